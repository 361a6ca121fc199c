"""The implementations of attention, one file each, with the same five functions:

    not_supported_reasons(problem) -> list[str]     why this backend can't run it; empty: it can
    forward(problem) -> (out, lse)
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


def empty_in_layout_of(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new dense tensor of that shape whose dimensions lie in memory in `like`'s order.

    An output in query's order means that (B, L, H, D) projections get a (B, L, H, D) output and
    nobody has to transpose.
    """
    if like.shape == shape:
        out = torch.empty_like(like)  # several times as fast
        if out.stride()[-1] == 1:
            return out
    strides = like.stride()
    order = sorted(range(like.dim() - 1), key=lambda dim: strides[dim], reverse=True)
    return torch.empty_permuted(
        shape, (*order, like.dim() - 1), dtype=like.dtype, device=like.device
    )
