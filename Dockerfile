# The same install as `make setup` without the tools for tests; serves a model directory mounted at /model.
FROM python:3.11-slim AS build
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY pyproject.toml setup.py README.md LICENSE ./
COPY constraints constraints
COPY kernels kernels
COPY spikingbrain spikingbrain
COPY training training
COPY serving serving
RUN python -m venv /venv \
 && (/venv/bin/pip install --no-cache-dir torch==2.13.0+cpu || /venv/bin/pip install --no-cache-dir torch==2.13.0) \
 && /venv/bin/pip install --no-cache-dir -c constraints/pins.txt '.[serve]'

# vLLM with our plugin, for GPUs: docker build --target vllm .  (see docs/vllm.md)
FROM vllm/vllm-openai:v0.32.0 AS vllm
COPY --from=build /src /src
RUN pip install --no-cache-dir --no-deps /src && pip install --no-cache-dir 'accelerate>=1.10'
ENTRYPOINT ["vllm", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 spikingbrain
COPY --from=build /venv /venv
USER spikingbrain
WORKDIR /home/spikingbrain
EXPOSE 8000
HEALTHCHECK CMD ["/venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["/venv/bin/spikingbrain"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
