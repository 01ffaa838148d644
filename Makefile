# Everything starts from git, make and a Python: `make demo` and `make test` set up what they need.
# uv is taken from the PATH where there is one, else installed into .uv/, and nothing outside this folder is touched.

SHELL := /bin/bash
.DEFAULT_GOAL := help
UV := $(shell command -v uv || echo .uv/bin/uv)
PYTHON := .venv/bin/python
RUN := $(UV) run --frozen --no-sync
UV_THERE := $(if $(shell command -v uv),,.uv/bin/uv)
# What must pass with no extra installed, and with the oldest dependencies that pyproject.toml allows.
BASE_TESTS := $(addprefix tests/,confidence money remote request schemas settings) tests/test_client.py tests/test_import.py

.PHONY: help setup demo test test-all test-base test-oldest test-postgres lint format bench docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready ## install uv (if missing) and every dependency into .venv

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml uv.lock .python-version $(UV_THERE)
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

test-base: $(UV_THERE) ## what needs no extra, in an environment without any
	$(UV) run --isolated --frozen pytest $(BASE_TESTS)

test-oldest: $(UV_THERE) ## the same with the oldest dependencies that pyproject.toml allows
	mkdir -p .cache
	$(UV) pip compile --quiet --python-version 3.12 --resolution lowest-direct pyproject.toml --output-file .cache/oldest.txt
	$(UV) venv --quiet --clear --python 3.12 .cache/oldest
	$(UV) pip install --quiet --python .cache/oldest --requirements .cache/oldest.txt --group dev --editable .
	.cache/oldest/bin/pytest $(BASE_TESTS)

test-postgres: setup ## every test that uses PostgreSQL, on the server at TEST_POSTGRES_URL if it is set, else on one of its own
	$(RUN) pytest tests/store tests/events tests/examples

bench: setup ## print the benchmarks' figures beside what they are compared with; DATA=FOLDER of recorded answers adds the engines
	$(RUN) python -m benchmarks $(if $(DATA),--data $(DATA))

docs: $(UV_THERE) ## build the documentation into site/, in an environment of its own; any warning stops it
	NO_MKDOCS_2_WARNING=1 $(UV) run --isolated --frozen --only-group docs mkdocs build --strict --quiet

clean: ## remove what the demo and the tests left; the environment stays
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist site
