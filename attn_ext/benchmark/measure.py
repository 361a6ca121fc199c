"""Measuring sides of a comparison on a machine that is noisy, shared and throttles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

REST_SECONDS = 0.02
ROUND_SECONDS = 0.05


def timed(
    function: Callable[[], object],
    burst: float = ROUND_SECONDS,
    wait: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """A function that gives the seconds of a call, averaged over `burst` seconds or one call.

    Args:
        function: what is timed.
        burst: seconds that one measurement takes, about.
        wait: waits until the device has done what the calls asked for: torch.cuda.synchronize.
    """

    def average(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            function()
        wait()
        return (time.perf_counter() - start) / count

    average(1)
    count = max(1, round(burst / average(1)))

    def seconds() -> float:
        return average(count)

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
