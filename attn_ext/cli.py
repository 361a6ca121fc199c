"""The command `attn-ext`: `attn-ext info` says what this machine runs and why not more."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import attn_ext
from attn_ext import dispatch
from attn_ext.backends import cpu, cuda


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="attn-ext", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what runs on this machine, and why not more")
    parser.parse_args(arguments)
    print(info())


if __name__ == "__main__":
    main()
