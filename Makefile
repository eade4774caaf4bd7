# Two commands matter: `make demo` and `make test`. Each sets up what it needs first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo
PORT ?= 8000
ARGS ?=
# cpu or cuda: what the lock installs. Detected; set DPO_RAY_ACCELERATOR to choose.
ACCELERATOR := $(or $(DPO_RAY_ACCELERATOR),$(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu))
LOCK := requirements/$(ACCELERATOR).txt
DEV_LOCK := requirements/dev.txt
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/python -m uv --quiet
unexport DPO_RAY_ACCELERATOR
# The CUDA build of vLLM needs a GPU; sampler and one trainer share it.
ON_cuda := --sampling.gpus_per_replica 0.5 --sampling.gpu_memory_utilization 0.3 --sampling.dtype float32 \
  --training.workers 1 --training.gpus_per_worker 0.5

.PHONY: help setup setup-dev demo serve test test-slow check lint unit format lock clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: setup ## Run iterative DPO on a tiny model, in RUN_DIR (runs/demo); goes on where it was interrupted.
	$(BIN)/python jobs/iterative_dpo.py --run_dir $(RUN_DIR) --serving.port $(PORT) $(ON_$(ACCELERATOR)) $(ARGS)

serve: setup ## Serve the live policy of RUN_DIR over HTTP on PORT (8000).
	$(BIN)/python -m serve --run_dir $(RUN_DIR) --serving.port $(PORT) $(ARGS)

test: check ## Run the checks, the unit tests, and the tests on real Ray and vLLM.
	$(BIN)/pytest tests/integration -v --durations=15 -m "not slow" --numprocesses 2

test-slow: setup-dev ## Run the tests that take minutes each, which `make test` leaves out.
	$(BIN)/pytest tests/integration -v -m slow

check: setup-dev ## Formatting, lint, types, layers, and the fast tests.
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint unit

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

unit:
	$(BIN)/pytest tests/unit -q --numprocesses 2

setup: $(VENV)/$(ACCELERATOR).stamp ## Make .venv and install the locked packages.

setup-dev: $(VENV)/dev-$(ACCELERATOR).stamp

$(VENV)/$(ACCELERATOR).stamp: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "dpo_ray needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep -E '^uv==' $(DEV_LOCK))
	$(TORCH)
	$(UV) pip install --no-deps --compile-bytecode --requirement $(VENV)/without-torch.txt
	$(UV) pip install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/dev-$(ACCELERATOR).stamp: $(VENV)/$(ACCELERATOR).stamp $(DEV_LOCK)
	$(UV) pip install --no-deps --requirement $(DEV_LOCK)
	touch $@

# The CPU build of torch is not on the package index: pip may know where it lies, else uv knows its home.
define TORCH
	grep -E '^torch==' $(LOCK) > $(VENV)/torch.txt
	grep -vE '^torch==' $(LOCK) > $(VENV)/without-torch.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement $(VENV)/torch.txt 2>/dev/null || \
	  $(UV) pip install --no-deps --torch-backend $(if $(filter cpu,$(ACCELERATOR)),cpu,auto) \
	    --requirement $(VENV)/torch.txt
endef

lock: setup-dev ## Resolve requirements/*.txt anew from pyproject.toml.
	$(BIN)/python -m uv pip compile pyproject.toml --extra cpu $(LOCK_OPTIONS) --torch-backend cpu -o requirements/cpu.txt
	$(BIN)/python -m uv pip compile pyproject.toml --extra cuda $(LOCK_OPTIONS) -o requirements/cuda.txt
	$(BIN)/python -m uv pip compile pyproject.toml --extra dev -c requirements/cpu.txt $(LOCK_OPTIONS) --torch-backend cpu -o $(VENV)/all.txt
	grep -vxFf requirements/cpu.txt $(VENV)/all.txt > $(DEV_LOCK)

LOCK_OPTIONS := --override requirements/overrides.txt --universal --no-annotate --no-header --quiet \
  --no-emit-index-url --no-emit-find-links

format: setup-dev ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and what tests leave behind; runs stay.
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
