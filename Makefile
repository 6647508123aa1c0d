# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow check clean

demo: .venv/.demo  ## fine-tune the bundled small model on the bundled data, and show before and after
	.venv/bin/veneer demo

test: .venv/.dev  ## the fast tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 -q

test-slow: .venv/.dev  ## the tests on real models and whole commands
	.venv/bin/python -m pytest -m slow -q

check: .venv/.dev  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/.demo

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
