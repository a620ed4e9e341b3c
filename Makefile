# `make` lists the targets. Each does its own set-up: a virtual environment, torch, the package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitize lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment and install tfqc into it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tfqc needs Python 3.11 or newer; say which: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## compile the built-in model to W4A8, sample it, show what it cost
	$(BIN)/tfqc demo --out demo-out

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

sanitize: $(READY)  ## run the tests of the CPU kernels under g++'s address and undefined-behaviour sanitizers
	TFQC_KERNEL_CHECKS=sanitize LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/backends/test_cpu_int8*.py \
		--deselect tests/backends/test_cpu_int8_build.py

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)  ## the table of strategies (two hours on two cores, goes on where it stopped); see bench/README.md
	$(BIN)/python bench/strategies.py

clean:  ## remove the virtual environment and what the targets made
	rm -rf $(VENV) demo-out build dist *.egg-info .pytest_cache .ruff_cache
