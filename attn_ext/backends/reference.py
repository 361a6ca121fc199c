"""Attention as its definition, in plain differentiable PyTorch: the ground truth of every test.

It runs on any device and dtype, under vmap, forward-mode differentiation and to any order of
derivative, and holds (B, Hq, Lq, Lk) tensors in memory: nothing runs it unless it is asked for, or
where no kernel exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ext.backends import Gradients, WeightsGradients
from attn_ext.philox import keep_mask
from attn_ext.problem import LOWEST_ENTRY, UNLIMITED, Problem

NEGATIVE_INFINITY = float("-inf")


def not_supported_reasons(problem: Problem) -> list[str]:
    """Nothing is beyond the reference."""
    return []


def forward(problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, Dv) in query's dtype and lse (B, Hq, Lq) in float32 (float64)."""
    exact = _has_non_finite(problem.query, problem.key, problem.value)
    scores, visible = _scores(problem, exact)
    lse = _logsumexp(scores, visible, problem.sinks)
    weights = _dropped(problem, _softmax(scores, visible, lse))
    value = _per_query_head(problem.value.to(problem.compute_dtype), problem)
    out = _matmul_over_visible(weights, value, visible, exact)
    return out.to(problem.query.dtype), lse


def weights(problem: Problem, lse: Tensor, average: bool) -> Tensor:
    """The weights after dropout: (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk)."""
    exact = _has_non_finite(problem.query, problem.key)
    scores, visible = _scores(problem, exact)
    result = _dropped(problem, _softmax(scores, visible, lse))
    return (result.mean(dim=1) if average else result).to(problem.query.dtype)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask_gradient: bool,
) -> Gradients:
    """The gradients by automatic differentiation of `forward`; see `backends` for the signature."""
    with torch.enable_grad(), _autograd_inside_operators():
        problem, inputs = _with_fresh_leaves(problem, mask_gradient)
        results = forward(problem)
        grads = _gradients(results, inputs, (dout, torch.zeros_like(lse) if dlse is None else dlse))
    return Gradients(*grads)  # type: ignore[arg-type]


def weights_backward(
    problem: Problem, lse: Tensor, dweights: Tensor, average: bool, mask_gradient: bool
) -> WeightsGradients:
    """The gradients by automatic differentiation of `weights`, LSE being an input of its own."""
    with torch.enable_grad(), _autograd_inside_operators():
        problem, inputs = _with_fresh_leaves(problem, mask_gradient)
        lse = lse.detach().requires_grad_()
        result = weights(problem, lse, average)
        dq, dk, dmask, dlse = _gradients(
            (result,), (inputs[0], inputs[1], inputs[3], lse), (dweights,)
        )
    assert dq is not None
    assert dk is not None
    assert dlse is not None
    return WeightsGradients(dq, dk, dmask, dlse)


def _autograd_inside_operators() -> Any:
    """Lets what an operator's kernel does, below autograd, record a graph of its own."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._SetExcludeDispatchKeyGuard(key, False)


def _scores(problem: Problem, exact: bool) -> tuple[Tensor, Tensor]:
    """Scores (B, Hq, Lq, Lk) before masking, and which pairs are visible (broadcasts to it)."""
    dtype = problem.compute_dtype
    query = problem.query.to(dtype)
    key = _per_query_head(problem.key.to(dtype), problem)
    visible = _visible(problem)
    scores = problem.scale * _matmul_over_visible(
        query, key.transpose(-1, -2), visible, exact, pairs_are_outputs=True
    )
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    for mask in (problem.attn_mask, _key_mask(problem)):
        if mask is not None and mask.is_floating_point():
            scores = scores + mask.to(dtype)
    if problem.alibi_slopes is not None:
        slopes = problem.alibi_slopes.to(dtype)[..., None, None]
        scores = scores - slopes * _distance_from_diagonal(problem).abs().to(dtype)
    return scores, visible


def _visible(problem: Problem) -> Tensor:
    """Which pairs take part: a bool tensor that broadcasts to (B, Hq, Lq, Lk)."""
    distance = _distance_from_diagonal(problem)
    visible = torch.ones_like(distance, dtype=torch.bool)
    left, right = problem.reach
    if right != UNLIMITED:
        visible = visible & (distance <= right)
    if left != UNLIMITED:
        visible = visible & (distance >= -left)
    for mask in (problem.attn_mask, _key_mask(problem)):
        if mask is not None:
            if mask.is_floating_point():
                mask = ~(mask.to(problem.compute_dtype) < LOWEST_ENTRY)  # beyond float16's range
            visible = visible & mask
    return visible


def _distance_from_diagonal(problem: Problem) -> Tensor:
    """column - diagonal(row), (Lq, Lk): 0 where positions meet, positive in the future."""
    device = problem.query.device
    row = torch.arange(problem.query_length, device=device) + problem.diagonal
    return torch.arange(problem.key_length, device=device) - row[:, None]


def _key_mask(problem: Problem) -> Tensor | None:
    mask = problem.key_padding_mask
    return None if mask is None else mask[:, None, None, :]


def _per_query_head(tensor: Tensor, problem: Problem) -> Tensor:
    """(B, Hkv, Lk, D) to (B, Hq, Lk, D): a key head serves Hq / Hkv neighbouring query heads."""
    if tensor.shape[1] == problem.query_heads:
        return tensor
    return tensor.repeat_interleave(problem.query_heads // tensor.shape[1], dim=1)


def _logsumexp(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """log of the sum over visible keys and the sink; -inf, with gradient 0, where there is none."""
    hidden = scores.masked_fill(~visible, NEGATIVE_INFINITY)
    logits = None if sinks is None else sinks.to(scores.dtype)[:, None].expand(scores.shape[:-1])
    if scores.shape[-1]:
        top = hidden.detach().amax(dim=-1)
    else:
        top = torch.full_like(scores.detach().sum(dim=-1), NEGATIVE_INFINITY)
    if logits is not None:
        top = torch.maximum(top, logits.detach())
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.exp(hidden - top[..., None]).sum(dim=-1)
    if logits is not None:
        total = total + torch.exp(logits - top)
    empty = total == 0
    return torch.where(empty, NEGATIVE_INFINITY, top + torch.log(total.masked_fill(empty, 1.0)))


def _softmax(scores: Tensor, visible: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) at visible pairs, else exactly 0."""
    lse = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0)
    return torch.exp((scores - lse[..., None]).masked_fill(~visible, NEGATIVE_INFINITY))


def _dropped(problem: Problem, weights: Tensor) -> Tensor:
    if problem.dropout_p == 0:
        return weights
    batch, heads = problem.batch, problem.query_heads
    keep = keep_mask(
        (batch, heads, problem.query_length, problem.key_length),
        problem.dropout_p,
        problem.seed if isinstance(problem.seed, Tensor) else problem.seed_value,
        problem.offset,
        q_start=problem.q_start,
        k_start=problem.k_start,
        device=problem.query.device,
    )
    return weights * keep / (1.0 - problem.dropout_p)


def _has_non_finite(*tensors: Tensor) -> bool:
    """Whether the slow exact products are needed; False where tensors have no values to see."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)
    ):
        return False
    return not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _matmul_over_visible(
    left: Tensor, right: Tensor, visible: Tensor, exact: bool, *, pairs_are_outputs: bool = False
) -> Tensor:
    """left @ right in which pairs that are not visible take no part, forward and backward.

    A plain product has 0 * NaN = NaN where a hidden key holds garbage. With `exact`, a hidden
    pair's operand is replaced by 0, at a cost of (..., Lq, Lk, D) memory; tests of such inputs are
    small.

    Args:
        left: (..., Lq, N). right: (..., N, M).
        visible: broadcasts to (..., Lq, N), or to (..., Lq, M) if pairs are outputs.
    """
    if not exact:
        return left @ right
    if pairs_are_outputs:
        seen = visible[..., None]
        products = torch.where(seen, left[..., :, None, :], 0.0) * torch.where(
            seen, right.transpose(-1, -2)[..., None, :, :], 0.0
        )
        return products.sum(dim=-1)
    seen = visible[..., None]
    products = torch.where(seen, left[..., None], 0.0) * torch.where(
        seen, right[..., None, :, :], 0.0
    )
    return products.sum(dim=-2)


def _with_fresh_leaves(
    problem: Problem, mask_gradient: bool
) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The problem over leaves of its own, and those leaves (None where no gradient is wanted)."""
    mask = problem.attn_mask
    problem = problem.replace(
        query=problem.query.detach().requires_grad_(),
        key=problem.key.detach().requires_grad_(),
        value=problem.value.detach().requires_grad_(),
        attn_mask=mask.detach().requires_grad_() if mask is not None and mask_gradient else mask,
        sinks=None if problem.sinks is None else problem.sinks.detach().requires_grad_(),
    )
    mask = problem.attn_mask if mask_gradient else None
    return problem, (problem.query, problem.key, problem.value, mask, problem.sinks)


def _gradients(
    results: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    output_gradients: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """torch.autograd.grad with None passed through in `inputs`."""
    wanted = [tensor for tensor in inputs if tensor is not None]
    found = iter(torch.autograd.grad(results, wanted, output_gradients, materialize_grads=True))
    return [None if tensor is None else next(found) for tensor in inputs]
