# Every target creates .venv where there is none and installs what it needs, at the versions of constraints.txt: the core
# alone for the demo, everything for the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Each stamp is made when its installation has gone through, and both are deleted before the next begins: what was
# broken off counts as nothing. Everything includes the core.
CORE := $(VENV)/.core
INSTALLED := $(VENV)/.installed

define install
rm -f $(CORE) $(INSTALLED)
$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)'
endef

.PHONY: demo test test-slow fuzz kills clusters calibration check architectures benchmarks gpu notebooks figures planted-marks
.DEFAULT_GOAL := test
.NOTPARALLEL:

$(CORE): pyproject.toml constraints.txt
	$(call install,.)
	touch $(CORE)

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,.[dev])
	touch $(CORE) $(INSTALLED)

demo: $(CORE)  ## the component map of the embedded pair, written to out/demo
	$(BIN)/frankenlens map --out out/demo

# A worker a core and a thread each; a file's tests stay together, since they share models, in the order of conftest.py.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

calibration: $(INSTALLED)  ## how often printed intervals cover, and tests err: nine shapes of data x n x clusters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/planted/test_calibration.py -m "slow or not slow" -s

# Without the type checks of the default suite, which would refuse input of wrong types before we do.
fuzz: $(INSTALLED)  ## 2,000 inputs of every kind that a user can give, and all bombs for the graders
	FUZZ=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o addopts=--import-mode=importlib \
	    tests/fuzz tests/interp/questions/test_grading_bombs.py

kills: $(INSTALLED)  ## long commands killed at 20 moments and run again, and interrupted at 20; all on a full disk
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/experiments/test_kills.py \
	    tests/experiments/test_interrupted.py tests/experiments/test_disk_full.py

# Alone: a worker that loads nnsight, because a test beside these has, cannot import the type checker of the tests.
clusters: $(INSTALLED)  ## Ray's workers against one process: all commands, killed workers, two hosts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/interp/cluster tests/experiments/test_on_ray.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

architectures: $(INSTALLED)  ## what works on which architecture, measured on tiny models; docs/architectures.md
	$(BIN)/python -m tests.architectures.table --out docs/architectures.md

benchmarks: $(INSTALLED)  ## against plain hooks, TransformerLens and nnsight; table and figure in out/benchmarks
	$(BIN)/python -m tests.benchmarks.run --out out/benchmarks

# On a bare machine: nothing is installed, and the Python is the machine's own, with its PyTorch and transformers.
gpu:  ## exactness and speed on a GPU, in ten minutes; tests/benchmarks/results/DATE-DEVICE.json, and the README
	$(PYTHON) tests/benchmarks/gpu/needed.py
	$(PYTHON) -m tests.benchmarks.gpu --out tests/benchmarks/results; \
	    code=$$?; $(PYTHON) -m tests.benchmarks.gpu.table && exit $$code

planted-marks: $(INSTALLED)  ## is the map's mark right? 30 planted and 24 null pairs; out/planted-marks, kept pair by pair
	OMP_NUM_THREADS=1 $(BIN)/frankenlens planted --marks --kinds rl identical bf16 noise --pairs 30 --nulls 8 --n 24 --seed 1 \
	    --methods compare --out out/planted-marks

notebooks: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_notebooks.py -m ""

figures: demo  ## the picture of the README
	mkdir -p notebooks/figures && cp out/demo/map.png notebooks/figures/map.png
