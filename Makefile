# Everything starts from git, make and a Python: `make demo` and `make test` set up what they need.
# uv is taken from the PATH where there is one, else installed into .uv/, and nothing outside this folder is touched.

SHELL := /bin/bash
.DEFAULT_GOAL := help
UV := $(shell command -v uv || echo .uv/bin/uv)
PYTHON := .venv/bin/python
RUN := $(UV) run --frozen --no-sync

.PHONY: help setup demo test test-all lint format bench docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready ## install uv (if missing) and every dependency into .venv

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml uv.lock .python-version $(if $(shell command -v uv),,.uv/bin/uv)
	$(UV) sync --frozen --extra all --group dev --group bench
	@touch $@

demo: setup ## replay 660 support tickets through the whole system, training included; LIVE=1 asks the real remote
	$(RUN) apprentice demo $(if $(LIVE),--live)

lint: setup ## format check, lint, types, import contracts
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy apprentice flows serving benchmarks examples
	$(RUN) lint-imports

format: setup ## format and fix what can be fixed
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

test: lint ## lint, types, import contracts and every test but the slow ones
	$(RUN) pytest

test-all: lint ## everything, slow tests included
	$(RUN) pytest -m ""

bench: setup ## print the benchmarks' figures beside what they are compared with; DATA=FOLDER of recorded answers adds the engines
	$(RUN) python -m benchmarks $(if $(DATA),--data $(DATA))

docs: $(if $(shell command -v uv),,.uv/bin/uv) ## build the documentation into site/, in an environment of its own; any warning stops it
	NO_MKDOCS_2_WARNING=1 $(UV) run --isolated --frozen --only-group docs mkdocs build --strict --quiet

clean: ## remove what the demo and the tests left; the environment stays
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist site
