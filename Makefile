# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make demo   virtual environment in .venv, install, main job
#   make test   the same environment, all tests
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint docs wheel bench clean

demo: $(STAMP)
	$(BIN)/intrafuse demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(STAMP)
	.ci/wheel $(BIN)/python

bench: $(STAMP)
	$(BIN)/python benchmarks/planning.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build dist site *.egg-info
