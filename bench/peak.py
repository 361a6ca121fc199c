"""This machine's limits, measured: multiply-adds in registers and reads of memory.

bench/peak.cpp is compiled when first needed, into build/, and loaded after torch, so that both
share one OpenMP library and its threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import shlex
import statistics
import subprocess
import tempfile
import time

import torch
from torch import Tensor

SOURCE = pathlib.Path(__file__).parent / "peak.cpp"
BUILD = pathlib.Path(__file__).parent.parent / "build"
ITERATIONS = 300_000
"""Of a loop of 12 or 24 instructions, two a cycle: half a millisecond to one at 4 GHz."""
BURSTS = 5
"""Short runs of which the best counts: what else the machine did only slowed the others."""
REST_SECONDS = 0.05
READ_BYTES = 2**29
"""Beyond any cache."""
READS = 4
"""Of the buffer, 50 ms in all: as long as what it is compared with, for other machines on the same
memory slow it by the moment."""
FUNCTIONS = {
    "float32": ("float32_avx512", "float32_avx2"),
    "float32_avx2": ("float32_avx2",),
    "bfloat16": ("bfloat16_avx512",),
}
"""Of bench/peak.cpp, best first: what measures each limit."""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The best of several short runs; None where the processor lacks the instructions.

    Attributes:
        threads: how many threads ran.
        float32: multiply-adds on the widest vectors there are, in GFLOP/s.
        float32_avx2: on 256-bit vectors, in GFLOP/s.
        bfloat16: the instruction vdpbf16ps, in GFLOP/s.
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


def read_rate(threads: int, read_bytes: int = READ_BYTES, reads: int = READS) -> float:
    """Bytes of memory read a second now, over a number of reads of a buffer."""
    address = _buffer(read_bytes).data_ptr()
    rates = [_library().memory_read(address, read_bytes, threads) for _ in range(reads)]
    return statistics.harmonic_mean(rates)


@functools.cache
def _buffer(size: int) -> Tensor:
    """Written once by all threads, on the same kind of pages as any tensor."""
    return torch.ones(size // 4, dtype=torch.int32)


@functools.cache
def _library() -> ctypes.CDLL:
    """bench/peak.cpp, compiled unless this very text of it was before."""
    path = BUILD / f"peak-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            compiler = shlex.split(os.environ.get("CXX", "g++"))
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
