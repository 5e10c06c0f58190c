# Every target installs what it needs into .venv, with the versions pinned in constraints.txt. Needs Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help train test slow lint lint-js format gpu static fuzz mutants faults cuda-trace as-with-gpu llama browser exchange track notebooks notebooks-run clean
.DEFAULT_GOAL := help

help:
	@echo "make train          train a model that fits this machine on Book/, and show what it writes"
	@echo "make test           run the test suite; where there is a CUDA GPU, the kernels run on it"
	@echo "make slow           run the slower tests: several processes, kill -9, benchmark commands"
	@echo "make gpu            prove and benchmark the kernels on this machine's NVIDIA GPU"
	@echo "make static         compile every kernel for sm_80, sm_90 and sm_100 and report spills and tensor-core use (no GPU)"
	@echo "make fuzz           test every kernel on EXAMPLES=300 random cases"
	@echo "make mutants        break the kernels one line at a time; the tests must fail each time"
	@echo "make faults         kill a training run at 50 random moments, fill its disk, damage its checkpoints"
	@echo "make cuda-trace     run train.py and generation with CUDA graphs on a stand-in for a GPU, in every combination of options"
	@echo "make as-with-gpu    run the suite as on a machine with a GPU, without the tests that need one"
	@echo "make llama          check that llama.cpp (from npm) gives our ids for GGUF files; RUN=runs/first-run checks that run too"
	@echo "make browser        test the page of model.explore in headless Chromium; CHROMIUM=/path/to/it uses that one"
	@echo "make exchange       prove that lm-eval and TransformerLens find our numbers on an exported folder"
	@echo "make track          prove that TensorBoard, Trackio and Weights & Biases get a run's metrics"
	@echo "make notebooks      open the notebooks in JupyterLab"
	@echo "make notebooks-run  run the notebooks and save them with their outputs"
	@echo "make lint           check format, lint and types"
	@echo "make lint-js        check the JavaScript, by Biome from npm; ARGS=--write fixes it"
	@echo "make format         reformat the source"
	@echo "make clean          remove .venv and caches"
	@echo "ARGS=... adds arguments:  make train ARGS='--steps 500'   make test ARGS='-k layer_norm'"

# One stamp file per set of extras: reinstall only when pyproject.toml or constraints.txt has changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"error: Python {v[0]}.{v[1]} is too old, 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.with-%: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing the pinned packages: $*"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[core,$*]'
	@touch $@

train: $(VENV)/.with-core
	@$(BIN)/python train.py $(ARGS)

# One worker per core, each taking whole files; torch uses one thread per worker (tests/conftest.py).
test: $(VENV)/.with-test
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# Tests that cannot be fast: several processes, kill -9, benchmark commands.
slow: $(VENV)/.with-test
	@$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(ARGS)

EXAMPLES ?= 300
fuzz: $(VENV)/.with-test
	@EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -m long tests/test_properties.py $(ARGS)

mutants: $(VENV)/.with-test
	@$(BIN)/python tests/mutants.py $(ARGS)

faults: $(VENV)/.with-test
	@$(BIN)/python -m pytest -q -m long tests/test_faults.py $(ARGS)

# The options of tests/cuda_runs.py, each with all others. Needs a C++ compiler.
cuda-trace: $(VENV)/.with-test
	@$(BIN)/python -m pytest -q -n auto -m long tests/test_fake_cuda.py $(ARGS)

as-with-gpu: $(VENV)/.with-test
	@AS_WITH_GPU=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not long' $(ARGS)

# llama.cpp, prebuilt for this machine's CPU, in an ignored folder. Needs Node.js 20 or newer.
LLAMA := build/llama
LLAMA_VERSION := 3.22.1
$(LLAMA)/.made-$(LLAMA_VERSION):
	@node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || { echo "error: Node.js 20 or newer is needed: nodejs.org" >&2; exit 1; }
	@echo "installing node-llama-cpp $(LLAMA_VERSION) in $(LLAMA) (once)"
	@platform=$$(node -p 'const p = process.platform + "-" + process.arch; ({"darwin-arm64": "mac-arm64-metal", "darwin-x64": "mac-x64"})[p] ?? p') && \
	npm install --prefix $(LLAMA) --no-save --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error \
		node-llama-cpp@$(LLAMA_VERSION) @node-llama-cpp/$$platform@$(LLAMA_VERSION)
	@touch $@

llama: $(VENV)/.with-test $(LLAMA)/.made-$(LLAMA_VERSION)
	@LLAMA=$(LLAMA) RUN=$(RUN) $(BIN)/python -m pytest -q -m long tests/test_llama.py $(ARGS)

# Chromium as Playwright packs it, in an ignored folder, unless CHROMIUM names another.
CHROMIUM ?=
BROWSER := build/browser
browser: $(VENV)/.with-test,browser
	@test -n "$(CHROMIUM)" || PLAYWRIGHT_BROWSERS_PATH=$(BROWSER) $(BIN)/python -m playwright install --only-shell chromium
	@CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest -q tests/test_explore_browser.py $(ARGS)

exchange: $(VENV)/.with-test,eval,lens
	@$(BIN)/python -m pytest -q -m slow tests/test_exchange.py $(ARGS)

track: $(VENV)/.with-test,trackio,wandb
	@$(BIN)/python -m pytest -q -m 'slow or not slow' tests/test_track.py $(ARGS)

notebooks: $(VENV)/.with-notebooks
	@$(BIN)/jupyter lab notebooks $(ARGS)

notebooks-run: $(VENV)/.with-notebooks
	@$(BIN)/python notebooks/regenerate.py $(ARGS)

lint: $(VENV)/.with-lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Biome, in an ignored folder.
BIOME := build/biome
BIOME_VERSION := 2.6.8
$(BIOME)/.made-$(BIOME_VERSION):
	@npm install --prefix $(BIOME) --no-save --no-audit --no-fund --loglevel=error @biomejs/biome@$(BIOME_VERSION)
	@touch $@

lint-js: $(if $(shell command -v npm),$(BIOME)/.made-$(BIOME_VERSION))
ifeq ($(shell command -v npm),)
	@echo "the JavaScript is not checked: that needs Node.js, nodejs.org"
else
	@cd model/explore && $(CURDIR)/$(BIOME)/node_modules/.bin/biome check --error-on-warnings $(ARGS)
endif

format: $(VENV)/.with-lint
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

# EXTRAS=bench,hf installs the libraries to compare with; without them they are reported as missing.
EXTRAS ?= core
gpu: $(VENV)/.with-$(EXTRAS)
	@$(BIN)/python -m bench gpu $(ARGS)

# Every kernel, case and precision: ten minutes on two cores, no GPU.
static: $(VENV)/.with-core
	@$(BIN)/python -m bench static --arch 80 90 100 $(ARGS)

clean:
	rm -rf $(VENV) $(LLAMA) $(BROWSER) $(BIOME) *.egg-info .pytest_cache .ruff_cache .mypy_cache
