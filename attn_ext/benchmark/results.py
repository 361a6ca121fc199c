"""What was measured: rows, groups of rows on one case, and a whole run, as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from attn_ext.benchmark.cases import Case, Shape


@dataclasses.dataclass
class Row:
    """One side of a case.

    Attributes:
        side: its name.
        ours: whether it is attn_ext.
        seconds: of a call, in each round.
        max_error: the largest difference to float64, of the output and of all gradients.
        peak_memory: bytes beyond the inputs at the highest, results included; None if unknown.
    """

    side: str
    ours: bool
    seconds: list[float] = dataclasses.field(default_factory=list)
    max_error: float = math.inf
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass
class Group:
    """A case and what all sides did; sides took turns, so round i is the same time for all.

    Attributes:
        case: what was done.
        rows: a row a side.
        left_out: why each other side did not take part.
        compute_limits: operations a second that the machine could do, in each round; may be empty.
        memory_limits: bytes a second, likewise.
    """

    case: Case
    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    compute_limits: list[float] = dataclasses.field(default_factory=list)
    memory_limits: list[float] = dataclasses.field(default_factory=list)

    @property
    def intensity(self) -> float:
        """Operations for each byte that must be moved."""
        return self.case.flops / self.case.bytes

    def gflops(self, row: Row) -> float:
        return self.case.flops / row.median / 1e9

    def share_of_peak(self, row: Row) -> float | None:
        """Of what the roofline allows: the machine's multiply-adds or, if less, its memory."""
        limits = zip(self.compute_limits, self.memory_limits, strict=True)
        ceilings = [min(compute, self.intensity * memory) for compute, memory in limits]
        if not ceilings or any(math.isnan(x) for x in ceilings):
            return None
        rounds = zip(row.seconds, ceilings, strict=True)
        return statistics.median(self.case.flops / seconds / most for seconds, most in rounds)

    def ratio(self, row: Row, other: Row) -> float:
        """How many times faster `row` is than `other`, round by round."""
        rounds = zip(row.seconds, other.seconds, strict=True)
        return statistics.median(theirs / ours for ours, theirs in rounds)

    def row(self, side: str) -> Row | None:
        return next((row for row in self.rows if row.side == side), None)

    @property
    def stock(self) -> Row | None:
        """PyTorch's own choice of kernel, which ratios refer to."""
        return self.row("PyTorch")

    def figures(self, row: Row) -> dict[str, Any]:
        """What a row comes to, in the units that its names say."""
        share, stock = self.share_of_peak(row), self.stock
        return {
            "milliseconds": _rounded(1e3 * row.median),
            "speedup_over_pytorch": None if stock is None else _rounded(self.ratio(row, stock)),
            "gflops": _rounded(self.gflops(row)),
            "bytes": self.case.bytes,
            "gigabytes_per_second": _rounded(self.case.bytes / row.median / 1e9),
            "percent_of_peak": None if share is None else _rounded(100 * share),
            "max_error": _rounded(row.max_error),
            "peak_memory_mebibytes": (
                None if row.peak_memory is None else round(row.peak_memory / 2**20, 3)
            ),
        }


@dataclasses.dataclass
class Run:
    """A whole run: what is written to JSON and drawn.

    Attributes:
        command: what made it.
        date: when.
        device: "cpu" or "cuda".
        machine: `attn_ext.benchmark.machine.description`.
        rounds: of each group.
        limits: how the machine's limits were measured, in a sentence.
        groups: what was measured.
    """

    command: str
    device: str
    machine: dict[str, Any]
    rounds: int
    limits: str
    groups: list[Group]
    date: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @property
    def left_out(self) -> dict[tuple[str, str], int]:
        """Each side and reason for which it did not take part, and in how many groups."""
        found: dict[tuple[str, str], int] = {}
        for group in self.groups:
            for key in group.left_out.items():
                found[key] = found.get(key, 0) + 1
        return found

    def write(self, path: pathlib.Path) -> None:
        """As JSON, a line a row, so that differences can be read."""
        head = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        groups = ",\n".join(_group_as_text(group) for group in self.groups)
        text = json.dumps({**head, "groups": []}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace('"groups": []', f'"groups": [\n{groups}\n ]') + "\n")

    @classmethod
    def read(cls, path: pathlib.Path) -> Run:
        found = json.loads(path.read_text())
        return cls(**{**found, "groups": [_group_of(x) for x in found["groups"]]})


def _group_as_text(group: Group) -> str:
    case = {**dataclasses.asdict(group.case), "shape": str(group.case.shape)}
    head = {
        "case": case,
        "flops": group.case.flops,
        "left_out": group.left_out,
        "compute_limits": [_rounded(x) for x in group.compute_limits],
        "memory_limits": [_rounded(x) for x in group.memory_limits],
    }
    rows = ",\n".join(
        "    " + json.dumps({**_row_as_dictionary(row), "figures": group.figures(row)})
        for row in group.rows
    )
    return f'  {json.dumps(head)[:-1]}, "rows": [\n{rows}\n  ]}}'


def _row_as_dictionary(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "seconds": [_rounded(x, 5) for x in row.seconds]}


def _group_of(found: dict[str, Any]) -> Group:
    case = found["case"]
    rows = [Row(**{k: v for k, v in row.items() if k != "figures"}) for row in found["rows"]]
    return Group(
        Case(**{**case, "shape": Shape.parse(case["shape"])}),
        rows,
        found["left_out"],
        found["compute_limits"],
        found["memory_limits"],
    )


def _rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))
