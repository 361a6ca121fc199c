"""Measuring two sides of a comparison on a machine that is noisy, shared and throttles."""

from __future__ import annotations

import dataclasses
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

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
    times = alternate((timed(ours), timed(theirs)), rounds, REST_SECONDS)
    return Comparison(statistics.median(times[0]), statistics.median(times[1]))


def timed(function: Callable[[], object], burst: float = ROUND_SECONDS) -> Callable[[], float]:
    """A function that gives the seconds of a call, averaged over `burst` seconds or one call."""
    function()
    start = time.perf_counter()
    function()
    count = max(1, round(burst / (time.perf_counter() - start)))

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - start) / count

    return seconds


def alternate(
    sides: Sequence[Callable[[], float]], rounds: int, rest: float = REST_SECONDS
) -> list[list[float]]:
    """What each side measured in each round; sides take turns, after `rest` seconds each.

    Every other round goes backwards, so that no side always follows the same other.
    """
    results: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        turns = list(zip(sides, results, strict=True))
        for side, result in reversed(turns) if number % 2 else turns:
            time.sleep(rest)
            result.append(side())
    return results


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
