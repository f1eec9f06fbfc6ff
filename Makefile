# Everything a person does with a checkout. Needs make, Python 3.11 or newer and a package index; nothing else.
#   make demo          train a recommender on a real shop's orders and look at what it recommends
#   make test check    what must pass before a commit
# PYTHON=/path/to/python3.12 chooses the interpreter of a new .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEMO_USER ?= 12347
PYTEST_FLAGS ?= -q
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
STUDY ?= recipes/study/beauty_main.yaml

.PHONY: help demo test cluster check bench docs results study mini clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## train on a real shop's orders and print recommendations (minutes; then seconds)
	@$(BIN)/lasar data get online_retail
	@$(BIN)/lasar data get all-minilm-l6-v2
	@$(BIN)/lasar run recipes/demo.yaml --until sft
	@$(BIN)/lasar recommend runs/demo --user $(DEMO_USER) --exclude-seen
	@echo "these were Stage 1's first recommendations; now the model learns to think before it answers"
	@$(BIN)/lasar run recipes/demo.yaml
	@$(BIN)/lasar explain runs/demo --user $(DEMO_USER) --exclude-seen
	@echo "report: runs/demo/report/report.html (one file, open it in a browser)"
	@echo "more:   $(BIN)/lasar recommend --help"

test: $(VENV)/.installed-dev ## run the tests
	@echo "tests: running"
	@OMP_NUM_THREADS=1 $(PYTEST) $(PYTEST_FLAGS)

cluster: $(VENV)/.installed-ray ## run the tests that need Ray (a download of its own)
	@echo "tests: scoring and serving in a Ray of this machine"
	@OMP_NUM_THREADS=1 $(PYTEST) -q -m slow tests/cluster

check: $(VENV)/.installed-dev ## format, lint, types
	@echo "check: format, lint, types"
	@$(BIN)/ruff format --check -q . || { echo "check: not formatted; run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy

mini: $(VENV)/.installed ## the whole pipeline on a tiny made-up shop (seconds)
	@$(BIN)/python examples/make_mini_data.py data/mini
	@$(BIN)/lasar run recipes/mini.yaml

bench: $(VENV)/.installed-dev ## speed and memory against named peers, one JSON line each (those that need no run)
	@for script in stage1 stage2 rl beam_search attention_backends; do $(BIN)/python benchmarks/$$script.py; done

study: $(VENV)/.installed ## the main table: STUDY=recipes/study/NAME.yaml SOURCE=FOLDER, part of it with ARGS="--seed 1 --arm SASRec"
	@test -n "$(SOURCE)" || { echo "study: where is the data? make study SOURCE=FOLDER (docs/studies.md says which files)" >&2; exit 2; }
	@$(BIN)/lasar study $(STUDY) prepare.source=$(SOURCE) $(ARGS)

results: $(VENV)/.installed ## regenerate docs/results.md and its plots from results/results.jsonl
	@$(BIN)/lasar results render

docs: results ## regenerate every generated page in docs/

clean: ## remove what builds and tests leave (not .venv, data and runs)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamps are newer than what they were installed from, so that nothing is installed twice.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setup: installing lasar with what its commands need into $(VENV) (minutes, the first time)"
	@$(INSTALL) -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setup: installing lasar and its development tools into $(VENV) (minutes, the first time)"
	@$(INSTALL) -e '.[all,dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	@echo "setup: installing Ray into $(VENV)"
	@$(INSTALL) -e '.[ray]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "setup: needs Python 3.11 or newer; install it, or give its path: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "setup: $(PYTHON) is not Python 3.11 or newer; give another: make PYTHON=..." >&2; exit 1; }
	@echo "setup: making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)" >/dev/null 2>&1 || { \
		echo "setup: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
