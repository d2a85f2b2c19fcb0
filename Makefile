# Two commands for newcomers: `make demo` and `make test`. Both need only python3 (3.11 or newer) with pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO := workdir/demo

.PHONY: demo test check clean

demo: .venv/installed
	$(BIN)/python train.py --config=configs/demo.py:complexity --workdir=$(DEMO)/complexity
	$(BIN)/python train.py --config=configs/demo.py:clip --workdir=$(DEMO)
	$(BIN)/icar bundle --clip $(DEMO) --complexity $(DEMO)/complexity --out $(DEMO)/bundle
	$(BIN)/python evaluate.py --config=configs/demo.py:clip --workdir=$(DEMO)

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 -m "not check"

# Slow tests: several devices and processes, whole runs.
check: .venv/installed
	$(BIN)/python -m pytest -q -m check

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "icar_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv $(DEMO)
