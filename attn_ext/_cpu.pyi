"""
SIMD attention kernels for CPUs; called by attn_ext.backends.cpu.
"""

from __future__ import annotations
import typing

__all__: list[str] = ["backward", "capabilities", "forward", "weights"]

def backward(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: tuple,
    out: typing.Any,
    lse: typing.Any,
    dout: typing.Any,
    dlse: typing.Any,
    dweights: typing.Any,
    dweights_scale: typing.SupportsFloat | typing.SupportsIndex,
    dquery: typing.Any,
    dkey: typing.Any,
    dvalue: typing.Any,
    dmask: typing.Any,
    row_term: typing.Any,
) -> None:
    """
    Write dquery, dkey, dvalue, dmask and row_term.
    """

def capabilities() -> dict:
    """
    Instruction sets that were compiled, best first, and whether this machine has each.
    """

def forward(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: tuple,
    out: typing.Any,
    lse: typing.Any,
) -> None:
    """
    Write out and lse.
    """

def weights(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: tuple,
    lse: typing.Any,
    weights: typing.Any,
    average: bool,
) -> None:
    """
    Write the attention weights.
    """
