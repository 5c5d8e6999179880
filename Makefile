# `make demo` and `make test` set up what they need by themselves, in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup
OUT ?= demo-run

# Threads that spin while they wait starve the other ranks and processes of a small machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-slow test-pods lint format protos chart ui bench clean

help:
	@echo "make demo       import real data, train, export, serve, predict: the whole product in minutes"
	@echo "make test       set up and run every check and test but the slow ones"
	@echo "make test-slow  the tests that take minutes to hours"
	@echo "make test-pods  builds the image and runs the chart's pods; needs podman and root"
	@echo "make bench      the benchmarks, as JSON"
	@echo "make format     rewrite the code in the house's style"
	@echo "make protos     regenerate the protobuf code"
	@echo "make chart      regenerate the Helm chart's README, schema and copies"
	@echo "make ui         rebuild the page that the server offers; needs npm"
	@echo "make clean      remove what was set up and made here"

setup: $(SETUP)

# torch comes first and by its exact version: left to a dependency, pip may fetch another build of it.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "equipot needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(SETUP)
	$(BIN)/python examples/demo.py --out $(OUT)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHON=$(BIN)/python scripts/gen_protos.sh --check

# Two at once, each with one thread: what tests wait for is start-up more than computing. Tests of slow things
# measure and kill, so they go one by one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not pods" -n 2 --dist worksteal

test-slow: $(SETUP)
	$(BIN)/python -m pytest -m "slow and not pods"

test-pods: $(SETUP)
	$(BIN)/python -m pytest -m pods tests/helm

chart: $(SETUP)
	$(BIN)/python scripts/chart_docs.py

# Offline afterwards: what the page needs is in the repository. Lock files name no host.
ui:
	cd serve/ui && npm ci --ignore-scripts --no-audit --no-fund && npm run --silent build

bench: $(SETUP)
	@for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(SETUP)
	PYTHON=$(BIN)/python scripts/gen_protos.sh

clean:
	rm -rf serve/ui/node_modules $(VENV) .venv-protos demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis
