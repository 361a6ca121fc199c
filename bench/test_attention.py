"""`pytest bench`: every kind of work, attn_ext's backends beside PyTorch's kernels and others.

How rounds are interleaved: pytest-benchmark runs one test after another, and a machine that is slow
for a minute would trouble one of them alone. So a case is measured once, when its first test runs,
by `Meter`: in each round all of its sides take their turns. Each test then hands its side's samples
to its `benchmark` through a clock that replays them. Statistics, comparisons and JSON are
pytest-benchmark's as ever; --benchmark-min-rounds and the like do nothing.

A group is one case; sides that can't do it are skipped with their reason. -m exhaustive runs every
shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attn_ext.benchmark.cases import Case, full_cases, short_cases
from attn_ext.benchmark.sides import left_out_by_default, sides
from bench.conftest import REPLAY, Measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters() -> Iterator[Any]:
    short = short_cases(DEVICE)
    for case in full_cases(DEVICE):
        marks = [] if case in short else [pytest.mark.exhaustive]
        for side in sides(case):
            if not left_out_by_default(side, DEVICE):
                yield pytest.param(case, side.name, id=f"{case}-{side.name}", marks=marks)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("case", "side"), parameters())
def test_attention(benchmark: Any, measure: Measure, case: Case, side: str) -> None:
    group = measure(case)
    row = group.row(side)
    if row is None:
        pytest.skip(group.left_out[side])
    benchmark.group = str(case)
    benchmark.extra_info.update(group.figures(row))
    REPLAY.load(row.seconds)
    benchmark.pedantic(lambda: None, rounds=len(row.seconds))
