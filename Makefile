# Everything starts here: the virtual environment is made when it is not there.
# The first Python of a supported version that runs: a name on the path may be a shim of one that is not installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: help demo test test-faults test-gpu bench-gpu wheels mutants docs lint format build smoke notes upstream test-upstream test-distributed clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch first, on its own: pinned, so that no other build of it is resolved
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12, 3.13 or 3.14 found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/ready  ## train DPO and our losses in a small world, nothing to download
	$(BIN)/trl-ext demo $(ARGS)

# A worker that is done takes tests from another: some take a minute
test: .venv/ready  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-distributed: .venv/ready  ## run the tests of several processes alone: DDP, FSDP2 and, where deepspeed is installed, ZeRO
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or distributed" tests/distributed tests/test_many_processes.py $(ARGS)

test-faults: .venv/ready  ## kill real runs at random, and compare what they come to with undisturbed ones. ARGS="--kills 200 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

# What leans on other libraries: the seam, parity with TRL, trainers, losses, the head, the command line
CORE := tests/test_trl_seam.py tests/test_trl_seam_parts.py tests/test_parity.py tests/test_dpo_trainer.py tests/test_cli.py \
	tests/losses tests/logprobs tests/online

# But for torch, what is not named is the newest that goes with it
test-upstream:  ## run the tests that lean on other libraries with other versions. VERSIONS="trl==1.16.0 transformers==5.22.0"
	@test -n "$(VERSIONS)" || { echo 'Which? make test-upstream VERSIONS="transformers==5.22.0 torch==2.14.0"' >&2; exit 1; }
	rm -rf build/upstream
	$(PYTHON) -m venv build/upstream
	for version in $(VERSIONS); do echo $$version; done > build/upstream/constraints.txt
	echo "$(VERSIONS)" | grep -q torch== || grep ^torch== constraints.txt >> build/upstream/constraints.txt
	build/upstream/bin/pip install --quiet --disable-pip-version-check -c build/upstream/constraints.txt torch
	build/upstream/bin/pip install --quiet --disable-pip-version-check -c build/upstream/constraints.txt -e '.[test]'
	build/upstream/bin/pip check
	OMP_NUM_THREADS=1 build/upstream/bin/python -m pytest -n $(WORKERS) $(CORE) $(ARGS)

upstream: .venv/ready  ## what has changed between two versions where private names are used. OLD=1.15.0 NEW=1.16.0 PACKAGE=trl
	@test -n "$(OLD)" -a -n "$(NEW)" || { echo 'Which? make upstream OLD=1.15.0 NEW=1.16.0' >&2; exit 1; }
	$(BIN)/python -m tests.upstream $(OLD) $(NEW) $(if $(PACKAGE),--package $(PACKAGE))

test-gpu: .venv/ready  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench-gpu: .venv/ready  ## on a GPU: its tests, then TRL and ours side by side. ARGS="--minutes 9 --parts tests logprobs"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

wheels: .venv/ready  ## download what a GPU machine without network lacks. ARGS="--python 3.12"
	$(BIN)/python benchmarks/wheels.py $(ARGS)

mutants: .venv/ready  ## put faults into the code: which does no test notice? ROOM=losses SAMPLE=200
	$(BIN)/python tests/mutants.py $(ROOM) $(if $(SAMPLE),--sample $(SAMPLE)) --workers $(WORKERS) $(ARGS)

docs: .venv/ready  ## build the site of docs/ into build/site. ARGS="--site-dir DIR"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: .venv/ready  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel is built from the sdist, so both are whole. The pinned setuptools builds it
build: .venv/ready  ## build the wheel and the sdist in dist/, and check them
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

smoke: build  ## install the wheel in an empty environment, and use it there
	rm -rf build/smoke
	$(BIN)/python -m venv build/smoke
	build/smoke/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/smoke/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	build/smoke/bin/pip check
	build/smoke/bin/python -I tests/smoke.py

notes:  ## print the notes of a release, from the changelog. VERSION=0.1.0
	@test -n "$(VERSION)" || { echo "Which release? make notes VERSION=0.1.0" >&2; exit 1; }
	@awk -v heading="## $(VERSION)" ' \
		/^## / { here = ($$0 == heading); found = found || here; next } \
		here { print } \
		END { if (!found) { print "CHANGELOG.md has no section \"" heading "\"." > "/dev/stderr"; exit 1 } }' CHANGELOG.md

clean:  ## remove the virtual environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
