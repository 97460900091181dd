# make demo    a small FoX (Pro) learns real text on a CPU, is saved, reloaded and generates: about 8 minutes with installation
# make test    the test suite on a CPU
# make check   what CI runs: style, structure, tests, Triton kernels interpreted and compiled ahead
# make suite   the tests that Transformers has for its own models, all of them that can be had: about 10 minutes
# make test-tasks    TRL, lm-eval, torchao and bitsandbytes on FoX: installs 600 MB for it
# make test-gpu, make bench    on a machine with a CUDA device, in the current environment

PYTHON ?= python3
VENV ?= .venv
# The plain PyPI wheel. Where pip is set up with an index of CPU builds, it takes a CPU build.
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# pip would compile 15,000 files, on one core, of which few are ever imported: those are compiled then, and kept.
# The pip that a Python brings along may be years old, and thinks twice as long about the same packages.
PIP := $(RUN) pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test suite test-tasks check style test-triton compile-ahead test-gpu bench format clean

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) fox_training.demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -q

suite: $(VENV)/installed
	$(BIN)/python tests/transformers_suite.py --required -n $(WORKERS)

$(VENV)/tasks-installed: $(VENV)/installed
	$(PIP) -e ".[dev,tasks]"
	touch $@

test-tasks: $(VENV)/tasks-installed
	OMP_NUM_THREADS=1 $(RUN) pytest -q -m tasks tests/test_tasks_*.py

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) mlinter modeling_fox

test-triton: $(VENV)/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -q -m interpret tests/test_kernels_*.py

compile-ahead: $(VENV)/installed
	OMP_NUM_THREADS=1 FOX_COMPILE_AHEAD=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -q tests/test_kernels_compile.py

# One run of pytest compiles ahead and tests: nothing is imported twice, and both cores are busy to its end.
check: export FOX_COMPILE_AHEAD := 1
check: style test test-triton

test-gpu:
	FOX_TEST_THREADS=8 python3 -m pytest -q -m gpu

bench:
	python3 kernels/benchmarks/bench_forgetting_attention.py
	python3 kernels/benchmarks/bench_forgetting_attention.py --plot kernels/benchmarks/results.png
	python3 kernels/benchmarks/bench_decode.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
