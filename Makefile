.PHONY: install style test quickstart bench

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

install: $(INSTALLED)

# The versions of constraints.txt are those that CI runs; the package itself accepts a range.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A thread each: workers that share cores wait for one another.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

quickstart: install
	$(BIN)/lusifer-hf quickstart

bench: install
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/encode.py --memory
	$(BIN)/python benchmarks/train.py
