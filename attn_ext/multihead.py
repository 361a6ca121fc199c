"""MultiheadAttention: torch.nn.MultiheadAttention on these kernels, and its functional form.

Projections write and read the memory layout that the kernel takes through strides: heads are views
of (..., H, D), never transposed copies, for `batch_first` or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from attn_ext.functional import attention, attention_weights

_LARGEST_COMPARED_MASK = 2**24


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, computed by `attn_ext.attention`.

    A subclass with the same constructor, parameters, initialisation, state_dict, arguments and
    errors. Its differences are improvements: docs/multihead_attention.md lists each.

    The arguments are those of torch.nn.MultiheadAttention. In short, for `forward`:

    Args:
        query: (L, E), or (L, N, E), or (N, L, E) with batch_first.
        key: (S, kdim), or (S, N, kdim), or (N, S, kdim) with batch_first.
        value: as key with vdim.
        key_padding_mask: (S) or (N, S); bool, where True is ignored, or floating, which is added.
        need_weights: also return the weights after dropout.
        attn_mask: (L, S) or (N * num_heads, L, S); bool, where True is ignored, or floating, which
            is added.
        average_attn_weights: return the weights' mean over heads.
        is_causal: row i sees keys up to i, in addition to what attn_mask (which must be given)
            says.

    Returns:
        The output in query's shape, and the weights, (L, S), (N, L, S) or with a heads' dimension
        before L, or None.

    Raises:
        AssertionError, RuntimeError, ValueError: whatever torch.nn.MultiheadAttention raises in the
        same case.

    Source: Vaswani et al., Attention is all you need (arXiv:1706.03762).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep_own_forward()

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """This class around another module's parameters, buffers, hooks and settings, all shared.

        Raises:
            TypeError: module is not a torch.nn.MultiheadAttention.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(
                f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}"
            )
        new = cls.__new__(cls)
        new.__dict__.update(
            (name, value.copy() if isinstance(value, dict) else value)
            for name, value in vars(module).items()
        )
        new._keep_own_forward()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_own_forward()

    def _keep_own_forward(self) -> None:
        """Make nn.TransformerEncoderLayer call this module in eval too.

        Without gradients it would hand the parameters to a native operator of its own, which is
        slower, and turns floating masks into boolean ones; it does not where a submodule has hooks.
        """
        if _no_operation not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_no_operation)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal
            )  # fmt: skip
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return _Attend(
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            project=_Projection(
                self.in_proj_weight,
                None if self._qkv_same_embed_dim else separate,
                self.in_proj_bias,
            ),
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout if self.training else 0.0,
            out_proj=self.out_proj,
            batch_first=self.batch_first,
        )(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What nn.TransformerEncoder passes in eval, padding on the right: pad, and cut again."""
        if query is not key or key is not value or query.layout is not torch.strided:
            raise AssertionError("nested query, key and value must be one tensor of strided layout")
        if key_padding_mask is not None or attn_mask is not None:
            raise AssertionError("nested tensors take neither key_padding_mask nor attn_mask")
        if not self.batch_first:
            raise AssertionError("nested tensors need batch_first=True")
        lengths = torch.tensor([part.shape[0] for part in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        there = torch.arange(padded.shape[1], device=query.device) < lengths[:, None]
        out, weights = self(
            padded,
            padded,
            padded,
            key_padding_mask=~there,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return torch._nested_tensor_from_mask(out, there, mask_check=False), weights


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward, signature and semantics, on these kernels.

    Args:
        query, key, value: (L, E), (S, E), (S, E), or with a batch dimension N in the middle.
        static_k, static_v: (N * num_heads, S, head_dim), used in place of the projected key and
            value.

        The others are those of PyTorch's function; see `MultiheadAttention` for the masks.

    Returns:
        The output, (L, E) or (L, N, E), and the weights or None.

    Raises:
        AssertionError, RuntimeError, ValueError: whatever PyTorch's function raises in the same
        case.
    """
    tensors = (query, key, value, in_proj_weight, in_proj_bias, bias_k, bias_v)
    tensors = (*tensors, out_proj_weight, out_proj_bias)  # type: ignore[assignment]
    if has_torch_function(tensors):
        return handle_torch_function(
            multi_head_attention_forward,
            tensors,
            *(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias),
            *(bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training),
            *(key_padding_mask, need_weights, attn_mask, use_separate_proj_weight),
            *(q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v),
            *(average_attn_weights, is_causal),
        )
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    return _Attend(
        num_heads=num_heads,
        embed_dim=embed_dim_to_check,
        project=_Projection(
            in_proj_weight, separate if use_separate_proj_weight else None, in_proj_bias
        ),
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p if training else 0.0,
        out_proj=lambda out: F.linear(out, out_proj_weight, out_proj_bias),
        static_k=static_k,
        static_v=static_v,
    )(
        query,
        key,
        value,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )


def _no_operation(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: see `MultiheadAttention._keep_own_forward`."""


@dataclasses.dataclass(slots=True)
class _Projection:
    """The input projections: one packed weight (3E, E), or three."""

    packed: Tensor | None
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None
    bias: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> list[Tensor]:
        """Query, key and value as (..., H, D), views of as few products as possible."""
        if self.separate is not None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            for name, weight in zip(names, self.separate, strict=True):
                if weight is None:
                    raise AssertionError(f"use_separate_proj_weight is True but {name} is None")
            biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
            return [
                F.linear(x, weight, bias).unflatten(-1, (heads, -1))  # type: ignore[arg-type]
                for x, weight, bias in zip((query, key, value), self.separate, biases, strict=True)
            ]
        if self.packed is None:
            raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
        if query is key and key is value:
            return self._linear(query, 0, 3, heads)
        if key is value:
            return self._linear(query, 0, 1, heads) + self._linear(key, 1, 3, heads)
        return [
            part
            for index, x in enumerate((query, key, value))
            for part in self._linear(x, index, index + 1, heads)
        ]

    def _linear(self, x: Tensor, first: int, end: int, heads: int) -> list[Tensor]:
        """The projections [first, end) of query, key and value, by one product."""
        assert self.packed is not None
        weight, bias = self.packed, self.bias
        if end - first < 3:
            width = weight.shape[0] // 3
            weight = weight[first * width : end * width]
            bias = None if bias is None else bias[first * width : end * width]
        return list(F.linear(x, weight, bias).unflatten(-1, (end - first, heads, -1)).unbind(-3))


@dataclasses.dataclass(slots=True)
class _Attend:
    """Everything of multi-head attention but its inputs: projections and settings."""

    num_heads: int
    embed_dim: int
    project: _Projection
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
        # Heads as (N, H, L, D) views, and the way back.
        to_heads, from_heads = (1, 2, 0, 3), (2, 0, 1, 3)
        if self.batch_first:
            to_heads = from_heads = (0, 2, 1, 3)
        q, k, v = (x.permute(to_heads) for x in self.project(query, key, value, self.num_heads))
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
        options = {"attn_mask": mask, "key_padding_mask": padding, "causal": causal}
        out, weights = self._attention(q, k, v, options, need_weights, average_attn_weights)
        out = self.out_proj(out.permute(from_heads).flatten(-2))
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
        weights = None
        if need_weights:
            out, lse = attention(q, k, v, return_lse=True, **options)
            weights = attention_weights(q, k, lse=lse, average=average, **options)
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
        batch = 0 if self.batch_first else 1
        if key.shape[batch] != query.shape[batch]:
            raise RuntimeError(
                f"key must have query's batch size {query.shape[batch]}, got {key.shape[batch]}"
            )
        separate = self.project.separate is not None
        if (key.shape[:2] if separate else key.shape) != (
            value.shape[:2] if separate else value.shape
        ):
            raise AssertionError(
                f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}"
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
        or torch._C._functorch.maybe_current_level() is not None
        or type(mask) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or mask.is_meta
        or mask.requires_grad
        or mask.shape[:2] != (1, 1)
        or mask.numel() > _LARGEST_COMPARED_MASK
    ):
        return False
    if mask.dtype is torch.bool:
        return torch.equal(mask, torch.ones_like(mask).tril())
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))
