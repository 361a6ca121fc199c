"""
SIMD attention kernels for CPUs; called by attn_ext.backends.cpu.
"""

from __future__ import annotations
import typing

__all__: list[str] = [
    "backward",
    "capabilities",
    "forward",
    "linear",
    "set_dtypes",
    "threads_for",
    "weights",
]

def backward(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: typing.Any,
    dropout: typing.Any,
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
    problem: typing.Any,
    dropout: typing.Any,
    out: typing.Any,
    lse: typing.Any,
) -> None:
    """
    Write out and lse.
    """

def linear(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    input: typing.Any,
    weight: typing.Any,
    bias: typing.Any,
    out: typing.Any,
) -> None:
    """
    Write input @ weight^T + bias.
    """

def set_dtypes(dtypes: tuple) -> None:
    """
    Torch's float32, bfloat16, float16, float64 and bool; before anything else.
    """

def threads_for(
    available: typing.SupportsInt | typing.SupportsIndex,
    flops: typing.SupportsFloat | typing.SupportsIndex,
) -> int:
    """
    How many threads some work gets.
    """

def weights(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: typing.Any,
    dropout: typing.Any,
    lse: typing.Any,
    weights: typing.Any,
    average: bool,
) -> None:
    """
    Write the attention weights.
    """
