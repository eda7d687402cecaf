# nearfar. `make help` lists the targets. Needs Python 3.11 and make, nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
EXTRAS ?= all
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := 0.13.8

# Kept also where the shell asks for no bytecode: the tests start hundreds of processes, and each
# would compile the package again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test fast check bench peers docs clean

help:  ## Show this help
	@echo "nearfar: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "The first target that needs it builds $(VENV) (all extras, about 8 GB)."

# Compiled once: each conversion is a process of its own, and torch alone takes twice as long
# to import from source.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 is needed (found: $$($(PYTHON) --version 2>&1)). Install it with:"; \
	  echo "  sudo apt-get install python3.11 python3.11-venv"; \
	  echo "or point to it: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing. Install it with:"; \
	  echo "  sudo apt-get install python3.11-venv"; exit 1; }
	@echo "installing nearfar[$(EXTRAS)] into $(VENV) ..."
	@start=$$(date +%s.%N); set -e; \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV); \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
	  --compile-bytecode --editable '.[$(EXTRAS)]'; \
	$(BIN)/python -c "import time; print(round(time.time() - $$start, 1))" > $(VENV)/.install_seconds
	@echo "installed in $$(cat $(VENV)/.install_seconds) s"
	@touch $@

demo: $(STAMP)  ## Convert, prove, serve and answer 300+ photos over an emulated mobile link
	$(BIN)/nearfar demo

test: $(STAMP)  ## Run every test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 25

fast: $(STAMP)  ## Run the tests that end within 90 seconds
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

check: $(STAMP)  ## Lint, type-check and check who imports whom
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## Run the benchmarks (ratios, JSON under build/bench)
	$(BIN)/python -m benchmarks

peers: $(STAMP)  ## Make the environments of the servers that the broker is compared with
	$(BIN)/python -m benchmarks.serving.peers

docs: $(STAMP)  ## Regenerate what docs/ and the README quote from the code
	$(BIN)/python -m docs.generate

clean:  ## Remove build outputs (not the environment: rm -rf .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
