PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint demo audit clean

test: .venv/.ready lint
	$(BIN)/python -m pytest -q -n 2

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv/.ready
	$(BIN)/python examples/finetune.py

audit: .venv/.ready
	$(BIN)/python -m benchmarks.audit --write

# torch goes first: left to another package's range, pip may choose a newer build
.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
