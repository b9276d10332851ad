# Every target creates .venv where there is none and installs what pyproject.toml asks for, at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check benchmarks notebooks figures
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## the component map of the embedded pair, written to out/demo
	$(BIN)/frankenlens map --out out/demo

# A worker a core and a thread each; a file's tests stay together, since they share models, in the order of conftest.py.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

benchmarks: $(INSTALLED)  ## against plain hooks, TransformerLens and nnsight; table and figure in out/benchmarks
	$(BIN)/python -m tests.benchmarks.run --out out/benchmarks

notebooks: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_notebooks.py

figures: demo  ## the picture of the README
	mkdir -p notebooks/figures && cp out/demo/map.png notebooks/figures/map.png
