"""Fixtures of `pytest bench`: one meter for the session, and each case measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attn_ext.benchmark.cases import Case
from attn_ext.benchmark.results import Group
from attn_ext.benchmark.run import Meter

ROUNDS = 7
BURST_SECONDS = 0.03
Measure = Callable[[Case], Group]


class Replay:
    """A clock for pytest-benchmark that gives back seconds which were measured before.

    It is read at the start and at the end of each round: between the two it moves on by one sample.
    """

    def __init__(self) -> None:
        self.samples: Iterator[float] = iter(())
        self.now, self.started = 0.0, False

    def load(self, samples: list[float]) -> None:
        self.samples, self.started = iter(samples), False

    def __call__(self) -> float:
        if self.started:
            self.now += next(self.samples)
        self.started = not self.started
        return self.now


REPLAY = Replay()


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Iterator[Measure]:
    """Measures a case the first time that it is asked for, with the sides that were selected."""
    selected: dict[Case, set[str]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in parameters:
            selected.setdefault(parameters["case"], set()).add(parameters["side"])
    groups: dict[Case, Group] = {}
    with Meter(ROUNDS, BURST_SECONDS) as meter:

        def once(case: Case) -> Group:
            if case not in groups:
                names = selected[case]
                groups[case] = meter.measure(case, lambda side: side.name in names)
            return groups[case]

        yield once
