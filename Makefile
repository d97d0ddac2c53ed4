# Every target works as the first command after a clone: it builds .venv if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

demo: $(STAMP)  ## train a DRT and its baseline, find needles in a million tokens, write runs/demo/
	$(BIN)/drt demo

test: $(STAMP)  ## the quick tests, under six minutes on two cores
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-all: $(STAMP)  ## every test, the slow ones too
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "slow or not slow"

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)  ## the benchmarks, printed as tables; about ten minutes on two cores without a GPU
	$(BIN)/python benchmarks/gca.py --quick
	$(BIN)/python benchmarks/window.py --quick
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/length.py --models demo --tiers host disk --max-length 1M --budget-seconds 60
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python benchmarks/window.py --device cuda && \
		$(BIN)/python benchmarks/operators.py && \
		$(BIN)/python benchmarks/model.py; \
	else \
		$(BIN)/python benchmarks/operators.py --quick && \
		$(BIN)/python benchmarks/model.py --quick; \
	fi

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
