# `make demo` and `make test` set up everything they need in .venv: Python >= 3.10, a C++ compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Which torch a new .venv gets: requirements, or pip's options, e.g. TORCH="torch==2.11.0 torchvision==0.26.0".
TORCH ?= torch torchvision
SOURCES := setup.py pyproject.toml $(shell find tools csrc -type f -not -name '*.pyc')
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: demo test test-gpu-code test-mutants test-triton lint format bench dist-check gpu gpu-carry gpu-keep clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: the build then uses it instead of fetching a second one into its isolated environment.
$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	$(BIN)/transkd env
	touch $@

demo: $(STAMP)
	$(BIN)/transkd demo --config configs/demo.yaml

# One group of tests at a time per process (tests/conftest.py): a file, since its tests share what they build. One thread
# in each, which is what a test that is not about threads needs. The order of names puts the long files of the subfolders
# first.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup \
	--no-loadscope-reorder
test: $(STAMP)
	GPU_CODE_ARCHS=90 $(PARALLEL) tests --allowed-skips tests/allowed_skips.txt $(PYTEST_ARGS)

# The machine code of every architecture, of which `make test` judges one.
test-gpu-code: $(STAMP)
	$(PARALLEL) tests/gpu_code --allowed-skips tests/allowed_skips.txt $(PYTEST_ARGS)

# `make test` plants one error per op and backend; this plants all of them.
test-mutants: $(STAMP)
	$(PARALLEL) tests/test_mutations.py tests/test_mutations_cuda.py --every-mutant $(PYTEST_ARGS)

# The Triton kernels under another Triton than torch's, compiled ahead of time; TRITON_TESTS="tests/test_hcl.py ..." has that
# Triton's interpreter run them too, and Triton 3.6's needs an older numpy.
TRITON ?= 3.6.0
OTHER_TRITON = $(VENV)/triton-$(TRITON)
TRITON_TESTS =
test-triton: $(STAMP)
	test -d $(OTHER_TRITON) || $(BIN)/python -m pip install --quiet --no-deps --target $(OTHER_TRITON) triton==$(TRITON) 'numpy<2.3'
	PYTHONPATH=$(abspath $(OTHER_TRITON)) $(PARALLEL) $(TRITON_TESTS) tests/gpu_code \
		-k triton --allowed-skips tests/allowed_skips.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(STAMP)
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

# The package as others get it: built from its source distribution, installed, used from another folder.
dist-check: $(STAMP)
	bash tools/dist_check.sh $(abspath $(BIN))

# Everything that needs a GPU, with PYTHON's own torch and no network; -B because a refusal leaves nothing behind.
gpu:
	$(PYTHON) -B bench/gpu.py run

# Before, on a machine with a network: what goes along in .gpu/carry.
gpu-carry:
	$(PYTHON) -B bench/gpu.py carry

# After: a run's results into bench/results/, from where they are committed.
FROM ?= .gpu/out
gpu-keep:
	$(PYTHON) -B bench/gpu.py keep $(FROM)

clean:
	rm -rf $(VENV) build dist *.egg-info transkd_fast/*.so
