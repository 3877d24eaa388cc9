# Everything below works in a fresh clone: nothing but Python 3.11 or newer (with venv) is needed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# flags of `make serve`, for example: make serve FLAGS="--port 30001"
FLAGS ?= --enable-multipole

.PHONY: help install demo serve test test-gpu lint

help:
	@echo "make demo   a real server, best of 4 over a long prompt, and a dense twin"
	@echo "make serve  the demo's model on http://127.0.0.1:30000 (FLAGS=... for others)"
	@echo "make test   all tests that need no GPU"
	@echo "make test-gpu  the kernels at real sizes, on an NVIDIA GPU"
	@echo "make lint   ruff check and ruff format --check"

# uv first: pip takes minutes more for the same packages, but pip alone reads pip's configuration
# (a mirror, a proxy); compiled, because each of a server's three processes imports half of it
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: Python must be 3.11 or newer, got $$($(PYTHON) -V); give PYTHON=<path>" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]' || \
		$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

serve: $(STAMP)
	@model="$$($(BIN)/sglang-multipole demo-model)" && \
		exec $(BIN)/sglang-multipole serve --model-path "$$model" $(FLAGS)

# a process in which kernels are interpreted cannot compile them, so there are two
test: $(STAMP)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "kernel or interpreted"
	@$(BIN)/python -m pytest -m "not (gpu or kernel or interpreted)"

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m "gpu or kernel"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
