# make demo and make test do everything on a fresh machine; `make` lists the targets.

PYTHON ?= python3
# What pip installs where .venv has no torch, with pip's options if need be:
# TORCH_SPEC=torch==2.13.0, TORCH_SPEC="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH_SPEC ?= torch
# ON makes warnings errors, as CI does; a compiler that is newer than the code may have new ones.
WERROR ?= OFF
BUILD := build/dev

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The tools of the environment (cmake, ninja, ...) come before the system's.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install --quiet

# One file for each step that is done; `touch` follows the step, so a failed one is tried again.
# They lie in what they describe, so that removing .venv or build/ is safe.
DONE := $(VENV)/.done
PACKAGE := $(BUILD)/.package-done
CPP_SOURCES = $(shell find csrc tests/cpp bench/cpp -name '*.h' -o -name '*.cc' -o -name '*.cu' 2>/dev/null)

.NOTPARALLEL:
.PHONY: help demo test lint bench sanitize build ctest pytest clean

help:
	@echo "make demo    run the demo model with a small expert cache, and compare"
	@echo "make test    lint, C++ tests and Python tests"
	@echo "make lint    formatting, static checks, types, include directions"
	@echo "make bench   benchmarks"
	@echo "make sanitize  C++ tests of core and host under ASan, UBSan and TSan"
	@echo "make build   build what changed, into .venv"
	@echo "make clean   remove build results (and .venv: rm -r .venv)"
	@echo "TORCH_SPEC=torch==2.13.0 chooses the torch that is installed where .venv has none."

demo: build
	$(BIN)/expertflow demo

test: lint ctest pytest

lint: $(DONE)/test-tools
	clang-format --dry-run -Werror $(CPP_SOURCES)
	python tools/check_includes.py
	ruff check .
	ruff format --check .
	mypy

ctest: build $(DONE)/test-tools
	sh tools/require_packages.sh gtest
	cmake -S . -B $(BUILD) -DEXPERTFLOW_BUILD_TESTS=ON -DEXPERTFLOW_WERROR=$(WERROR) --log-level=WARNING
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j 2

pytest: build $(DONE)/test-tools
	python -m pytest -q

bench: build $(DONE)/test-tools
	sh tools/require_packages.sh benchmark
	cmake -S . -B $(BUILD) -DEXPERTFLOW_BUILD_BENCH=ON -DEXPERTFLOW_WERROR=$(WERROR) --log-level=WARNING
	cmake --build $(BUILD)
	set -e; for bench in $(BUILD)/*_bench; do \
	  case $$bench in */cuda_*) nvidia-smi >/dev/null 2>&1 || continue ;; esac; $$bench; done
	set -e; for bench in bench/*_bench.py; do python $$bench; done

# The tests of core and host, which need no Python: build/asan (with UBSan) and build/tsan.
sanitize: $(DONE)/build-tools
	sh tools/require_packages.sh gtest
	sh tools/run_sanitized.sh asan address,undefined
	sh tools/run_sanitized.sh tsan thread

# What changed since the package was installed, which built everything once.
build: $(PACKAGE)
	cmake --build $(BUILD)
	cmake --install $(BUILD) --prefix expertflow >$(BUILD)/install.log

clean:
	rm -rf build dist *.egg-info expertflow/*.so

$(DONE)/venv:
	PYTHON=$(PYTHON) sh tools/require_packages.sh compiler python
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(DONE)
	touch $@

# A torch that is there stays, whatever TORCH_SPEC says.
$(DONE)/torch: $(DONE)/venv
	@echo "Installing torch into $(VENV), unless it is there (TORCH_SPEC=$(TORCH_SPEC))"
	$(BIN)/python cmake/find_torch.py >/dev/null 2>&1 || { spec="$(TORCH_SPEC)"; $(PIP) $$spec; }
	$(BIN)/python cmake/find_torch.py
	touch $@

$(DONE)/build-tools: pyproject.toml $(DONE)/torch
	$(PIP) $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',"')
	touch $@

$(PACKAGE): setup.py $(DONE)/build-tools
	@echo "Building and installing ExpertFlow into $(VENV)"
	CMAKE_ARGS="-DEXPERTFLOW_WERROR=$(WERROR)" $(PIP) --no-build-isolation --editable .
	touch $@

# The package is there already: this adds what its extra asks for.
$(DONE)/test-tools: $(PACKAGE)
	@echo "Installing the test tools into $(VENV)"
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $@
