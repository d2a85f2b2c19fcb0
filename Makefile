# Two commands for newcomers: `make demo` (`make demo SEARCH=1` also indexes its gallery and searches it) and `make test`. Both
# need only python3 (3.11 or newer) with pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO := workdir/demo

.PHONY: demo test check parity clean

demo: .venv/installed
	$(BIN)/python train.py --config=configs/demo.py:complexity --workdir=$(DEMO)/complexity
	$(BIN)/python train.py --config=configs/demo.py:clip --workdir=$(DEMO)
	$(BIN)/icar bundle --clip $(DEMO) --complexity $(DEMO)/complexity --out $(DEMO)/bundle
	$(BIN)/python evaluate.py --config=configs/demo.py:clip --workdir=$(DEMO)
ifdef SEARCH
	$(BIN)/icar scenes $(DEMO)/gallery -n 500
	$(BIN)/icar index $(DEMO)/gallery/images --checkpoint $(DEMO)/bundle --store $(DEMO)/store --captions $(DEMO)/gallery/captions.jsonl
	$(BIN)/icar search "A small red circle on a yellow background." --store $(DEMO)/store -k 5
endif

# Programs that run for a moment: optimising them would take longer than it saves. `make check` and `make parity` do.
test: .venv/installed
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" $(BIN)/python -m pytest -q -n 2 -m "not check and not parity"

# Slow tests: several devices and processes, whole runs.
check: .venv/installed
	$(BIN)/python -m pytest -q -m check

# Against PyTorch and the libraries that weights come from. timm and open_clip are installed without what they depend on:
# they ask for a torchvision whose own dependencies would replace the CPU build of torch.
parity: .venv/parity
	$(BIN)/python -m pytest -q -n 2 -m parity

.venv/parity: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 transformers
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps timm torchvision open_clip_torch
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "icar_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv $(DEMO)
