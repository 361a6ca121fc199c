#!/usr/bin/env bash
# The contract suite on a build of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/sanitized
rm -rf "$folder"
mkdir -p "$folder"
cp -r attn_ext "$folder/attn_ext"
rm -f "$folder"/attn_ext/_cpu*.so
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
CFLAGS="$flags" LDFLAGS="$flags" .venv/bin/python setup.py --quiet build_ext \
  --build-lib "$folder" --build-temp "$folder/temp"
# Leaks are not looked for: Python and torch keep memory for the life of the process.
# One thread: libgomp is not instrumented. From inside the folder, so that its attn_ext is the one imported.
root=$PWD
cd "$folder"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
"$root/.venv/bin/python" -c "from attn_ext import _cpu; assert '$folder' in _cpu.__file__, _cpu.__file__"
"$root/.venv/bin/python" -m pytest -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
  "$root/tests/test_contract.py" \
  -k "(float32 or other_dtypes or garbage or strides) and not reference"
