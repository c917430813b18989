# One word per need; `make help` lists them. Everything runs in .venv, which the first one that needs it makes.
.DEFAULT_GOAL := help
.PHONY: help setup repro compare test test-ui soak check audit format ui bench ablations scaling clean

BIN := .venv/bin
# The first that runs and can make an environment: a name on the PATH may be a shim without a Python behind it. Those
# that Aim has wheels for come first; elsewhere runtime.trackers names another tracker.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$name -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null \
	&& { echo $$name; break; }; done)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Where there is an NVIDIA GPU, a CPU build that pip may know besides is refused; elsewhere pip prefers one that it can
# find (PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL may say where) to the default build, which on Linux is the CUDA one.
TORCH = $$(nvidia-smi >/dev/null 2>&1 && echo 'torch!=$(shell sed -n s/^torch==//p constraints.txt)+cpu' || echo torch)

# DVC starts the stages, and its queue starts DVC, by bare names: the environment has to come first on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: .venv/.pipeline ## make .venv with the pinned dependencies

repro: setup ## run the pipeline, from the text to the samples; then print the results
	$(BIN)/dvc repro
	$(BIN)/python -m dsv3.report

# Not shown: when and where it ran, settings of the machine, and what has a slash in its name: hashes of files, and
# architectures where there are several model.config.
compare: setup ## all experiments in one table: what differs in parameters and architecture, and the headline numbers
	@$(BIN)/dvc exp show --only-changed --drop 'Created|Executor|runtime|.*/'

test: .venv/.dev ## run the tests, a real pipeline among them (not those marked gpu, baseline or browser: pytest -m gpu)
	$(BIN)/python -m pytest --numprocesses auto

# On Debian: apt-get install chromium chromium-driver. SCREENSHOTS=folder keeps what was seen; docs/figures has one of them.
test-ui: .venv/.ui ## test what Aim shows of two experiments, in a real browser (Chromium)
	$(BIN)/python -m pytest tests/browser -m browser -rs

MINUTES ?= 30
soak: .venv/.dev ## kill, stop, damage and fill up small trainings for MINUTES=30, and compare what they give, bit by bit
	$(BIN)/python -m tests.stress.soak --minutes $(MINUTES)

check: .venv/.dev ## check format, lint, types, import rules and contracts, as pre-commit does
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/contracts -m 'not gpu'

# In an environment of its own, which is thrown away: what it needs is none of the pipeline's business. A package that the
# source of advisories doesn't know is a failure, not a pass.
audit: ## compare every pinned package with the published advisories
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" \
	&& "$$folder"/bin/python -m pip install --quiet --disable-pip-version-check pip-audit \
	&& "$$folder"/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt

format: .venv/.dev ## format the code and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

ui: setup ## compare runs in Aim, in prepared views; on this machine only: it asks for no password
	@$(BIN)/python -m dsv3.tracking.views

BENCHMARKS := train_step time_to_loss quality generate startup tokenize growth
bench: .venv/.dev ## measure speed and quality beside peers, on this machine, after make repro; write docs/benchmarks.md
	@mkdir -p docs/benchmarks
	@set -e; for name in $(BENCHMARKS); do \
		echo "python -m benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name --json docs/benchmarks/$$name.json; done
	$(BIN)/python -m benchmarks.page

JOBS ?= 1
ablations: setup ## train the recipe without each of its parts (hours; JOBS=2: two at a time), write docs/ablations.md
	$(BIN)/python -m benchmarks.study run ablations --jobs $(JOBS)
	$(BIN)/python -m benchmarks.study report ablations

SET ?=
scaling: setup ## train smaller and larger models for longer and shorter (hours), fit a law, write docs/scaling.md
	$(BIN)/python -m benchmarks.study run scaling --jobs $(JOBS) $(addprefix -S ,$(SET))
	$(BIN)/python -m benchmarks.study report scaling

clean: ## remove caches and all checkpoints, those to go on from among them; data, results, runs and .venv stay
	rm -rf .checkpoints .pytest_cache .ruff_cache .hypothesis .import_linter_cache .triton_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

.venv/.pipeline: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 (with venv) on the PATH; install one, or name it:" \
		"make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the pinned dependencies into .venv (minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) pip setuptools # a pip that reads dependency groups
	@$(INSTALL) "$(TORCH)" # first and alone: what follows finds it there and pulls no other build
	@$(INSTALL) --group pipeline
	@touch $@

.venv/.dev: .venv/.pipeline
	@echo "installing what tests and checks need (a minute, once)"
	@$(INSTALL) --group dev
	@touch $@

.venv/.ui: .venv/.dev
	@$(INSTALL) --group ui
	@touch $@
