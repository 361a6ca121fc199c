"""Fixtures: every backend of this machine, the CPU kernels once for each instruction set it has."""

from __future__ import annotations

import pytest
import torch

from attn_ext.backends import cpu
from attn_ext.dispatch import BACKENDS

CPU_CAPABILITIES = [name for name, present in cpu.capabilities().items() if present]
BACKEND_IDS = [
    identifier
    for name in BACKENDS
    for identifier in ([f"cpu-{c}" for c in CPU_CAPABILITIES] if name == "cpu" else [name])
]


@pytest.fixture(params=BACKEND_IDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; for the CPU one, with one of its instruction sets in force."""
    name, _, capability = request.param.partition("-")
    if capability:
        monkeypatch.setattr(cpu, "capability", capability)
    return name


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20_26)
