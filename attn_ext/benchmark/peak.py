"""This machine's limits, measured: multiply-adds in registers and reads of memory.

For a CPU peak.cpp is compiled when first needed, into the user's cache, and loaded after torch, so
that both share one OpenMP library and its threads. On a GPU, and without a C++ compiler, PyTorch's
own matrix product and copy stand for the limits: `how` says which it was.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attn_ext.benchmark.measure import timed

SOURCE = pathlib.Path(__file__).parent / "peak.cpp"
ITERATIONS = 300_000
"""Of a loop of 12 or 24 instructions, two a cycle: half a millisecond to one at 4 GHz."""
BURSTS = 5
"""Short runs of which the best counts: what else the machine did only slowed the others."""
REST_SECONDS = 0.05
BURST_SECONDS = 0.01
SUSTAINED_SECONDS = 0.04
"""About as long as what is held against it, see `sustained_rate`."""
READ_BYTES = 2**29
"""Beyond any cache."""
READS = 4
"""Of the buffer, 50 ms in all: as long as what it is compared with, for other machines on the same
memory slow it by the moment."""
FUNCTIONS = {
    "float32": ("float32_avx512", "float32_avx2"),
    "float32_avx2": ("float32_avx2",),
    "bfloat16": ("bfloat16_amx", "bfloat16_avx512"),
}
"""Of peak.cpp, best first: what measures each limit."""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The best of several short runs; None where the processor lacks the instructions.

    Attributes:
        threads: how many threads ran.
        float32: multiply-adds on the widest vectors there are, in GFLOP/s.
        float32_avx2: on 256-bit vectors, in GFLOP/s.
        bfloat16: the tiles of AMX, or else the instruction vdpbf16ps, in GFLOP/s.
        memory: reads of a buffer larger than any cache, in GB/s.
    """

    threads: int
    float32: float | None
    float32_avx2: float | None
    bfloat16: float | None
    memory: float


def peaks(threads: int, rounds: int = 10, read_bytes: int = READ_BYTES) -> Peaks:
    """Measure every limit, resting between the rounds so that the machine does not throttle."""
    best = dict.fromkeys(FUNCTIONS, 0.0)
    memory = 0.0
    for _ in range(rounds):
        for name in best:
            time.sleep(REST_SECONDS)
            best[name] = max(best[name], multiply_add_rate(name, threads) or 0.0)
        time.sleep(REST_SECONDS)
        memory = max(memory, read_rate(threads, read_bytes, reads=1))
    found = {name: round(rate / 1e9, 1) if rate else None for name, rate in best.items()}
    return Peaks(threads=threads, memory=round(memory / 1e9, 1), **found)


def multiply_add_rate(
    name: str, threads: int, iterations: int = ITERATIONS, bursts: int = BURSTS
) -> float | None:
    """Floating-point operations a second now, or None where the processor can't.

    Args:
        name: one of `FUNCTIONS`; "float32" is that of the widest vectors there are.
        threads: how many threads run.
        iterations: of the loop, in each run.
        bursts: how many runs, of which the best counts.
    """
    for function in FUNCTIONS[name]:
        rate = max(getattr(_library(), function)(iterations, threads) for _ in range(bursts))
        if rate > 0:
            return float(rate)
    return None


def sustained_rate(name: str, threads: int, seconds: float = SUSTAINED_SECONDS) -> float | None:
    """Floating-point operations a second over some time from now, None where the processor can't.

    The limit of what runs for as long: a shared machine that throttles does better in its best
    burst of half a millisecond than a kernel can in fifty, be it multiply-adds in registers alone.
    """
    rates: list[float] = []
    start = time.perf_counter()
    while not rates or time.perf_counter() - start < seconds:
        rate = multiply_add_rate(name, threads, bursts=1)
        if rate is None:
            return None
        rates.append(rate)
    return statistics.harmonic_mean(rates)


def read_rate(threads: int, read_bytes: int = READ_BYTES, reads: int = READS) -> float:
    """Bytes of memory read a second now, over a number of reads of a buffer."""
    address = _buffer(read_bytes).data_ptr()
    rates = [_library().memory_read(address, read_bytes, threads) for _ in range(reads)]
    return statistics.harmonic_mean(rates)


PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied where PyTorch's product stands for a limit."""


def has_compiler() -> bool:
    """Whether peak.cpp can be compiled here."""
    return shutil.which(_compiler()[0]) is not None


def how(device: str) -> str:
    """How the limits of a device are measured, in a sentence."""
    if device == "cpu" and has_compiler():
        return (
            "the machine's limits are multiply-adds in registers and reads of a buffer larger than "
            "any cache, measured in the same rounds as the kernels"
        )
    missing = " (no C++ compiler was found to measure more)" if device == "cpu" else ""
    return (
        "the machine's limits are PyTorch's matrix product and its copy of a large buffer"
        f"{missing}, measured in the same rounds as the kernels"
    )


def compute_limit(dtype: str, device: str) -> Callable[[], float] | None:
    """A function that measures operations a second now; None where nothing measures a dtype's."""
    threads = torch.get_num_threads()
    if device == "cpu" and has_compiler():
        if dtype not in FUNCTIONS or multiply_add_rate(dtype, threads, bursts=1) is None:
            return None
        return lambda: sustained_rate(dtype, threads) or math.nan
    size = PRODUCT_SIZE["cpu" if device == "cpu" else "cuda"]
    left, right = torch.ones(2, size, size, dtype=getattr(torch, dtype), device=device)
    seconds = timed(lambda: left @ right, BURST_SECONDS, waiting_for(device))
    return lambda: 2 * size**3 / seconds()


def memory_limit(device: str) -> Callable[[], float]:
    """A function that measures bytes read (or read and written) a second now."""
    if device == "cpu" and has_compiler():
        return lambda: read_rate(torch.get_num_threads())
    source = torch.ones(READ_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), BURST_SECONDS, waiting_for(device))
    return lambda: 2 * READ_BYTES / seconds()


def waiting_for(device: str) -> Callable[[], object]:
    """Waits until a device has done what it was asked."""
    return (lambda: None) if device == "cpu" else (lambda: torch.cuda.synchronize(device))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def _buffer(size: int) -> Tensor:
    """Written once by all threads, on the same kind of pages as any tensor."""
    return torch.ones(size // 4, dtype=torch.int32)


@functools.cache
def _library() -> ctypes.CDLL:
    """peak.cpp, compiled unless this very text of it was before."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    build = cache / "attn_ext"
    path = build / f"peak-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build) as folder:
            compiler = _compiler()
            flags = ["-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra"]
            made = pathlib.Path(folder) / path.name
            subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(made)], check=True)
            made.replace(path)  # at once: another process finds all of it or nothing
    library = ctypes.CDLL(str(path))
    for name in {name for names in FUNCTIONS.values() for name in names}:
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.c_int]
    library.memory_read.restype = ctypes.c_double
    library.memory_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library


if __name__ == "__main__":
    print(peaks(torch.get_num_threads()))
