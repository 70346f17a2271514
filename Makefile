# The commands of this repository. Each makes the environment it needs first; `make` alone lists them.
#
#   PYTHON=python3.12   interpreter that makes the environment (3.10 or newer)
#   TORCH=2.12.0        version of torch, default in constraints.txt
#   VENV=.venv-3.12     where the environment lies
#   JOBS=4              test processes
#   PYTEST_ARGS="..."   more arguments for pytest, such as "-k attention"

PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
EXTRAS := data,demo,report,test,test-peers
# what tests/peers compares with and whose requirements pin versions years old: installed without them
PEERS := coca-pytorch==0.1.0 fairscale==0.4.0 torchscale==0.3.0 vit-pytorch==1.26.11

BIN := $(VENV)/bin
# the oldest Triton that setup.py admits, in a folder of its own beside the newest
OLDEST_TRITON := $(shell sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' setup.py)
OLDEST := $(abspath $(VENV))/triton-$(OLDEST_TRITON)
# newer than what the installation is made from, and named after the torch in it: then there is nothing to install
STAMP := $(VENV)/.installed-torch-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help test test-all bench compile-gate dev lint clean

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# one thread per process, because threads of several processes on the same cores wait for each other; tests that share an
# expensive fixture stay in one process by the mark xdist_group
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup

test: $(STAMP)  ## Run the tests
	$(PYTEST) -m "not heavy" $(PYTEST_ARGS)

test-all: $(STAMP)  ## Run the tests, and published models in many more sizes
	$(PYTEST) $(PYTEST_ARGS)

bench: $(STAMP)  ## Measure the three models on this machine; writes bench-out/
	$(BIN)/python benchmarks/run_all.py --out bench-out

readme-tables: $(STAMP)  ## Write the tables of README.md and docs/PERFORMANCE.md from benchmarks/results/
	$(BIN)/python benchmarks/readme_tables.py

compile-gate: $(STAMP) $(OLDEST)  ## Compile kernels for GPUs that are not here, with the oldest and the newest Triton
	PYTHONPATH=$(OLDEST) $(BIN)/python -m vlp_fast.kernels._compile --check
	$(BIN)/python -m vlp_fast.kernels._compile --check

lint: $(STAMP)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dev: $(STAMP)  ## Make the environment, and the links by which editors find vlp_fast.kernels and vlp_fast.benchmarks
	ln -sfn ../kernels vlp_fast/kernels
	ln -sfn ../benchmarks vlp_fast/benchmarks
	@echo "Ready: . $(BIN)/activate"

clean:  ## Delete caches and outputs; the environment stays
	rm -rf build dist *.egg-info bench-out .pytest_cache .benchmarks .hypothesis .ruff_cache .mypy_cache
	find kernels vlp_fast benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(OLDEST): | $(STAMP)
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$(OLDEST_TRITON)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "vlp_fast needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0])'
	@echo "Installing torch $(TORCH) and vlp_fast into $(VENV): a minute or two, longer where torch must be downloaded."
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]' --constraint $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --no-deps $(PEERS)
	@touch $@
