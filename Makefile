PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per test process: two processes share two cores better than their thread pools do.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 19

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## what modicum does, step by step, every figure measured now; writes modicum-demo.html
	$(BIN)/modicum demo

demo-check: $(VENV)/installed  ## the demo, as short as it gets
	$(BIN)/modicum demo --quick

demo-report-check: demo-check  ## the demo's report, opened in a headless browser at two widths, light and dark
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -q tests/report/test_browser.py
	$(BIN)/python tests/report/browser.py modicum-demo.html

test: $(VENV)/installed  ## the test suite
	$(TEST)

test-slow: $(VENV)/installed  ## the tests that take minutes
	$(TEST) -m slow

lint: $(VENV)/installed  ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

fix: $(VENV)/installed  ## repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## speed against transformers, side by side
	$(BIN)/python benchmarks/text_cpu.py

docs: $(VENV)/installed  ## regenerate the command reference
	$(BIN)/python docs/generate.py

.PHONY: help demo demo-check demo-report-check test test-slow lint fix bench docs
