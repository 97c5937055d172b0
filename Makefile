PYTHON ?= python3
BIN := .venv/bin
DEVICE ?= cuda
PARTS ?=
BUDGET ?= 520

# bytecode of what is imported is kept, and of nothing else: pip would compile all of torch and transformers, 50 s
export PYTHONDONTWRITEBYTECODE =

.PHONY: test lint demo audit bench gpu adopt clean

test: .venv/.ready lint
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv/.ready
	$(BIN)/python examples

audit: .venv/.ready
	$(BIN)/python -m benchmarks.audit --write

bench: .venv/.ready
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks report

# from a bare checkout, with that machine's own torch and triton: nothing is installed
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --parts "$(PARTS)" --device $(DEVICE) --budget "$(BUDGET)"

adopt:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.adopt "$(FROM)"

# torch goes first: left to another package's range, pip may choose a newer build
.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
