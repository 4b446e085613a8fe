# The two commands of the README: each works on a machine with only Python, make and pip.
#
#   make train    trains examples/quickstart.yaml into ./runs/quickstart
#   make test     lint, types and all tests
#
# More: make lint, make types, make soak, make bench, make docs, make clean.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOB ?= examples/quickstart.yaml
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS = 1
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: train test install install-dev lint types soak bench docs clean

train: $(STAMP)
	$(BIN)/ray-train-geo train $(JOB) --set run.storage_path=runs

test: $(STAMP)-dev
	$(MAKE) lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)-dev
	$(BIN)/mypy

# What takes long: half an hour of seeded faults on a cluster of its own (SOAK_MINUTES, SOAK_SEED), a
# spot trace, links that fade, every plan with every schedule and sync.
soak: $(STAMP)-dev
	$(BIN)/python -m pytest -m soak -s

bench: $(STAMP)-dev
	$(BIN)/python benchmarks/throughput.py

docs: $(STAMP)-dev
	$(BIN)/python -m ray_train_geo.spec_reference > docs/job-spec.md
	$(BIN)/ray-train-geo schema > examples/job.schema.json

install: $(STAMP)

install-dev: $(STAMP)-dev

# torch comes first, alone and pinned: an unpinned one would pull gigabytes of CUDA packages.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $(STAMP)

$(STAMP)-dev: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)-dev

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
