"""MultiheadAttention: torch.nn.MultiheadAttention on these kernels, and its functional form.

Projections write and read the memory layout that the kernel takes through strides: heads are views
of (..., H, D), never transposed copies, for `batch_first` or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import handle_torch_function, has_torch_function

from attn_ext import ops
from attn_ext.backends import cpu
from attn_ext.linear import has_fast_kernel, linear
from attn_ext.multihead_forward import Attend, Projection, is_stock_linear

_FEW_TOKENS = 64
"""Batch size times length up to which self-attention without gradients is one native call: what
Python spends between its products shows there, and so few rows are multiplied by our own kernel
(csrc/cpu/linear.h) in 0.5 to 1.2 times of what MKL takes on an Emerald Rapids, 5 to 9 of them in
up to 1.7 times."""


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

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self._keep_own_forward()

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """This class around another module's parameters, buffers, hooks and settings, all shared.

        Raises:
            TypeError: module is not exactly a torch.nn.MultiheadAttention: a subclass has a forward
                of its own.
            ValueError: module itself was given another forward, or was compiled with its `compile`.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(
                "module must be a torch.nn.MultiheadAttention and no subclass, "
                f"got {type(module).__name__}"
            )
        if not has_stock_forward(module):
            raise ValueError(
                "module must have torch.nn.MultiheadAttention's forward, got one with another: "
                "compile or patch the new module instead"
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

        Without gradients it would hand the parameters to a native operator of its own, slower on
        CPUs, that turns floating masks into boolean ones; it does not where a submodule has hooks.
        """
        if _no_operation not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_no_operation)

    def _call_impl(self, *arguments: Any, **options: Any) -> Any:
        """nn.Module's, less its time for hooks where there is only the one that does nothing."""
        if (
            len(self._forward_pre_hooks) == 1
            and not self._forward_hooks
            and not self._backward_hooks
            and not self._backward_pre_hooks
            and not _has_any_global_hook()
            and not torch.compiler.is_compiling()
            and torch._C._get_tracing_state() is None
            and _no_operation in self._forward_pre_hooks.values()
        ):
            return self.forward(*arguments, **options)
        return super()._call_impl(*arguments, **options)

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
        if (
            query is key
            and key is value
            and key_padding_mask is None
            and attn_mask is None
            and not is_causal
        ):
            result = self._forward_few_tokens(query, need_weights, average_attn_weights)
            if result is not None:
                return result
        separate = None
        if not self._qkv_same_embed_dim:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return Attend(
            num_heads=self.num_heads,
            embed_dim=self.embed_dim,
            project=Projection(self.in_proj_weight, separate, self.in_proj_bias),
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

    def _forward_few_tokens(
        self, tokens: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Plain self-attention of few tokens in one native call, where no gradient is wanted.

        None, and nothing done, for whatever `Attend` would treat in another way or refuse, and
        where anything but these kernels must see the products.
        """
        heads, out_proj = self.num_heads, self._modules.get("out_proj")
        if not (
            not torch.compiler.is_compiling()  # first, lest tracing looks at sizes
            and has_fast_kernel
            and type(self) is MultiheadAttention
            and type(tokens) is Tensor
            and tokens.shape[-1:] == (self.embed_dim,)
            and tokens.numel() <= _FEW_TOKENS * self.embed_dim
            and type(heads) is int
            and 0 < heads <= self.embed_dim
            and self._qkv_same_embed_dim
            and self.bias_k is self.bias_v is None
            and not self.add_zero_attn
            and (not self.training or self.dropout == 0)
            and ops.is_plain_state()
            and is_stock_linear(out_proj)
        ):
            return None
        try:  # as attributes they would cost ten times as much
            in_parameters, out_parameters = self._parameters, out_proj._parameters  # type: ignore[union-attr]
            in_weight, in_bias = in_parameters["in_proj_weight"], in_parameters["in_proj_bias"]
            out_weight, out_bias = out_parameters["weight"], out_parameters["bias"]
        except KeyError:  # one is computed from others, as pruning does
            return None
        if not (
            type(in_weight) is type(out_weight) is nn.Parameter
            and (in_bias is None or type(in_bias) is nn.Parameter)
            and (out_bias is None or type(out_bias) is nn.Parameter)
        ):
            return None
        tensors = (tokens, in_weight, in_bias, out_weight, out_bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return None
        options = (heads, bool(self.batch_first), bool(need_weights), bool(average))
        return cpu.plain_self_attention(*tensors, *options)

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
        # Not self(...), which would run this module's hooks a second time.
        out, weights = self.forward(
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
    return Attend(
        num_heads=num_heads,
        embed_dim=embed_dim_to_check,
        project=Projection(
            in_proj_weight, separate if use_separate_proj_weight else None, in_proj_bias
        ),
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p if training else 0.0,
        out_proj=lambda out: linear(out, out_proj_weight, out_proj_bias),
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


def has_stock_forward(module: nn.MultiheadAttention) -> bool:
    """Whether calling a module runs torch.nn.MultiheadAttention's own forward, uncompiled."""
    return (
        type(module) is nn.MultiheadAttention
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
    )


def hand_back(new: MultiheadAttention, module: nn.MultiheadAttention) -> None:
    """The inverse of `MultiheadAttention.from_module`: give the module what `new` now holds."""
    vars(module).update(
        (name, value.copy() if isinstance(value, dict) else value)
        for name, value in vars(new).items()
    )
    for key, hook in new._forward_pre_hooks.items():
        if hook is _no_operation:
            del module._forward_pre_hooks[key]


def _no_operation(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: see `MultiheadAttention._keep_own_forward`."""
