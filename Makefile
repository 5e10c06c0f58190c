# Every target sets up what it needs: a .venv with the pinned set of constraints.txt. Python >= 3.10 and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help train test slow lint format gpu static fuzz mutants faults clean
.DEFAULT_GOAL := help

help:
	@echo "make train   train a model that fits this machine on Book/, and read what it writes"
	@echo "make test    the test suite (CPU; on a CUDA machine the kernels run on the GPU too)"
	@echo "make slow    the tests that take longer: every command of the READMEs, several processes, kill -9"
	@echo "make gpu     proof and benchmarks of the kernels on this machine's NVIDIA GPU"
	@echo "make static  what every kernel compiles to, for sm_80, sm_90 and sm_100 (no GPU is used)"
	@echo "make fuzz    random cases for every kernel, EXAMPLES=300 of them each; the suite has a few, the same every time"
	@echo "make mutants breaks the kernels by hand, one line at a time, and sees the suite turn red"
	@echo "make faults  kills a training run at 50 random moments, fills its disk, damages its checkpoints"
	@echo "make lint    format check, lint, types        make format   rewrite in house style"
	@echo "ARGS=... is passed on:  make train ARGS='--steps 500'   make test ARGS='-k layer_norm'"

# One stamp per set of extras: a changed pyproject.toml or constraints.txt installs again, otherwise nothing is done.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"error: Python {v[0]}.{v[1]} is too old, 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.with-%: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing the pinned packages: $*"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(if $(filter core,$*),,[$*])'
	@touch $@

train: $(VENV)/.with-core
	@$(BIN)/python train.py $(ARGS)

# One worker per core, whole files to a worker; torch gets one thread in each (tests/conftest.py).
test: $(VENV)/.with-test
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# The tests that cannot be short: every command of the READMEs, several processes, kill -9.
slow: $(VENV)/.with-test
	@$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(ARGS)

EXAMPLES ?= 300
fuzz: $(VENV)/.with-test
	@EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -m long tests/test_properties.py $(ARGS)

mutants: $(VENV)/.with-test
	@$(BIN)/python tests/mutants.py $(ARGS)

faults: $(VENV)/.with-test
	@$(BIN)/python -m pytest -q -m long tests/test_faults.py $(ARGS)

lint: $(VENV)/.with-lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.with-lint
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

# EXTRAS=bench,hf installs the other libraries that ours is measured beside; without them they are named as missing.
EXTRAS ?= core
gpu: $(VENV)/.with-$(EXTRAS)
	@$(BIN)/python -m bench gpu $(ARGS)

# Compiles every kernel, every case, every precision for GPUs that need not be here: ten minutes of two cores.
static: $(VENV)/.with-core
	@$(BIN)/python -m bench static --arch 80 90 100 $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
