# make setup | test | lint | bench | demo [DATA=path] | gpu
#
# setup makes the environment in VENV and builds the package into it; every other target does so where it is missing.
# TORCH names the PyTorch to install. pip prefers a CPU build (2.13.0+cpu) to a CUDA build of the same version where
# its index options offer both. For another build, give pip's own options, for example
#   make setup TORCH="--index-url <index of CUDA builds> torch==2.13.0"

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: setup test lint bench demo gpu

setup: $(VENV)/.built

$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.20" ninja
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test,dev,parquet,plot,fetch]"
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy td3_fast
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.cuh)

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-quiet --benchmark-autosave

demo: setup
	$(BIN)/td3-fast demo $(DATA)

# On a machine with a GPU and no network: the interpreter's own PyTorch and build tools.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh
