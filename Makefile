# For newcomers: `make demo` and `make test`. Both need only python3 (3.11 or newer) with pip.
# For who changes the code: `make quick` (what a change touches), `make check` (slow tests), `make parity`, `make coverage`,
# `make lint`, `make docs`, `make fuzz`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := workdir/demo
# Programs that one command of the demo has compiled the next one reads.
KEPT := JAX_COMPILATION_CACHE_DIR="$(abspath $(DEMO))/programs" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
# Memory in huge pages: every training step on a CPU asks for hundreds of MB anew, and much of its time went into page faults.
# Ignored where the C library or the kernel has none.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Programs of tests run for a moment: optimising them takes longer than it saves. `make check`, but for its child processes, and
# `make parity` run what users do.
FAST := ICAR_JAX_TESTS_COMPILE_FAST=1
PYTEST := $(BIN)/python -m pytest -q --durations=10

.PHONY: demo test quick check parity coverage lint docs fuzz clean

demo: .venv/installed
	$(KEPT) $(BIN)/python examples/demo.py $(DEMO)

test: .venv/installed
	$(FAST) $(PYTEST) -n 2 --dist worksteal -m "not check and not parity"

quick: .venv/installed
	$(FAST) $(PYTEST) -n 2 -m "not check and not parity" $$($(BIN)/python -m tests.support.touched)

# Slow tests: several devices and processes, whole runs. Those that time something or fill both cores come last, one by one.
check: .venv/installed
	$(PYTEST) -n 2 --dist worksteal -m "check and not alone"
	$(PYTEST) -m "check and alone"

# Against PyTorch and the libraries that weights come from. timm and open_clip are installed without what they depend on:
# they ask for a torchvision whose own dependencies would replace the CPU build of torch.
parity: .venv/parity
	$(PYTEST) -n 2 -m parity

# Share of each folder's lines that `make test` runs, in this process; what child processes run does not count.
coverage: .venv/installed
	$(FAST) $(PYTEST) -n 2 -m "not check and not parity" --cov=icar_jax --cov-report=json:coverage.json
	$(BIN)/python -m tests.support.covered coverage.json

# Malformed inputs for every reader of files and settings, for three minutes: status 1 unless nothing crashed, hung, took too much
# memory, was accepted in silence, or started or wrote anything. FUZZ="--count 25000 --seed 1" runs that many. Inputs with a fault
# are kept in workdir/fuzz.
fuzz: .venv/installed
	$(BIN)/python -m tests.support.fuzz $(FUZZ)

# ruff over everything; mypy over the package, strictly over what other code builds on (pyproject.toml).
lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and an API reference from the docstrings, as workdir/site/index.html. Needs no network once installed.
docs: .venv/docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f mkdocs.yml
	@echo "Open workdir/site/index.html"

.venv/lint: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt ruff mypy
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

.venv/parity: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 transformers
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps timm torchvision open_clip_torch
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "icar_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into .venv (a minute or two, about 1.5 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv $(DEMO)
