# `make demo` and `make test` need python3 (>= 3.11) and a C++ compiler; everything else they install into .venv.

PYTHON ?= python3
VENV ?= .venv
# Extras of pyproject.toml that this environment gets.
EXTRAS ?= balance examples test dev
RUN ?= runs/demo
SANITIZE ?=

BIN = $(VENV)/bin
CXX_FILES = $(shell find xla_ffi benchmarks -name '*.cc' -o -name '*.cu' -o -name '*.h' \
  -o -name '*.cuh')
# The folders stand for sources that came or went.
NATIVE = $(filter xla_ffi/%,$(CXX_FILES)) \
  $(shell find xla_ffi -type d -o -name '*.cmake' -o -name CMakeLists.txt)
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help build demo test lint types format format-check cpp-test bazel smoke-newest clean

help:
	@echo 'make demo          train the default preset on 8 virtual CPU devices, then decode from it'
	@echo 'make test          run the test suite'
	@echo 'make build         install into $(VENV), or compile again what changed in xla_ffi/'
	@echo 'make lint types format format-check'
	@echo 'make cpp-test      C++ tests by CMake; SANITIZE=thread or address for a sanitizer'
	@echo 'make bazel         native libraries and C++ tests by Bazel'
	@echo 'make smoke-newest  smoke tests with the newest JAX, where a Python >= 3.12 is found'
	@echo 'make clean         remove environments and build products'

# The requirements come first and alone, so that compiling needs no isolated environment of its own
# and sees the jaxlib that it will run with.
$(VENV)/requirements.stamp: pyproject.toml tools/requirements.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing requirements into $(VENV) (a minute or two the first time) ...'
	@$(BIN)/python tools/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	@$(PIP) install --quiet -r $(VENV)/requirements.txt
	@$(BIN)/python tools/requirements.py --build-tools > $(VENV)/build-tools.txt
	@if [ -s $(VENV)/build-tools.txt ]; then $(PIP) install --quiet -r $(VENV)/build-tools.txt; fi
	@touch $@

$(VENV)/build.stamp: $(VENV)/requirements.stamp $(NATIVE)
	@echo 'Compiling xla_ffi/ ...'
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@cat $(VENV)/lib/python3*/site-packages/jaxmoe/lib/cuda_library.txt
	@touch $@

build: $(VENV)/build.stamp

demo: build
	$(BIN)/python examples/pretrain.py --preset demo --run-dir $(RUN) --overwrite
	$(BIN)/python examples/decode.py $(RUN) --prompt "def "

test: build
	$(BIN)/python -m pytest -n 2

lint: build
	$(BIN)/ruff check .

types: build
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

format-check: build
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

CPP_BUILD = build/cpp-test$(addprefix -,$(SANITIZE))
cpp-test: build
	PATH="$(abspath $(BIN)):$$PATH" cmake -S xla_ffi -B $(CPP_BUILD) -DJAXMOE_TESTS=ON -DJAXMOE_CUDA=OFF \
	  -DJAXMOE_SANITIZE=$(SANITIZE) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(CPP_BUILD) --parallel 2 --target cpp_tests
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir $(CPP_BUILD) --output-on-failure --no-tests=error

bazel: build
	bazel test --repo_env=JAXMOE_PYTHON=$(abspath $(BIN)/python) //...

# The same rules with another Python; its newest JAX needs Python >= 3.12.
smoke-newest:
	@python="$$(tools/find_newer_python.sh)"; \
	if [ -z "$$python" ]; then \
	  echo 'smoke-newest: skipped, no Python >= 3.12 with venv on PATH or in pyenv (the newest JAX needs one)'; \
	else \
	  $(MAKE) --no-print-directory VENV=.venv-newest PYTHON="$$python" EXTRAS='balance examples test' smoke; \
	fi

.PHONY: smoke
smoke: build
	$(BIN)/python -c 'import sys, jax; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	$(BIN)/python -m pytest -n 2 -m smoke

clean:
	if [ -e build/bazel-out ]; then bazel clean --expunge; fi
	rm -rf .venv .venv-newest build dist .mypy_cache .pytest_cache .ruff_cache
