# Everything a newcomer or developer runs. `make` alone lists the commands.
#
#   PYTHON   the interpreter that .venv is made from
#   VENV     the environment; `VENV=` (empty) uses PYTHON as it is and installs nothing
#   EP       processes that the demo's experts are spread over
#   ARGS     passed on to the demo, pytest or the benchmark
#   TORCH    the pip requirement for torch

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EP ?= 1

# Major CUDA version of NVIDIA's driver; empty on a machine without a GPU.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA [A-Z ]*Version: *([0-9]+)\..*/\1/p' | head -n 1)
ifneq ($(filter 9 10 11,$(CUDA)),)
$(warning the NVIDIA driver is for CUDA $(CUDA); CuPy 14 needs CUDA 12 or newer, so the GPU is left alone)
CUDA :=
endif

# A release of torch is built for one CUDA version. Without a GPU it is one exact release, so that a CPU
# build pip has been told of (find-links, an extra index) is taken before a newer build with CUDA in it.
ifeq ($(CUDA),)
EXTRAS := torch,dev
TORCH ?= torch==2.13.0
else ifeq ($(CUDA),12)
EXTRAS := torch,dev,cuda12
TORCH ?= torch==2.10.*
else
EXTRAS := torch,dev,cuda13
TORCH ?= torch>=2.11
endif

EXTENSION_SOURCES := setup.py $(shell find ffmoe_core -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

ifeq ($(VENV),)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

.PHONY: help build demo test lint format gpu-test bench-cpu bench-gpu tune tables dist clean
.DELETE_ON_ERROR:

help:  ## list these commands
	@awk -F ':.*## +' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

ifeq ($(VENV),)
build:
	$(PY) setup.py -q build_ext --inplace
else
build: $(VENV)/.built  ## set up .venv and build the extensions
endif

demo: build  ## train a small MoE language model (EP=2: on two processes; ARGS="--help" lists its options)
	$(if $(filter-out 1,$(EP)),mpirun -n $(EP)) $(PY) examples/train_lm.py $(ARGS)

test: build  ## run the tests (ARGS="-k router" chooses some)
	$(PY) -m pytest $(ARGS)

lint: build  ## formatting, lint and types, as CI checks them
	pre-commit run --all-files --show-diff-on-failure

format: build  ## reformat, and fix what lint can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

gpu-test: build  ## all tests and sanitizers on an NVIDIA GPU, recorded in benchmarks/results/
	$(PY) benchmarks/gpu_record.py $(ARGS)

bench-cpu: build  ## time a layer on the CPU beside its peers, recorded in benchmarks/results/
	$(PY) benchmarks/cpu_layer.py $(ARGS)

bench-gpu: build  ## time a layer on a GPU beside its peers, recorded in benchmarks/results/
	$(PY) benchmarks/layer.py $(ARGS)

tune: build  ## find the fastest tiles on a GPU, for ffmoe_core/cuda/tiles.json
	$(PY) benchmarks/tune.py $(ARGS)

tables: build  ## write README's tables from benchmarks/results/
	$(PY) benchmarks/readme_tables.py

dist: build  ## build the sdist and the wheel into dist/
	$(PY) -m build --outdir dist

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info $(if $(VENV),$(VENV)/.built)
	find ffmoe_core -name '*.so' -delete -o -name '*.c' -delete

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"ffmoe needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=...")'
	@command -v $${CC:-cc} >/dev/null || { echo "ffmoe needs a C compiler (cc)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What was asked for the last time; with another torch or other extras, .venv is brought up to date.
WANTED := $(TORCH) $(EXTRAS)
ifneq ($(shell cat $(VENV)/.wanted 2>/dev/null),$(WANTED))
.PHONY: $(VENV)/.wanted
endif
$(VENV)/.wanted: | $(VENV)/bin/python
	echo '$(WANTED)' > $@

# Editable: `import ffmoe_core` works from any folder and sees an edit at once.
$(VENV)/.installed: pyproject.toml $(VENV)/.wanted | $(VENV)/bin/python
	$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requires.txt
	$(PY) -m pip install '$(TORCH)' --requirement $(VENV)/build-requires.txt
	$(PY) -m pip install --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.built: $(VENV)/.installed $(EXTENSION_SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@
