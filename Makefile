# make demo: attribute, prune and compare on the bundled model   make test: everything
# Every pip call is held to constraints.txt: an unpinned torch would bring gigabytes of CUDA.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find sparc3 kernels csrc -type f -not -path '*/__pycache__/*' -not -path '*/_native/*')
PACKAGE := pyproject.toml constraints.txt setup.py
# The oldest transformers that pyproject.toml allows; the newest is what pip finds.
FLOOR := 5.9.0
FLOOR_DIR := build/transformers-$(FLOOR)
FLOOR_TESTS := $(addprefix tests/sparc3/test_,$(addsuffix .py,families wrap engine weights scores schedules models samples quantizer))
DEMO := build/demo

.PHONY: bench-gpu demo test lint bench clean

demo: $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/sparc3 prune tiny-llama --pattern global --out $(DEMO) --force \
		--compare lrp,gradient,ria,wanda,magnitude,random --sparsities 0.3,0.4,0.5,0.6,0.7

test: $(VENV)/dev.stamp lint $(FLOOR_DIR)/stamp
	@echo "== transformers $(FLOOR), the oldest that is supported"
	PYTHONPATH=$(FLOOR_DIR) $(BIN)/python -m pytest $(FLOOR_TESTS)
	@echo "== everything"
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(wildcard bench/bench_*.py) --benchmark-enable --benchmark-json=build/bench.json
	$(BIN)/python bench/ratios.py build/bench.json

# One GPU, under nine minutes. Uses the Python at hand (PYTHON=...): a CUDA build of torch is not what constraints.txt holds.
bench-gpu:
	PYTHONPATH=.:kernels:bench $(PYTHON) bench/gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/sparc3_kernels/_native

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The demo runs the package as a user has it; the tests run this tree. One .venv serves both in turn.
$(VENV)/demo.stamp: $(VENV)/bin/python $(PACKAGE) $(SOURCES)
	$(PIP) install -c constraints.txt .
	@rm -f $(VENV)/dev.stamp
	@touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python $(PACKAGE) $(filter csrc/%,$(SOURCES))
	$(PIP) install -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/demo.stamp
	@touch $@

# With the kernels package of that time: an old transformers does not import beside the one that the tests use.
$(FLOOR_DIR)/stamp: $(VENV)/bin/python Makefile
	rm -rf $(FLOOR_DIR)
	$(PIP) install -c constraints.txt --target $(FLOOR_DIR) 'transformers[kernels]==$(FLOOR)'
	@touch $@
