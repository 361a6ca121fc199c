"""What was measured, as tables for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.table import Table

from attn_ext.benchmark.results import Group, Row, Run
from attn_ext.benchmark.scaling import NAMES, Fit

COLUMNS = ("side", "time", "speedup", "GFLOP/s", "GB/s", "of peak", "max error", "peak memory")


def cells(group: Group, row: Row) -> list[str]:
    """A row's figures as text, in the order of `COLUMNS`."""
    stock, share = group.stock, group.share_of_peak(row)
    return [
        row.side,
        duration(row.median),
        "-" if stock is None else f"{group.ratio(row, stock):.2f}",
        f"{group.gflops(row):.1f}",
        f"{group.case.bytes / row.median / 1e9:.1f}",
        "-" if share is None else f"{100 * share:.0f} %",
        f"{row.max_error:.1e}",
        "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.1f} MiB",
    ]


def measured_table(groups: Sequence[Group]) -> Table:
    """A line a side, sides of one case together; ours are bold."""
    table = Table("case (B, H, L, D)", *COLUMNS, highlight=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for group in groups:
        table.add_section()
        for number, row in enumerate(group.rows):
            style = "bold" if row.ours else ""
            table.add_row("" if number else str(group.case), *cells(group, row), style=style)
    return table


def left_out_lines(run: Run) -> list[str]:
    """Who took no part, and why."""
    count = len(run.groups)
    return [
        f"{side}: {reason}" + ("" if times == count else f" ({times} of {count} cases)")
        for (side, reason), times in run.left_out.items()
    ]


def exponents_table(fits: Sequence[Fit]) -> Table:
    """A line for each side and kind of work, a column for each dimension and quantity."""
    table = Table(title="time and memory grow with these powers", highlight=False)
    table.add_column("side, work")
    heads = list(itertools.product(NAMES, ("time", "memory")))
    for dimension, quantity in heads:
        table.add_column(f"{quantity} in {dimension}", justify="right")
    lines: dict[str, dict[tuple[str, str], Fit]] = {}
    for fit in fits:
        name = f"{fit.side}, {fit.kind} {fit.dtype}"
        lines.setdefault(name, {})[fit.dimension, fit.quantity] = fit
    for name, found in lines.items():
        exponents = (found.get(head) for head in heads)
        table.add_row(name, *("-" if x is None else f"{x.exponent:.2f}" for x in exponents))
    return table


def duration(seconds: float) -> str:
    """Three digits, in ms or µs."""
    if math.isnan(seconds):
        return "-"
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
