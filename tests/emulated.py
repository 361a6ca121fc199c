"""The CUDA kernels on the host, by tests/cuda_emulator: a backend of the test suite alone.

g++ compiles the sources of attn_ext._cuda against the emulator, into a module that takes CPU
tensors. It is kept in build/ under a hash of all that it is made of. The environment variable
ATTN_EXT_EMULATED_FLAGS adds flags for the kernels, as tests/sanitize.sh does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pybind11
from filelock import FileLock

from attn_ext.backends import cuda, native

ROOT = pathlib.Path(__file__).resolve().parent.parent
CUDA, EMULATOR = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulator"
SOURCES = [
    CUDA / "backward_keys.cu",
    CUDA / "backward_queries.cu",
    CUDA / "forward.cu",
    CUDA / "weights.cu",
    ROOT / "csrc" / "bindings_cuda.cpp",
    EMULATOR / "emulator.cpp",
]
FLAGS = ["-O2", "-std=c++17", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
ARCHITECTURES = (800, 750)
"""Those whose code differs, the newest first: 750 has no cp.async, no bfloat16 and no TF32."""

# Problems that these kernels leave to other backends; any other refusal is a failure.
REFUSALS = (
    r"backend '(cuda|cuda_emulated)' can't run this: ("
    r"query is float64"
    r"|query is bfloat16, which takes compute capability 8\.0, and (cpu|cuda:\d+) has 7\.5"
    r"|query has a head_dim of (384|512|1000); at most 256"
    r"|query and value have a head_dim of \d+ and \d+ in float32, which takes \d+ bytes"
    r")"
)


@functools.cache
def backend(architecture: int) -> ModuleType:
    """attn_ext.backends.cuda once more, over the kernels of an emulated architecture."""
    compiled = _imported(_name(architecture), build(architecture))
    compiled.set_dtypes(native.DTYPES)
    module = _imported("attn_ext.backends.cuda_emulated", pathlib.Path(cuda.__file__))
    module._cuda = compiled
    return module


def build(architecture: int) -> pathlib.Path:
    """The emulated module's file, compiled if there is none of these sources."""
    compiler = os.environ.get("CXX", "g++").split()
    flags = [
        *FLAGS,
        f"-DATTN_EXT_EMULATED={architecture}",
        f"-DATTN_EXT_CUDA_MODULE={_name(architecture)}",
        *(f"-I{folder}" for folder in (ROOT / "csrc", EMULATOR)),
        *(f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))),
    ]
    more = os.environ.get("ATTN_EXT_EMULATED_FLAGS", "").split()
    folder = ROOT / "build" / "emulated" / _hash(" ".join([*compiler, *flags, *more]))
    module = folder / f"{_name(architecture)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # tests run in several processes
        if not module.exists():
            _compile(module, [*compiler, *flags], more)
    return module


def _compile(module: pathlib.Path, command: list[str], more: list[str]) -> None:
    """`more`: flags for the kernels and for linking."""
    folder = module.parent

    def compiled(source: pathlib.Path) -> str:
        target = str(folder / f"{source.stem}.o")
        # The emulator itself is never instrumented.
        own = more if source.parent == CUDA else []
        _run([*command, *own, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    unfinished = folder / "unfinished.so"  # an interrupted build leaves no module behind
    _run([*command, "-shared", *more, *objects, "-o", str(unfinished)])
    unfinished.rename(module)


def _name(architecture: int) -> str:
    """A name for each: pybind11 takes two modules of one name for the same."""
    return f"_cuda_emulated_{architecture}"


def _hash(command: str) -> str:
    digest = hashlib.sha256(command.encode())
    for folder in (ROOT / "csrc", CUDA, EMULATOR):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _imported(name: str, path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
