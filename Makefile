# The two commands of the README, and what CI needs besides. Everything lives in a virtual environment of its own, so a
# fresh machine needs Python 3.10 or later and a C compiler, and a second run reuses what the first one set up.
#
#   make mnist                      train the PyTorch MNIST example with SAM (torchvision downloads the data)
#   make mnist DATA=folder          the same from a folder with the four MNIST .gz files, without a network
#   make mnist EPOCHS=14            as long as the original example (2 minutes an epoch on two cores)
#   make test                       C tests under sanitizers, then pytest, on the wheel that `make wheel` builds
#   make lint                       formats, clang-tidy, ruff, mypy
#   make bench                      one SAM step beside its peers
#   make gpu                        everything that a GPU must show, in 8 minutes, with the python and nvcc that are there
#   make gpu ARGS=--dry-run         the same walk without a GPU
#
# Variables: PYTHON, VENV, TORCH (what pip installs, e.g. TORCH=torch==2.13.0), JOBS (test files at a time), ARGS (more
# flags for the command).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
DATA ?=
EPOCHS ?= 3
JOBS ?= 2
ARGS ?=
BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc cuda python -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') python/flatmin/py.typed \
           CMakeLists.txt setup.py pyproject.toml README.md LICENSE
C_FILES := $(wildcard csrc/*/*.[ch] cuda/*.[ch] cuda/*.cu cuda/*.cuh tests/c/*.[ch] tests/c/*.cpp tests/emu/*.[ch] tests/emu/*.cpp \
           benchmarks/*.c)
INCLUDES := -Icsrc/math -Icsrc/core -Icsrc/cpu -Icsrc/torch -Icuda
# kernels.c is checked twice: what is written for one instruction set is not there in the other.
LINT_MARCH := $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v4)

.PHONY: mnist test ctest pytest lint bench gpu wheel clean

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.created
	$(BIN)/pip install --quiet $(foreach package,$(TORCH),'$(package)') numpy tqdm matplotlib
	touch $@

$(VENV)/.test-tools: $(VENV)/.torch
	$(BIN)/pip install --quiet pytest pytest-xdist hypothesis scipy pillow cmake ninja torch-abi-audit \
	  nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# One wheel file for every environment: a second VENV installs the one that the first built and tested.
wheel: dist/.built
dist/.built: $(SOURCES) | $(VENV)/.created
	rm -rf dist build/bdist.* build/lib* build/temp.*
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	touch $@

$(VENV)/.installed: dist/.built $(VENV)/.torch
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/flatmin-*.whl
	touch $@

$(VENV)/.torchvision: $(VENV)/.torch
	$(BIN)/pip install --quiet torchvision
	touch $@

mnist: $(VENV)/.installed $(if $(DATA),,$(VENV)/.torchvision)
	mkdir -p out
	$(BIN)/python examples/mnist.py $(if $(DATA),--data '$(DATA)') --epochs $(EPOCHS) --plot out/mnist.png $(ARGS)

test: ctest pytest

ctest: $(VENV)/.test-tools
	$(BIN)/cmake -S . -B build/tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFM_WERROR=ON -DFM_TESTS=ON -DFM_CUDA_ARCHITECTURES=90-real \
	  -DFM_TORCH_INCLUDE=$$($(BIN)/python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "include")')
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure --timeout 300

pytest: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

$(VENV)/.lint-tools: $(VENV)/.test-tools
	$(BIN)/pip install --quiet ruff mypy clang-format clang-tidy
	touch $@

lint: $(VENV)/.lint-tools
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	for file in $(filter-out csrc/torch/torch_stub.c,$(wildcard csrc/*/*.c cuda/*.c tests/c/*.c)); do \
	  $(BIN)/clang-tidy --quiet $$file -- -std=c17 -DFM_X86 -DFM_KERNELS_NAME=fm_kernels_lint -DFM_ISA_NUMBER=1 $(INCLUDES) || exit 1; \
	done
	$(BIN)/clang-tidy --quiet csrc/cpu/kernels.c -- -std=c17 -DFM_KERNELS_NAME=fm_kernels_lint -DFM_ISA_NUMBER=4 $(INCLUDES) $(LINT_MARCH)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict python/flatmin

$(VENV)/.bench-tools: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps pytorch-optimizer
	touch $@

bench: $(VENV)/.bench-tools
	$(BIN)/python benchmarks/sam_step.py $(ARGS)

gpu:
	$(PYTHON) tools/gpu_check.py $(ARGS)

clean:
	rm -rf build dist out $(VENV) python/flatmin.egg-info
