# `make demo` and `make test` set up everything they need in .venv: Python >= 3.10, a C++ compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(shell find tools csrc -type f -not -name '*.pyc')

.PHONY: demo test lint format bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: the build then uses it instead of fetching a second one into its isolated environment.
$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	$(BIN)/transkd env
	touch $@

demo: $(STAMP)
	$(BIN)/transkd demo --config configs/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest tests --allowed-skips tests/allowed_skips.txt $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

bench: $(STAMP)
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info transkd_fast/*.so
