"""How time and memory grow with L, B, H and D: exponents fitted to sweeps."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from attn_ext.benchmark.cases import Shape
from attn_ext.benchmark.results import Group

DIMENSIONS = {
    "L": lambda shape: shape.query_length,
    "B": lambda shape: shape.batch,
    "H": lambda shape: shape.query_heads,
    "D": lambda shape: shape.head_dim,
}
NAMES = {"L": "length L", "B": "batch B", "H": "heads H", "D": "head_dim D"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """quantity = factor * dimension ** exponent, the least squares of the logarithms.

    Attributes:
        dimension: "L", "B", "H" or "D".
        kind, dtype, side: what was measured.
        quantity: "time" in seconds or "memory" in bytes.
        points: what was measured, by the dimension's size.
        exponent, factor: of the fit.
    """

    dimension: str
    kind: str
    dtype: str
    side: str
    quantity: str
    points: dict[int, float]
    exponent: float
    factor: float


def size(dimension: str, shape: Shape) -> int:
    """What a shape has of a dimension."""
    return DIMENSIONS[dimension](shape)


def fits(groups: Sequence[Group]) -> list[Fit]:
    """A fit for each sweep, side and quantity of which there are three points or more."""
    series: dict[tuple[str, str, str, str, str], dict[int, float]] = {}
    for group in groups:
        case = group.case
        if not case.sweep:
            continue
        for row in group.rows:
            for quantity, value in (("time", row.median), ("memory", row.peak_memory)):
                if value:
                    key = (case.sweep, case.kind, case.dtype, row.side, quantity)
                    series.setdefault(key, {})[size(case.sweep, case.shape)] = float(value)
    enough = {key: points for key, points in series.items() if len(points) > 2}
    return [Fit(*key, points, *power_law(points)) for key, points in enough.items()]


def power_law(points: dict[int, float]) -> tuple[float, float]:
    """(exponent, factor) of the power law through points, by least squares of the logarithms."""
    line = statistics.linear_regression(
        [math.log(x) for x in points], [math.log(y) for y in points.values()]
    )
    return line.slope, math.exp(line.intercept)
