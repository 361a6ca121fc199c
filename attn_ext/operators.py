"""The operators `torch.ops.attn_ext.*`: what torch.compile, torch.export and torch.func trace.

Each has a kernel, which asks `dispatch` when it runs, a fake kernel, a backward pass and a rule for
vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ext import dispatch
from attn_ext.backends import Gradients, WeightsGradients, empty_in_layout_of
from attn_ext.problem import Problem
from attn_ext.second_derivatives import second_derivative, weights_second_derivative

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_TENSOR_COUNT = 8
_OPTIONS = (
    "float dropout_p, int offset, str? causal, SymInt window_left, SymInt window_right, "
    "float scale, float softcap, SymInt q_start, SymInt k_start, str? backend"
)
_OPTION_COUNT = 10

library = torch.library.Library("attn_ext", "DEF")
library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")
library.define(
    f"attention_backward({_TENSORS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"bool mask_gradient, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"attention_weights({_TENSORS}, Tensor lse, bool average, {_OPTIONS}) -> Tensor")
library.define(
    f"attention_weights_backward({_TENSORS}, Tensor lse, Tensor dweights, bool average, "
    f"bool mask_gradient, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def split_arguments(problem: Problem, backend: str | None) -> tuple[tuple[Any, ...], ...]:
    seed = problem.seed
    if problem.dropout_p == 0:
        seed_tensor = None
    elif isinstance(seed, Tensor):
        seed_tensor = seed
    else:
        signed = seed - 2**64 if seed >= 2**63 else seed
        seed_tensor = torch.full((), signed, dtype=torch.int64)
    left, right = problem.window
    tensors = (
        problem.query,
        problem.key,
        problem.value,
        problem.attn_mask,
        problem.key_padding_mask,
        problem.alibi_slopes,
        problem.sinks,
        seed_tensor,
    )
    options = (
        problem.dropout_p,
        problem.offset,
        problem.causal,
        left,
        right,
        problem.scale,
        problem.softcap,
        problem.q_start,
        problem.k_start,
        backend,
    )
    return tensors, options


def _problem(tensors: Any, options: Any) -> Problem:
    query, key, value, attn_mask, key_padding_mask, alibi_slopes, sinks, seed = tensors
    dropout_p, offset, causal, left, right, scale, softcap, q_start, k_start, _ = options
    return Problem(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed,
        offset=offset,
        causal=causal,
        window=(left, right),
        scale=scale,
        softcap=softcap,
        q_start=q_start,
        k_start=k_start,
    )


def _parse(arguments: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...], str | None]:
    """An operator's arguments as (problem, what stands between tensors and options, backend)."""
    tensors, options = arguments[:_TENSOR_COUNT], arguments[-_OPTION_COUNT:]
    return _problem(tensors, options), arguments[_TENSOR_COUNT:-_OPTION_COUNT], options[-1]


def _without_none(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators can't return None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _attention_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, _, backend = _parse(arguments)
    return dispatch.select(problem, backend).forward(problem)


def _attention_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    problem, extra, backend = _parse(arguments)
    grads = dispatch.select(problem, backend).backward(problem, *extra)
    return _without_none(grads, problem.query)


def _weights_kernel(*arguments: Any) -> Tensor:
    problem, extra, backend = _parse(arguments)
    return dispatch.select(problem, backend).weights(problem, *extra)


def _weights_backward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    problem, extra, backend = _parse(arguments)
    grads = dispatch.select(problem, backend).weights_backward(problem, *extra)
    return _without_none(grads, problem.query)


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, _, _ = _parse(arguments)
    shape = (problem.batch, problem.query_heads, problem.query_length)
    out = empty_in_layout_of(problem.query, problem.value.shape[3])
    return out, problem.query.new_empty(shape, dtype=problem.compute_dtype)


def _attention_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, extra, _ = _parse(arguments)
    mask = problem.attn_mask if extra[-1] else None
    return _without_none(
        Gradients(
            empty_in_layout_of(problem.query),
            empty_in_layout_of(problem.key),
            empty_in_layout_of(problem.value),
            None if mask is None else mask.new_empty(mask.shape),
            None if problem.sinks is None else problem.sinks.new_empty(problem.sinks.shape),
        ),
        problem.query,
    )


def _weights_fake(*arguments: Any) -> Tensor:
    problem, (_, average), _ = _parse(arguments)
    heads = () if average else (problem.query_heads,)
    return problem.query.new_empty(
        (problem.batch, *heads, problem.query_length, problem.key_length)
    )


def _weights_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (lse, _, _, mask_gradient), _ = _parse(arguments)
    mask = problem.attn_mask if mask_gradient else None
    return _without_none(
        WeightsGradients(
            empty_in_layout_of(problem.query),
            empty_in_layout_of(problem.key),
            None if mask is None else mask.new_empty(mask.shape),
            lse.new_empty(lse.shape),
        ),
        problem.query,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor) -> None:
    """Keep an operator's arguments: tensors where autograd's hooks see them."""
    is_tensor = [isinstance(argument, Tensor) for argument in inputs]
    ctx.save_for_backward(*(x for x, yes in zip(inputs, is_tensor, strict=True) if yes), *more)
    ctx.rest = [None if yes else x for x, yes in zip(inputs, is_tensor, strict=True)]
    ctx.is_tensor = is_tensor


def _saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if yes else x for x, yes in zip(ctx.rest, ctx.is_tensor, strict=True)]
    return inputs, tuple(tensors)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, *output)


def attention_gradients(arguments: Any, saved: Any, mask_gradient: bool) -> Gradients:
    """By the operator `attention_backward`.

    Args:
        arguments: of the operator `attention`.
        saved: out, lse, dout and dlse.
        mask_gradient: whether the mask's is wanted.
    """
    tensors, options = arguments[:_TENSOR_COUNT], arguments[_TENSOR_COUNT:]
    grads = call("attention_backward", *tensors, *saved, mask_gradient, *options)
    dq, dk, dv, dmask, dsinks = grads
    mask = dmask if mask_gradient else None
    return Gradients(dq, dk, dv, mask, None if tensors[6] is None else dsinks)


def _attention_gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    inputs, (out, lse) = _saved(ctx)
    grads = attention_gradients(inputs, (out, lse, dout, dlse), ctx.needs_input_grad[3])
    dq, dk, dv, dmask, dsinks = grads
    return (dq, dk, dv, dmask, None, None, dsinks, None, *(None,) * _OPTION_COUNT)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def _attention_second_gradient(ctx: Any, *second_gradients: Tensor) -> tuple[Any, ...]:
    inputs, _ = _saved(ctx)
    problem, (_, _, dout, dlse, mask_gradient), _ = _parse(tuple(inputs))
    dq, dk, dv, dmask, dsinks, ddout, ddlse = second_derivative(
        problem, dout, dlse, mask_gradient, _with_none(second_gradients, ctx, (3, 6))
    )
    return (
        *(dq, dk, dv, dmask, None, None, dsinks, None),
        *(None, None, ddout, ddlse, None),
        *(None,) * _OPTION_COUNT,
    )


def weights_gradients(
    arguments: Any, lse: Tensor, dweights: Tensor, average: bool, mask_gradient: bool
) -> WeightsGradients:
    """As `attention_gradients`, by the operator `attention_weights_backward`."""
    tensors, options = arguments[:_TENSOR_COUNT], arguments[_TENSOR_COUNT:]
    dq, dk, dmask, dlse = call(
        "attention_weights_backward", *tensors, lse, dweights, average, mask_gradient, *options
    )
    return WeightsGradients(dq, dk, dmask if mask_gradient else None, dlse)


def _weights_gradient(ctx: Any, dweights: Tensor) -> tuple[Any, ...]:
    inputs, _ = _saved(ctx)
    lse, average = inputs[_TENSOR_COUNT : _TENSOR_COUNT + 2]
    arguments = (*inputs[:_TENSOR_COUNT], *inputs[_TENSOR_COUNT + 2 :])
    grads = weights_gradients(arguments, lse, dweights, average, ctx.needs_input_grad[3])
    dq, dk, dmask, dlse = grads
    return (dq, dk, None, dmask, *(None,) * 4, dlse, None, *(None,) * _OPTION_COUNT)


def _weights_second_gradient(ctx: Any, *second_gradients: Tensor) -> tuple[Any, ...]:
    inputs, _ = _saved(ctx)
    problem, (lse, dweights, average, mask_gradient), _ = _parse(tuple(inputs))
    grads = [grad if grad is not None and grad.shape != (0,) else None for grad in second_gradients]
    dq, dk, dmask, dlse, ddweights = weights_second_derivative(
        problem, lse, dweights, average, mask_gradient, tuple(grads)
    )
    return (
        *(dq, dk, None, dmask, *(None,) * 4),
        *(dlse, ddweights, None, None),
        *(None,) * _OPTION_COUNT,
    )


def _with_none(
    grads: tuple[Tensor, ...], ctx: Any, optional: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Undo `_without_none` for the gradients of an optional mask and optional sinks."""
    dq, dk, dv, dmask, dsinks = grads
    mask_index, sinks_index = optional
    return (
        dq,
        dk,
        dv,
        dmask if ctx.is_tensor[mask_index] and dmask is not None and dmask.dim() == 4 else None,
        dsinks if ctx.is_tensor[sinks_index] else None,
    )


def _vmap_by_loop(operator: Any, info: Any, in_dims: tuple[Any, ...], arguments: Any) -> Any:
    """Run a batched operator one sample at a time: right for any combination of inputs."""
    results = []
    for index in range(info.batch_size):
        sample = [
            argument if dim is None else argument.select(dim, index)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(operator(*sample))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _vmap_by_folding(operator: Any, info: Any, in_dims: tuple[Any, ...], arguments: Any) -> Any:
    """Run a batched operator once, the vmapped dimension folded into the batch.

    Returns None where that is not the same thing or would copy a broadcast mask.
    """
    tensors, dropout_p = arguments[:_TENSOR_COUNT], arguments[-_OPTION_COUNT]
    mask, batch = tensors[3], tensors[0].dim() - (in_dims[0] is not None) == 4
    shared = [dim is not None for dim in (in_dims[5], in_dims[6], in_dims[7])]
    if dropout_p > 0 or any(shared) or tensors[6] is not None or not batch:
        return None
    mask_gradient = any(argument is True for argument in arguments[_TENSOR_COUNT:-_OPTION_COUNT])
    if mask is not None and (mask_gradient or in_dims[3] is not None or mask.shape[0] != 1):
        return None
    alibi = tensors[5]
    if alibi is not None and alibi.dim() != 1:
        return None
    folded: list[Any] = []
    for position, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if not isinstance(argument, Tensor) or position in (3, 5):
            folded.append(argument)
            continue
        moved = argument.movedim(dim, 0) if dim is not None else argument[None]
        folded.append(moved.expand(info.batch_size, *moved.shape[1:]).flatten(0, 1))
    result = operator(*folded)

    def unfold(part: Tensor) -> Tensor:
        return part.unflatten(0, (info.batch_size, -1)) if part.numel() else part

    if isinstance(result, Tensor):
        return unfold(result), 0
    dims = tuple(0 if part.numel() else None for part in result)
    return tuple(unfold(part) for part in result), dims


_transformed: dict[str, type[torch.autograd.Function]] = {}


def call(name: str, *arguments: Any) -> Any:
    """Call an operator, through a function that torch.func understands where that is active."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _transformed[name].apply(*arguments)
    return getattr(torch.ops.attn_ext, name)(*arguments)


def _make_transformed(operator: Any, setup: Any, gradient: Any) -> type[torch.autograd.Function]:
    """An operator as torch.func wants it, which is not how register_autograd makes it."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *output_gradients: Any) -> Any:
            return gradient(ctx, *output_gradients)

    return Transformed


def _register(name: str, kernel: Any, fake: Any, setup: Any, gradient: Any) -> None:
    qualified = f"attn_ext::{name}"
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, gradient, setup_context=setup, lib=library)
    operator = getattr(torch.ops.attn_ext, name)

    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        folded = _vmap_by_folding(operator, info, in_dims, arguments)
        return folded or _vmap_by_loop(operator, info, in_dims, arguments)

    torch.library.register_vmap(qualified, vmap, lib=library)
    _transformed[name] = _make_transformed(operator, setup, gradient)


_register("attention", _attention_kernel, _attention_fake, _attention_setup, _attention_gradient)
_register(
    "attention_backward",
    _attention_backward_kernel,
    _attention_backward_fake,
    _backward_setup,
    _attention_second_gradient,
)
_register("attention_weights", _weights_kernel, _weights_fake, _backward_setup, _weights_gradient)
_register(
    "attention_weights_backward",
    _weights_backward_kernel,
    _weights_backward_fake,
    _backward_setup,
    _weights_second_gradient,
)
