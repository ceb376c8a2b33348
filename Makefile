# Everything a developer or an operator runs, one line per target. `make` prints them.
# Needs python3 (3.11 or later, with venv), make and g++; the rest is installed into .venv from requirements.lock.
.DEFAULT_GOAL := help
.PHONY: help setup kernels serve test test-all lint types fmt bench bench-report docs gpu clean

PYTHON ?= python3
PORT ?= 8000
# A checkpoint directory in the published layout. The default is a small model trained here: models/mini/README.md.
MODEL ?= models/mini
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# Threads that wait asleep: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY = passive
KERNEL_SOURCES := $(wildcard bittrue/ops/cpu/csrc/*)

help: ## print the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.built ## create .venv, install the pinned dependencies, build the kernels

.venv/.installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install python3 (3.11 or later)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; pass PYTHON=/path/to/newer"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "make: cannot create .venv; on Debian: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/.built: .venv/.installed pyproject.toml CMakeLists.txt $(KERNEL_SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "make: no C++ compiler; install g++ (Debian: apt install g++) or set CXX"; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

kernels: .venv/.built ## build the CPU kernels again if their sources changed

serve: .venv/.built ## serve MODEL (default: the bundled models/mini) on PORT (8000)
	$(BIN)/bittrue serve $(MODEL) --port $(PORT)

test: .venv/.built ## tests that need no GPU and no network, under 5 minutes on 2 cores
	$(PYTEST) -m "not slow and not gpu and not weights"

test-all: .venv/.built ## all tests that need no GPU
	$(PYTEST) -m "not gpu and not weights"

lint: .venv/.built ## ruff
	$(BIN)/ruff check bittrue tests benchmarks

types: .venv/.built ## mypy, strict
	$(BIN)/mypy

fmt: .venv/.built ## format the sources
	$(BIN)/ruff format bittrue tests benchmarks

bench: .venv/.built ## time every op next to the machine's copy bandwidth
	$(BIN)/bittrue bench ops

bench-report: .venv/.built ## write docs/benchmarks.md and its plot from benchmarks/results
	$(BIN)/python benchmarks/report.py

docs: .venv/.built ## write the generated pages: docs/cli.md, config.md, errors.md, metrics.md
	$(BIN)/bittrue docs

gpu: .venv/.built ## tests that need a CUDA device (there is no GPU backend yet: says so)
	$(BIN)/python -m pytest -m gpu || { code=$$?; test $$code -eq 5 && echo "make gpu: there is no GPU backend yet, so no test needs one"; }

clean: ## remove what was built and generated (keeps .venv)
	rm -rf build models/generated bittrue/ops/cpu/*.so .venv/.built
