# Every target sets up what it needs in .venv, and reuses what is there.
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
NATIVE := setup.py setup_cuda.py pyproject.toml $(CSRC)
RESULTS := bench/results
# On every core, up to eight.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8
CXX_FILES := $(CSRC) $(wildcard attn_ext/benchmark/*.cpp bench/*.cpp tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp)

.PHONY: demo test exhaustive sanitize aarch64 bench report bench-cpu cuda-report triton-report gpu lint format stubs wheel clean

demo: .venv/built  ## train a small language model with stock attention and with ours, side by side
	$(BIN)/python -m examples.demo

test: .venv/built  ## the test suite
	$(PYTEST)

exhaustive: .venv/built  ## the full sweep of the contract suite; on emulated CUDA kernels also with their lanes in another order
	$(PYTEST) -m exhaustive
	ATTN_EXT_EMULATOR_ORDER=20 $(PYTEST) tests/test_contract.py -k cuda_emulated-800

sanitize: .venv/built  ## the contract suite under AddressSanitizer and UndefinedBehaviorSanitizer
	bash tests/sanitize.sh

aarch64: .venv/built  ## the CPU kernels' contract suite on AArch64, emulated by qemu; needs Debian's cross compiler
	bash tests/aarch64.sh

bench: .venv/built  ## time, memory and errors beside PyTorch and others: README's plot and a report
	mkdir -p $(RESULTS)
	$(BIN)/attn-ext bench --json $(RESULTS)/bench.json
	$(MAKE) report

report: .venv/built  ## draw what `make bench` measured, with the reports of compiled GPU kernels
	$(BIN)/attn-ext bench --from $(RESULTS)/bench.json --report build/report.html \
	  --svg gflops $(RESULTS)/gflops.svg $(addprefix --kernels ,$(wildcard $(RESULTS)/*_report.json))

bench-cpu: .venv/built  ## the CPU kernels against their targets and the machine's measured peak
	$(BIN)/python -m bench.cpu

cuda-report: .venv/built  ## what nvcc makes of the CUDA kernels: registers, spills, instructions
	$(BIN)/python -m bench.cuda_report

triton-report: .venv/built  ## what Triton makes of the Triton kernels, for GPUs of NVIDIA and AMD
	$(BIN)/python -m bench.compile_report

gpu:  ## on a machine with a GPU: set up, build, test and measure; writes bench/results/gpu
	PYTHON=$(PYTHON) bash bench/gpu.sh

lint: .venv/built  ## formatting, style, types, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python tests/stubs.py --check

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

stubs: .venv/built  ## regenerate the native modules' type stubs
	$(BIN)/python tests/stubs.py

wheel:  ## build a wheel, by default for every GPU, not only those of this machine; needs no torch
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-7.5;8.0+PTX}" $(PYTHON) -m pip wheel --no-deps -w dist .

clean:
	rm -rf .venv build dist *.egg-info attn_ext/*.so

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/built: .venv/installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
