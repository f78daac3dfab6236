# One target for each thing a developer does. `make test` and `make demo` set up all that they need.
#   VENV=      uses the interpreter in place, which then must hold torch, numpy, pytest, hypothesis,
#              setuptools, tqdm, cuda-core
#   PYTHON=... the interpreter to start from

VENV ?= .venv
PYTHON ?= python3

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH=. $(PYTHON)
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Where a GPU answers and the interpreter already has a CUDA build of torch, the venv sees that one.
HAS_CUDA_TORCH = $(PYTHON) -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null

# Warnings are errors here, and never where pip builds.
build $(VENV)/.ready: export FA_SM120_CFLAGS := -Wall -Wextra -Werror $(FA_SM120_CFLAGS)

.PHONY: demo test quick build bench docs hub lint format asan warmup clean cross-compilers

demo: build
	$(RUN) -m flash_attn_sm120 demo

test: build
	$(RUN) -m pytest $(PYTEST_ARGS)

build: $(READY)
	$(RUN) setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml
	if $(HAS_CUDA_TORCH); \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	elif nvidia-smi >/dev/null 2>&1; \
	then $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q torch; \
	else $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q torch==2.13.0; \
	fi
	$(VENV)/bin/pip install -q -e .[test,bench]
	touch $@

bench: build
	FA_SM120_LIMITS=120 $(RUN) benchmarks/forward.py
	FA_SM120_LIMITS=120 $(RUN) benchmarks/backward.py --graph
	$(RUN) benchmarks/overhead.py

warmup: build
	$(RUN) -m flash_attn_sm120 warmup

docs: build
	$(RUN) docs/make_api.py
	$(RUN) benchmarks/where_it_stands.py

hub: build
	rm -rf build/wheels build/lib*  # what is left of files that are gone
	$(RUN) -m pip wheel -q --no-deps --no-build-isolation -w build/wheels .
	$(RUN) hub/build.py build/wheels/*.whl --output build/hub

quick: build
	$(RUN) -m pytest -q -m quick

lint: build
	$(RUN) -m pytest -q tests/gates/test_source.py tests/gates/test_layers.py

format: $(READY)
	$(RUN) -m ruff format flash_attn_sm120 emulator tests benchmarks docs examples hub conftest.py setup.py
	$(RUN) -m ruff check --fix -q flash_attn_sm120 emulator tests benchmarks docs examples hub conftest.py setup.py
	$(dir $(RUN))clang-format -i csrc/*.[ch] csrc/cpu/*.[ch] kernels/* tests/helpers/*.[ch] emulator/*.[ch]

asan: build
	$(RUN) -m pytest -q tests/host/test_sanitizers.py

# What tests/gates/test_platforms.py compiles for Windows and aarch64 with, and runs the latter on.
CROSS_COMPILERS := gcc-mingw-w64-x86-64-win32 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
cross-compilers:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends $(CROSS_COMPILERS)

clean:
	rm -rf build dist *.egg-info flash_attn_sm120/*.so
