# Every target sets itself up in .venv; nothing but Python 3.11+, make and a package index is needed.
PYTHON ?= python3
KILLS ?= 30
SEED ?= 0
STORE ?= local
SOURCE ?= light
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install demo toy layers test interop peers test-services chaos check format bench clean

help:
	@echo "make demo WORKDIR=dir   language model -> activations -> SAEs -> report, on this machine"
	@echo "make toy WORKDIR=dir    a grid of SAEs on data whose features are known -> sweep.html, toy-summary.json"
	@echo "make layers WORKDIR=dir the same grid on each of the six MLPs of the shipped model -> sweep.html"
	@echo "make test               tests that need nothing but Python packages"
	@echo "make interop            exports and imports against SAELens, dictionary_learning and sparsify"
	@echo "make peers WORKDIR=dir  quality of dictionaries beside these libraries', on the same batches (an hour or two)"
	@echo "make test-services      tests against servers and a browser from Debian packages, and long ones"
	@echo "make chaos KILLS=n SEED=s STORE=local|moto|ceph SOURCE=light|lm"
	@echo "                        kill everything at random; nothing may come out different"
	@echo "make check              ruff and mypy"
	@echo "make bench              measure loader, step and harvest against their limits"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	@touch $@

install: .venv/installed

demo: .venv/installed
	$(BIN)/penstock run examples/demo.yaml --workdir $(or $(WORKDIR),demo)

toy: .venv/installed
	$(BIN)/penstock sweep examples/toy.yaml --workdir $(or $(WORKDIR),toy)

layers: .venv/installed
	$(BIN)/penstock sweep examples/layers.yaml --workdir $(or $(WORKDIR),layers)

test: .venv/installed-dev
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not services and not long"

# also for whatever else compares with these libraries
.venv-interop/installed: tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

interop: .venv/installed-dev .venv-interop/installed
	PYTHONPATH=tests $(BIN)/python -m interop .venv-interop/work .venv-interop/bin/python

peers: .venv/installed-dev .venv-interop/installed
	$(BIN)/python -m benchmarks.quality $(or $(WORKDIR),peers)

test-services: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "services or long"

chaos: .venv/installed-dev
	PYTHONPATH=tests $(BIN)/python -m chaos --kills $(KILLS) --seed $(SEED) --store $(STORE) --source $(SOURCE)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-interop build *.egg-info .mypy_cache .ruff_cache .pytest_cache
