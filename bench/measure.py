"""Measuring two sides of a comparison on a machine that is noisy, shared and throttles."""

from __future__ import annotations

import dataclasses
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from attn_ext.backends import cpu

REST_SECONDS = 0.02
ROUND_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Median seconds of a call, over rounds in which both sides took turns."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Comparison:
    """Time two functions in alternating rounds of about 50 ms, with rests against throttling."""
    calls = []
    for function in (ours, theirs):
        function()
        start = time.perf_counter()
        function()
        calls.append(max(1, round(ROUND_SECONDS / (time.perf_counter() - start))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, count, record in zip((ours, theirs), calls, times, strict=True):
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            for _ in range(count):
                function()
            record.append((time.perf_counter() - start) / count)
    return Comparison(statistics.median(times[0]), statistics.median(times[1]))


def machine() -> str:
    """The machine in one line: processor, threads, instruction set, torch."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1] for line in lines if "model name" in line]
    name = names[0].strip() if names else platform.processor()
    return (
        f"{name}, {torch.get_num_threads()} threads, {cpu.capability}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def peak_mebibytes(code: str) -> float:
    """How far a piece of code raises the peak memory of a fresh process that has warmed up.

    Args:
        code: Python that defines `warm_up()` and `work()`.
    """
    program = f"""
{code}
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
warm_up()
resident = int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1])
work()
print((peak() - resident) / 1024)
"""
    return float(subprocess.check_output([sys.executable, "-c", program]))
