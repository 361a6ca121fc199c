"""Who does the work: attn_ext's backends, PyTorch's own kernels, and other packages if installed.

A side that can't do a case says why by raising `UnavailableError` or whatever its package raises.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext import dispatch
from attn_ext.benchmark.cases import Case, Inputs

Context = Callable[[], contextlib.AbstractContextManager[object]]


class UnavailableError(Exception):
    """Why a side can't do a case, in a sentence."""


@dataclasses.dataclass
class Prepared:
    """A case, ready to be done by one side.

    Attributes:
        leaves: the tensors that gradients are asked of; query, key and value come first.
        call: gives the output, in the side's own layout.
        dout: the output's gradient, in that layout.
        standard: from the side's layout to (B, H, L, D), for outputs and for the leaves' gradients.
        context: entered around many calls, for what would cost time in each.
    """

    leaves: list[Tensor]
    call: Callable[[], Tensor]
    dout: Tensor | None
    standard: Callable[[Tensor], Tensor] = lambda x: x
    context: Context = contextlib.nullcontext

    def work(self, kind: str) -> Callable[[], object]:
        """What is timed: the output, the gradients, or both."""
        if self.dout is None:
            return self.call
        if kind == "backward":
            with self.context():
                out = self.call()
            return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)
        return lambda: torch.autograd.grad(self.call(), self.leaves, self.dout)

    def results(self) -> list[Tensor]:
        """The output and, where they are asked, the gradients of `leaves`, in (B, H, L, D)."""
        with self.context():
            out = self.call()
            found = [out]
            if self.dout is not None:
                found += torch.autograd.grad(out, self.leaves, self.dout)
        return [self.standard(x.detach()) for x in found]


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to do the work: a name and what makes it ready; `ours` for attn_ext."""

    name: str
    prepare: Callable[[Inputs], Prepared]
    ours: bool = False


def sides(case: Case) -> list[Side]:
    """Everything that may do a case, ours first."""
    ours = [
        Side(f"attn_ext {name}", functools.partial(_ours, name), ours=True)
        for name in dispatch.BACKENDS
    ]
    if case.kind == "module":
        return [*ours, Side("PyTorch", _stock_module)]
    return [
        *ours,
        Side("PyTorch", _sdpa),
        *(
            Side(f"PyTorch {name}", functools.partial(_sdpa, backend=backend))
            for name, backend in (
                ("math", SDPBackend.MATH),
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION),
                ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            )
        ),
        *([Side("PyTorch nested", _nested)] if case.kind == "varlen" else []),
        Side("flex_attention", _flex),
        Side("flash-attn", _flash_attn),
        Side("xformers", _xformers),
        Side("flashinfer", _flashinfer),
    ]


def left_out_by_default(side: Side, device: str) -> str:
    """Why a side is not timed unless it is named; empty if it is."""
    if side.name == "attn_ext reference":
        return "it is the truth for the others, not a kernel; --backend reference times it"
    return ""


def _ours(name: str, inputs: Inputs) -> Prepared:
    x = inputs.query
    probe = x.reshape(*x.shape[:2], -1, 1)[..., :2, :].expand(-1, -1, -1, 8) if x.dim() == 3 else x
    keys = probe if x.dim() == 3 else inputs.key
    explanation = attn_ext.explain(probe, keys, keys, backend=name)
    if explanation.backend is None:
        raise UnavailableError("; ".join(explanation.reasons[name]))
    if inputs.case.device == "cpu" and name not in ("cpu", "reference"):
        raise UnavailableError("it is interpreted or emulated here, so its time would mean nothing")
    if inputs.case.kind == "module":
        prepared = _module(inputs, attn_ext.MultiheadAttention.from_module)
        prepared.context = lambda: attn_ext.use_backend(name)
        return prepared
    options: dict[str, Any] = {"causal": inputs.causal, "window": inputs.window}
    if inputs.mask is not None:
        options["attn_mask"] = inputs.mask
    if inputs.lengths is not None:
        options["key_padding_mask"] = inputs.padding
    if len(options) == 2 and inputs.window is None:  # the drop-in, as it is called instead of SDPA
        function = functools.partial(
            attn_ext.scaled_dot_product_attention, is_causal=inputs.causal, enable_gqa=True
        )
        prepared = _attention(inputs, function)
        prepared.context = lambda: attn_ext.use_backend(name)
        return prepared
    return _attention(inputs, functools.partial(attn_ext.attention, backend=name, **options))


def _sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Prepared:
    mask = inputs.mask
    if inputs.window is not None:
        mask = _window_mask(inputs)
    if inputs.padding is not None:
        mask = inputs.padding[:, None, None]
    function = functools.partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=inputs.causal,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
    )
    prepared = _attention(inputs, function)
    if backend is not None:
        prepared.context = lambda: sdpa_kernel(backend)
    return prepared


def _stock_module(inputs: Inputs) -> Prepared:
    return _module(inputs, lambda stock: stock)


def _nested(inputs: Inputs) -> Prepared:
    """Sequences without their padding, as a jagged nested tensor of (B, H, L*, D)."""
    assert inputs.lengths is not None
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    lengths = inputs.lengths.tolist()
    rows = inputs.case.shape.query_length

    def jagged(x: Tensor) -> Tensor:
        parts = [part[:, :length].transpose(0, 1) for part, length in zip(x, lengths, strict=True)]
        return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)

    def padded(x: Tensor) -> Tensor:
        parts = x.transpose(1, 2).unbind()
        rest = [(0, 0, 0, rows - part.shape[0]) for part in parts]
        return torch.stack(
            [F.pad(part.transpose(0, 1), pad) for part, pad in zip(parts, rest, strict=True)]
        )

    query, key, value = (jagged(x) for x in (inputs.query, inputs.key, inputs.value))
    return Prepared(
        [query, key, value],
        lambda: F.scaled_dot_product_attention(query, key, value),
        None,
        padded,
    )


def _flex(inputs: Inputs) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if inputs.case.device == "cpu" and inputs.case.needs_gradients:
        raise UnavailableError("it has no backward pass on CPUs")
    shape, device = inputs.case.shape, inputs.query.device
    options: dict[str, Any] = {"enable_gqa": shape.query_heads != shape.key_heads}
    mask, padding = inputs.mask, inputs.padding
    visible: Callable[..., Tensor] | None = None
    if inputs.causal:
        visible = lambda b, h, i, j: j <= i  # noqa: E731
    elif inputs.window is not None:
        left, right = inputs.window
        visible = lambda b, h, i, j: (j >= i - left) & (j <= i + right)  # noqa: E731
    elif padding is not None:
        visible = lambda b, h, i, j: padding[b, j]  # noqa: E731
    elif mask is not None and mask.dtype is torch.bool:
        visible = lambda b, h, i, j: mask[i, j]  # noqa: E731
    elif mask is not None:
        options["score_mod"] = lambda score, b, h, i, j: score + mask[i, j]
    # After several shapes of one function PyTorch would no longer compile, and run it unfused.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    if visible is not None:
        batch = shape.batch if padding is not None else None
        options["block_mask"] = create_block_mask(
            visible, batch, None, shape.query_length, shape.key_length, device=device
        )
    return _attention(inputs, functools.partial(compiled, **options))


def _flash_attn(inputs: Inputs) -> Prepared:
    package = _package("flash_attn")
    if inputs.mask is not None or inputs.lengths is not None:
        raise UnavailableError("it takes no mask")
    _only_on_gpus(inputs)
    function = functools.partial(
        package.flash_attn_func, causal=inputs.causal, window_size=inputs.window or (-1, -1)
    )
    return _attention(inputs, function, heads_inside=True)


def _xformers(inputs: Inputs) -> Prepared:
    package = _package("xformers.ops")
    shape = inputs.case.shape
    grouped = shape.query_heads != shape.key_heads
    if inputs.lengths is not None or inputs.window is not None or grouped:
        raise UnavailableError("it is compared where heads are not grouped and nothing is ragged")
    bias: Any = package.LowerTriangularMask() if inputs.causal else None
    if inputs.mask is not None:
        bias = inputs.mask
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=inputs.query.dtype).masked_fill(~bias, -torch.inf)
        bias = bias.expand(shape.batch, shape.query_heads, -1, -1)
    function = functools.partial(package.memory_efficient_attention, attn_bias=bias)
    return _attention(inputs, function, heads_inside=True)


def _flashinfer(inputs: Inputs) -> Prepared:
    package = _package("flashinfer")
    if inputs.case.needs_gradients:
        raise UnavailableError("it has no backward pass")
    if inputs.case.shape.batch != 1 or inputs.mask is not None or inputs.window is not None:
        raise UnavailableError("it is compared on single sequences without a mask")
    _only_on_gpus(inputs)
    prefill = functools.partial(package.single_prefill_with_kv_cache, causal=inputs.causal)

    def one_sequence(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[1] == 1:
            return package.single_decode_with_kv_cache(query[0, 0], key[0], value[0])[None, None]
        return prefill(query[0], key[0], value[0])[None]

    return _attention(inputs, one_sequence, heads_inside=True)


def _attention(
    inputs: Inputs, function: Callable[..., Any], heads_inside: bool = False
) -> Prepared:
    """A function of query, key and value; heads_inside: of the layout (B, L, H, D)."""

    def own(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if heads_inside else x

    def standard(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if heads_inside else x

    needs_gradients = inputs.case.needs_gradients
    leaves = [
        own(x).detach().requires_grad_(needs_gradients)
        for x in (inputs.query, inputs.key, inputs.value)
    ]
    dout = None if inputs.dout is None else own(inputs.dout)
    return Prepared(leaves, lambda: function(*leaves), dout, standard)


def _module(inputs: Inputs, swap: Callable[[nn.MultiheadAttention], nn.Module]) -> Prepared:
    """Self-attention; every side gets the same parameters."""
    shape, x = inputs.case.shape, inputs.query
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = nn.MultiheadAttention(shape.width, shape.query_heads, batch_first=True)
    training = inputs.case.needs_gradients
    module = swap(copy.deepcopy(stock).to(x.device, x.dtype)).requires_grad_(training)
    need_weights = inputs.case.option == "default arguments"
    leaf = x.detach().requires_grad_(training)
    leaves = [leaf, *(module.parameters() if training else ())]

    def call() -> Tensor:
        return module(leaf, leaf, leaf, need_weights=need_weights)[0]

    return Prepared(leaves, call, inputs.dout)


def _window_mask(inputs: Inputs) -> Tensor:
    assert inputs.window is not None
    left, right = inputs.window
    shape, device = inputs.case.shape, inputs.query.device
    rows = torch.arange(shape.query_length, device=device)[:, None]
    columns = torch.arange(shape.key_length, device=device)
    return (columns >= rows - left) & (columns <= rows + right)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UnavailableError("it is not installed") from None


def _only_on_gpus(inputs: Inputs) -> None:
    if inputs.case.device == "cpu":
        raise UnavailableError("it runs on GPUs")
