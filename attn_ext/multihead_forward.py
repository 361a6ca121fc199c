"""The computation of multi-head attention: projections, masks, attention, output projection.

`multihead` wraps it as a module and as a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _OutProjection
from torch.nn.modules.module import _has_any_global_hook

from attn_ext.functional import attention, attention_and_weights
from attn_ext.linear import linear
from attn_ext.ops import is_transformed
from attn_ext.problem import LOWEST_ENTRY

_LARGEST_COMPARED_MASK = 2**24
_LARGEST_PRODUCT = 2**20
"""Elements of query, key and value together above which a product for each is faster than one for
all: each is read and written as contiguous memory, forward and backward, and less often freshly
mapped, as glibc does for every tensor above 32 MiB."""


@dataclasses.dataclass(slots=True)
class Projection:
    """The input projections: one packed weight (3E, E), or three."""

    packed: Tensor | None
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None
    bias: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> list[Tensor]:
        """Query, key and value as (..., H, D), views of as few products as is fast."""
        if self.separate is not None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            for name, weight in zip(names, self.separate, strict=True):
                if weight is None:
                    raise AssertionError(f"use_separate_proj_weight is True but {name} is None")
            biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
            return [
                _projected(x, weight, bias, 1, heads)[0]  # type: ignore[arg-type]
                for x, weight, bias in zip((query, key, value), self.separate, biases, strict=True)
            ]
        if self.packed is None:
            raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
        # Which of query, key and value one product makes.
        parts = [3]
        if key is not value or _is_large(key, self.packed):
            parts = [1, 1, 1]
        elif query is not key:
            parts = [1, 2]
        if len(parts) == 1:
            return _projected(query, self.packed, self.bias, 3, heads)
        # Split at once: autograd then joins the parts' gradients by one concatenation.
        sizes = [count * (self.packed.shape[0] // 3) for count in parts]
        weights = self.packed.split(sizes)
        biases = (None,) * 3 if self.bias is None else self.bias.split(sizes)
        return [
            head
            for count, x, weight, bias in zip(
                parts, (query, key, value), weights, biases, strict=False
            )
            for head in _projected(x, weight, bias, count, heads)
        ]


@dataclasses.dataclass(slots=True)
class Attend:
    """Everything of multi-head attention but its inputs: projections and settings."""

    num_heads: int
    embed_dim: int
    project: Projection
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj: Callable[[Tensor], Tensor]
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    batch_first: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if not batched:
            same_key, same_value = key is query, value is key
            query = query.unsqueeze(0 if self.batch_first else 1)
            key = query if same_key else key.unsqueeze(0 if self.batch_first else 1)
            value = key if same_value else value.unsqueeze(0 if self.batch_first else 1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check(query, key, value, attn_mask, key_padding_mask, is_causal)
        q, k, v = self.project(query, key, value, self.num_heads)
        if self.batch_first:  # (N, L, H, D); as (N, H, L, D) views
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        else:  # (L, N, H, D)
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        rows, columns = q.shape[2], k.shape[2]
        mask = self._mask(attn_mask, q.shape[0], rows, columns)
        k, v, extra_keys = self._extended(k, v)
        padding = _takes_part(key_padding_mask)
        if padding is not None and extra_keys:
            padding = _with_visible_columns(padding, extra_keys)
        causal = is_causal
        if causal and mask is not None and _is_causal_mask(mask):
            mask = None
        if extra_keys:
            mask, causal = _with_extra_keys(mask, causal, rows, columns, extra_keys, q)
        if padding is not None and padding.shape != (q.shape[0], k.shape[2]):
            raise AssertionError(
                f"key_padding_mask must have shape {(q.shape[0], k.shape[2] - extra_keys)}, "
                f"got {tuple(key_padding_mask.shape)}"  # type: ignore[union-attr]
            )
        mask, padding = _check_operands(q, k, v, attn_mask=mask, key_padding_mask=padding)
        options = {"attn_mask": mask, "key_padding_mask": padding, "causal": causal}
        out, weights = self._attention(q, k, v, options, need_weights, average_attn_weights)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = _out_projected(self.out_proj, out.flatten(-2))
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        everything_dropped = self.dropout_p == 1.0
        if self.dropout_p > 0 and not everything_dropped:
            # One seed for both calls: the weights returned are the ones that were used.
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
            options = {**options, "dropout_p": self.dropout_p, "seed": seed}
        elif self.dropout_p < 0:
            raise ValueError(f"dropout must be in [0, 1], got {self.dropout_p}")
        out: Any
        weights = None
        if need_weights:
            out, weights = attention_and_weights(q, k, v, average=average, **options)
        else:
            out = attention(q, k, v, **options)
        if everything_dropped:
            out, weights = out * 0.0, None if weights is None else weights * 0.0
        return out, weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype is not torch.bool and not mask.is_floating_point():
                raise AssertionError(f"{name} must be bool or floating, got {mask.dtype}")
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask must be given when is_causal is True; "
                "torch.nn.Transformer.generate_square_subsequent_mask makes one"
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"query must have embed_dim {self.embed_dim}, got {query.shape[-1]}"
            )
        if self.embed_dim % self.num_heads:
            raise AssertionError(
                f"embed_dim must be divisible by num_heads {self.num_heads}, got {self.embed_dim}"
            )
        separate = self.project.separate is not None
        if (key.shape[:2] if separate else key.shape) != (
            value.shape[:2] if separate else value.shape
        ):
            raise AssertionError(
                f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[batch] != query.shape[batch]:
            raise RuntimeError(
                f"key must have query's batch size {query.shape[batch]}, got {key.shape[batch]}"
            )

    def _mask(self, attn_mask: Tensor | None, batch: int, rows: int, columns: int) -> Tensor | None:
        """attn_mask as `attention` takes it, (1 or N, 1 or H, L, S), True taking part."""
        if attn_mask is None:
            return None
        if self.static_k is not None:
            columns = self.static_k.shape[1]
        wanted = (
            (rows, columns) if attn_mask.dim() == 2 else (batch * self.num_heads, rows, columns)
        )
        if attn_mask.shape != wanted:
            raise RuntimeError(f"attn_mask must have shape {wanted}, got {tuple(attn_mask.shape)}")
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        else:
            attn_mask = attn_mask[None, None]
        return _takes_part(attn_mask)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Key and value after static_k and static_v, bias_k and bias_v, and add_zero_attn.

        Returns them and how many keys were appended.
        """
        batch, heads, _, head_dim = k.shape
        extra = 0
        if (self.bias_k is None) != (self.bias_v is None):
            raise AssertionError("bias_k and bias_v must both be given or both be None")
        if self.bias_k is not None and self.bias_v is not None:
            if self.static_k is not None or self.static_v is not None:
                raise AssertionError("static_k and static_v must be None where bias_k is given")
            k, v = (
                torch.cat([x, bias.view(1, heads, 1, -1).expand(batch, -1, -1, -1)], dim=2)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        for name, static in (("static_k", self.static_k), ("static_v", self.static_v)):
            if static is None:
                continue
            if static.shape[0] != batch * heads or static.shape[2] != head_dim:
                raise AssertionError(
                    f"{name} must have shape ({batch * heads}, length, {head_dim}), got "
                    f"{tuple(static.shape)}"
                )
        k = k if self.static_k is None else self.static_k.unflatten(0, (batch, heads))
        v = v if self.static_v is None else self.static_v.unflatten(0, (batch, heads))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(batch, heads, 1, head_dim)], dim=2) for x in (k, v))
            extra += 1
        return k, v, extra


_stock_linear_forward = torch.nn.Linear.forward


def is_stock_linear(module: Any) -> bool:
    """Whether a call of it is nothing but a torch.nn.Linear's product: no hooks, not compiled."""
    return (
        isinstance(module, torch.nn.Linear)
        and type(module) in (_OutProjection, torch.nn.Linear)
        and not torch.compiler.is_compiling()
        and type(module).forward is _stock_linear_forward
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or "forward" in module.__dict__
            or _has_any_global_hook()
        )
    )


def _out_projected(out_proj: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
    """out_proj(out), and fast where that is nothing but a torch.nn.Linear without hooks."""
    if is_stock_linear(out_proj):
        return linear(out, out_proj.weight, out_proj.bias)  # type: ignore[attr-defined]
    return out_proj(out)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether one product for query, key and value would be larger than is fast."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.numel() // max(x.shape[-1], 1) * weight.shape[0] > _LARGEST_PRODUCT
    )


def _projected(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, heads: int
) -> list[Tensor]:
    """The `count` projections that a weight (count * E, K) holds, each as (..., H, D)."""
    out = linear(x, weight, bias)
    head_dim = out.shape[-1] // (count * heads)
    if count == 1:
        return [out.view(*out.shape[:-1], heads, head_dim)]
    return list(out.view(*out.shape[:-1], count, heads, head_dim).unbind(-3))


def _check_operands(q: Tensor, k: Tensor, v: Tensor, **masks: Tensor | None) -> list[Tensor | None]:
    """What only `attention` would refuse, and with other exceptions than the original's.

    Returns the masks; a float32 one beside float64 operands, which the original takes, is widened.
    """
    if k.shape[2] != v.shape[2]:
        raise RuntimeError(f"value must have key's length {k.shape[2]}, got {v.shape[2]}")
    autocast = not q.is_meta and torch.is_autocast_enabled(q.device.type)
    if not autocast and not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(
            "query, key and value must have one dtype once projected, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    for name, mask in masks.items():
        if mask is None:
            continue
        if mask.device != q.device:
            raise RuntimeError(f"{name} must be on query's device {q.device}, got {mask.device}")
        allowed = (torch.bool, torch.float32, q.dtype)
        if mask.dtype not in allowed and (not autocast or mask.dtype is torch.float64):
            raise RuntimeError(
                f"{name} must be bool, float32 or query's dtype {q.dtype}, got {mask.dtype}"
            )
        if mask.dtype is torch.float32 and q.dtype is torch.float64:
            masks[name] = mask.to(q.dtype)
    return list(masks.values())


def _takes_part(mask: Tensor | None) -> Tensor | None:
    """From the convention where True is ignored to `attention`'s; floating masks stay."""
    if mask is None:
        return None
    return ~mask if mask.dtype is torch.bool else mask


def _with_visible_columns(mask: Tensor, count: int) -> Tensor:
    return F.pad(mask, (0, count), value=True if mask.dtype is torch.bool else 0.0)


def _with_extra_keys(
    mask: Tensor | None, causal: bool, rows: int, columns: int, count: int, like: Tensor
) -> tuple[Tensor | None, bool]:
    """The mask over appended keys, which every row sees: causality is for the original ones."""
    if causal:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril()[None, None]
        if mask is None:
            mask = allowed
        elif mask.dtype is torch.bool:
            mask = mask & allowed
        else:
            mask = mask.masked_fill(~allowed, float("-inf"))
    return (None if mask is None else _with_visible_columns(mask, count)), False


def _is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask says just what causality says; False where looking is impossible or slow."""
    if (
        torch.compiler.is_compiling()
        or type(mask) is not Tensor
        or is_transformed()
        or mask.device.type != "cpu"  # looking would wait for the device
        or mask.requires_grad
        or mask.shape[:2] != (1, 1)
        or not 0 < mask.numel() <= _LARGEST_COMPARED_MASK
    ):
        return False
    if mask.dtype is torch.bool:
        return torch.equal(mask, torch.ones_like(mask).tril())
    entry = float(mask[0, 0, 0, -1])  # which causality forbids, unless there is one column
    return entry < LOWEST_ENTRY and torch.equal(mask, torch.full_like(mask, entry).triu(1))
