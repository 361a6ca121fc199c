"""The SIMD kernels of csrc/cpu: AMX, AVX-512, AVX2 and a portable build, picked when first used.

The environment variable ATTN_EXT_CPU_CAPABILITY (amx, avx512_bf16, avx512, avx2 or portable)
overrides the choice.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from attn_ext.backends import Gradients, WeightsGradients, empty_in_layout_of, native
from attn_ext.problem import CAUSAL_MODES, Problem

# After torch: the module then shares torch's OpenMP library and its pool of threads.
try:
    from attn_ext import _cpu
except ImportError as error:  # a source tree that was not built
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)

has_plain_forward = False
"""Whether `plain_forward` can be used: it takes an interface that torch 2.9 does not have."""

if _cpu is not None:
    _cpu.set_dtypes(native.DTYPES)
    _exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    has_plain_forward = _cpu.set_plain(_exchange_api, torch.empty_like, empty_in_layout_of)

_ENVIRONMENT_VARIABLE = "ATTN_EXT_CPU_CAPABILITY"

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# GNU OpenMP's pool does not survive a fork: a child that asks it for a second thread hangs.
os.register_at_fork(after_in_child=_after_fork)


def capabilities() -> dict[str, bool]:
    """The compiled instruction sets, best first, and whether this machine has each."""
    return {} if _cpu is None else _cpu.capabilities()


def _chosen_capability() -> str:
    found = capabilities()
    name = os.environ.get(_ENVIRONMENT_VARIABLE)
    if name is None:
        return next((name for name, present in found.items() if present), "none")
    if found and name not in found:
        raise ValueError(f"{_ENVIRONMENT_VARIABLE} must be one of {list(found)}, got {name!r}")
    if found and not found[name]:
        raise ValueError(f"{_ENVIRONMENT_VARIABLE} is {name!r}, which this machine does not have")
    return name


_CAPABILITIES = tuple(capabilities())
capability = _chosen_capability()
"""The instruction set in use."""


def num_threads() -> int:
    """How many threads a kernel may use: torch's setting; less work gets fewer."""
    return 1 if _forked else torch.get_num_threads()


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels can't run a problem; they run everything that lies in CPU memory."""
    reasons = []
    if _cpu is None:
        reasons.append(f"attn_ext._cpu is not built ({_import_error}); run `pip install -e .`")
    if not problem.query.is_cpu:
        reasons.append(f"query is on {problem.query.device}, and this backend takes CPU tensors")
    return reasons


def forward(problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns out (B, Hq, Lq, Dv) in query's dtype and memory order, and lse (B, Hq, Lq)."""
    return native.forward(_cpu, _settings(), problem, with_lse)


def plain_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    causal: str | None,
    grouped: bool,
    with_lse: bool,
) -> Any:
    """`forward` without a Problem: out or (out, lse); or None, and nothing done.

    It does something if they are dense CPU tensors that fit each other, masks as `attention` takes
    them, and `scale` is None or a finite float. `grouped`: query may have a multiple of key's
    heads.
    """
    tensors = (query, key, value, attn_mask, key_padding_mask)
    mode = CAUSAL_MODES.index(causal)
    return _cpu.plain_forward(*_settings(), *tensors, scale, mode, grouped, with_lse)


def plain_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    causal: str | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`backward` for what `plain_forward` gave: the gradients of query, key and value.

    None, and nothing done, if one of the tensors is not dense in CPU memory or does not fit.
    """
    tensors = (query, key, value, attn_mask, key_padding_mask)
    mode = CAUSAL_MODES.index(causal)
    return _cpu.plain_backward(*_settings(), *tensors, scale, mode, out, lse, dout)


def plain_forward_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: str | None,
    average: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(out, weights, lse) in one pass, where `plain_forward` does something; else None."""
    tensors = (query, key, value, attn_mask, key_padding_mask)
    mode = CAUSAL_MODES.index(causal)
    return _cpu.plain_forward_and_weights(*_settings(), *tensors, mode, average)


def plain_self_attention(
    tokens: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    batch_first: bool,
    with_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Multi-head self-attention with its projections, made for few tokens; or None, nothing done.

    Args:
        tokens: (L, E), (N, L, E) or, without `batch_first`, (L, N, E).
        in_weight, in_bias: (3E, E) and (3E) or None.
        out_weight, out_bias: (E, E) and (E) or None.
        heads: how many.
        with_weights: also return the weights, (N, L, L) if `average`, else (N, heads, L, L), or
            without N.

    It does something if they are dense contiguous float32 CPU tensors that fit each other, and E is
    a multiple of 16.
    """
    tensors = (tokens, in_weight, in_bias, out_weight, out_bias)
    return _cpu.plain_self_attention(
        *_settings(), *tensors, heads, batch_first, with_weights, average
    )


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask_gradient: bool,
) -> Gradients:
    """Gradients for a given out and LSE, recomputing the weights tile by tile."""
    dmask = _zero_mask_gradient(problem) if mask_gradient else None
    row_term = None if problem.sinks is None else torch.empty_like(lse)
    return native.backward(_cpu, _settings(), problem, out, lse, dout, dlse, dmask, row_term)


def weights(problem: Problem, lse: Tensor, average: bool) -> Tensor:
    """The weights after dropout, (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk)."""
    return native.weights(_cpu, _settings(), problem, lse, average)


def forward_and_weights(problem: Problem, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` and `weights` in one pass over the keys: (out, lse, weights)."""
    return native.forward_and_weights(_cpu, _settings(), problem, average)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (..., K) @ weight (N, K)^T + bias (N), contiguous float32; made for few rows.

    K must be a multiple of 16, and not 0. Nothing is checked and there is no derivative.
    """
    columns, depth = weight.shape
    out = torch.empty(*input.shape[:-1], columns, dtype=torch.float32)
    _cpu.linear(*_settings(), input.numel() // depth, input, weight, bias, out)
    return out


def weights_backward(
    problem: Problem, lse: Tensor, dweights: Tensor, average: bool, mask_gradient: bool
) -> WeightsGradients:
    """Gradients of `weights`, LSE being an input of its own."""
    dmask = _zero_mask_gradient(problem) if mask_gradient else None
    return native.weights_backward(_cpu, _settings(), problem, lse, dweights, average, dmask)


def _settings() -> tuple[int, int]:
    """The arguments that every native function starts with."""
    return _CAPABILITIES.index(capability), num_threads()


def _zero_mask_gradient(problem: Problem) -> Tensor:
    """Where the mask broadcasts, many scores add to one entry: in float64, so that none is lost."""
    mask = problem.attn_mask
    assert mask is not None
    full = mask.shape == native.pairs(problem)
    return torch.zeros(mask.shape, dtype=problem.compute_dtype if full else torch.float64)
