"""From a `Problem` to a backend, differentiably.

In eager mode the backend's function is called directly, inside a torch.autograd.Function where a
gradient is wanted: an operator registered from Python would cost more than a small attention. Under
torch.compile, torch.export, torch.func transforms, dispatch modes and tensor subclasses the same
backend runs behind the operators of `attn_ext.operators`, which those tools can trace. Where no
kernel exists (forward-mode and second derivatives) the reference takes over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn_ext import dispatch
from attn_ext.backends import cpu, reference
from attn_ext.operators import attention_gradients, call, split_arguments, weights_gradients
from attn_ext.problem import Problem, as_four_dimensional, default_scale, resolved
from attn_ext.second_derivatives import (
    differentiable_inputs,
    second_derivative,
    weights_second_derivative,
)

# Looked up once: small calls would spend a twentieth of their time on it.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_count_of_function_modes = torch._C._len_torch_function_stack
_count_of_dispatch_modes = torch._C._len_torch_dispatch_stack
_level_of_transforms = torch._C._functorch.maybe_current_level
_state_of_jit_trace = torch._C._get_tracing_state
_BATCHED = torch._C._dispatch_key_parse("Batched")


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    causal: str | None,
    grouped: bool,
) -> Tensor | None:
    """The output, if these tensors and the state that PyTorch is in need nothing but a kernel.

    None otherwise, and nothing is checked then: `attention` does it. A small call's time is what
    Python spends on it, of which this takes a third.
    """
    if not _are_plain(query, key, value, attn_mask, key_padding_mask):
        return None
    arguments = (query, key, value, attn_mask, key_padding_mask, scale, causal, grouped)
    if _want_gradients(query, key, value):
        try:
            return _record_plain_attention(*arguments, None)
        except _NotPlainError:
            return None
    return cpu.plain_forward(*arguments, False)


def plain_attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: str | None,
    average: bool,
) -> tuple[Tensor, Tensor] | None:
    """As `plain_attention`, the output and the weights."""
    tensors = (query, key, value, attn_mask, key_padding_mask)
    if not _are_plain(*tensors):
        return None
    if _want_gradients(query, key, value):
        try:
            return _record_plain_attention(*tensors, None, causal, True, average)
        except _NotPlainError:
            return None
    result = cpu.plain_forward_and_weights(*tensors, causal, average)
    return None if result is None else result[:2]


def _are_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> bool:
    """Whether nothing in sight makes a call of these more than a CPU kernel's."""
    return (
        type(query) is type(key) is type(value) is Tensor
        and (attn_mask is None or (type(attn_mask) is Tensor and not attn_mask.requires_grad))
        and (
            key_padding_mask is None
            or (type(key_padding_mask) is Tensor and not key_padding_mask.requires_grad)
        )
        and is_plain_state()
    )


def is_plain_state() -> bool:
    """Whether nothing but the tensors themselves can make a call more than a CPU kernel's."""
    return (
        not torch.compiler.is_compiling()
        and cpu.has_plain_forward
        and dispatch.forced() in (None, "cpu")
        and not _is_any_autocast_enabled()
        and _count_of_function_modes() == 0
        and not is_transformed()
        and forward_ad._current_level < 0
    )


def attention(problem: Problem, backend: str | None, with_lse: bool = True) -> tuple[Tensor, Any]:
    """Output (B, Hq, Lq, Dv) and LSE (B, Hq, Lq) of a problem, differentiable.

    Without `with_lse` LSE may be None: making a tensor takes a tenth of a small attention's time.
    """
    traced = _is_traced(problem)
    if backend == "reference" or _needs_forward_mode(problem, traced):
        return reference.forward(problem)
    if traced:
        tensors, options = split_arguments(problem, backend)
        return call("attention", *tensors, *options)
    module = dispatch.select(problem, backend)
    if module is reference or not _needs_gradient(problem):
        return module.forward(problem, with_lse)
    result = _record_attention(*differentiable_inputs(problem), problem, module, with_lse)
    return result if with_lse else (result, None)


def attention_weights(problem: Problem, lse: Tensor, average: bool, backend: str | None) -> Tensor:
    """Weights after dropout, (B, Hq, Lq, Lk) or averaged over heads (B, Lq, Lk), differentiable."""
    if problem.sinks is not None:  # LSE holds them
        problem = problem.replace(sinks=None)
    traced = _is_traced(problem)
    if backend == "reference" or _needs_forward_mode(problem, traced, lse):
        return reference.weights(problem, lse, average)
    if traced:
        tensors, options = split_arguments(problem, backend)
        return call("attention_weights", *tensors, lse, average, *options)
    module = dispatch.select(problem, backend)
    if module is reference or not (
        _needs_gradient(problem) or (torch.is_grad_enabled() and lse.requires_grad)
    ):
        return module.weights(problem, lse, average)
    return _record_weights(
        problem.query, problem.key, problem.attn_mask, lse, problem, average, module
    )


def attention_and_weights(
    problem: Problem, average: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Output and weights of a problem, by one pass where its backend has that.

    Two operators where these are traced: a compiler drops the weights if nothing uses them.
    """
    traced = _is_traced(problem)
    if not (traced or backend == "reference" or _needs_forward_mode(problem, traced)):
        module = dispatch.select(problem, backend)
        if module is cpu:
            if _needs_gradient(problem):
                return _record_both(*differentiable_inputs(problem), problem, average)
            out, _, weights = cpu.forward_and_weights(problem, average)
            return out, weights
    out, lse = attention(problem, backend)
    return out, attention_weights(problem, lse, average, backend)


def _needs_gradient(problem: Problem) -> bool:
    return _want_gradients(
        problem.query, problem.key, problem.value, problem.attn_mask, problem.sinks
    )


def _want_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> bool:
    return torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def _is_traced(problem: Problem) -> bool:
    """Whether a call must be one operator, for the sake of its tensors or of who looks on."""
    return type(problem.query) not in (Tensor, torch.nn.Parameter) or _needs_operators()


def is_transformed() -> bool:
    """Whether a dispatch mode, a transform of torch.func or torch.jit.trace sees every operator."""
    return (
        _count_of_dispatch_modes() > 0
        or _level_of_transforms() is not None
        or _state_of_jit_trace() is not None
    )


def _needs_operators() -> bool:
    """Whether torch.compile, compiled autograd, a transform or a mode must see operators."""
    return torch.compiler.is_compiling() or is_transformed()


def is_batched(tensor: Tensor) -> bool:
    """Whether it is one of the many that torch.autograd.grad's is_grads_batched makes look as one.

    Operators have a rule for those; they have no memory of their own. torch.vmap's are others,
    which `is_transformed` knows of.
    """
    return torch._C._dispatch_keys(tensor).has(_BATCHED)


def _needs_forward_mode(problem: Problem, traced: bool, lse: Tensor | None = None) -> bool:
    """Whether tangents flow through: torch.func.jvp, jacfwd, hessian, or dual tensors."""
    if traced:
        if torch.compiler.is_compiling():
            return False
        if _level_of_transforms() is not None:
            stack = torch._C._functorch.get_interpreter_stack() or ()
            return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    if forward_ad._current_level < 0:
        return False
    tensors = (*differentiable_inputs(problem), lse)
    return any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        problem: Problem,
        module: Any,
        with_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = module.forward(problem)
        ctx.save_for_backward(*problem.tensors, out, lse)
        ctx.settings, ctx.module = problem.settings, module
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out  # each output costs a small call dearly

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        problem = Problem(*tensors, *ctx.settings)
        mask_gradient = ctx.needs_input_grad[3]
        grads = _gradients(problem, ctx.module, out, lse, dout, dlse, mask_gradient)
        return (*grads, None, None, None)


class _AttentionAndWeights(torch.autograd.Function):
    """`_Attention` and `_Weights` by the CPU's kernel for both."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        problem: Problem,
        average: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse, weights = cpu.forward_and_weights(problem, average)
        ctx.save_for_backward(*problem.tensors, out, lse)
        ctx.settings, ctx.average = problem.settings, average
        _prepare_weights(ctx, weights)
        return out, weights

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        arguments = (out, lse, dout, dweights, ctx.average, ctx.needs_input_grad[3])
        return (*_gradients_of_both(problem, *arguments), None, None)


def _prepare_weights(ctx: Any, weights: Tensor) -> None:
    """Of a function that returns them beside an output."""
    query, key, _, *others = ctx.needs_input_grad
    if not (query or key or any(others)):
        ctx.mark_non_differentiable(weights)
    ctx.set_materialize_grads(False)


class _NotPlainError(Exception):
    pass


class _PlainAttention(torch.autograd.Function):
    """`_Attention` by `cpu.plain_forward`, or `_AttentionAndWeights` where `average` is not None.

    It raises `_NotPlainError` where `cpu.plain_forward` does nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        scale: float | None,
        causal: str | None,
        grouped: bool,
        average: bool | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tensors = (query, key, value, attn_mask, key_padding_mask)
        if average is None:
            result = cpu.plain_forward(*tensors, scale, causal, grouped, True)
        else:
            result = cpu.plain_forward_and_weights(*tensors, causal, average)
        if result is None:
            raise _NotPlainError
        out, lse = result[0], result[-1]
        ctx.save_for_backward(*tensors, out, lse)
        ctx.scale, ctx.causal, ctx.average = scale, causal, average
        if average is None:
            return out
        _prepare_weights(ctx, result[1])
        return result[:2]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None = None) -> Any:
        query, key, value, attn_mask, padding, out, lse = ctx.saved_tensors
        if (
            type(dout) is Tensor
            and dweights is None
            and not torch.is_grad_enabled()
            and not _needs_operators()
        ):
            tensors = (query, key, value, attn_mask, padding)
            plain = cpu.plain_backward(*tensors, ctx.scale, ctx.causal, out, lse, dout)
            if plain is not None:
                return (*plain, None, None, None, None, None, None)
        scale = default_scale(query.shape[3]) if ctx.scale is None else ctx.scale
        mask = None if attn_mask is None else as_four_dimensional(attn_mask)
        problem = Problem(query, key, value, mask, None, padding, causal=ctx.causal, scale=scale)
        grads = _gradients_of_both(problem, out, lse, dout, dweights, ctx.average, False)
        return (*grads[:3], None, None, None, None, None, None)


def _gradients_of_both(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    average: bool,
    mask_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """`_gradients` of what the CPU's kernels gave, for the output and weights together."""
    if dweights is None:
        if dout is None:
            return (None,) * 5
        return tuple(_gradients(problem, cpu, out, lse, dout, None, mask_gradient))
    if torch.is_grad_enabled():
        _check_unpacked(problem, lse, out=out)
        # LSE, which the weights are a function of, is one of query, key and mask in its turn.
        _, lse = attention(problem, "cpu")
    given_lse = problem.replace(sinks=None)
    arguments = (lse, dweights, average, mask_gradient)
    of_query, of_key, of_mask, dlse = _weights_gradients(given_lse, cpu, *arguments)
    query, key, value, mask, sinks = _gradients(problem, cpu, out, lse, dout, dlse, mask_gradient)
    return query + of_query, key + of_key, value, mask + of_mask if mask_gradient else None, sinks


def _as_arguments(problem: Problem, module: Any) -> tuple[Any, ...]:
    """Those of the operator `attention`, to be run by a backend."""
    tensors, options = split_arguments(problem, module.__name__.rpartition(".")[2])
    return (*tensors, *options)


def _gradients(
    problem: Problem,
    module: Any,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    mask_gradient: bool,
) -> Any:
    """A backend's backward pass, differentiable in its turn where that is asked for."""
    if dout is None:  # LSE does not know the values
        narrow = problem.replace(value=problem.key[..., :0])
        nothing = out.new_empty((*out.shape[:3], 0))
        arguments = (nothing, lse, nothing, dlse, mask_gradient)
        query, key, _, mask, sinks = _gradients(narrow, module, *arguments)
        return query, key, torch.zeros_like(problem.value), mask, sinks
    dout, dlse = _in_memory(dout), None if dlse is None else _in_memory(dlse)
    if _needs_operators() or is_batched(dout) or (dlse is not None and is_batched(dlse)):
        saved = (out, lse, dout, dlse)
        return attention_gradients(_as_arguments(problem, module), saved, mask_gradient)
    _check_unpacked(problem, lse, out=out, dout=dout, dlse=dlse)
    arguments = (out, lse, dout, dlse, mask_gradient)
    if torch.is_grad_enabled():
        return _AttentionBackward.apply(*problem.tensors, *arguments, problem.settings, module)
    return module.backward(problem, *arguments)


def _check_unpacked(
    problem: Problem,
    lse: Tensor,
    *,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dweights: Tensor | None = None,
) -> None:
    """Of what the forward pass saved: torch.autograd.graph.saved_tensors_hooks may change it.

    PyTorch has checked the gradients themselves.
    """
    query, key, value = problem.query, problem.key, problem.value
    rows, compute_dtype = query.shape[:3], problem.compute_dtype
    output = (*rows, value.shape[3])
    keys = (query.shape[0], *value.shape[1:3], query.shape[3])
    of_all_heads = dweights is None or dweights.dim() == 4
    weights = (*(rows if of_all_heads else (rows[0], rows[2])), key.shape[2])
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("key", key, keys, query.dtype),
        ("value", value, (*keys[:3], value.shape[3]), query.dtype),
        ("the output", out, output, query.dtype),
        ("the output's gradient", dout, output, query.dtype),
        ("LSE", lse, rows, compute_dtype),
        ("LSE's gradient", dlse, rows, compute_dtype),
        ("the weights' gradient", dweights, weights, query.dtype),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tensor.dtype is not dtype or tensor.shape != shape):
            raise ValueError(
                f"saved_tensors_hooks must give back what was saved; with query as it is now, "
                f"{name} must be {dtype} and {tuple(shape)}, got {tensor.dtype} and "
                f"{tuple(tensor.shape)}"
            )


def _in_memory(gradient: Tensor) -> Tensor:
    """An output's gradient as one whose memory holds it, which zeros may lack; see `resolved`."""
    if not torch.compiler.is_compiling() and gradient._is_zerotensor():
        return gradient.clone()
    return resolved(gradient)


class _AttentionBackward(torch.autograd.Function):
    """The backward pass as a function of its own, so that it has a derivative: the reference's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *arguments, settings, module = arguments  # type: ignore[assignment]
        tensors, (out, lse, dout, dlse, mask_gradient) = arguments[:7], arguments[7:]
        ctx.save_for_backward(*tensors, dout, dlse)
        ctx.settings, ctx.mask_gradient = settings, mask_gradient
        ctx.set_materialize_grads(False)
        problem = Problem(*tensors, *settings)
        return tuple(module.backward(problem, out, lse, dout, dlse, mask_gradient))

    @staticmethod
    def backward(ctx: Any, *second_gradients: Tensor | None) -> Any:
        *tensors, dout, dlse = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        *grads, ddout, ddlse = second_derivative(
            problem, dout, dlse, ctx.mask_gradient, second_gradients
        )
        return (*grads, None, None, None, None, ddout, ddlse, None, None, None)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        lse: Tensor,
        problem: Problem,
        average: bool,
        module: Any,
    ) -> Tensor:
        ctx.save_for_backward(*problem.tensors, lse)
        ctx.settings, ctx.average, ctx.module = problem.settings, average, module
        return module.weights(problem, lse, average)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> Any:
        *tensors, lse = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        mask_gradient = ctx.needs_input_grad[2]
        arguments = (lse, dweights, ctx.average, mask_gradient)
        return (*_weights_gradients(problem, ctx.module, *arguments), None, None, None)


def _weights_gradients(
    problem: Problem,
    module: Any,
    lse: Tensor,
    dweights: Tensor,
    average: bool,
    mask_gradient: bool,
) -> Any:
    """As `_gradients`, for the weights."""
    dweights = _in_memory(dweights)
    arguments = (lse, dweights, average, mask_gradient)
    if _needs_operators() or is_batched(dweights):
        return weights_gradients(_as_arguments(problem, module), *arguments)
    _check_unpacked(problem, lse, dweights=dweights)
    if torch.is_grad_enabled():
        return _WeightsBackward.apply(*problem.tensors, *arguments, problem.settings, module)
    return module.weights_backward(problem, *arguments)


class _WeightsBackward(torch.autograd.Function):
    """As `_AttentionBackward`, for the weights."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *arguments, settings, module = arguments  # type: ignore[assignment]
        tensors, (lse, dweights, average, mask_gradient) = arguments[:7], arguments[7:]
        ctx.save_for_backward(*tensors, lse, dweights)
        ctx.settings, ctx.average, ctx.mask_gradient = settings, average, mask_gradient
        ctx.set_materialize_grads(False)
        problem = Problem(*tensors, *settings)
        return tuple(module.weights_backward(problem, lse, dweights, average, mask_gradient))

    @staticmethod
    def backward(ctx: Any, *second_gradients: Tensor | None) -> Any:
        *tensors, lse, dweights = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.settings)
        dq, dk, dmask, dlse, ddweights = weights_second_derivative(
            problem, lse, dweights, ctx.average, ctx.mask_gradient, second_gradients
        )
        return (dq, dk, None, dmask, *(None,) * 3, dlse, ddweights, *(None,) * 4)


def _recorder(function: type[torch.autograd.Function]) -> Any:
    """`apply`, less what it does for torch.func: `_is_traced` has seen to that."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_record_attention = _recorder(_Attention)
_record_plain_attention = _recorder(_PlainAttention)
_record_weights = _recorder(_Weights)
_record_both = _recorder(_AttentionAndWeights)
