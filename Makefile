# Signing key rotation. `make help` lists the targets; each sets up what it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
export PREFECT_SERVER_ALLOW_EPHEMERAL_MODE ?= false
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo sandbox test test-faults test-browser check format lock clean

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## Make or refresh .venv from the locked, hashed requirements

$(VENV)/ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked requirements into $(VENV) (about a minute)"
	@# The lock is whole and hashed: nothing is resolved, so older pips, which stumble over extras with hashes, install it, too.
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## A rotation, told while it happens: sandbox up, live traffic, rotation, cleanup, report
	@$(RUN) -m sandbox demo

sandbox: setup ## The same world, kept up until Ctrl-C, with the Prefect UI
	@$(RUN) -m sandbox up --home .sandbox

test: setup ## The core suite: 10 minutes at most on 2 cores
	@$(RUN) -m pytest -n $(WORKERS) --dist loadgroup -m "not long and not browser" tests

test-faults: setup ## The long suites: rotations in a row under traffic, faults, restarts
	@$(RUN) -m pytest -m long tests

test-browser: setup $(VENV)/ready-browser ## The Prefect UI in a real Chromium (needs Debian's chromium)
	@$(RUN) -m pytest -m browser tests

$(VENV)/ready-browser: requirements-browser.txt $(VENV)/ready
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-browser.txt
	@touch $@

check: setup ## Lint, types, floors of the house
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache

format: setup ## Format the code as `make check` wants it
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

lock: ## Make the lock files anew from pyproject.toml (needs uv)
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.txt
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml --extra sandbox --extra dev -c requirements.txt -o requirements-dev.txt
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml --extra sandbox --extra dev --extra browser -c requirements-dev.txt -o requirements-browser.txt

clean: ## Remove what was made here
	@rm -rf $(VENV) .sandbox .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
