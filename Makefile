# make demo        install what is needed, train on two CPU workers with three strategies, compare them
# make test        install what is needed, test every promise of README.md and docs/ (under 10 minutes on two cores)
# make test-slow   the other tests: more combinations, more ways to die, operators that are compiled first
# make lint        ruff and mypy
# make dist        an sdist and a wheel in dist/, which is installed where no compiler is and trains the demo's first steps
# make docs        the pages as a site, in build/site; a broken link is an error
# make test-gpu    what needs a GPU, on a machine with one, in ten minutes; WHEELS=FOLDER has the packages that it lacks
#
# TEST_PROCESSES=4 runs the suite on more cores; each process takes up to 8 GB, with the ranks that it starts.
# Everything goes into .venv. PYTHON names the interpreter that makes it (3.11 to 3.13).

PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(if $(shell $(name) -c 'import sys; print(1 if (3, 11) <= sys.version_info < (3, 14) else "")' 2>/dev/null),$(name))))
BIN := .venv/bin
TEST_PROCESSES ?= 2
# pip compiles every module on one core; here those that are imported are compiled then, once.
unexport PYTHONDONTWRITEBYTECODE
RECIPES := parallel constant qsr
SEEDS := 0 1

.PHONY: demo test test-slow test-gpu lint docs dist clean

demo: export DS_ACCELERATOR := cpu
demo: .venv/installed
	rm -rf demo
	$(BIN)/qsr shards digits demo/digits --eval 900
	@for name in $(RECIPES); do for seed in $(SEEDS); do \
	  echo; set -x; \
	  $(BIN)/qsr train configs/digits-$$name.yaml --ranks 2 --set seed=$$seed --set logging.name=$$name-seed$$seed || exit 1; \
	  { set +x; } 2>/dev/null; \
	done; done
	@echo
	$(BIN)/qsr report demo/runs --out demo/report
	@echo
	$(BIN)/python -m benchmarks.demo --runs demo/runs --report demo/report
	@echo; echo "TensorBoard: $(BIN)/tensorboard --logdir demo/runs --host localhost, then open http://localhost:6006"

PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# With the Python whose torch sees the GPU, not .venv's; nothing is fetched.
GPU_PYTHON ?= python3
WHEELS ?=
OUT ?= gpu-report

test-gpu:
	@echo "looking for a GPU with the torch of $(GPU_PYTHON)"
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU here; what needs none: python -m benchmarks.gpu --device cpu")'
	@if [ -n "$(WHEELS)" ]; then \
	  $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .wheels $(WHEELS)/*.whl; \
	fi
	PYTHONPATH="$(CURDIR):$(CURDIR)/.wheels:$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu --out $(OUT)

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: .venv/installed-dist
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	.ci/try-wheel $(BIN)/python dist/*.whl

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python from 3.11 to 3.13 was found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[demo]'
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $@

.venv/installed-dist: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dist"])')
	@touch $@

.venv/installed-docs: pyproject.toml | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .wheels gpu-report demo runs dist build
