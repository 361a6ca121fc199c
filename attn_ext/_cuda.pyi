"""
Tensor-core attention kernels for NVIDIA GPUs; called by attn_ext.backends.cuda.
"""

from __future__ import annotations
import typing

__all__: list[str] = [
    "architectures",
    "backward",
    "compute_capability",
    "device_count",
    "device_type",
    "forward",
    "no_device_reason",
    "set_dtypes",
    "shared_bytes",
    "shared_bytes_limit",
    "weights",
]

def architectures() -> list[str]:
    """
    What the kernels were compiled for, in the terms of torch.cuda.get_arch_list.
    """

def backward(
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    allow_tf32: bool,
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

def compute_capability(device: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int]:
    """
    (major, minor).
    """

def device_count() -> int:
    """
    How many devices there are; 0 without a driver.
    """

def forward(
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    allow_tf32: bool,
    problem: typing.Any,
    dropout: typing.Any,
    out: typing.Any,
    lse: typing.Any,
) -> None:
    """
    Write out and lse.
    """

def no_device_reason() -> str:
    """
    Why the CUDA runtime has no device; empty where it has one.
    """

def set_dtypes(dtypes: tuple) -> None:
    """
    Torch's float32, bfloat16, float16, float64 and bool; before anything else.
    """

def shared_bytes(
    dtype: typing.Any,
    head_dim: typing.SupportsInt | typing.SupportsIndex,
    value_dim: typing.SupportsInt | typing.SupportsIndex,
    allow_tf32: bool,
    limit: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Shared memory that the kernels need where a block may have `limit` bytes.
    """

def shared_bytes_limit(device: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Shared memory that a block may have on a device, in bytes.
    """

def weights(
    device: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    allow_tf32: bool,
    problem: typing.Any,
    dropout: typing.Any,
    lse: typing.Any,
    weights: typing.Any,
    average: bool,
) -> None:
    """
    Write the attention weights.
    """

device_type: str = "cuda"
