#!/usr/bin/env bash
# Builds the CPU kernels for AArch64 and runs the contract suite there under qemu: `make aarch64`.
# On Debian, with the packages that the next lines name; all else goes to build/aarch64.
set -euo pipefail
cd "$(dirname "$0")/.."

for program in aarch64-linux-gnu-g++ qemu-aarch64-static apt-get; do
  command -v $program > /dev/null || {
    echo "$program is missing: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2
    exit 1
  }
done
torch=2.10.0  # the latest whose wheel for AArch64 needs no CUDA
work=$PWD/build/aarch64
root=$work/root site=$work/site package=$work/package python=$PWD/.venv/bin/python
mkdir -p "$root" "$work"/{debs,lists/partial,cache/archives/partial}

apt() {  # knows of arm64 alone, and of nothing that is installed
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$work/lists" \
    -o Dir::State::status=/dev/null -o Dir::Cache="$work/cache" -o Debug::NoLocking=1 \
    -o APT::Sandbox::User=root -o Dir::Cache::archives="$work/debs" "$@"
}
if [ ! -e "$work/installed" ]; then
  apt update
  apt install --download-only --no-install-recommends -y python3-dev libstdc++6 libgomp1
  for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
  version=$(cd "$root/usr/bin" && echo python3.??)
  triton=$("$python" -c 'import triton; print(triton.__version__)')
  # Without dependencies: pip takes them for the host's processor.
  "$python" -m pip install --quiet --no-deps --target "$site" --only-binary :all: --python-version "${version#python}" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    "torch==$torch" filelock fsspec jinja2 markupsafe mpmath networkx sympy typing_extensions \
    "triton==$triton" numpy pybind11 pytest iniconfig packaging pluggy pygments
  echo "$version" > "$work/installed"
fi
interpreter=$(cat "$work/installed")

rm -rf "$package"
mkdir -p "$package"
cp -r attn_ext "$package/attn_ext"
rm -f "$package"/attn_ext/*.so
cp -r triton_kernels "$package/attn_ext/triton_kernels"
# Before the host's headers of Python, which setuptools adds.
cat > "$work/compiler" <<END
#!/bin/sh
exec aarch64-linux-gnu-g++ -I"$root/usr/include/$interpreter" -I"$root/usr/include" "\$@"
END
chmod +x "$work/compiler"
ATTN_EXT_CUDA=0 CC="$work/compiler" CXX="$work/compiler" "$python" setup.py --quiet build_ext --force \
  --build-lib "$package" --build-temp "$work/temp"
mv "$package"/attn_ext/_cpu.*.so "$package/attn_ext/_cpu.so"  # named after the host

repository=$PWD
cd "$package"
export PYTHONPATH=$package:$site PYTHONDONTWRITEBYTECODE=1
emulated() {
  qemu-aarch64-static -L "$root" "$root/usr/bin/$interpreter" "$@"
}
emulated -c '
import platform, torch
from attn_ext.backends import cpu
print(platform.machine(), "torch", torch.__version__, cpu.capabilities())
assert platform.machine() == "aarch64" and cpu.capability == "portable" and cpu.has_plain_forward
'
emulated -m pytest -p no:cacheprovider -p no:xdist --rootdir "$repository" -c "$repository/pyproject.toml" \
  "$repository/tests/test_contract.py" -k cpu
