# Every target sets up what it needs, and is quick the second time.
#   make test                      lint and tests, in a virtual environment in .venv
#   make demo                      the whole road in one command: runs/demo/report.html
#   make rl-demo                   SOAR first, then RL, and what comes of it: runs/rl/report.html
#   make test-newest               the tests with Python 3.12 or newer and the newest of everything, in .venv-newest
#   SOAR_PYTHON=python make demo   the same in the active environment, with the torch (CUDA) it already has

SHELL := /bin/bash
.DELETE_ON_ERROR:

ifeq ($(strip $(SOAR_PYTHON)),)
PYTHON := .venv/bin/python
READY := .venv/ready
else
PYTHON := $(SOAR_PYTHON)
READY := .ready-$(shell $(SOAR_PYTHON) -c "import hashlib, sys; print(hashlib.sha256(sys.prefix.encode()).hexdigest()[:12])")
endif

# The tests are many small processes: one thread each.
TEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest

.PHONY: setup lint test test-newest test-slow test-gpu test-slurm demo rl-demo base study clean

setup: $(READY)

# torch comes first: what is built later must see the torch it will run with.
.venv/ready: setup.py constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "soar_mega needs Python 3.11 or newer as python3" >&2; exit 1; }
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# In an environment of the user's own, what touches torch keeps its version (tools/keep_torch.py).
.ready-%: setup.py tools/keep_torch.py
	$(PYTHON) tools/keep_torch.py > $@.constraints
	$(PYTHON) -m pip install --disable-pip-version-check -c $@.constraints -e '.[dev]'
	@touch $@

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check --quiet .
	$(PYTHON) -m mypy

# Two files at a time: half of the tests' time is waiting for other processes. These tests see no GPU; tests/gpu does, and
# says that it was skipped where there is none.
test: lint
	$(TEST) -n 2 --dist loadfile --no-loadscope-reorder
	$(TEST) tests/gpu

# The newest versions that setup.py allows: megatron-core is another one there, and torch a CUDA build of several GB.
NEWEST := .venv-newest/bin/python

.venv-newest/ready: setup.py
	@for python in $$NEWEST_PYTHON python3 python3.12 python3.13 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then $$python -m venv .venv-newest && exit; fi; \
	done; echo "make test-newest needs Python 3.12 or newer: name one in NEWEST_PYTHON" >&2; exit 1
	$(NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade torch
	$(NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	@touch $@

test-newest: .venv-newest/ready
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(TEST) -m slow --timeout 1800

# tools/gpu_check.sh runs them side by side, and the demo, and writes down what came out.
test-gpu: $(READY)
	$(TEST) tests/gpu

# A real SLURM on this machine (root; installed where it is missing). Elsewhere the tests say that they were not run.
test-slurm: $(READY)
	$(TEST) tests/slurm -m "slurm and not slow" --durations 0 --durations-min 5

demo: $(READY)
	$(PYTHON) tools/demo.py

rl-demo: $(READY)
	$(PYTHON) tools/rl_demo.py

base: $(READY)
	$(PYTHON) tools/make_base.py

study: $(READY)
	$(PYTHON) tools/sweep.py recipes/tiny/study.yaml --out benchmarks/results/$$(date +%F)-cpu-study

clean:
	rm -rf .venv .venv-newest .ready-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
