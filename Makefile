# Two targets do all the set-up: `make quickstart` runs the main job, `make test` runs the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# The tested release. Where the package index offers only CUDA builds and there is no GPU, install a CPU build into
# .venv first to save gigabytes; an installed torch is left alone. On a GPU machine likewise install the build for your
# CUDA first.
TORCH ?= torch==2.13.0

# An environment of its own for SGLang on the CPU, which needs other versions than the trainer: `make sglang-cpu`.
SGLANG_VENV ?= .venv-sglang

# An environment of its own for the next Megatron-Core: `make test-megatron-next`. Its metadata asks for Python 3.12;
# its wheel for 3.11 works.
MEGATRON_NEXT ?= megatron-core==0.19.0
MEGATRON_NEXT_VENV ?= .venv-megatron-next

.PHONY: quickstart sglang-cpu test test-drills test-all test-megatron-next test-gpu crash-matrix evaluate-drill parity
.PHONY: lint format bench bench-gpu seeds clean docs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(SGLANG_VENV)/.installed: requirements/sglang_cpu.txt requirements/sglang_cpu_nodeps.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(SGLANG_VENV)/bin/python -c "import torch" 2>/dev/null || $(SGLANG_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(SGLANG_VENV)/bin/python -m pip install --quiet -r requirements/sglang_cpu.txt
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/sglang_cpu_nodeps.txt
	touch $@

sglang-cpu: $(SGLANG_VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/dasd train experiment=quickstart

# One OpenMP thread in each process, and none that spins: the tests' processes share the cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
# Three files at a time on two cores: many tests wait, for limits to run out or for a cluster. Tests of one file share
# what they set up. tests/conftest.py hands out whole files, the longest first.
FILES_AT_ONCE := -n 3

# Everything but the drills, of which it has short forms.
test: $(VENV)/.installed-dev
	$(PYTEST) $(FILES_AT_ONCE) -m "not drill"

# The drills, with fewer moments of the crash matrix.
test-drills: $(VENV)/.installed-dev
	CRASH_MOMENTS=6 $(PYTEST) $(FILES_AT_ONCE) -m drill

# Everything, drills in whole.
test-all: $(VENV)/.installed-dev
	CRASH_MOMENTS=20 $(PYTEST) $(FILES_AT_ONCE)

$(MEGATRON_NEXT_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(MEGATRON_NEXT_VENV)
	$(MEGATRON_NEXT_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(MEGATRON_NEXT_VENV)/bin/python -c "import torch" 2>/dev/null || \
		$(MEGATRON_NEXT_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(MEGATRON_NEXT_VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	$(MEGATRON_NEXT_VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python "$(MEGATRON_NEXT)"
	touch $@

# Models, updates, checkpoints' contents and every parallel layout, on gloo.
test-megatron-next: $(MEGATRON_NEXT_VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(MEGATRON_NEXT_VENV)/bin/python -m pytest $(FILES_AT_ONCE) tests/distributed

parity: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/parity.py

# A run that is killed and resumed twenty times.
crash-matrix: $(VENV)/.installed-dev
	CRASH_MOMENTS=20 $(PYTEST) -s -m drill tests/integration/test_crash_matrix.py

# 50 problems of GSM8K x 4 samples by SmolLM2-135M-Instruct, killed twice, end in the files of an evaluation that was
# not.
evaluate-drill: $(VENV)/.installed-dev
	EVALUATE_PROBLEMS=50 $(PYTEST) -s tests/integration/test_evaluate.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/.
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/loss.py

bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/loss_cuda.py

seeds: $(VENV)/.installed
	$(BIN)/python benchmarks/seeds.py

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(MEGATRON_NEXT_VENV) build dist *.egg-info
