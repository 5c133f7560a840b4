# Every target sets itself up: `make test` and `make demo` need Python >= 3.11 and make, nothing else.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch's CPU build on Linux, where the default one is for CUDA.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH_INDEX ?=
WORKERS ?= 2
DEMO ?=

# Without bytecode each process would compile torch's Python sources again.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/ready
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help setup test lint test-slow test-gpu demo docs format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the pinned packages, once

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moeforge needs Python 3.11 or newer; name it with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv (a few minutes, once)"
	@rm -f $@
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Benchmarks run by hand: their calls at least must fit.
CALLS = --only missing-argument --only unexpected-keyword --only bad-argument-count --only missing-module-attribute

test: lint  ## everything that must hold: lint, types, import directions, then the tests but slow and gpu ones
	$(PYTEST)

lint: $(READY)  ## ruff, the type checker and the import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --output-format min-text --summary=none
	$(BIN)/pyrefly check --output-format min-text --summary=none --search-path benchmarks --search-path src \
		--search-path . $(CALLS) benchmarks/*.py
	$(BIN)/lint-imports --no-logo

test-slow: $(READY)  ## the tests that take minutes
	$(PYTEST) -m slow

test-gpu: $(READY)  ## the tests that need a GPU
	$(PYTEST) -m gpu

demo: $(READY)  ## train PR-MoE and its dense twin, compare, write, and make demo/report.html
	$(BIN)/moeforge demo $(DEMO)

docs: $(READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what the other targets made, .venv included
	rm -rf .venv site demo dist .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
