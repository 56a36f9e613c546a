# make demo        install what is needed, train on two CPU workers with three strategies, compare them
# make test        install what is needed, test every promise of the README (under 10 minutes on two cores)
# make test-slow   the other tests: more combinations, more ways to die, operators that are compiled first
# make lint        ruff and mypy
#
# TEST_PROCESSES=4 runs the suite on more cores; each process takes up to 8 GB, with the ranks that it starts.
# Everything goes into .venv. PYTHON names the interpreter that makes it (3.11 to 3.13).

PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(if $(shell $(name) -c 'import sys; print(1 if (3, 11) <= sys.version_info < (3, 14) else "")' 2>/dev/null),$(name))))
BIN := .venv/bin
TEST_PROCESSES ?= 2
RECIPES := parallel constant qsr

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	rm -rf demo
	$(BIN)/qsr shards digits demo/digits
	for name in $(RECIPES); do \
	  echo; DS_ACCELERATOR=cpu $(BIN)/qsr train configs/digits-$$name.yaml --ranks 2 || exit 1; \
	done
	@echo
	$(BIN)/qsr report $(RECIPES:%=demo/runs/%) --out demo/report
	@echo "TensorBoard: $(BIN)/tensorboard --logdir demo/runs --host localhost, then open http://localhost:6006"

PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 to 3.13 was found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo runs
