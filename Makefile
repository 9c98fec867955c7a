# Everything starts here: the virtual environment is made when it is not there.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3.10 python3,$(shell command -v $(name))))
BIN := .venv/bin
WORKERS ?= 2

.PHONY: help demo test test-gpu lint format clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch first, on its own: pinned, so that no other build of it is resolved
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/ready  ## train DPO and our losses in a small world, nothing to download
	$(BIN)/trl-ext demo $(ARGS)

test: .venv/ready  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu" $(ARGS)

test-gpu: .venv/ready  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: .venv/ready  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
