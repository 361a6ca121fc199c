"""What a measurement ran on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from attn_ext._version import __version__
from attn_ext.backends import cpu
from attn_ext.processor import properties


def processor() -> str:
    """The processor's name, family and model, since virtual machines give many the same name."""
    found = properties()
    name = found.get("model name") or platform.processor()
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def machine() -> str:
    """The machine in one line: processor, threads, instruction set, torch."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads, {cpu.capability}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def description(device: str) -> dict[str, Any]:
    """The same as a dictionary, with the GPU where it is one that was measured."""
    found: dict[str, Any] = {
        "processor": processor(),
        "instruction_set": cpu.capability,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attn_ext": __version__,
    }
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    return found
