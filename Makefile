# Two commands: `make quickstart` (the main job on real molecules) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRIALS ?= 0
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart env test code tests notebooks drills bench clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python -m biokit notebook notebooks/00_quickstart.ipynb runs/quickstart

env: $(VENV)/.env

# the tests and the notebooks side by side: either waits much; their dots mix
test: $(VENV)/.env
	$(MAKE) --no-print-directory code
	$(MAKE) --no-print-directory --jobs=2 --keep-going tests notebooks

code: $(VENV)/.env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports

tests: $(VENV)/.env
	$(BIN)/python -m pytest -m "not full"

notebooks: $(VENV)/.env
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=600 \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider notebooks

drills: $(VENV)/.env
	$(BIN)/python -m tests.drills --trials $(TRIALS)

bench: $(VENV)/.bench
	$(BIN)/python -m tests.bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[notebooks,analysis]"
	touch $@

$(VENV)/.env: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[notebooks,analysis,distributed,test]"
	touch $@ $(VENV)/.quickstart

$(VENV)/.bench: $(VENV)/.env
	$(INSTALL) -e ".[notebooks,analysis,distributed,test,bench]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
