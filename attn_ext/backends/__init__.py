"""The implementations of attention, one file each, with the same five functions:

    not_supported_reasons(problem) -> list[str]     why this backend can't run it; empty: it can
    forward(problem, with_lse) -> (out, lse)        without with_lse LSE may be None
    backward(problem, out, lse, dout, dlse, mask_gradient) -> Gradients
    weights(problem, lse, average) -> weights
    weights_backward(problem, lse, dweights, average, mask_gradient) -> WeightsGradients

`attn_ext.dispatch.BACKENDS` lists them; they are imported when first needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """What `backward` returns: the gradients of the problem's differentiable inputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    sinks: Tensor | None


class WeightsGradients(NamedTuple):
    """What `weights_backward` returns; LSE counts as an input of its own."""

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None
    lse: Tensor


def empty_in_layout_of(like: Tensor, columns: int | None = None) -> Tensor:
    """A new dense tensor of `like`'s shape, dtype and order of dimensions in memory.

    An output in query's order means that (B, L, H, D) projections get a (B, L, H, D) output and
    nobody has to transpose. The last dimension lies innermost, and may get another size: `columns`.
    """
    if columns is None or columns == like.shape[3]:
        out = torch.empty_like(like)  # several times as fast
        if out.is_contiguous() or out.stride()[3] == 1:  # the first is the faster look
            return out
    strides, shape = like.stride(), like.shape
    order = sorted(range(3), key=lambda dim: strides[dim], reverse=True)
    return torch.empty_permuted(
        (*shape[:3], shape[3] if columns is None else columns),
        (*order, 3),
        dtype=like.dtype,
        device=like.device,
    )
