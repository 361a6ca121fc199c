"""A float32 torch.nn.functional.linear at the speed of the machine, where PyTorch's own is not.

PyTorch hands float32 products to MKL, which runs AVX2 code on AMD processors with AVX-512: 38 % of
Zen 5's peak; of Zen 4's, which AVX2 reaches as well, 50 to 80 %. oneDNN, which PyTorch ships too,
reaches 90 % and is in reach through the operator that torch.compile generates calls to,
`mkldnn::_linear_pointwise`. It takes strided matrices, so that it computes the gradients too, and
copies a transposed first operand itself:

    out (M, N) = input (M, K) @ weight (N, K)^T + bias (N)
    d input (M, K) = d out (M, N) @ weight (N, K)
    d weight (N, K) = d out (M, N)^T @ input (M, K)

The operator is private, has no derivative and checks nothing. So `linear` uses it only for plain
float32 tensors in eager mode, behind a torch.autograd.Function and checks of its own, and leaves
everything else, errors included, to F.linear. Both compute in float32 throughout and differ in the
order of their sums alone. oneDNN generates code for every new shape, which takes 0.2 ms once; it
keeps the latest 1024.

With a few rows both are slow: a kernel of our own (csrc/cpu/linear.h) computes these. On Intel's
processors with AVX-512, where MKL is fast otherwise, that is all that is done: an Emerald Rapids
took 1.1 to 1.9 times as long without it, and more on two threads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from attn_ext import processor
from attn_ext.backends import cpu
from attn_ext.ops import is_batched, is_transformed

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_SMALLEST_PRODUCT = 2**21
"""M * N * K for each thread from which the operator wins: a call costs 12 µs, and one of MKL 2."""
_FEW_ROWS = {
    "AuthenticAMD": [(range(4, 17), 2**20)],
    "GenuineIntel": [(range(4, 17), 3 * 2**20), (range(17, 65), 2**24)],
}
"""How many rows our own kernel is for, and the M * N * K from which it wins, where it fits and no
derivative is wanted, by the processor's vendor; the smallest first. MKL's call costs less on
Intel's, and oneDNN is for more rows on AMD's."""
_SMALLEST_WEIGHT_GRADIENT = 2**22
"""The same for the gradient of a weight, which runs at three quarters of the operator's speed."""
_FEWEST_ROWS = 4
"""Fewer rows than this make gradients a matter of reading the weight, which MKL does as fast."""
_FEWEST_FEATURES = {"AuthenticAMD 25": 384}
"""Smaller gradients of a weight are long sums of small products, at which the operator is slow: by
vendor and family, 16 elsewhere. Zen 4 computes 256 by MKL in 0.75 to 0.9 of the time."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, signature and semantics: input @ weight^T + bias.

    Args:
        input: (..., K), any dtype and device; the fast path takes float32 on the CPU.
        weight: (N, K).
        bias: (N) or None.

    Returns:
        (..., N), differentiable to any order.

    Raises:
        RuntimeError, TypeError: whatever F.linear raises in the same case.
    """
    if (
        not torch.compiler.is_compiling()
        and has_fast_kernel
        and type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and weight.dim() == 2
        and input.numel() * weight.size(0) >= _FEW_ROWS[_vendor][0][1]
        and _is_plain(input)
        and _is_plain(weight)
        and _fits(input, weight, bias)
        and _is_worthwhile(input, weight, bias)
        and _in_plain_eager_mode()
    ):
        if _wants_gradient(input, weight, bias):
            return _Linear.apply(input, weight, bias)
        return _product(input, weight, bias)
    return F.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    """The fast operator with its gradients; it keeps only what the wanted ones need."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_input, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.set_materialize_grads(False)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return None, None, None
        input, weight = ctx.saved_tensors
        dinput = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dinput = _input_gradient(dout, weight)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dout, input)
        if ctx.needs_input_grad[2]:
            dbias = _as_matrix(dout).sum(0)
        return dinput, dweight, dbias


def _input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    """(..., N) and (N, K) to (..., K)."""
    if math.prod(dout.shape[:-1]) >= _FEWEST_ROWS and _is_fast_gradient(dout, weight):
        return _product(dout, weight.t(), None)
    return dout @ weight


def _weight_gradient(dout: Tensor, input: Tensor) -> Tensor:
    """(..., N) and (..., K) to (N, K)."""
    dout, input = _as_matrix(dout), _as_matrix(input)
    rows, columns, inner = dout.shape[1], input.shape[1], input.shape[0]
    if (
        inner >= _FEWEST_ROWS
        and min(rows, columns) >= _fewest_features
        and rows * columns * inner >= _SMALLEST_WEIGHT_GRADIENT * torch.get_num_threads()
        and _is_fast_gradient(dout, input)
    ):
        return _product(dout.t(), input.t(), None)
    return dout.t() @ input


def _as_matrix(tensor: Tensor) -> Tensor:
    """(..., N) as (M, N); not by `flatten`, which torch.autograd.grad's is_grads_batched lacks."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _is_fast_gradient(dout: Tensor, other: Tensor) -> bool:
    """Whether a product in backward may take the operator.

    Not where it must be differentiable or is compiled, and not for is_grads_batched, whose tensors
    look like any.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not is_batched(dout)
        and _is_plain(dout)
        and _is_plain(other)
        and _in_plain_eager_mode()
    )


def _is_worthwhile(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is large enough for what it costs outside of PyTorch's own operator."""
    large = _SMALLEST_PRODUCT * torch.get_num_threads()
    if _has_fast_operator and input.numel() * weight.size(0) >= large:
        return True
    return _has_few_rows(input, weight) and not _wants_gradient(input, weight, bias)


def _has_few_rows(input: Tensor, weight: Tensor) -> bool:
    """Whether our own kernel takes these plain operands."""
    depth = weight.size(1)
    if depth == 0 or depth % 16 != 0:
        return False
    rows, products = input.numel() // depth, input.numel() * weight.size(0)
    return (
        any(rows in few and products >= smallest for few, smallest in _FEW_ROWS[_vendor])
        and input.is_contiguous()
        and weight.is_contiguous()
        and not (input.is_neg() or weight.is_neg())
        and cpu.capability != "none"
    )


def _wants_gradient(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) and (N, K) to (..., N), by our kernel or the operator, without a derivative."""
    if _has_few_rows(input, weight):
        bias = None if bias is None else bias.resolve_neg().contiguous()
        return cpu.linear(input, weight, bias)
    rows, columns = weight.stride()
    if not ((columns == 1 and rows >= weight.shape[1]) or (rows == 1 and columns >= len(weight))):
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


def _is_plain(tensor: Any) -> bool:
    """Whether an argument is a dense float32 tensor in CPU memory and of no subclass."""
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are those of the fast path; F.linear complains about wrong ones."""
    return (
        input.dim() >= 2
        and input.shape[-1] == weight.shape[1]
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1]))
    )


def _in_plain_eager_mode() -> bool:
    """Whether nothing but eager PyTorch with its default settings looks at this call.

    Not so under tracing, torch.func transforms, forward-mode derivatives, dispatch and function
    modes and autocast, nor where torch.backends.mkldnn or torch.set_float32_matmul_precision ask
    for no oneDNN, for its deterministic algorithms or for less than float32.
    """
    return (
        torch._C._get_mkldnn_enabled()
        and not torch._C._get_mkldnn_deterministic()
        and torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("none", "ieee")
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and torch._C._len_torch_function_stack() == 0
        and not is_transformed()
    )


_vendor = processor.vendor()
_fewest_features = _FEWEST_FEATURES.get(f"{_vendor} {processor.family()}", 16)

has_fast_kernel = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and _vendor in _FEW_ROWS
    and torch.backends.mkl.is_available()
    and hasattr(torch._C, "_get_fp32_precision_getter")
)
"""Whether our own kernel wins on few rows: `_has_few_rows` tells which."""


def _finds_fast_operator() -> bool:
    """Whether this PyTorch has the operator, and the processor is one where MKL stays with AVX2."""
    return (
        has_fast_kernel
        and _vendor == "AuthenticAMD"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


_has_fast_operator = _finds_fast_operator()
