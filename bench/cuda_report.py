"""What nvcc makes of the CUDA kernels: `make cuda-report`. Needs nvcc, and no GPU.

Compiles every instance for each architecture and reads its machine code: registers, spills, shared
memory, blocks that a multiprocessor holds, and for the main loop the instructions for each
HMMA.16816 (m16n8k16, 2048 multiply-adds), their mix, and how busy each unit is while the tensor
core is busy throughout. Two figures a loop: its whole body, by which targets are judged, and the
way through it with the most matrix products. All of it goes to bench/results/cuda_report.json.

    python -m bench.cuda_report --architectures 8.0 9.0 --jobs 1 --dtypes float16 TF32
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import setup_cuda
from bench import sass
from bench.cuda_architectures import ARCHITECTURES
from bench.cuda_kernels import Compiler, Kernel

RESULTS = pathlib.Path(__file__).parent / "results" / "cuda_report.json"
REPORT_WIDTH = 180
"""Columns, where there is no terminal that has a width of its own."""
WIDEST_WITHOUT_SPILLS = 128


@dataclass(frozen=True)
class Target:
    """The most instructions for each HMMA.16816 that a main loop may have at 8.0, in float16.

    Nothing may be spilled. Beside it what FlashAttention-2 has, compiled by the same nvcc 13.0, its
    dropout, ALiBi, softcap and windows compiled out except where `kind` says otherwise; all its
    kernels have 255 registers.
    """

    operations: tuple[str, ...]
    head_dim: int
    kind: str
    at_most: float
    flash_attention: tuple[float, ...]
    flash_attention_spills: tuple[int, ...] = ()

    def applies_to(self, kernel: Kernel) -> bool:
        return (
            kernel.architecture.name == "8.0"
            and kernel.name.dtype == "float16"
            and kernel.name.operation in self.operations
            and kernel.name.head_dim == self.head_dim
            and self.kind in kernel.kinds
        )

    def met_by(self, kernel: Kernel) -> bool | None:
        """None where the main loop holds others, whose instructions run more often than counted."""
        loop = kernel.loops[0]
        if loop["per_matrix_unit"] > self.at_most or kernel.spills:
            return False
        return None if loop["inner_loops"] else True


BACKWARD = ("backward_queries", "backward_keys")
TARGETS = (
    Target(("forward",), 64, "plain", 4.5, (4.63, 4.56), (320, 284)),
    Target(("forward",), 128, "plain", 3.55, (3.68, 3.57), (156, 224)),
    Target(BACKWARD, 64, "plain", 3.5, (3.52, 4.01), (92, 96)),
    Target(BACKWARD, 128, "plain", 2.8, (2.78, 3.05), (60, 64)),
    Target(("forward",), 64, "dropout", 7.02, (7.02,)),
    Target(("forward",), 128, "dropout", 5.38, (5.38,)),
)


def verdicts(kernels: Sequence[Kernel]) -> list[tuple[Target, Kernel, bool | None]]:
    """Every target with each kernel that it is for, and whether it is met; None: unknown."""
    return [(t, x, t.met_by(x)) for t in TARGETS for x in kernels if t.applies_to(x)]


def spilling(kernels: Sequence[Kernel], widest: int = WIDEST_WITHOUT_SPILLS) -> list[Kernel]:
    """Those that spill registers, up to a head_dim."""
    return [x for x in kernels if x.spills and (x.name.head_dim or 0) <= widest]


def as_dictionary(kernel: Kernel) -> dict[str, Any]:
    found = kernel.resources
    return {
        "architecture": kernel.architecture.name,
        **asdict(kernel.name),
        "launched_for": kernel.kinds,
        "registers": found.registers,
        "spill_stores_bytes": found.spill_stores,
        "spill_loads_bytes": found.spill_loads,
        "shared_bytes": kernel.shared_bytes + found.shared,
        "threads": kernel.threads,
        "blocks_per_multiprocessor": kernel.blocks,
        "main_loops": kernel.loops,
    }


def target_table(kernels: Sequence[Kernel]) -> Table:
    table = Table(
        "at 8.0, float16", "FlashAttention-2", "its spill stores", "at most", "ours", "hot path",
        "spill stores", "", title="instructions for each HMMA.16816",
    )  # fmt: skip
    for target, kernel, met in verdicts(kernels):
        loop = kernel.loops[0]
        table.add_row(
            f"{kernel.name.operation} {target.head_dim}"
            + (f", {target.kind}" if target.kind != "plain" else ""),
            ", ".join(f"{x:.2f}" for x in target.flash_attention),
            ", ".join(f"{x} B" for x in target.flash_attention_spills) or "-",
            f"{target.at_most:.2f}, 0 B",
            f"{loop['per_matrix_unit']:.2f}",
            f"{loop['hot_path_per_matrix_unit']:.2f}",
            f"{kernel.resources.spill_stores} B",
            {True: "[green]met", False: "[red]missed", None: "loops inside"}[met],
        )
    return table


def kernel_table(kernels: Sequence[Kernel]) -> Table:
    """A line for each main loop; a kernel's further loops are those with an edge in them."""
    table = Table(
        "", "kernel", "registers", "spills, B", "shared, KiB", "blocks", "each HMMA", "hot path",
        "instructions of the body", "of tensor time: shared memory, exp, FMA, ALU, issue",
    )  # fmt: skip
    architecture = None
    for kernel in kernels:
        if architecture not in (None, kernel.architecture):
            table.add_section()
        architecture = kernel.architecture
        found = kernel.resources
        cells = (
            architecture.name,
            str(kernel.name),
            str(found.registers),
            f"{found.spill_stores}, {found.spill_loads}" if kernel.spills else "-",
            f"{(kernel.shared_bytes + found.shared) / 1024:.1f}",
            str(kernel.blocks),
        )
        for number, loop in enumerate(kernel.loops):
            name = cells if number == 0 else (architecture.name, "  at an edge", *[""] * 4)
            table.add_row(*name, *_loop_cells(loop))
        if not kernel.loops:
            table.add_row(*cells)
    return table


def _loop_cells(loop: dict[str, Any]) -> list[str]:
    mix = ", ".join(f"{count} {name}" for name, count in loop["mix"].items())
    if loop["inner_loops"]:
        mix += f"; {len(loop['inner_loops'])} loops inside counted once"
    shares = loop["shares_of_tensor_time"]
    figures = [loop["per_matrix_unit"], loop["hot_path_per_matrix_unit"]]
    return [
        *("-" if x is None else f"{x:.2f}" for x in figures),
        mix,
        "-" if shares is None else ", ".join(f"{x:.2f}" for x in shares.values()),
    ]


def report(kernels: Sequence[Kernel], compiler: Compiler) -> dict[str, Any]:
    """What is written: how it was compiled, the targets and every kernel."""
    architectures = dict.fromkeys(x.architecture for x in kernels)
    return {
        "command": "make cuda-report",
        "date": time.strftime("%Y-%m-%d"),
        "nvcc": compiler.version,
        "compiled_by": {
            x.name: " ".join(["nvcc", *compiler.command(x)[1:]]) for x in architectures
        },
        "matrix_unit_multiply_adds": sass.MATRIX_UNIT,
        "targets": [
            {
                **asdict(target),
                "kernel": str(kernel.name),
                "ours": kernel.loops[0]["per_matrix_unit"],
                "spill_stores": kernel.resources.spill_stores,
                "met": met,
            }
            for target, kernel, met in verdicts(kernels)
        ],
        "spilling_up_to_head_dim_128": [
            f"{x.architecture.name} {x.name}" for x in spilling(kernels)
        ],
        "kernels": [as_dictionary(x) for x in kernels],
    }


def as_text(result: dict[str, Any]) -> str:
    """JSON with a line for each kernel, so that differences can be read."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in result["kernels"])
    head = json.dumps({**result, "kernels": []}, indent=1)
    return head.replace('"kernels": []', f'"kernels": [\n{lines}\n ]') + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What nvcc makes of the CUDA kernels.")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float16"], help="which kernels to print; all are written"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help=f"where to write; {RESULTS.name} for all architectures"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    nvcc = setup_cuda.find_nvcc(os.environ)
    if nvcc is None:
        raise SystemExit("make cuda-report needs nvcc: set CUDA_HOME or PATH")
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    compiler = Compiler(nvcc, options.jobs)
    with console.status("compiling"):
        kernels = compiler.kernels([ARCHITECTURES[x] for x in options.architectures])
    console.print(kernel_table([x for x in kernels if x.name.dtype in options.dtypes]))
    console.print(target_table(kernels))
    met = [bool(x) for _, _, x in verdicts(kernels)]
    spills = spilling(kernels)
    console.print(f"{sum(met)} of {len(met)} targets met; nvcc {compiler.version}")
    console.print(f"{len(spills)} kernels spill at a head_dim of up to {WIDEST_WITHOUT_SPILLS}")
    for kernel in spills:
        console.print(
            f"  {kernel.architecture.name} {kernel.name}: {kernel.resources.spill_stores} B stored"
        )
    everything = options.architectures == list(ARCHITECTURES)
    output = options.output or (RESULTS if everything else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(as_text(report(kernels, compiler)))
        console.print(f"written to {output}")


if __name__ == "__main__":
    main()
