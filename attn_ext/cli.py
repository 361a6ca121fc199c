"""The command `attn-ext`.

`attn-ext info` says what this machine runs and why not more, `attn-ext check` holds every backend
against float64 here, `attn-ext bench` measures.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import platform
import sys
import time

import torch

import attn_ext
from attn_ext import dispatch
from attn_ext.backends import cpu, cuda
from attn_ext.benchmark.cases import DTYPES, KINDS, Shape

CHECK_COLUMNS = (
    "backend", "device", "dtype", "results", "worst error", "PyTorch's", "limit", "where", "",
)  # fmt: skip
"""Of the table that `attn-ext check` prints; the worst error is the largest part of its limit."""


def info() -> str:
    """Versions, instruction sets, threads, and what each backend can do here."""
    found, override = cpu.capabilities(), os.environ.get("ATTN_EXT_CPU_CAPABILITY")
    marks = (
        f"{name}{'' if present else ' (not on this machine)'}" for name, present in found.items()
    )
    lines = [
        f"attn_ext      {attn_ext.__version__}",
        f"torch         {torch.__version__}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"cpu kernels   {', '.join(marks) or 'not built'}",
        f"in use        {cpu.capability}"
        + (f" (ATTN_EXT_CPU_CAPABILITY={override})" if override else ""),
        f"threads       {cpu.num_threads()} (torch.set_num_threads)",
        f"cuda kernels  {', '.join(cuda.architectures()) or 'not built'}",
        f"cuda devices  {_cuda_devices()}",
        "",
    ]  # fmt: skip
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            tensors = (torch.zeros(1, 1, 2, 8, dtype=dtype, device=device) for _ in range(3))
            lines.append(f"{device}, {str(dtype).removeprefix('torch.')}:")
            lines += [f"  {line}" for line in str(attn_ext.explain(*tensors)).splitlines()]
    lines += ["", f"backends, the preferred first: {', '.join(dispatch.BACKENDS)}"]
    return "\n".join(lines)


def _cuda_devices() -> str:
    found = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        for index in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(index)]
    ]
    if found:
        return "; ".join(found)
    return f"none ({cuda.no_device_reason() or 'this torch was built without CUDA'})"


def run_check(options: argparse.Namespace) -> int:
    """Print the worst result of each backend and dtype, and every failure; 1 if any failed."""
    from attn_ext.benchmark import check

    start = time.perf_counter()
    backends = options.backend or list(dispatch.BACKENDS)
    for device in check.devices():
        for name, reason in check.refusals(backends, device).items():
            print(f"not {name} on {device}: {reason}")
    found = list(check.check(backends, options.dtype, options.shapes or check.SHAPES))
    if not found:
        print("nothing was checked: no backend of those can run any of this")
        return 1
    rows: list[tuple[str, ...]] = [CHECK_COLUMNS]
    for worst, count, failed in check.summary(found):
        figures = [f"{x:.1e}" for x in (worst.error, worst.theirs, worst.limit)]
        where = f"{worst.result}, {worst.problem} {worst.shape}"
        verdict = f"{failed} FAILED" if failed else "right"
        rows.append(
            (worst.backend, worst.device, worst.dtype, str(count), *figures, where, verdict)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    failures = [finding for finding in found if not finding.passed]
    for finding in failures:
        print(f"FAILED {finding}")
    print(
        f"{len(found) - len(failures)} of {len(found)} results are right: within twice PyTorch's "
        f"own error against float64, or what rounding costs; {time.perf_counter() - start:.0f} s"
    )
    return 1 if failures else 0


def run_bench(options: argparse.Namespace) -> int:
    """Measure; see attn_ext.benchmark.command."""
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"attn-ext bench needs {' and '.join(missing)}: pip install 'attn-ext[bench]'",
            file=sys.stderr,
        )
        return 1
    from attn_ext.benchmark import command

    return command.run(options)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    whole = argparse.ArgumentParser(prog="attn-ext", description="Fused attention for PyTorch.")
    commands = whole.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what runs on this machine, and why not more")
    check = commands.add_parser("check", help="every backend against float64, on this machine")
    bench = commands.add_parser("bench", help="time, memory and errors beside PyTorch and others")
    for command in (check, bench):
        command.add_argument(
            "--shapes", nargs="+", type=_shape, metavar="B,H,L,D", default=[],
            help="shapes of your own; H may be Hq:Hkv and L may be Lq:Lk, as in 1,32:8,1:4096,128",
        )  # fmt: skip
        command.add_argument("--backend", nargs="+", choices=dispatch.BACKENDS, default=[])
    check.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    bench.add_argument("--dtype", nargs="+", choices=DTYPES, default=[])
    bench.add_argument("--peer", nargs="+", default=[], help='only these, such as "PyTorch flash"')
    bench.add_argument(
        "--set", nargs="+", choices=("short", "full", "dtypes", "sweeps"),
        default=["short", "dtypes", "sweeps"], help="what is measured where no shapes are given",
    )  # fmt: skip
    bench.add_argument("--kind", nargs="+", choices=KINDS, default=[])
    bench.add_argument("--option", nargs="+", default=[], help='"causal", "float mask", ...')
    bench.add_argument("--rounds", type=int, default=10, help="turns that every side takes")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--threads", type=int, help="torch's own choice by default")
    bench.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure it")
    bench.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    bench.add_argument("--report", type=pathlib.Path, help="where to write an HTML report")
    bench.add_argument(
        "--svg", nargs=2, action="append", default=[], metavar=("PLOT", "FILE"),
        help="write one plot of the report",
    )  # fmt: skip
    bench.add_argument(
        "--kernels", action="append", type=pathlib.Path, default=[],
        help="a JSON report of compiled GPU kernels, to become a part of the HTML; may be repeated",
    )  # fmt: skip
    bench.add_argument(
        "--from", dest="source", type=pathlib.Path, metavar="JSON",
        help="draw what an earlier --json wrote; nothing is measured",
    )  # fmt: skip
    return whole


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.arguments = arguments[1:]
    if options.command == "info":
        print(info())
        return 0
    return run_check(options) if options.command == "check" else run_bench(options)


if __name__ == "__main__":
    sys.exit(main())
