# make demo | test | lint | bench: make .venv if it is missing, install what they need, and run.
# make gpu: runs with the Python given as PYTHON, as it is: no virtual environment, nothing installed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Arguments for the example, pytest and the benchmark: make test ARGS="-k resume"
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# One thread a worker: two pools of threads on two cores mostly wait for each other.
WORKERS ?= 2
# Those that run on a GPU; the others would only be collected, and need more packages for it.
GPU_TESTS := tests/test_philox.py tests/test_range_finder.py tests/kernels tests/subspaces tests/optim

.PHONY: demo test lint bench gpu clean FORCE

demo: $(VENV)/.extra-demo
	$(RUN) examples/pretrain.py $(ARGS)

test: $(VENV)/.extra-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.extra-bench
	$(RUN) -m benchmarks $(ARGS)

# Needs torch, triton, pytest and hypothesis in that Python; with pytest-xdist the kernels compile side by side. There is nothing to
# build before csrc/ has sources.
gpu: SIDE_BY_SIDE = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && printf '%s' '-n 8')
gpu:
	$(if $(wildcard csrc/*),$(PYTHON) setup.py --quiet build_ext --inplace)
	$(PYTHON) -m pytest -m gpu -x $(SIDE_BY_SIDE) $(GPU_TESTS) $(ARGS)
	$(PYTHON) -m benchmarks --seconds 180

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Holds the requirement that is installed, so that another TORCH installs anew.
$(VENV)/.torch: FORCE | $(VENV)/bin/python
	@test "$$(cat $@ 2>/dev/null)" = '$(TORCH)' || { $(PIP) '$(TORCH)' 'setuptools>=77' wheel ninja && echo '$(TORCH)' > $@; }

FORCE:

$(VENV)/.extra-%: pyproject.toml setup.py $(VENV)/.torch
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) "$$(sed -n 's/.*"\(ruff[^"]*\)".*/\1/p' pyproject.toml)"
	touch $@
