# make mini    set up, then the whole loop on this machine: train, fit, propose, report
# make test    set up, then every check: lint, format, types, layers, tests, doctests
# make check   the checks alone, without the tests that train or start Ray
# make bench   the benchmarks, each a table
# make lock    requirements.lock from constraints.txt, on Linux, x86-64, Python 3.11

PYTHON ?= python3
BIN := .venv/bin
# The pins are for Linux and Python 3.11; elsewhere pip resolves the bounds of pyproject.toml.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.platform == "linux" and sys.version_info[:2] == (3, 11)))')

# Processes that test side by side; each may start a Ray of its own.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

.PHONY: mini test check lint bench lock clean

mini: .venv/installed
	$(BIN)/isoflop mini --project projects/mini

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

check: lint
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/pip install --quiet $(PINS) -e '.[dev,bench]'
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.mini
	$(BIN)/python -m benchmarks.fit
	$(BIN)/python -m benchmarks.coverage
	$(BIN)/python -m benchmarks.orchestration

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "isoflop needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	@touch $@

# One hash a package, of the wheel for this platform; pip downloads metadata alone.
lock: .venv/installed
	$(BIN)/pip install --quiet --dry-run --ignore-installed --prefer-binary --report build-lock.json -c constraints.txt '.[s3,gcs,text]'
	$(BIN)/python -c 'import json; found = [(i["metadata"], i["download_info"]) for i in json.load(open("build-lock.json"))["install"]]; print(*open("requirements.lock").read().partition("\n\n")[:1], "", *sorted((m["name"] + "==" + m["version"] + " --hash=sha256:" + d["archive_info"]["hashes"]["sha256"] for m, d in found if m["name"] != "isoflop"), key=str.lower), sep="\n")' > build-lock.txt
	mv build-lock.txt requirements.lock
	rm build-lock.json

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
