"""What Triton makes of the Triton kernels, for GPUs that are not here: `make triton-report`.

Compiles kernels and configurations for each architecture and prints registers, spills, shared
memory, blocks that a multiprocessor holds, the matrix instructions and the instructions of the main
loop for each HMMA.16816 that its products need (m16n8k16, 2048 multiply-adds, done by one warp or
wavefront: where several repeat a product, all their instructions count), a loop being found by
control flow (bench.sass, bench.amdgcn). All of it goes to
bench/results/compile_report.json, which tests compare freshly compiled kernels with.

    python -m bench.compile_report --architectures sm_90 gfx942 --jobs 1
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from bench.triton_kernels import ARCHITECTURES, PRODUCTS, Name, measured, names

RESULTS = pathlib.Path(__file__).parent / "results" / "compile_report.json"
REPORT_WIDTH = 170
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What Triton's own fused-attention tutorial has in its leanest main loop, compiled by the same
    triton 3.9.0: ours should have less, with nothing spilled."""

    architecture: str
    kernels: tuple[str, ...]
    head_dim: int
    tutorial: float

    def ours(self, rows: Iterable[Row]) -> tuple[float, int] | None:
        """Instructions for each HMMA.16816 over one pass through the full tiles' loops of these
        kernels, weighted by their work, and what they spill. None: not among the rows."""
        found = [
            row
            for row in rows
            if (row["architecture"], row["dtype"], row["head_dim"], row["kind"])
            == (self.architecture, "float16", self.head_dim, "plain")
            and row["kernel"] in self.kernels
        ]
        if len(found) != len(self.kernels):
            return None
        work = sum(PRODUCTS[row["kernel"]] for row in found)
        instructions = sum(
            PRODUCTS[row["kernel"]]
            * row["loops"][0]["instructions"]
            / row["loops"][0]["matrix_work"]
            for row in found
        )
        return instructions / work, sum(row["spills"] for row in found)


FORWARD, BACKWARD = ("forward",), ("backward_queries", "backward_keys")
TARGETS = (
    Target("sm_80", FORWARD, 64, 5.52),
    Target("sm_80", FORWARD, 128, 3.98),
    Target("sm_80", BACKWARD, 64, 4.70),
    Target("sm_80", BACKWARD, 128, 4.44),
    Target("sm_90", FORWARD, 64, 4.03),
    Target("sm_90", FORWARD, 128, 2.02),
    Target("sm_90", BACKWARD, 64, 2.61),
    Target("sm_90", BACKWARD, 128, 2.31),
)


def target_table(rows: Sequence[Row]) -> Table:
    table = Table(
        "float16", "the tutorial", "ours", "spills", "",
        title="instructions for each HMMA.16816 in the main loop",
    )  # fmt: skip
    for target in TARGETS:
        ours = target.ours(rows)
        if ours is not None:
            table.add_row(
                f"{target.architecture} {' and '.join(target.kernels)} {target.head_dim}",
                f"{target.tutorial:.2f}",
                f"{ours[0]:.2f}",
                str(ours[1]),
                "[green]below" if ours[0] < target.tutorial and not ours[1] else "[red]missed",
            )
    return table


def kernel_table(rows: Sequence[Row]) -> Table:
    table = Table(
        "", "kernel", "registers", "spills (in the loop)", "shared, KiB", "warps", "blocks",
        "each HMMA", "edge", "times done", "matrix instructions",
    )  # fmt: skip
    for row in rows:
        each = [f"{loop['per_matrix_unit']:.2f}" for loop in row["loops"][:2]]
        times = [loop["times_done"] for loop in row["loops"]]
        table.add_row(
            row["architecture"],
            f"{row['kernel']} {row['dtype']} {row['head_dim']} {row['kind']}",
            str(row["registers"]),
            _spills(row),
            f"{row['shared_bytes'] / 1024:.1f}",
            str(row["warps"]),
            str(row.get("blocks_per_multiprocessor", "")),
            *[*each, "", ""][:2],
            f"{times[0]:.1f}" if times and times[0] else "",
            ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items()),
        )
    return table


def _spills(row: Row) -> str:
    """Registers of AMD on the stack, loads and stores of NVIDIA; and how many the main loop has."""
    if not row["spills"]:
        return "-"
    return f"{row['spills']} ({row['loops'][0]['spills'] if row['loops'] else '?'})"


def worse(row: Row, committed: Row) -> list[str]:
    """Which figures of a kernel are worse than the committed ones."""
    found = [
        f"{key} {row[key]}, committed {committed[key]}"
        for key in ("spills", "registers", "shared_bytes")
        if row[key] > committed[key]
    ]
    if row.get("blocks_per_multiprocessor", 0) < committed.get("blocks_per_multiprocessor", 0):
        found.append(f"blocks {row['blocks_per_multiprocessor']}")
    found += [
        f"{key} of a loop {ours[key]}, committed {theirs[key]}"
        for ours, theirs in zip(row["loops"], committed["loops"], strict=False)
        for key in ("per_matrix_unit", "spills")
        if ours[key] > theirs[key]
    ]
    return found


def committed(path: pathlib.Path = RESULTS) -> dict[Name, Row]:
    """The committed rows."""
    rows = json.loads(path.read_text())["kernels"]
    keys = ("architecture", "kernel", "dtype", "head_dim", "kind")
    return {Name(*(row[key] for key in keys)): row for row in rows}


def as_text(rows: Sequence[Row]) -> str:
    """JSON with a line for each kernel, so that differences can be read."""
    head = {
        "command": "make triton-report",
        "date": time.strftime("%Y-%m-%d"),
        "triton": triton.__version__,
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return (
        json.dumps({**head, "kernels": []}, indent=1).replace(
            '"kernels": []', f'"kernels": [\n{lines}\n ]'
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What Triton makes of the Triton kernels.")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument(
        "--output", type=pathlib.Path, help="where to write; rows of other architectures stay there"
    )
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    wanted = list(names(tuple(options.architectures)))
    with console.status("compiling"), ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(measured, wanted))
    console.print(kernel_table(rows))
    console.print(target_table(rows))
    console.print(f"{sum(bool(row['spills']) for row in rows)} of {len(rows)} kernels spill")
    output = options.output or RESULTS
    kept = committed(output) if output.exists() else {}
    by_architecture = sorted(
        [
            *rows,
            *(row for name, row in kept.items() if name.architecture not in options.architectures),
        ],
        key=lambda row: ARCHITECTURES.index(row["architecture"]),
    )
    output.write_text(as_text(by_architecture))
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()
