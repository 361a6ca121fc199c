"""What backends with native kernels share: Python allocates, a kernel writes.

`kernels` is a native module, and `settings` the arguments that its functions start with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn_ext.backends import Gradients, WeightsGradients, empty_in_layout_of
from attn_ext.philox import dropout_threshold
from attn_ext.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool)
"""In the order of csrc/attention.h's DType: for a native module's set_dtypes."""
MAX_HEAD_DIM = 256
"""That the GPUs' kernels take."""


def forward(
    kernels: Any, settings: tuple[Any, ...], problem: Problem, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns out (B, Hq, Lq, Dv) in query's dtype and memory order, and lse (B, Hq, Lq)."""
    out = empty_in_layout_of(problem.query, problem.value.shape[3])
    lse = _empty_lse(problem) if with_lse else None
    kernels.forward(*settings, *_arguments(problem), out, lse)
    return out, lse


def backward(
    kernels: Any,
    settings: tuple[Any, ...],
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dmask: Tensor | None,
    row_term: Tensor | None,
) -> Gradients:
    """Gradients for a given out and LSE; the kernel writes dmask and row_term too."""
    dq, dk, dv = (empty_in_layout_of(x) for x in (problem.query, problem.key, problem.value))
    arguments = (*settings, *_arguments(problem))
    kernels.backward(*arguments, out, lse, dout, dlse, None, 1.0, dq, dk, dv, dmask, row_term)
    sinks, dsinks = problem.sinks, None
    if sinks is not None and row_term is not None:
        shares = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        shares = shares.masked_fill(lse == -math.inf, 0.0)  # nothing is seen, the sink neither
        dsinks = -(shares * row_term).sum(dim=(0, 2)).to(sinks.dtype)
    return Gradients(dq, dk, dv, _as_mask(dmask, problem), dsinks)


def weights(
    kernels: Any, settings: tuple[Any, ...], problem: Problem, lse: Tensor, average: bool
) -> Tensor:
    """The weights after dropout, (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk)."""
    result = _empty_weights(problem, average)
    per_head = result.unsqueeze(1) if average else result
    kernels.weights(*settings, *_arguments(problem), lse, per_head, average)
    return result


def forward_and_weights(
    kernels: Any, settings: tuple[Any, ...], problem: Problem, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` and `weights` at once: (out, lse, weights)."""
    out, lse = empty_in_layout_of(problem.query, problem.value.shape[3]), _empty_lse(problem)
    result = _empty_weights(problem, average)
    per_head = result.unsqueeze(1) if average else result
    kernels.forward_and_weights(*settings, *_arguments(problem), out, lse, per_head, average)
    return out, lse, result


def weights_backward(
    kernels: Any,
    settings: tuple[Any, ...],
    problem: Problem,
    lse: Tensor,
    dweights: Tensor,
    average: bool,
    dmask: Tensor | None,
) -> WeightsGradients:
    """Gradients of `weights`, LSE being an input of its own; the kernel writes dmask too."""
    problem = problem.replace(value=problem.key[..., :0])
    if average:
        dweights = dweights[:, None].expand(pairs(problem))
    dq, dk = (empty_in_layout_of(x) for x in (problem.query, problem.key))
    dlse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    share = 1.0 / max(problem.query_heads, 1) if average else 1.0
    arguments = (*settings, *_arguments(problem))
    kernels.backward(*arguments, None, lse, None, None, dweights, share, dq, dk, None, dmask, dlse)
    return WeightsGradients(dq, dk, _as_mask(dmask, problem), dlse)


def reasons_of_inputs(dtype: torch.dtype, head_dim: int, value_dim: int) -> list[str]:
    """Why the GPUs' kernels can't run a problem, whatever the GPU."""
    reasons = []
    if dtype is torch.float64:
        reasons.append("query is float64; float32, float16 or bfloat16 would do")
    for name, size in (("query has a head_dim", head_dim), ("value has one", value_dim)):
        if size > MAX_HEAD_DIM:
            reasons.append(f"{name} of {size}; at most {MAX_HEAD_DIM} would do")
    return reasons


def mask_gradient_of(problem: Problem) -> Tensor:
    """Where a kernel writes the gradient of attn_mask, a value for each of its entries."""
    assert problem.attn_mask is not None
    mask = problem.attn_mask
    # A sum over no pairs is 0, and nobody writes it.
    make = torch.zeros if 0 in pairs(problem) else torch.empty
    return make(mask.shape, dtype=torch.float32, device=mask.device)


def pairs(problem: Problem) -> tuple[int, int, int, int]:
    """The shape that has an entry for every query and key of every head."""
    return problem.batch, problem.query_heads, problem.query_length, problem.key_length


def _empty_lse(problem: Problem) -> Tensor:
    query = problem.query
    return torch.empty(query.shape[:3], dtype=problem.compute_dtype, device=query.device)


def _empty_weights(problem: Problem, average: bool) -> Tensor:
    """Where a kernel writes weights or their mean, as a tensor of its own, which may be changed in
    place where autograd returns it; a mean of no heads is NaN."""
    batch, heads, rows, columns = pairs(problem)
    shape = (batch, rows, columns) if average else (batch, heads, rows, columns)
    result = torch.empty(shape, dtype=problem.query.dtype, device=problem.query.device)
    return result.fill_(math.nan) if average and problem.query_heads == 0 else result


def _arguments(problem: Problem) -> tuple[Problem, tuple[int, int] | None]:
    """The problem as native code takes it, and dropout's threshold and seed."""
    dropout = None
    if problem.dropout_p > 0:
        dropout = (dropout_threshold(problem.dropout_p), problem.seed_value)
    if problem.sinks is not None and problem.sinks.dtype != problem.compute_dtype:
        problem = problem.replace(sinks=problem.sinks.to(problem.compute_dtype))
    return problem, dropout


def _as_mask(dmask: Tensor | None, problem: Problem) -> Tensor | None:
    if dmask is None or problem.attn_mask is None:
        return None
    return dmask.to(problem.attn_mask.dtype)
