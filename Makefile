# The two commands are `make demo` and `make test`. Both build .venv with pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= runs/digits
WORKERS ?= auto

.PHONY: demo test lint types imports unit slow bench results docs clean

demo: $(STAMP)
	$(BIN)/flexnorm compare --out $(DEMO_OUT)

test: lint types imports unit slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/python .ci/private_imports.py flexnorm

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=95

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m benchmarks

results: $(STAMP)
	$(BIN)/python -m benchmarks.results demo

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexnorm needs Python 3.11 or newer, this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* site dist build
