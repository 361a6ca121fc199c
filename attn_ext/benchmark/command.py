"""`attn-ext bench`: measure, print, and write JSON, plots and an HTML report."""

from __future__ import annotations

import argparse
import itertools
import pathlib
import shlex
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attn_ext.benchmark import peak
from attn_ext.benchmark.cases import (
    Case,
    dtype_cases,
    full_cases,
    options_of,
    short_cases,
    sweeps,
)
from attn_ext.benchmark.machine import description
from attn_ext.benchmark.results import Run
from attn_ext.benchmark.run import Meter
from attn_ext.benchmark.scaling import fits
from attn_ext.benchmark.sides import Side
from attn_ext.benchmark.tables import exponents_table, left_out_lines, measured_table

REPORT_WIDTH = 150
"""Columns, where there is no terminal that has a width of its own."""
SETS: dict[str, Callable[[str], list[Case]]] = {
    "short": short_cases,
    "full": full_cases,
    "dtypes": dtype_cases,
    "sweeps": lambda device: list(sweeps(device)),
}


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns its exit status."""
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH, highlight=False)
    found = _measured(options, console) if options.source is None else Run.read(options.source)
    console.print(measured_table(found.groups))
    exponents = fits(found.groups)
    if exponents:
        console.print(exponents_table(exponents))
    console.print("took no part:", *left_out_lines(found), sep="\n  ")
    console.print(f"{found.machine}\n{found.limits}")
    if options.json is not None:
        found.write(options.json)
    _draw(found, options)
    for path in (options.json, options.report, *(path for _, path in options.svg)):
        if path is not None:
            console.print(f"written to {path}")
    return 0


def selected(options: argparse.Namespace) -> list[Case]:
    """The cases of the sets that were named, or of the shapes, narrowed by everything else."""
    device = options.device
    if options.shapes:
        kinds, dtypes = options.kind or ["forward"], options.dtype or ["float32"]
        cases = [
            Case(kind, shape, dtype, option, device)
            for kind, shape, dtype in itertools.product(kinds, options.shapes, dtypes)
            for option in (options.option or options_of(kind)[:1])
            if option in options_of(kind)
        ]
    else:
        cases = [case for name in options.set for case in SETS[name](device)]
    return [
        case
        for case in dict.fromkeys(cases)
        if (not options.kind or case.kind in options.kind)
        and (not options.dtype or case.dtype in options.dtype)
        and (not options.option or case.option in options.option)
    ]


def wanted_sides(options: argparse.Namespace) -> Callable[[Side], bool] | None:
    """Which sides --backend and --peer ask for; None if neither is given."""
    if not options.backend and not options.peer:
        return None
    ours = {f"attn_ext {name}" for name in options.backend or ()}

    def wanted(side: Side) -> bool:
        if side.ours:
            return side.name in ours if options.backend else side.name != "attn_ext reference"
        return not options.peer or side.name in options.peer

    return wanted


def _measured(options: argparse.Namespace, console: Console) -> Run:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = selected(options)
    if not cases:
        raise SystemExit("attn-ext bench: no case is of the kinds, dtypes and options asked for")
    groups = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Meter(options.rounds, with_memory=options.memory) as meter,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            groups.append(meter.measure(case, wanted_sides(options)))
            progress.advance(task)
    return Run(
        command=shlex.join(["attn-ext", "bench", *options.arguments]),
        device=options.device,
        machine=description(options.device),
        rounds=options.rounds,
        limits=peak.how(options.device),
        groups=groups,
    )


def _draw(found: Run, options: argparse.Namespace) -> None:
    if options.report is None and not options.svg:
        return
    from attn_ext.benchmark import page, plots  # matplotlib takes a second

    drawn = plots.plots(found)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(page.page(found, options.kernels, drawn))
    for name, path in options.svg:
        if name not in drawn:
            raise SystemExit(f"--svg must name one of {', '.join(drawn)}, got {name!r}")
        pathlib.Path(path).write_text(plots.standalone(drawn[name]))
