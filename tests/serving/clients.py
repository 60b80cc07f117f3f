"""Runs real client libraries, installed in another environment, against our server: PYTHON is that environment's.

python -m tests.serving.clients PYTHON
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from spikingbrain.files import read_json

from .conftest import make_tokenizer, save_model
from .harness import serving

LITELLM = """
import sys, litellm
base = {"model": "openai/tiny", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 8, "temperature": 0}
messages = [{"role": "user", "content": "does it rain?"}]
whole = litellm.completion(messages=messages, **base)
chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **base))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == whole.choices[0].message.content, (text, whole)
assert whole.usage.completion_tokens == 8, whole.usage
assert litellm.text_completion(prompt="a", **base).choices[0].text
"""
LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAI
base = {"model": "tiny", "base_url": sys.argv[1], "api_key": "none", "temperature": 0}
chat = ChatOpenAI(max_tokens=8, stream_usage=True, **base)
whole = chat.invoke("does it rain?")
chunks = list(chat.stream("does it rain?"))
assert "".join(chunk.content for chunk in chunks) == whole.content, (chunks, whole)
total = chunks[0]
for chunk in chunks[1:]:
    total += chunk
assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"] == 8, total.usage_metadata
form = {"title": "weather", "type": "object", "properties": {"city": {"enum": ["Graz"]}}, "required": ["city"],
        "additionalProperties": False}
asked = ChatOpenAI(max_tokens=100, **base).with_structured_output(form, method="json_schema").invoke("where?")
assert asked == {"city": "Graz"}, asked
tool = {"type": "function", "function": {"name": "weather", "parameters": form}}
call = ChatOpenAI(max_tokens=100, **base).bind_tools([tool], tool_choice="weather").invoke("where?").tool_calls
assert call[0]["args"] == {"city": "Graz"}, call
responses = ChatOpenAI(max_tokens=8, use_responses_api=True, **base).invoke("does it rain?")
assert responses.usage_metadata["output_tokens"] == 8, responses
assert OpenAI(max_tokens=8, **base).invoke("a")
"""
# The requests of `vllm bench serve`, 16 at a time.
LOADS = """
import json, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
base, root = sys.argv[1], sys.argv[1].removesuffix("/v1")
assert urllib.request.urlopen(f"{root}/health").status == 200
name = json.load(urllib.request.urlopen(f"{base}/models"))["data"][0]["id"]
common = {"model": name, "stream": True, "ignore_eos": True, "temperature": 0.0, "repetition_penalty": 1.0}
tokens = [5 + i * 7 % 250 for i in range(100)]
user = [{"role": "user", "content": [{"type": "text", "text": "does it rain? " * 20}]}]
vllm = {**common, "max_tokens": 24, "logprobs": None, "stream_options": {"include_usage": True}}
REQUESTS = [
    ("completions", {**vllm, "prompt": tokens}),
    ("chat/completions", {**vllm, "max_completion_tokens": 24, "messages": user}),
]
def ask(number):
    path, body = REQUESTS[number % len(REQUESTS)]
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    request = urllib.request.Request(f"{base}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        *lines, done = [line[6:].strip() for line in answer if line.startswith(b"data: ")]
    assert done == b"[DONE]", done
    *chunks, last = map(json.loads, lines)
    assert all(chunk["choices"] for chunk in chunks), chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24, last
with ThreadPoolExecutor(16) as pool:
    print(len(list(pool.map(ask, range(400)))), "requests")
"""
# litellm would ask the internet for prices.
SCRIPTS = {"litellm": LITELLM, "langchain-openai": LANGCHAIN, "loads of vllm bench": LOADS}
GUIDELLM = {
    "profile": "kind=concurrent,streams=8",
    "constraint": "kind=max_requests,count=64",
    "data": "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
}
NO_DOWNLOADS = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
CURL = (
    "curl",
    "-sfN",
    "-H",
    "Content-Type: application/json",
    "-d",
    '{"prompt": "a", "max_tokens": 3, "stream": true}',
)


def run_guidellm(python: str, url: str, model: Path) -> None:
    """guidellm's own load of 64 streams; raises AssertionError if one fails."""
    report = model.with_name("guidellm.json")
    backend = f"kind=openai_http,target={url},model=tiny"
    options = {**GUIDELLM, "backend": backend, "tokenizer": f"kind=hf_auto,model={model}"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [Path(python).parent / "guidellm", "run", "--disable-console", *words]
    subprocess.run([*command, "--output", f"kind=json,path={report}"], check=True, timeout=600, env=NO_DOWNLOADS)
    (benchmark,) = read_json(report)["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    if totals != {"successful": 64, "errored": 0, "incomplete": 0, "total": 64}:
        raise AssertionError(totals)


def main() -> None:
    python = sys.argv[1]
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(Path(directory) / "tiny", make_tokenizer())
        with serving(model, max_model_len=5000) as server:
            base = f"{server.url}/v1"
            for name, script in SCRIPTS.items():
                subprocess.run([python, "-c", script, base], check=True, timeout=300, env=NO_DOWNLOADS)
                sys.stdout.write(f"{name}: well\n")
            run_guidellm(python, server.url, model)
            sys.stdout.write("guidellm: well\n")
            answer = subprocess.run([*CURL, f"{base}/completions"], check=True, capture_output=True, text=True)
            if not answer.stdout.endswith("data: [DONE]\n\n"):
                raise AssertionError(answer.stdout)
            sys.stdout.write("curl: well\n")


if __name__ == "__main__":
    main()
