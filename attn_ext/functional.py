"""The public functions: check the arguments, build one `Problem`, run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from attn_ext import ops
from attn_ext.dispatch import Explanation, explain_problem
from attn_ext.problem import Problem, checked_causal, resolved

Window = tuple[int | None, int | None] | int | None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool | str | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    q_start: int = 0,
    k_start: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact fused softmax attention.

    ::

        s   = scale * query @ key^T
        s   = softcap * tanh(s / softcap)            if softcap
        s   = s + attn_mask - alibi_slope * |i - j|  if given
        s   = -inf where a mask, causality or the window forbids
        p   = exp(s - lse),  lse = logsumexp(s, and the head's sink if any)
        out = dropout(p) @ value

    A row that may attend to nothing gives output 0, LSE -inf and gradient 0. NaN and inf in the
    inputs reach the rows that may see them and no other. Neither pass holds an (Lq, Lk) tensor in
    memory. Differentiable in query, key, value, a floating attn_mask and sinks, to second order and
    in forward mode.

    Under autocast query, key and value are cast to its dtype, as for PyTorch's own attention.

    Args:
        query: (B, Hq, Lq, D), float32, bfloat16, float16 or float64; any strides. A last dimension
            that is not contiguous costs a copy.
        key: (B, Hkv, Lk, D), where Hq is a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Lk, Dv).
        attn_mask: broadcastable to (B, Hq, Lq, Lk), never expanded in memory. Bool: True takes
            part. Floating (query's dtype or float32): added to the scores; an entry of -inf, or of
            float32's or bfloat16's lowest number (anything below -2.36e38), forbids the pair.
        key_padding_mask: (B, Lk). Bool: True takes part. Floating: added, as attn_mask is.
        dropout_p: probability that a weight is dropped, in [0, 1). Always applied if not 0.
        causal: True or "upper_left": row i sees keys up to i (as SDPA's is_causal). "lower_right":
            row i sees keys up to i + Lk - Lq (decoding against a cache).
        window: (left, right) or one int for both: how many keys before and after its diagonal a row
            sees. None or -1 is no limit. The diagonal is the one of `causal`.
        scale: factor on the scores; 1 / sqrt(D) by default.
        softcap: bound on the scores' size, as in Gemma 2 (arXiv:2408.00118); None or 0 for none.
        alibi_slopes: (Hq,) or (B, Hq), the slopes of ALiBi (arXiv:2108.12409). No gradient.
        sinks: (Hq,), a logit per head that takes weight and gives no value (arXiv:2309.17453).
        return_lse: also return the log-sum-exp of the scores.
        seed: dropout's seed, 64 bits; drawn from `generator` by default.
        offset: another stream of dropout under the same seed, 32 bits.
        generator: where the seed is drawn; PyTorch's default CPU generator if None.
        q_start: absolute position of the first query, for causality, windows, ALiBi and dropout.
        k_start: absolute position of the first key.
        backend: one of `attn_ext.BACKENDS`; it never falls back. None chooses: see
            `attn_ext.explain`.

    Returns:
        The output (B, Hq, Lq, Dv) in query's dtype and memory order; with return_lse also the LSE
        (B, Hq, Lq), natural logarithm, float32 (float64 for float64), differentiable.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's shape, device or value is wrong.
        NotImplementedError: the requested backend can't run this.

    The method: Dao et al., FlashAttention (arXiv:2205.14135) and FlashAttention-2
    (arXiv:2307.08691); Rabe and Staats, Self-attention does not need O(n^2) memory
    (arXiv:2112.05682).
    """
    if (
        window is None
        and softcap is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and not return_lse
        and _is_zero(dropout_p, float)
        and _is_zero(q_start, int)
        and _is_zero(k_start, int)
    ):
        tensors = (query, key, value, attn_mask, key_padding_mask)
        plain = ops.plain_attention(*tensors, scale, checked_causal(causal), True)
        if plain is not None:
            return plain
    if _may_autocast():
        query, key, value, attn_mask, key_padding_mask = _autocast(
            query, key, value, attn_mask, key_padding_mask
        )
    problem = Problem.build(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        q_start=q_start,
        k_start=k_start,
    )
    if problem.dropout_p > 0:
        problem.seed, problem.offset = _checked_seed(seed, generator), _checked_offset(offset)
    if key_padding_mask is not None:
        problem = _without_float_padding(problem)
    out, lse = ops.attention(problem, backend, return_lse)
    return (out, lse) if return_lse else out


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    average: bool = True,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool | str | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    q_start: int = 0,
    k_start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The attention weights themselves, after dropout, in one fused pass.

    With the output, too: see `attention_and_weights`.

    With `average` the mean over heads is summed up tile by tile: (B, Hq, Lq, Lk) never exists.

    Args:
        query, key: as in `attention`.
        lse: what `attention(..., return_lse=True)` gave for the same arguments, (B, Hq, Lq);
            gradients flow into it. None computes it, as `attention_and_weights` does.
        average: return the mean over heads rather than each head's weights.
        seed: give both calls the same seed to see the weights that `attention` dropped.

        The others are those of `attention`.

    Returns:
        (B, Lq, Lk) if average, else (B, Hq, Lq, Lk), in query's dtype. Differentiable.

    Raises:
        As `attention`.
    """
    value = key[..., :0] if isinstance(key, Tensor) and key.dim() else key
    if _may_autocast():
        query, key, value, attn_mask, key_padding_mask = _autocast(
            query, key, value, attn_mask, key_padding_mask
        )
    problem = Problem.build(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        q_start=q_start,
        k_start=k_start,
    )
    problem = _without_float_padding(problem)
    if problem.dropout_p > 0:
        problem.seed, problem.offset = _checked_seed(seed, generator), _checked_offset(offset)
    if lse is None:
        return ops.attention_and_weights(problem, average, backend)[1]
    _check_lse(lse, problem)
    return ops.attention_weights(problem, resolved(lse), average, backend)


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    average: bool = True,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool | str | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    q_start: int = 0,
    k_start: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` and the weights that it used, after dropout.

    On CPUs one pass over the keys makes both, unless queries are few, as in decoding, or keys more
    than 8192: the mean over heads then costs little more than the output alone. Elsewhere it is
    `attention` and then `attention_weights`.

    Args:
        average: return the mean over heads rather than each head's weights.

        The others are those of `attention`.

    Returns:
        The output (B, Hq, Lq, Dv), and the weights (B, Lq, Lk) if average, else (B, Hq, Lq, Lk); in
        query's dtype. Differentiable.

    Raises:
        As `attention`.
    """
    if (
        window is None
        and scale is None
        and softcap is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and _is_zero(dropout_p, float)
        and _is_zero(q_start, int)
        and _is_zero(k_start, int)
    ):
        tensors = (query, key, value, attn_mask, key_padding_mask)
        plain = ops.plain_attention_and_weights(*tensors, checked_causal(causal), bool(average))
        if plain is not None:
            return plain
    if _may_autocast():
        query, key, value, attn_mask, key_padding_mask = _autocast(
            query, key, value, attn_mask, key_padding_mask
        )
    problem = Problem.build(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        q_start=q_start,
        k_start=k_start,
    )
    if problem.dropout_p > 0:
        problem.seed, problem.offset = _checked_seed(seed, generator), _checked_offset(offset)
    return ops.attention_and_weights(_without_float_padding(problem), average, backend)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, signature and semantics, on these kernels.

    It honours `__torch_function__`; a torch.nn.attention.bias.CausalBias as attn_mask becomes the
    kernel's own causality. Rows that may attend to nothing give 0, where some of PyTorch's paths
    give NaN, and where a mask holds nothing but the lowest float32 or bfloat16 the mean of values.

    Args:
        query: (N, ..., Hq, L, E), at least 2-D.
        key: (N, ..., H, S, E); leading dimensions broadcast.
        value: (N, ..., H, S, Ev).
        attn_mask: broadcastable to (N, ..., Hq, L, S); bool (True takes part) or floating (added).
        dropout_p: probability that a weight is dropped; applied whenever it is above 0.
        is_causal: row i sees keys up to i; excludes attn_mask.
        scale: factor on the scores; 1 / sqrt(E) by default.
        enable_gqa: allow Hq to be a multiple of H.

    Returns:
        (N, ..., Hq, L, Ev).

    Raises:
        TypeError, ValueError: as `attention`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True, got both")
    causal: str | None = "upper_left" if is_causal else None
    if has_torch_function((query, key, value)) or (
        attn_mask is not None
        and has_torch_function((attn_mask,))
        and not isinstance(attn_mask, CausalBias)
    ):
        return handle_torch_function(
            scaled_dot_product_attention,
            (query, key, value, attn_mask),
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if isinstance(attn_mask, CausalBias):
        lower_right = attn_mask.variant is CausalVariant.LOWER_RIGHT
        causal, attn_mask = ("lower_right" if lower_right else "upper_left"), None
    # Not through `attention`: a call of 17 arguments takes longer than the smallest kernel.
    if _is_zero(dropout_p, float):
        tensors = (query, key, value, attn_mask, None)
        plain = ops.plain_attention(*tensors, scale, causal, bool(enable_gqa))
        if plain is not None:
            return plain
    leading = None
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dim() == key.dim() == value.dim() == 4
        and (
            query.shape == key.shape
            or query.shape[:2] == key.shape[:2]
            or (enable_gqa and query.shape[0] == key.shape[0] == value.shape[0])
        )
    ):
        query, key, value, attn_mask, leading = _to_four_dimensions(
            query, key, value, attn_mask, enable_gqa
        )
    if _may_autocast():
        query, key, value, attn_mask, _ = _autocast(query, key, value, attn_mask, None)
    problem = Problem.build(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, causal=causal, scale=scale
    )
    if problem.dropout_p > 0:
        problem.seed = _checked_seed(None, None)
    out, _ = ops.attention(problem, None, False)
    return out if leading is None else out.reshape(*leading, *out.shape[-2:])


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Explanation:
    """Which backend would run this `attention` call, and why each other would not.

    Args:
        query, key, value: as in `attention`.
        **arguments: the other arguments of `attention`.

    Returns:
        An `Explanation`: print it, or read its `backend` and `reasons`.

    Raises:
        TypeError, ValueError: the call itself would raise it.
    """
    backend = arguments.pop("backend", None)
    for name in ("return_lse", "seed", "offset", "generator"):
        arguments.pop(name, None)
    return explain_problem(Problem.build(query, key, value, **arguments), backend)


def _is_zero(number: Any, expected_type: type) -> bool:
    return type(number) is expected_type and number == 0


def _may_autocast() -> bool:
    """False in the common case, and cheaper to ask than a device's own setting."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def _autocast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Under autocast everything floating but float64 goes to its dtype; a float32 mask may stay."""
    if (
        not isinstance(query, Tensor)
        or query.is_meta
        or not torch.is_autocast_enabled(query.device.type)
    ):
        return query, key, value, attn_mask, key_padding_mask
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Any, keep: tuple[torch.dtype, ...]) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor if tensor.dtype in keep else tensor.to(dtype)

    if query.dtype is torch.float64:
        return query, key, value, attn_mask, key_padding_mask
    masks = (cast(mask, (dtype, torch.float32)) for mask in (attn_mask, key_padding_mask))
    return (*(cast(tensor, (dtype,)) for tensor in (query, key, value)), *masks)


def _without_float_padding(problem: Problem) -> Problem:
    """Move a key_padding_mask that needs a gradient into attn_mask, which has one."""
    padding, mask = problem.key_padding_mask, problem.attn_mask
    if padding is None or not (padding.requires_grad and padding.is_floating_point()):
        return problem
    padding = padding[:, None, None, :]
    if mask is not None and mask.dtype is torch.bool:
        padding = padding.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        padding = mask + padding
    return problem.replace(attn_mask=padding, key_padding_mask=None)


def _checked_seed(seed: int | Tensor | None, generator: torch.Generator | None) -> int | Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator)
    if generator is not None:
        raise ValueError("generator must be None when seed is given, got both")
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} of "
                f"shape {tuple(seed.shape)}"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed % 2**64


def _checked_offset(offset: int) -> int:
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset < 2**32:
        raise ValueError(f"offset must be in [0, 2**32), got {offset}")
    return offset


def _check_lse(lse: Tensor, problem: Problem) -> None:
    shape = (problem.batch, problem.query_heads, problem.query_length)
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a torch.Tensor, got {type(lse).__name__}")
    if lse.shape != shape:
        raise ValueError(
            f"lse must have shape (batch, query heads, query length) = {shape}, got "
            f"{tuple(lse.shape)}"
        )
    if lse.dtype != problem.compute_dtype:
        raise TypeError(f"lse must be {problem.compute_dtype}, got {lse.dtype}")
    if lse.device != problem.query.device:
        raise ValueError(f"lse must be on query's device {problem.query.device}, got {lse.device}")


def _to_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Size]:
    """Broadcast leading dimensions and fold all but the heads' into one batch dimension.

    Returns the four tensors and the output's leading dimensions.
    """
    tensors = (query, key, value)
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be at least 2-D, got shape {tuple(tensor.shape)}")
    heads = [tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in tensors]
    try:
        batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))
        if not enable_gqa:
            heads = [torch.broadcast_shapes(*((count,) for count in heads))[0]] * 3
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"query, key and value must have leading dimensions that broadcast, got shapes "
            f"{shapes}; "
            "enable_gqa=True allows query a multiple of key's heads"
        ) from None
    query, key, value = (
        tensor.expand(*batch, count, *tensor.shape[-2:]).reshape(-1, count, *tensor.shape[-2:])
        for tensor, count in zip(tensors, heads, strict=True)
    )
    highest = max(tensor.dim() for tensor in tensors)
    leading = torch.Size((*batch, heads[0]) if highest > 2 else ())
    if attn_mask is not None and attn_mask.dim() >= 4 and len(batch) > 1:
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
    return query, key, value, attn_mask, leading
