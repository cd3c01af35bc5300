# Everything a newcomer needs. The first target that runs code builds .venv from requirements.lock; after that, make
# goes straight to work until requirements.lock or pyproject.toml changes. No compiler and no ninja is needed.
#
#   make PYTHON=/usr/bin/python3.11 test      which Python builds .venv (3.11 or 3.12; found by itself otherwise)
#   make quickstart ARGS="run.steps=4"       ARGS is passed on to the program

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing
LOCKS := requirements.lock requirements-cuda.lock
ARGS ?=

# The first Python that fits and can make virtual environments (Debian splits venv off: ensurepip is then missing).
CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(CHECK_PYTHON)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow check bench lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED)  ## build .venv (the other targets do it by themselves)

quickstart: $(INSTALLED)  ## improve a restorer on real photographs and show the table, within 15 minutes on 2 cores
	$(BIN)/rlrestore train configs/quickstart.yaml $(ARGS)

test: $(INSTALLED)  ## the tests, within 12 minutes on 2 cores
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(INSTALLED)  ## the tests that train: algorithms against their controls, LL-Score, ZeRO (half an hour and more)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## loop efficiency of every placement and engine
	$(BIN)/python scripts/bench_loop.py $(ARGS)

lock: $(INSTALLED)  ## resolve the lock files again after a change of pyproject.toml
	$(BIN)/python scripts/lock.py

clean:  ## remove .venv and caches (never runs/ or data/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find rlrestore rewards envs scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# .installing stands while an install runs. If it is still there, the last one was cut off in the middle of some package,
# which pip would take for installed: begin again. --no-compile: Python compiles what is imported when it is imported.
$(INSTALLED): $(LOCKS) pyproject.toml
	@if ! "$(or $(PYTHON),no-python)" -c '$(CHECK_PYTHON)' >/dev/null 2>&1; then \
		echo "rlrestore needs Python 3.11 or 3.12 with its venv module, and found neither python3.11, python3.12" >&2; \
		echo "nor a python3 that fits. Install one (Debian, Ubuntu: apt install python3.11-venv), or name it:" >&2; \
		echo "    make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi
	@if [ -e $(INSTALLING) ]; then echo "The last install was cut off: building $(VENV) again."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(INSTALLING)
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm $(INSTALLING) && touch $@
