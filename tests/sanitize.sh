#!/usr/bin/env bash
# The contract suite on a build of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, in
# which plain C++ stands in for AMX's instructions; then a part of it that reaches every CUDA kernel, emulated on
# the host, under the same sanitizers and under ThreadSanitizer, whose threads are the GPU's.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=$root/build/sanitized
rm -rf "$folder"
mkdir -p "$folder"
cp -r attn_ext "$folder/attn_ext"
rm -f "$folder"/attn_ext/_cpu*.so
# A compiler of its own, for setuptools disagree about the variables that add flags, and these must come last.
cat > "$folder/compiler" <<'END'
#!/bin/sh
exec g++ "$@" -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 \
  -DATTN_EXT_EMULATE_AMX
END
chmod +x "$folder/compiler"
ATTN_EXT_CUDA=0 CC="$folder/compiler" CXX="$folder/compiler" .venv/bin/python setup.py --quiet build_ext \
  --build-lib "$folder" --build-temp "$folder/temp"
# Leaks are not looked for: Python and torch keep memory for the life of the process.
# One thread: libgomp is not instrumented. From inside the folder, so that its attn_ext is the one imported.
cd "$folder"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
# Memory that nothing was written to is NaN, so that what is made of it shows.
export ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 OMP_NUM_THREADS=1
"$root/.venv/bin/python" - "$folder" <<'END'
import sys

from attn_ext import _cpu

assert _cpu.__file__.startswith(sys.argv[1]), _cpu.__file__
symbols = open(_cpu.__file__, "rb").read()
assert b"__asan_report" in symbols and b"__ubsan_handle" in symbols, "built without sanitizers"
assert "amx_emulated" in _cpu.capabilities(), "built without emulated AMX"
END
"$root/.venv/bin/python" -m pytest -n auto --maxprocesses 8 -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
  "$root/tests/test_contract.py" \
  -k "(float32 or other_dtypes or garbage or strides) and cpu"
# The ways to the kernels that don't go through a Problem.
"$root/.venv/bin/python" -m pytest -n auto --maxprocesses 8 -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
  "$root"/tests/test_{ops,multihead,linear}.py -k "plain and not calls_give or few"

# float32 throughout, and the kernels that only halves have, of both kinds. Compiled before a sanitizer is preloaded.
selected="cuda_emulated-800 and (test_case_in_float32 and (-everything or -causal_window) or \
  test_case_in_other_dtypes and (-head_dim_64 or -dropout_of_whole_tiles) and not float64)"
cd "$root"
run_emulated() {
  export ATTN_EXT_EMULATED_FLAGS="-fsanitize=$1 -fno-sanitize-recover=all -O1"
  library="$LD_PRELOAD"
  [ "$1" = thread ] && library="$(LD_PRELOAD= gcc -print-file-name=libtsan.so)"
  LD_PRELOAD= PYTHONPATH=tests .venv/bin/python -c "import emulated; emulated.build(800)"
  LD_PRELOAD= setarch -R env LD_PRELOAD="$library" TSAN_OPTIONS=halt_on_error=1 .venv/bin/python -m pytest -q \
    -p no:cacheprovider tests/test_contract.py -k "$selected"
}
# One process each, side by side.
run_emulated address,undefined &
run_emulated thread > "$folder/thread.log" 2>&1 &
failed=0
wait %1 || failed=1
wait %2 || failed=1
cat "$folder/thread.log"
exit $failed
