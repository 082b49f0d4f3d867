# Set-up, checks and tests. `make test` and `make demo` need only bash, Python 3.10-3.13 with pip and venv, and a
# package registry; each makes its own virtual environment, and makes it anew when what it was made from changes.

PYTHON ?= python3
TORCH ?= 2.13.0
PYTEST_ARGS ?=
SANITIZE_ARGS ?=

# The Triton of the CPU tests, beside whichever torch: register and spill counts are asserted for this version.
TRITON := 3.6.0
# Upstream's modules, compared with ours. Their requirements (torchvision, gradio, ...) are not needed for that.
ORACLES := uniception==0.1.7 depth-anything-v2==0.1.0
ORACLE_NEEDS := einops==0.8.2 jaxtyping>=0.3,<0.4 wadler_lindig>=0.1.6,<0.2

# What the package registry has of CUDA 12.8; 13.0's compiler is the extra `nvcc`.
CUDA_12_8 := nvidia-cuda-nvcc-cu12==12.8.93 nvidia-cuda-runtime-cu12==12.8.90 nvidia-cuda-cccl-cu12==12.8.90

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Only the stage that interprets kernels may have it.
unexport TRITON_INTERPRET
# The machine's CUDA toolkit must not change what `make test` finds: it compiles with the one in its environment.
TOOLKIT_OF_PIP := env -u CUDA_HOME -u CUDA_PATH -u ANY4D_FAST_BUILD_CUDA -u ANY4D_FAST_CUDA_ARCHS

KEY := $(shell { cat pyproject.toml setup.py Makefile; echo $(TORCH); $(PYTHON) -VV; } 2>/dev/null | cksum | cut -d ' ' -f 1)
TEST_VENV := .venv-test
DEMO_VENV := .venv-demo
TEST_READY := $(TEST_VENV)/ready-$(KEY)
DEMO_READY := $(DEMO_VENV)/ready-$(KEY)
TEST_BIN := $(TEST_VENV)/bin

# $(1): what is about to run
define stage
@printf '\n==> %s\n' "$(1)"
endef

# $(1): folder. The tests of the package use pip's option --python, which came with 22.3.
define create_venv
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
  echo "error: any4d-fast needs Python 3.10 to 3.13, and PYTHON=$(PYTHON) is: $$($(PYTHON) -V 2>&1);" \
       "pass make another one: PYTHON=/path/to/python3.x" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "error: $(PYTHON) cannot create virtual environments: its modules venv and ensurepip are missing;" \
       "on Debian and Ubuntu install them with: apt-get install python3-venv" >&2; exit 1; }
$(PYTHON) -m venv --clear $(1)
@$(1)/bin/python -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (22, 3))' || \
  $(1)/bin/python -m pip install --quiet --upgrade "pip>=23"
endef

# Most tests take one core, the interpreter's all: two processes of one thread each.
SIDE_BY_SIDE := -n 2

# $(1): pytest's -m expression; $(2): environment. pytest exits with 5 when it ran no test, which is in order only
# when PYTEST_ARGS chose a part of the suite.
define pytest
status=0; $(2) $(TEST_BIN)/pytest -m "$(1)" $(3) $(PYTEST_ARGS) || status=$$?; \
[ $$status -eq 5 ] && $(if $(strip $(PYTEST_ARGS)),true,false) || exit $$status
endef

# $(1): marker; $(2): environment; $(3): options. The same for a kind of test that the tree may not have yet.
define pytest_marked
if grep -rqw --include='*.py' 'mark[.]$(1)' tests; then $(call pytest,$(1),$(2),$(3)); else echo "no test is marked $(1)"; fi
endef

.PHONY: help install test test-gpu sanitize build-matrix bench plots lint format demo clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: ## install the package, editable, with everything for development, in the environment of PYTHON
	$(PYTHON) -m pip install -e ".[dev,viz]"

test: $(TEST_READY) ## linters, types and every test that needs no GPU, in .venv-test
	$(call stage,1/7 ruff check)
	$(TEST_BIN)/ruff check .
	$(call stage,2/7 ruff format --check)
	$(TEST_BIN)/ruff format --check .
	$(call stage,3/7 mypy)
	$(TEST_BIN)/mypy
	$(call stage,4/7 pytest: CPU)
	@$(call pytest,not gpu and not interpret and not aot and not nvcc,OMP_NUM_THREADS=1,$(SIDE_BY_SIDE))
	$(call stage,5/7 pytest: Triton kernels in the interpreter)
	@$(call pytest_marked,interpret,TRITON_INTERPRET=1 OMP_NUM_THREADS=1,$(SIDE_BY_SIDE))
	$(call stage,6/7 pytest: Triton kernels compiled ahead of time)
	@$(call pytest_marked,aot)
	$(call stage,7/7 pytest: CUDA sources compiled for every architecture)
	@$(call pytest_marked,nvcc,$(TOOLKIT_OF_PIP))
	$(call stage,all stages passed)

test-gpu: ## the tests that need a GPU, in the environment of PYTHON; the outcome goes to benchmarks/results/tests
	status=0; $(PYTHON) -m pytest -m gpu -ra --junitxml=test-gpu.xml $(PYTEST_ARGS) || status=$$?; \
	$(PYTHON) -m benchmarks.gpu_tests test-gpu.xml; exit $$status

sanitize: ## compute-sanitizer over every CUDA kernel (SANITIZE_ARGS="--tool memcheck"), in the environment of PYTHON
	$(PYTHON) -m tests.sanitize $(SANITIZE_ARGS)

build-matrix: $(TEST_READY) ## compile csrc/ for every architecture with another toolkit: CUDA_HOME=/path/to/cuda-12.8
	@[ -x "$(CUDA_HOME)/bin/nvcc" ] || { echo "error: pass make CUDA_HOME=/path/to/a/toolkit (got '$(CUDA_HOME)')" >&2; exit 1; }
	CUDA_HOME="$(CUDA_HOME)" $(TEST_BIN)/pytest tests/csrc/test_compile.py -k "not cuda_12_8" $(PYTEST_ARGS)

bench: ## check and time every operator and the model on this GPU, in the environment of PYTHON
	$(PYTHON) -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

plots: ## draw charts and README's tables from benchmarks/results/, in the environment of PYTHON
	$(PYTHON) benchmarks/plots.py

lint: $(TEST_READY) ## linters and types only
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .
	$(TEST_BIN)/mypy

format: $(TEST_READY) ## fix what the linters can fix
	$(TEST_BIN)/ruff check --fix .
	$(TEST_BIN)/ruff format .

demo: $(DEMO_READY) ## reconstruct a synthetic clip into demo_out/, in .venv-demo
	$(DEMO_VENV)/bin/any4d-fast demo -o demo_out

$(TEST_READY):
	$(call stage,set-up: $(TEST_VENV) with torch $(TORCH))
	$(call create_venv,$(TEST_VENV))
	ANY4D_FAST_BUILD_CUDA=0 $(TEST_BIN)/python -m pip install --quiet "torch==$(TORCH)" -e ".[dev,nvcc,viz]"
	$(TEST_BIN)/python -m pip install --quiet --no-deps $(CUDA_12_8)
	$(TEST_BIN)/python -m pip install --quiet --no-deps "triton==$(TRITON)" $(foreach need,$(ORACLE_NEEDS),"$(need)")
	$(TEST_BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(ORACLES)
	@touch $@

$(DEMO_READY):
	$(call stage,set-up: $(DEMO_VENV) with torch $(TORCH))
	$(call create_venv,$(DEMO_VENV))
	ANY4D_FAST_BUILD_CUDA=0 $(DEMO_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)" -e ".[viz]"
	@touch $@

clean: ## delete the environments, caches and build outputs
	rm -rf $(TEST_VENV) $(DEMO_VENV) build dist any4d_fast.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf .benchmarks test-gpu.xml any4d_fast/_C.*so
	find any4d_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
