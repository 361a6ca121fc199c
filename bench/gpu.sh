#!/usr/bin/env bash
# make gpu: sets up .venv for the GPUs of this machine, builds for them, then tests and measures (bench/gpu.py).
#
# A torch that reaches the GPU already, in .venv or in $PYTHON's own packages, is kept; else PyPI's newest is
# installed, or that of $TORCH_INDEX, as https://download.pytorch.org/whl/cu126 for an older driver. Where there is no
# nvcc and torch was built with CUDA 13, NVIDIA's compiler is installed into .venv too.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
install=("$python" -m pip install --quiet --disable-pip-version-check)
# TRITON_INTERPRET would run Triton kernels on the CPU.
unset TRITON_INTERPRET

reaches_gpu() { "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; }

if [ ! -x "$python" ]; then
  flags=()
  if reaches_gpu "${PYTHON:-python3}"; then flags=(--system-site-packages); fi
  "${PYTHON:-python3}" -m venv "${flags[@]}" .venv
fi
# Not requirements.txt's torch, which may be a build for CPUs, and would replace what is there.
grep -v '^torch==' requirements.txt | "${install[@]}" -r /dev/stdin
if ! reaches_gpu "$python"; then
  "${install[@]}" --upgrade --force-reinstall ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.9'
fi
if ! reaches_gpu "$python"; then
  echo "torch finds no GPU that it can use:" >&2
  "$python" -c 'import torch; print(torch.__version__); torch.zeros(1, device="cuda")' >&2 || true
  echo "an older driver needs a torch for it: TORCH_INDEX=https://download.pytorch.org/whl/cu126 make gpu" >&2
  exit 1
fi

cuda=$("$python" -c 'import torch; print(torch.version.cuda)')
if ! "$python" -c 'import os, setup_cuda; raise SystemExit(not setup_cuda.find_nvcc(os.environ))'; then
  if [[ "$cuda" != 13.* ]]; then
    echo "no nvcc is found: install CUDA $cuda's, and set CUDA_HOME or PATH" >&2
    exit 1
  fi
  "${install[@]}" "cuda-toolkit[nvcc,cudart,cccl]==$cuda.*"
  CUDA_HOME=$("$python" -c 'import nvidia.cu13; print(*nvidia.cu13.__path__)')
  export CUDA_HOME
fi
# For the GPUs that torch finds, whatever the environment has: containers export lists of their own.
TORCH_CUDA_ARCH_LIST=$("$python" -c '
import torch
found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
print(";".join(f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= (7, 5)))')
export TORCH_CUDA_ARCH_LIST
ATTN_EXT_CUDA=1 "${install[@]}" --no-build-isolation --no-deps --force-reinstall -e .
# For make: what is installed and built stays as it is.
touch .venv/installed .venv/built
exec "$python" -m bench.gpu "$@"
