# One word per need. Everything runs in .venv, which the first target that needs it makes; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help repro test check format ui bench clean setup

VENV := .venv
BIN := $(VENV)/bin
# The newest Python that every dependency has wheels for (Aim has none for 3.13).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
# DVC starts the stages by the name `python`, so the environment has to come first on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.pipeline ## make .venv with the pinned dependencies

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.pipeline: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 on the PATH; install one, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (some minutes, once)"
	@$(INSTALL) 'pip>=25.1' # reads dependency groups
	@$(INSTALL) torch # first and alone: what follows finds it there and pulls no other build
	@$(INSTALL) --group pipeline
	@touch $@

$(VENV)/.dev: $(VENV)/.pipeline
	@$(INSTALL) --group dev
	@touch $@

repro: setup ## run the pipeline: download, tokenize, estimate_size, train, evaluate, sample; then print the results
	dvc repro
	python -m dsv3.report

test: $(VENV)/.dev ## run all tests (GPU tests skip without a GPU)
	python -m pytest

check: $(VENV)/.dev ## formatting, lint, types, import rules, contracts
	ruff format --check .
	ruff check .
	basedpyright
	lint-imports
	python -m pytest tests/contracts

format: $(VENV)/.dev ## format the code and mend what can be mended
	ruff format .
	ruff check --fix .

ui: setup ## compare runs in Aim, on this machine only
	aim up --host 127.0.0.1

bench: $(VENV)/.dev ## run the benchmarks behind the README's numbers
	for script in benchmarks/*.py; do python -m "$$(basename "$${script%.py}" | sed 's/^/benchmarks./')"; done

clean: ## remove what runs leave behind; data, results, .aim and the environment stay
	rm -rf .checkpoints .pytest_cache .ruff_cache .hypothesis .import_linter_cache .triton_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
