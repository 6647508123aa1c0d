# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
PIP = bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-without-peft check bench clean

demo: .venv/.demo  ## fine-tune the bundled small model on the bundled data, and show before and after
	.venv/bin/veneer demo

test: .venv/.dev  ## the fast tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 -q

test-slow: .venv/.dev  ## the tests on real models, whole commands and whole programs
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow -n 2 --dist loadfile -q

test-without-peft: .venv-without-peft/.test  ## what other libraries see of Veneer, where PEFT is not installed
	@! .venv-without-peft/bin/python -c 'import peft' 2>/dev/null || { echo "PEFT is installed there"; exit 1; }
	OMP_NUM_THREADS=1 .venv-without-peft/bin/python -m pytest -n 2 --dist loadfile -q tests/ecosystem tests/integrations

check: .venv/.dev  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

bench: .venv/.dev  ## measure everything beside PEFT, about half an hour on a quiet machine, and write docs/benchmarks.md
	.venv/bin/python -m benchmarks

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	.venv/$(PIP) --editable '.[demo]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	.venv/$(PIP) --editable '.[dev]'
	@touch $@ .venv/.demo

.venv-without-peft/.test: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m venv .venv-without-peft
	.venv-without-peft/$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-without-peft .pytest_cache .ruff_cache .hypothesis build dist
