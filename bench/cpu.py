"""How far the CPU kernels are from the machine's limits: `make bench-cpu`.

Measures every row of bench/cpu_rows.py, prints it beside its targets and writes
bench/results/cpu_targets.json. In each round both sides take turns with the peak, each
after a rest, and the peak for about as long as they; a figure is the median over the rounds of the
figure of each round, so that what slows the machine for a while slows what is divided by what
alike.

    python -m bench.cpu --only decode "forward (1, 8, 4096, 64)" --rounds 15
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attn_ext.backends import cpu
from attn_ext.benchmark.machine import machine
from attn_ext.benchmark.measure import alternate, timed
from attn_ext.benchmark.peak import Peaks, peaks, read_rate, sustained_rate
from bench.cpu_rows import Row, all_rows

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu_targets.json"
REST_SECONDS = 0.05
"""Before each side, so two to three times as long between a round and the next."""
REPORT_WIDTH = 140
"""Columns, where there is no terminal that has a width of its own."""
STATISTIC = "median over the rounds of each round's figure"


class Round(NamedTuple):
    """What one round measured: seconds of a call, and operations or bytes a second."""

    ours: float
    theirs: float
    achieved: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A figure that has a target: how it follows from a round, and how it reads."""

    of: Callable[[Round], float]
    text: str
    more_is_better: bool


QUANTITIES = {
    "percent of peak": Quantity(lambda x: 100 * x.achieved / x.peak, "{:.1f} % of peak", True),
    "speedup": Quantity(lambda x: x.theirs / x.ours, "{:.2f}x", True),
    "relative time": Quantity(lambda x: x.ours / x.theirs, "{:.2f} of the time", False),
    "extra microseconds": Quantity(lambda x: 1e6 * (x.ours - x.theirs), "{:.1f} µs more", False),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A target and what was measured; None where this machine can't."""

    quantity: str
    target: float
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        better = QUANTITIES[self.quantity].more_is_better
        return self.measured >= self.target if better else self.measured <= self.target


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured row: medians in ms, the peak's in GFLOP/s or GB/s, and its outcomes."""

    group: str
    work: str
    ours_ms: float | None
    theirs_ms: float | None
    peak: float | None
    outcomes: list[Outcome]


def selected(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose group is one of the patterns or whose name contains one; all without any."""
    return [
        row
        for row in rows
        if not patterns or any(x == row.group or x in row.name for x in patterns)
    ]


def peak_side(name: str, threads: int) -> Callable[[], float]:
    """Measures a limit in milliseconds: operations or bytes a second, NaN if there is none."""
    if name == "memory":
        return lambda: read_rate(threads)
    return lambda: sustained_rate(name, threads) or math.nan


def measure(row: Row, rounds: int) -> Result:
    """Run a row in this process, at the instruction set that is in force."""
    work = row.prepare()
    sides = [timed(work.ours), timed(work.theirs)]
    if row.peak is not None:
        sides.append(peak_side(row.peak, torch.get_num_threads()))
    results = alternate(sides, rounds, REST_SECONDS)
    ours, theirs = results[:2]
    peak = results[2] if row.peak is not None else [math.nan] * rounds
    return summary(
        row, [Round(x, y, work.amount / x, z) for x, y, z in zip(ours, theirs, peak, strict=True)]
    )


def summary(row: Row, rounds: Sequence[Round]) -> Result:
    """Medians over the rounds."""

    def median(of: Callable[[Round], float], digits: int = 4) -> float | None:
        value = statistics.median(of(x) for x in rounds)
        return None if math.isnan(value) else round(value, digits)

    return Result(
        row.group,
        row.name,
        median(lambda x: 1e3 * x.ours),
        median(lambda x: 1e3 * x.theirs),
        median(lambda x: x.peak / 1e9, 1),
        [
            Outcome(quantity, target, median(QUANTITIES[quantity].of, 3))
            for quantity, target in row.targets.items()
        ],
    )


def measure_in_subprocess(row: Row, rounds: int) -> Result:
    """Run a row in a new process, since the instruction set is chosen when a process starts."""
    if not cpu.capabilities().get(str(row.capability)):
        unknown = [Outcome(quantity, target, None) for quantity, target in row.targets.items()]
        return Result(row.group, row.name, None, None, None, unknown)
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "row.json"
        options = ["--only", row.name, "--rounds", rounds, "--output", output]
        options += ["--threads", torch.get_num_threads()]
        subprocess.run(
            [sys.executable, "-m", "bench.cpu", *map(str, options)],
            env={**os.environ, "ATTN_EXT_CPU_CAPABILITY": str(row.capability)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        (found,) = json.loads(output.read_text())["rows"]
    return as_result(found)


def as_dictionary(result: Result) -> dict[str, Any]:
    outcomes = [{**dataclasses.asdict(x), "met": x.met} for x in result.outcomes]
    return {**dataclasses.asdict(result), "outcomes": outcomes}


def as_result(row: dict[str, Any]) -> Result:
    outcomes = [Outcome(x["quantity"], x["target"], x["measured"]) for x in row["outcomes"]]
    return Result(**{**row, "outcomes": outcomes})


def table_of(results: Sequence[Result]) -> Table:
    """A line for each target, rows of one group together."""
    table = Table("work", "ours, ms", "against, ms", "target", "measured", "")
    for number, result in enumerate(results):
        if number and result.group != results[number - 1].group:
            table.add_section()
        cells = (result.work, milliseconds(result.ours_ms), milliseconds(result.theirs_ms))
        for outcome in result.outcomes:
            quantity = QUANTITIES[outcome.quantity]
            sign = "≥" if quantity.more_is_better else "≤"
            measured = outcome.measured
            table.add_row(
                *cells,
                f"{sign} {quantity.text.format(outcome.target)}",
                "-" if measured is None else quantity.text.format(measured),
                {True: "[green]met", False: "[red]missed", None: "not here"}[outcome.met],
            )
            cells = ("", "", "")
    return table


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def report(
    results: Sequence[Result], limits: Peaks, rounds: int, arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """What is written: the command, the machine, its limits and every row."""
    found = {x.name: getattr(limits, x.name) for x in dataclasses.fields(limits)}
    return {
        "command": shlex.join(["python", "-m", "bench.cpu", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "torch": torch.__version__,
        "instruction_set": cpu.capability,
        "threads": limits.threads,
        "rounds": rounds,
        "statistic": STATISTIC,
        "peaks_gflops_and_gigabytes_per_second": {
            name: value for name, value in found.items() if name != "threads"
        },
        "rows": [as_dictionary(result) for result in results],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our CPU kernels against their targets.")
    parser.add_argument(
        "--only", nargs="+", default=[], help="groups, or parts of rows' names; all by default"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds for each row")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument(
        "--output", type=pathlib.Path, help=f"where to write; {RESULTS.name} if every row is run"
    )
    parser.add_argument("--list", action="store_true", help="print the rows' groups and names")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    rows = selected(all_rows(), options.only)
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    if options.list:
        for row in rows:
            console.print(f"{row.group}: {row.name}", highlight=False)
        return
    if not rows:
        raise SystemExit(f"--only: no group is, and no row's name contains, any of {options.only}")
    if options.threads:
        torch.set_num_threads(options.threads)
    limits = peaks(torch.get_num_threads())
    results = []
    with Progress(console=console, transient=True) as progress:
        for row in progress.track(rows, description="measuring"):
            here = row.capability in (None, cpu.capability)
            results.append((measure if here else measure_in_subprocess)(row, options.rounds))
    console.print(table_of(results))
    outcomes = [x.met for result in results for x in result.outcomes if x.met is not None]
    console.print(f"{sum(outcomes)} of {len(outcomes)} targets met; {STATISTIC}")
    console.print(f"{limits}\n{machine()}")
    output = options.output or (None if options.only else RESULTS)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = report(results, limits, options.rounds, arguments)
        output.write_text(json.dumps(written, indent=1) + "\n")
        console.print(f"written to {output}")


if __name__ == "__main__":
    main()
