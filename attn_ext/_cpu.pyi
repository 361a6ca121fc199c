"""
SIMD attention kernels for CPUs; called by attn_ext.backends.cpu.
"""

from __future__ import annotations
import typing

__all__: list[str] = [
    "backward",
    "capabilities",
    "forward",
    "forward_and_weights",
    "linear",
    "plain_backward",
    "plain_forward",
    "plain_forward_and_weights",
    "plain_self_attention",
    "set_dtypes",
    "set_plain",
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

def forward_and_weights(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    problem: typing.Any,
    dropout: typing.Any,
    out: typing.Any,
    lse: typing.Any,
    weights: typing.Any,
    average: bool,
) -> None:
    """
    Write out, lse and the attention weights.
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

def plain_backward(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    query: typing.Any,
    key: typing.Any,
    value: typing.Any,
    attn_mask: typing.Any,
    key_padding_mask: typing.Any,
    scale: typing.Any,
    causal: typing.SupportsInt | typing.SupportsIndex,
    out: typing.Any,
    lse: typing.Any,
    dout: typing.Any,
) -> typing.Any:
    """
    The gradients of query, key and value for what plain_forward gave; None, and nothing done, for tensors that need more than the kernel.
    """

def plain_forward(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    query: typing.Any,
    key: typing.Any,
    value: typing.Any,
    attn_mask: typing.Any,
    key_padding_mask: typing.Any,
    scale: typing.Any,
    causal: typing.SupportsInt | typing.SupportsIndex,
    grouped: bool,
    with_lse: bool,
) -> typing.Any:
    """
    The output, or (out, lse); None, and nothing done, for tensors that need more than the kernel. `causal`: 0 for not, 1 for upper left, 2 for lower right.
    """

def plain_forward_and_weights(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    query: typing.Any,
    key: typing.Any,
    value: typing.Any,
    attn_mask: typing.Any,
    key_padding_mask: typing.Any,
    causal: typing.SupportsInt | typing.SupportsIndex,
    average: bool,
) -> typing.Any:
    """
    As plain_forward with the default scale: (out, weights, lse), or None.
    """

def plain_self_attention(
    capability: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
    tokens: typing.Any,
    in_weight: typing.Any,
    in_bias: typing.Any,
    out_weight: typing.Any,
    out_bias: typing.Any,
    heads: typing.SupportsInt | typing.SupportsIndex,
    batch_first: bool,
    with_weights: bool,
    average: bool,
) -> typing.Any:
    """
    Multi-head self-attention with its projections: (out, weights or None); None, and nothing done, for tensors that need more than the kernels.
    """

def set_dtypes(dtypes: tuple) -> None:
    """
    Torch's float32, bfloat16, float16, float64 and bool; before anything else.
    """

def set_plain(
    exchange_api: typing.Any, empty_like: typing.Any, empty_in_layout_of: typing.Any
) -> bool:
    """
    Prepare plain_forward; whether it can be used.
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
