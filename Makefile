# The commands a person needs; each sets up its own virtual environment on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test check static clean

quickstart: $(VENV)/demo
	$(BIN)/mmcontrast quickstart

test: $(VENV)/all
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: static test

static: $(VENV)/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/all: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[all]'
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) build dist *.egg-info
