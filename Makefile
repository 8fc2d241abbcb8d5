# Two commands matter: `make demo` trains a model that talks, `make test` checks the project.
# Each target is also a plain python command, named in the README.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit soak lint clean

demo: .venv/.runtime
	$(BIN)/python dataset/demo/run.py

test: .venv/.dev
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile

unit: .venv/.dev
	$(BIN)/python -m pytest -m "not slow and not soak"

soak: .venv/.dev
	$(BIN)/python -m pytest -m soak

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1 | cut -d" " -f2): name a newer one, make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# A stamp per set of packages: nothing is installed again until its file changes
.venv/.runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/.runtime
