"""Tests and measures the kernels on a GPU: what `make gpu` runs once they are built.

    python -m bench.gpu                       all of it
    python -m bench.gpu --only timings        one of tests, sanitizers, timings

1. The contract suite and tests/gpu on every backend for GPUs.
2. compute-sanitizer's memcheck and racecheck, if installed, on a part that launches each kernel.
3. Our kernels beside SDPA's backends (bench/gpu_rows.py).

What fails is in the result too, bench/results/gpu/<device>.json. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attn_ext
import setup_cuda
from attn_ext.backends import cuda
from bench.gpu_rows import SDPA, Measured, all_rows, measure

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "gpu"
LOGS = ROOT / "build" / "gpu"
PARTS = ("tests", "sanitizers", "timings")
REPORT_WIDTH = 180
"""Columns, where there is no terminal that has a width of its own."""
SANITIZER_TOOLS = ("memcheck", "racecheck")
EVERY_KERNEL = "tests/gpu/test_every_kernel.py"
NVIDIA_SMI = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "temperature.gpu", "power.draw", "power.limit", "ecc.mode.current", "persistence_mode",
)  # fmt: skip


def run_tests(arguments: Sequence[str]) -> dict[str, Any]:
    """pytest's counts, and the names of what failed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    report = LOGS / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--junitxml", str(report), *arguments]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    found: dict[str, Any] = {"exit_code": code, "seconds": round(time.perf_counter() - start)}
    if report.exists():
        found.update(counts_of(report))
    return found


def counts_of(report: pathlib.Path) -> dict[str, Any]:
    """What a JUnit report says: how many tests passed, failed, were skipped, and which failed."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = [x for x in cases if x.find("failure") is not None or x.find("error") is not None]
    skipped = sum(x.find("skipped") is not None for x in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": [f"{x.get('classname')}::{x.get('name')}" for x in failed],
    }


def run_sanitizers() -> dict[str, Any]:
    """Each tool's verdict on our kernels; None where compute-sanitizer is not installed."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return dict.fromkeys(SANITIZER_TOOLS)
    LOGS.mkdir(parents=True, exist_ok=True)
    found = {}
    # With torch's cache of memory, what lies beyond a tensor's end would often be another's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZER_TOOLS:
        log = LOGS / f"{tool}.log"
        command = [
            *(sanitizer, "--tool", tool, "--error-exitcode", "99", "--log-file", str(log)),
            *("--kernel-regex", f"kns=({'|'.join(kernel_names())})"),
            *(sys.executable, "-m", "pytest", "-m", "gpu", EVERY_KERNEL),
        ]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log.read_text())
        found[tool] = {"exit_code": code, "summary": summary[-1] if summary else None}
    return found


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in the toolkit."""
    nvcc = setup_cuda.find_nvcc(os.environ)
    beside = os.path.dirname(os.path.realpath(nvcc)) if nvcc else ""
    folders = [os.environ.get("PATH", ""), beside, "/usr/local/cuda/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def kernel_names() -> list[str]:
    """Parts of our kernels' names: the namespace of those in C++, and each Triton kernel's own."""
    sources = sorted((ROOT / "triton_kernels").glob("*.py"))
    triton = [
        name
        for source in sources
        for name in re.findall(r"@triton\.jit\b.*?\ndef (\w+)", source.read_text(), re.S)
    ]
    return ["attn_ext", *triton]


def run_timings(device: torch.device, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Measures every row and prints them."""
    results = []
    with Progress(console=console, transient=True) as progress:
        for row in progress.track(all_rows(), description="measuring"):
            results.append(measure(row, device, rounds, burst=0.03))
    console.print(table_of(results))
    return [x.as_dictionary() for x in results]


def table_of(results: Sequence[Measured]) -> Table:
    """A line for each row: milliseconds of each side, and our fastest beside SDPA's fastest."""
    names = list(dict.fromkeys(name for x in results for name in x.milliseconds))
    names.sort(key=lambda name: name in SDPA)
    table = Table("work", *(f"{name}, ms" for name in names), "speedup")
    for x in results:
        times = (x.milliseconds.get(name) for name in names)
        speedup = "-" if x.speedup is None else f"{x.speedup:.2f}x"
        table.add_row(x.row.name, *("-" if y is None else f"{y:.3f}" for y in times), speedup)
    return table


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver and its clocks, and the versions of all that took part."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "attn_ext": attn_ext.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "attn_ext_cuda_architectures": cuda.architectures(),
        "nvcc": _output(setup_cuda.find_nvcc(os.environ) or "nvcc", "--version"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "gpus_visible": torch.cuda.device_count(),
        }
        found["nvidia_smi"] = nvidia_smi(device)
    return found


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature of the device as they are now."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    query = f"--query-gpu={','.join(NVIDIA_SMI)}"
    text = _output("nvidia-smi", query, "--format=csv,noheader", f"--id=GPU-{uuid}")
    return None if text is None else dict(zip(NVIDIA_SMI, text.split(", "), strict=True))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def file_name(device: torch.device) -> str:
    """The device's name, fit for a file's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_") + ".json"


def failures(result: dict[str, Any]) -> list[str]:
    """The parts that went wrong."""
    found = ["tests"] if result.get("tests", {}).get("exit_code") else []
    tools = result.get("sanitizers", {})
    return found + [name for name, x in tools.items() if x is not None and x["exit_code"]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tests and measures the kernels on a GPU.")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="rounds for each row")
    parser.add_argument("--output", type=pathlib.Path, help="where to write")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; `attn-ext info` says what it finds")
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: run_tests(["tests"]),
        "sanitizers": run_sanitizers,
        "timings": lambda: run_timings(options.device, options.rounds, console),
    }
    result = {"command": "make gpu", "machine": machine(options.device)}
    for name in options.only:
        console.rule(name)
        result[name] = parts[name]()
    if options.device.type == "cuda":
        result["nvidia_smi_afterwards"] = nvidia_smi(options.device)
    output = options.output or RESULTS / file_name(options.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    for name in failures(result):
        console.print(f"[red]{name} failed[/red]; logs are in {LOGS}")
    console.print(f"written to {output}")
    console.print(
        "Please send this file as a pull request, failures included: it is how we get to know how "
        "the kernels do on GPUs that we don't have."
    )
    if failures(result):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
