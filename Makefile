# make demo | test | lint | docs | bench | aot | fuzz: make .venv if it is missing, install what they need, build the extension, and run.
# make demo-distributed: the example in one process, and in two by DDP and by FSDP2, with their losses side by side.
# make sanitize: the extension's tests under AddressSanitizer and UBSan.
# make gpu-dry: the tests marked gpu up to the launch of each kernel, which is compiled for GPUs that need not be here and not run.
# make cuda-build: the CUDA part against a CUDA build of torch, in a virtual environment of its own that takes 6 GB; needs nvcc, no GPU.
# make gpu-ir: every kernel executed from the compiler's IR, in the same environment with a Triton of its own.
# make wheels: an sdist, a pure wheel and one with the extension, each installed and tried; LOWRANK_KERNELS_BUILD=cuda demands the CUDA part.
# make integrations: the tests with Lightning, PEFT, TRL and others, and the table in docs/integrations.md.
# make test: a representative part of the tests, in minutes. make test-all: all of them, with every kernel configuration compiled, and a
# sample of make gpu-ir; without the latter: make test ARGS=--all.
# make gpu: runs with the Python given as PYTHON, as it is: no virtual environment, nothing installed.
# LOWRANK_KERNELS_BUILD=0 | 1: without the extension, or with it or not at all; setup.py has the details.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Arguments for the example, pytest and the benchmark: make test ARGS="-k resume"
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# One thread a worker: two pools of threads on two cores mostly wait for each other.
WORKERS ?= 2
# What GPU machines run. Other than here, the ordinary torch for Linux has CUDA.
CUDA_TORCH ?= torch==2.11.0
CUDA_PYTHON ?= $(shell for python in python3.12 python3.13 "$$HOME"/.pyenv/versions/3.12*/bin/python; do \
	"$$python" --version >/dev/null 2>&1 && echo "$$python" && break; done)
CUDA_VENV ?= .venv-cuda
# ttsem knows the modules of this Triton, which is put in front of the one that comes with torch.
IR_PACKAGES := triton==3.8.0 ttsem==0.1.0
IR_FOLDER = $(abspath $(CUDA_VENV)/triton-3.8)
IR_RUN = OMP_NUM_THREADS=1 LOWRANK_KERNELS_BUILD=0 PYTHONPATH=$(IR_FOLDER) $(CUDA_VENV)/bin/python
# Whose integration make test-all tries too; make test tries that of transformers and accelerate.
FRAMEWORKS ?= galore-torch lightning peft trl torchtitan
# Of make gpu-dry.
ARCHS ?= 80 90 100
# Of make fuzz.
CASES ?= 10000
SEED ?=
# nvcc crashes beside a preloaded sanitizer, so tests/csrc/test_nvcc.py is not among these.
SANITIZE_TESTS ?= tests/test_philox.py tests/test_range_finder.py tests/test_ops.py tests/subspaces tests/csrc/test_emulation.py
CSRC := $(shell find csrc 2>/dev/null)

.PHONY: demo demo-distributed test test-all integrations wheels lint docs bench aot fuzz sanitize gpu-dry cuda-build gpu-ir gpu clean FORCE

demo: $(VENV)/.extra-demo
	$(RUN) examples/pretrain.py $(ARGS)

demo-distributed: $(VENV)/.extra-demo
	$(RUN) examples/side_by_side.py $(ARGS)

test: $(VENV)/.extra-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(VENV)/.extra-test $(VENV)/.frameworks $(IR_FOLDER)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest --all -n $(WORKERS) --dist worksteal --junitxml build/tests.xml $(ARGS)
	$(RUN) -m tests.integrations.table --check build/tests.xml
	$(IR_RUN) -m benchmarks.ir --sample --workers $(WORKERS)

# Writes the table of docs/integrations.md.
integrations: $(VENV)/.extra-test $(VENV)/.frameworks
	OMP_NUM_THREADS=1 $(RUN) -m pytest --all -n $(WORKERS) --dist worksteal --junitxml build/integrations.xml tests/integrations
	$(RUN) -m tests.integrations.table build/integrations.xml

lint: $(VENV)/.lint $(VENV)/.torch
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# build/wheels: the sdist and the pure wheel, and a wheel with the extension for TORCH. Each is checked in a virtual environment of its own.
wheels: $(VENV)/.torch
	rm -rf build/wheels
	$(PIP) '$(TORCH)' build twine
	LOWRANK_KERNELS_BUILD=0 $(RUN) -m build --outdir build/wheels
	LOWRANK_KERNELS_BUILD=$(or $(LOWRANK_KERNELS_BUILD),1) LOWRANK_KERNELS_WHEEL=1 $(RUN) -m build --wheel --no-isolation --outdir build/wheels
	$(RUN) -m twine check --strict build/wheels/*
	$(RUN) -m tests.check_wheel --torch '$(TORCH)' build/wheels/*

# The pages of docs/ as a site in build/site; a broken link or name is an error.
docs: $(VENV)/.extra-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs --quiet build --strict --site-dir build/site $(ARGS)

bench: $(VENV)/.extra-bench
	$(RUN) -m benchmarks $(ARGS)

# What the compiler makes of every kernel configuration, for GPUs that need not be here, and the tests of its budgets.
aot: $(VENV)/.extra-test
	$(RUN) -m benchmarks.aot --json build/aot.json $(ARGS)
	AOT_REPORTS=build/aot.json $(RUN) -m pytest -q tests/kernels/test_aot.py

gpu-dry: $(VENV)/.extra-test
	$(foreach arch,$(ARCHS),OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal -p tests.dry_lane --dry-arch $(arch) \
		--all $(ARGS) &&) true

# Random cases of the step against the reference: CASES of them, from SEED on (default: a random one, which is printed).
fuzz: $(VENV)/.extra-test
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --cases $(CASES) --workers $(WORKERS) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Python is not built with the sanitizer, so its runtime has to be loaded first, and libstdc++ with it: it looks up what throws exceptions
# when it starts. Python never frees a part of what it allocates, so leaks are not reported. Nothing is captured: a report ends the process.
sanitize: PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so)
sanitize: $(VENV)/.extra-test
	LOWRANK_KERNELS_BUILD=1 CXX=g++ $(RUN) setup.py --quiet build_ext --sanitize --build-lib build/sanitize
	LOWRANK_KERNELS_LIBRARY=build/sanitize/lowrank_kernels/_C.so LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(RUN) -m pytest --all --capture=no $(SANITIZE_TESTS) $(ARGS)

cuda-build: $(CUDA_VENV)/.torch
	$(CUDA_VENV)/bin/python -m benchmarks.cuda_build --workers $(WORKERS) $(ARGS)

# With ARGS="--out benchmarks/results/ir/triton-3.8.0.txt" it writes the log that is to be committed. It takes two hours of two cores;
# with --journal build/ir.jsonl as well it can be interrupted, and goes on where it was.
gpu-ir: $(IR_FOLDER)/.installed
	$(IR_RUN) -m benchmarks.ir --workers $(WORKERS) $(ARGS)
	$(IR_RUN) -m pytest -q tests/kernels/test_ir.py

# Needs torch, triton, ninja, nvcc, pytest and hypothesis in that Python; with pytest-xdist the tests run side by side. In nine minutes, with
# a summary at the end whatever happens: make gpu ARGS="--stages full --minutes 60".
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs
	rm -f lowrank_kernels/_C.* lowrank_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Holds the requirement that is installed, so that another TORCH installs anew.
$(VENV)/.torch: FORCE | $(VENV)/bin/python
	@test "$$(cat $@ 2>/dev/null)" = '$(TORCH)' || { $(PIP) '$(TORCH)' 'setuptools>=77' wheel ninja && echo '$(TORCH)' > $@; }

$(CUDA_VENV)/bin/python:
	@test -n "$(CUDA_PYTHON)" || { echo "no Python 3.12 or 3.13 was found: name one with CUDA_PYTHON=path"; exit 1; }
	$(CUDA_PYTHON) -m venv $(CUDA_VENV)

# Triton 3.6, which comes with this torch, needs numpy < 2.4 for its interpreter.
$(CUDA_VENV)/.torch: FORCE | $(CUDA_VENV)/bin/python
	@test "$$(cat $@ 2>/dev/null)" = '$(CUDA_TORCH)' || { $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		'$(CUDA_TORCH)' 'numpy>=1.26,<2.4' 'setuptools>=77' wheel ninja 'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6.100' rich matplotlib \
		&& echo '$(CUDA_TORCH)' > $@; }

$(IR_FOLDER)/.installed: $(CUDA_VENV)/.torch
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(IR_FOLDER) $(IR_PACKAGES)
	touch $@

# Holds LOWRANK_KERNELS_BUILD, so that another value builds anew, or removes what was built.
$(VENV)/.mode: FORCE | $(VENV)/bin/python
	@test -f $@ -a "$$(cat $@ 2>/dev/null)" = '$(LOWRANK_KERNELS_BUILD)' || echo '$(LOWRANK_KERNELS_BUILD)' > $@

FORCE:

$(VENV)/.extra-%: pyproject.toml setup.py $(CSRC) $(VENV)/.torch $(VENV)/.mode
	$(PIP) --no-build-isolation --editable ".[$*]"
	@$(RUN) -m lowrank_kernels | grep ^extension
	touch $@

# What cannot be installed here has its tests skipped.
$(VENV)/.frameworks: pyproject.toml $(VENV)/.torch
	@for package in $(FRAMEWORKS); do $(PIP) '$(TORCH)' $$package || echo "$$package was not installed: its tests are skipped"; done
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) $$(sed -n 's/^dev = .*"\(ruff[^"]*\)".*"\(mypy[^"]*\)".*/"\1" "\2"/p' pyproject.toml | tr -d '"')
	touch $@
