# Every command sets up what it needs in $(VENV) and can be run again. Variables, as NAME=value:
#   VENV         the virtual environment to use                    (.venv)
#   PYTHON       the Python it is made from                        (python3)
#   TORCH        the torch to install into it                      (torch==2.13.0)
#   TORCH_INDEX  where pip takes that torch from; empty: as pip is configured. PyPI's torch brings
#                several GB of CUDA; the CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         more arguments for pytest                         (empty)
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# One worker a core, each with one torch thread. A later -n in ARGS wins: ARGS="-n 0 -k route".
PYTEST := $(BIN)/pytest -n logical --maxprocesses 4
PY_SOURCES := $(wildcard pmod_ops pmod_model tests bench tools setup.py)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
CUDA_SOURCES := $(shell find csrc/cuda -name '*.cu' -o -name '*.cuh')
CXX_TESTS := $(shell find tests/cpp -name '*.cpp' -o -name '*.h')
BUILD_INPUTS := $(CXX_SOURCES) $(CUDA_SOURCES) CMakeLists.txt setup.py pyproject.toml \
	tools/backend.py tools/nvcc.py tools/toolchain.py tools/torchfind.py

.PHONY: help demo test emulated test-emulator coverage mutate gpu lint bench bench-baseline format
.PHONY: check-all check-all-status clean test-cpp test-aarch64 sanitize sanitize-ops sanitize-cpp
.PHONY: sanitize-threads sanitize-emulated sanitize-emulated-threads

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		awk -F '\t' '{ printf "  make %-18s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## train p-MoD and a dense twin on easy-VQA and write build/demo/report.html
	$(BIN)/pmod train --output build/demo/pmod --overwrite $(ARGS)
	$(BIN)/pmod train --dense --output build/demo/dense --overwrite $(ARGS)
	$(BIN)/pmod evaluate --model build/demo/pmod
	$(BIN)/pmod evaluate --model build/demo/dense
	$(BIN)/pmod generate --model build/demo/pmod --image easy-vqa:3 \
		--prompt "what color is the shape?" --prompt "what shape is in the image?" \
		--prompt "is there a circle?"
	$(BIN)/pmod report build/demo/pmod build/demo/dense --output build/demo/report.html

test: $(VENV)/.installed emulated  ## run the tests on the CPU, the CUDA kernels emulated
	$(PYTEST) $(ARGS)

# Builds the CUDA kernels for the CPU, with the torch of the environment, in a folder, with more
# options for CMake.
define build-emulated
cmake -S . -B $(1) -G Ninja -U 'PMOD_*' -DPMOD_EMULATED=ON $(PMOD_CMAKE_ARGS) \
	-DPMOD_TORCH_DIR="$$($(BIN)/python -c 'import importlib.util as u; \
		print(u.find_spec("torch").submodule_search_locations[0])')" \
	-DPMOD_PYTHON_INCLUDE="$$($(BIN)/python -c 'import sysconfig; \
		print(sysconfig.get_path("include"))')" $(2)
cmake --build $(1) --parallel "$$(nproc)"
endef
MODULE := tests/emulator/pmod_emulated.so

emulated: $(VENV)/.installed
	$(call build-emulated,build/emulated,)

test-emulator: emulated  ## run the C++ tests of the emulator and of the emulated CUDA kernels
	$(call ctest,build/emulated)

coverage: $(VENV)/.installed  ## run all tests of the emulated CUDA kernels: which lines do they reach?
	$(call build-emulated,build/coverage,-DPMOD_COVERAGE=ON)
	find build/coverage -name '*.gcda' -delete
	$(call ctest,build/coverage)
	PMOD_EMULATED_MODULE=build/coverage/$(MODULE) $(PYTEST) tests/emulated $(ARGS)
	$(BIN)/python tools/cuda_coverage.py build/coverage

mutate: $(VENV)/.installed  ## change the CUDA kernels in one place after the other: do the tests notice?
	$(BIN)/python tools/mutate.py $(ARGS)

gpu: $(VENV)/.installed  ## test and time everything on a GPU in ten minutes: build/gpu/report.md
	$(BIN)/python tools/gpu.py $(ARGS)

# A shell command that fails and says what to install if a program is missing.
need = command -v $(1) >/dev/null || { echo "$(1) not found; install it: $(2)" >&2; exit 1; }

# Builds and runs the C++ tests in a folder, with more options for CMake. What CMake cached of an
# earlier environment does not carry over: not its Ninja, and no option.
define cpp-tests
@$(call need,cmake,pip install cmake)
@$(call need,ninja,pip install ninja)
@$(call need,$${CXX:-c++},apt install g++)
cmake -S . -B $(1) -G Ninja -U 'PMOD_*' -DCMAKE_MAKE_PROGRAM="$$(command -v ninja)" \
	-DPMOD_CPP_TESTS=ON $(PMOD_CMAKE_ARGS) $(2)
cmake --build $(1) --parallel "$$(nproc)"
$(call ctest,$(1))
endef
ctest = ctest --test-dir $(1) --no-tests=error --verbose --parallel "$$(nproc)"

test-cpp:  ## build and run the tests of the C++ code that knows no tensors; needs no torch
	$(call cpp-tests,build/cpp)

# The bits must be those of the machine at hand, and nothing of x86 may be compiled.
test-aarch64: test-cpp  ## the same for 64-bit ARM: cross-compiled, run in an emulator
	@$(call need,aarch64-linux-gnu-g++,apt install g++-aarch64-linux-gnu)
	@$(call need,qemu-aarch64,apt install qemu-user)
	$(call cpp-tests,build/cpp-aarch64,-DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake)
	! ninja -C build/cpp-aarch64 -t deps | grep -E '/(x86|x86[a-z]*intrin|[a-z]+mmintrin)\.h$$'
	cmp build/cpp/bits.txt build/cpp-aarch64/bits.txt

sanitize: sanitize-ops sanitize-cpp sanitize-threads  ## run op and C++ tests under ASan, UBSan, TSan
sanitize: sanitize-emulated sanitize-emulated-threads

UNDER_ASAN = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	$$($${CXX:-c++} -print-file-name=libubsan.so)"

# The second file proves that it is the sanitized package that is tested. No search for leaks: the
# interpreter itself has some.
sanitize-ops: SANITIZED := $(abspath build/sanitized)
sanitize-ops: $(VENV)/.installed
	PMOD_CUDA=0 PMOD_CMAKE_ARGS="$(PMOD_CMAKE_ARGS) '-DPMOD_SANITIZE=address;undefined'" \
		$(PIP) --no-deps --no-build-isolation --upgrade --target $(SANITIZED) .
	PYTHONPATH=$(SANITIZED) $(UNDER_ASAN) $(PYTEST) tests/ops tests/build/test_installed_package.py \
			-m 'not compile and not slow' $(ARGS)

sanitize-cpp:
	$(call cpp-tests,build/cpp-address,'-DPMOD_SANITIZE=address;undefined')

sanitize-threads:
	$(call cpp-tests,build/cpp-thread,-DPMOD_SANITIZE=thread)

sanitize-emulated: $(VENV)/.installed
	$(call build-emulated,build/emulated-address,'-DPMOD_SANITIZE=address;undefined')
	$(call ctest,build/emulated-address)
	PMOD_EMULATED_MODULE=build/emulated-address/$(MODULE) $(UNDER_ASAN) $(PYTEST) tests/emulated $(ARGS)

# Races between CUDA threads: only their barriers and atomics order what they do.
sanitize-emulated-threads: $(VENV)/.installed
	$(call build-emulated,build/emulated-thread,-DPMOD_SANITIZE=thread)
	$(call ctest,build/emulated-thread)

lint: $(VENV)/.installed  ## check formatting, style, types and C++ with every linter
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_TESTS)
	$(BIN)/run-clang-tidy.py -quiet -p build/cmake -clang-tidy-binary $(BIN)/clang-tidy 'csrc/.*\.cpp$$'

# Memory that is freed stays with the process, for every side: mapping it afresh costs more than the
# copy itself. The default of glibc is measured apart, on a few shapes, if ARGS is empty. Threads are
# bound to cores: left alone, two may share one for as long as a run takes.
BENCH := env OMP_PROC_BIND=true $(BIN)/pytest bench --benchmark-enable --benchmark-only \
	--benchmark-storage=file://bench/results --benchmark-columns=median,iqr,rounds
RETAINED := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
	MALLOC_TOP_PAD_=1073741824
BENCH_NAME := run

bench: $(VENV)/.installed  ## time every op and its peers; ARGS="-k gather" times a part
ifeq ($(strip $(ARGS)),)
	$(BENCH) --subset --benchmark-save=default-allocator-$(BENCH_NAME)
endif
	env $(RETAINED) $(BENCH) --benchmark-save=$(BENCH_NAME) $(ARGS)

bench-baseline:  ## time everything, replace the committed results and docs/benchmarks.md
	$(MAKE) bench ARGS= BENCH_NAME=baseline
	$(BIN)/python tools/bench_report.py --adopt

format: $(VENV)/.installed  ## rewrite the sources in the project's format
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/ruff check --fix $(PY_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES) $(CXX_TESTS)

check-all: $(VENV)/.installed  ## run every check there is, record it in docs/check-all.json
	$(BIN)/python tools/check_all.py --torch '$(TORCH)'

check-all-status: $(VENV)/.installed  ## say whether docs/check-all.json was made from these sources
	@$(BIN)/python tools/check_all.py --status

clean:  ## remove everything that was built; the virtual environment stays
	rm -rf build dist *.egg-info pmod_ops/*.so .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed

# Torch comes first and alone: a plain `pip install .` would let pip choose another, larger one.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) 'setuptools>=77' cmake ninja
	touch $@

# Without isolation the build tree and its tools stay: a change of one file compiles one file.
$(VENV)/.installed: $(VENV)/.created $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --editable '.[model,demo,dev]'
	touch $@
