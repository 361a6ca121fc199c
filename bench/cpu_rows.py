"""What the CPU kernels are held to: every row of work, what it is compared with, and its targets.

Sizes are (B, H, L, D) for attention and (B, L, E, H) for modules. Nothing runs here: a row
prepares its tensors when bench/cpu.py measures it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_ext
from attn_ext.benchmark.cases import (
    DECODE_BYTES,
    DECODE_HEAD_DIM,
    DECODE_HEADS,
    DECODE_KEYS,
    DECODE_MANY_HEADS,
    LARGE,
    MODULES,
    SMALL,
    Sizes,
    flops,
    key_value_bytes,
    padding_mask,
)

Attention = Callable[..., Tensor]

MASKED: tuple[Sizes, ...] = ((2, 8, 1024, 64), (1, 8, 2048, 128))
MODULE_OF_PROJECTIONS: Sizes = (32, 128, 256, 4)
MODULE_OF_16_TOKENS: Sizes = (1, 16, 256, 4)
TINY: Sizes = (1, 1, 4, 64)
FEW_KEYS = 128
"""Of a cache that is still short."""
POOLING: Sizes = (16, 12, 196, 64)
"""The keys' sizes: of ViT-Base's tokens."""

HIDDEN_SHARE = 0.1
"""Of the keys, by the padding mask."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Two functions to compare, and what a call does: floating-point operations, or bytes read."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    amount: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        group: the kind of work, by which rows are selected.
        name: the work in words; unique.
        targets: the bound on each quantity, by the names of bench/cpu.py's QUANTITIES.
        prepare: makes the tensors and the two functions.
        peak: the limit that "percent of peak" refers to, as attn_ext.benchmark.peak names it.
        capability: the instruction set to run at, where it is not the best one.
    """

    group: str
    name: str
    targets: dict[str, float]
    prepare: Callable[[], Work]
    peak: str | None = None
    capability: str | None = None


def name_of(dtype: torch.dtype, causal: bool = False) -> str:
    return str(dtype).removeprefix("torch.") + (", causal" if causal else "")


def tensors_of(
    shape: Sizes, dtype: torch.dtype, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    query, key, value = (
        torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(3)
    )
    return query, key, value


def forward_row(
    shape: Sizes,
    dtype: torch.dtype,
    causal: bool,
    targets: dict[str, float],
    group: str = "forward",
) -> Row:
    """F.scaled_dot_product_attention and ours."""

    def prepare() -> Work:
        x = tensors_of(shape, dtype)
        return Work(
            lambda: attn_ext.scaled_dot_product_attention(*x, is_causal=causal),
            lambda: F.scaled_dot_product_attention(*x, is_causal=causal),
            flops(shape, 2, causal),
        )

    peak = {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(dtype)
    return Row(group, f"forward {shape} {name_of(dtype, causal)}", targets, prepare, peak)


def forward_rows() -> Iterator[Row]:
    for shape, percent in zip(LARGE, (88, 90), strict=True):
        yield forward_row(shape, torch.float32, False, {"percent of peak": percent, "speedup": 2.5})
        yield forward_row(shape, torch.float32, True, {"percent of peak": 83, "speedup": 3.0})
    for shape in SMALL:
        yield forward_row(shape, torch.float32, False, {"speedup": 2.2})
    for shape, causal in itertools.product(LARGE, (False, True)):
        targets = {"percent of peak": 72.0 if causal else 80.0, "speedup": 4.8}
        yield forward_row(shape, torch.bfloat16, causal, targets)
    for shape in SMALL:
        yield forward_row(shape, torch.bfloat16, False, {"speedup": 3.5})
    for shape, causal in itertools.product(LARGE, (False, True)):
        yield forward_row(shape, torch.float16, causal, {"speedup": 2.2})
    for shape in SMALL:
        yield forward_row(shape, torch.float16, False, {"speedup": 2.2})


def backward_rows() -> Iterator[Row]:
    """The gradients alone, of a graph that is kept."""
    for shape, causal in itertools.product(LARGE, (False, True)):

        def prepare(shape: Sizes = shape, causal: bool = causal) -> Work:
            x = tensors_of(shape, torch.float32, requires_grad=True)
            dout = torch.randn(shape)

            def gradients(attention: Attention) -> Callable[[], object]:
                out = attention(*x, is_causal=causal)
                return lambda: torch.autograd.grad(out, x, dout, retain_graph=True)

            return Work(
                gradients(attn_ext.scaled_dot_product_attention),
                gradients(F.scaled_dot_product_attention),
                flops(shape, 5, causal),
            )

        name = f"backward {shape} {name_of(torch.float32, causal)}"
        targets = {"percent of peak": 85.0, "speedup": 2.6}
        yield Row("backward", name, targets, prepare, "float32")


def training_work(x: Sequence[Tensor], dout: Tensor, causal: bool = False) -> Work:
    """Output and gradients of query, key and value."""

    def step(attention: Attention) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(*x, is_causal=causal), x, dout)

    return Work(step(attn_ext.scaled_dot_product_attention), step(F.scaled_dot_product_attention))


def forward_and_backward_rows() -> Iterator[Row]:
    cases = [*itertools.product(LARGE, (False, True)), *((shape, False) for shape in SMALL)]
    for (dtype, speedup), (shape, causal) in itertools.product(
        ((torch.float32, 2.3), (torch.bfloat16, 2.8)), cases
    ):

        def prepare(
            shape: Sizes = shape, dtype: torch.dtype = dtype, causal: bool = causal
        ) -> Work:
            x = tensors_of(shape, dtype, requires_grad=True)
            dout = torch.randn(shape).to(dtype)

            return training_work(x, dout, causal)

        name = f"forward and backward {shape} {name_of(dtype, causal)}"
        yield Row("forward and backward", name, {"speedup": speedup}, prepare)


def mask_rows() -> Iterator[Row]:
    """Our own forward with a mask, against our own without, or PyTorch's if it hides half."""
    masks: dict[str, Callable[[Sizes], Tensor]] = {
        "padding mask hiding 10 %": lambda x: padding_mask(x[0], x[2], HIDDEN_SHARE),
        "padding mask hiding nothing": lambda x: padding_mask(x[0], x[2], 0.0),
        "(L, S) float mask": lambda x: torch.randn(x[2], x[2]),
    }
    for shape, (label, make) in itertools.product(MASKED, masks.items()):

        def prepare(shape: Sizes = shape, make: Callable[[Sizes], Tensor] = make) -> Work:
            x, mask = tensors_of(shape, torch.float32), make(shape)
            return Work(
                lambda: attn_ext.scaled_dot_product_attention(*x, mask),
                lambda: attn_ext.scaled_dot_product_attention(*x),
            )

        yield Row("masks", f"forward {shape} float32, {label}", {"relative time": 1.1}, prepare)
    shape = MASKED[0]
    for dtype, speedup in ((torch.float32, 3.0), (torch.bfloat16, 4.8)):

        def prepare_causal(dtype: torch.dtype = dtype) -> Work:
            x = tensors_of(shape, dtype)
            mask = nn.Transformer.generate_square_subsequent_mask(shape[2], dtype=dtype)
            return Work(
                lambda: attn_ext.scaled_dot_product_attention(*x, mask),
                lambda: F.scaled_dot_product_attention(*x, mask),
            )

        name = f"forward {shape} {name_of(dtype)}, causality by a float mask"
        yield Row("masks", name, {"speedup": speedup}, prepare_causal)


def decode_row(
    heads: int, key_heads: int, keys: int, dtype: torch.dtype, targets: dict[str, float]
) -> Row:
    """One query against a cache, read from memory."""
    amount = key_value_bytes(key_heads, keys, DECODE_HEAD_DIM, dtype)

    def prepare() -> Work:
        query = torch.randn(1, heads, 1, DECODE_HEAD_DIM).to(dtype)
        caches = [
            [torch.randn(1, key_heads, keys, DECODE_HEAD_DIM, dtype=dtype) for _ in range(2)]
            for _ in range(max(1, DECODE_BYTES // amount))
        ]

        def step(attention: Attention) -> Callable[[], object]:
            turns = itertools.cycle(caches)
            return lambda: attention(query, *next(turns), enable_gqa=heads != key_heads)

        return Work(
            step(attn_ext.scaled_dot_product_attention),
            step(F.scaled_dot_product_attention),
            amount,
        )

    name = f"decode heads {heads}:{key_heads}, {keys} keys, D {DECODE_HEAD_DIM} {name_of(dtype)}"
    return Row("decode", name, targets, prepare, "memory")


def decode_rows() -> Iterator[Row]:
    dtypes = ((torch.float32, 2.4, 1.5), (torch.bfloat16, 7.0, 7.0))
    for (dtype, speedup, _), heads, keys in itertools.product(dtypes, DECODE_HEADS, DECODE_KEYS):
        yield decode_row(*heads, keys, dtype, {"percent of peak": 95.0, "speedup": speedup})
    for (dtype, _, speedup), heads in itertools.product(dtypes, DECODE_HEADS):
        yield decode_row(*heads, FEW_KEYS, dtype, {"speedup": speedup})
    for dtype, speedup, _ in dtypes:
        yield decode_row(*DECODE_MANY_HEADS, DECODE_KEYS[0], dtype, {"speedup": speedup})


def pooling_rows() -> Iterator[Row]:
    """One query of a head, in training: of a model that pools its tokens by attention."""
    batch, heads, keys, head_dim = POOLING
    for dtype, speedup in ((torch.float32, 1.5), (torch.bfloat16, 2.8)):

        def prepare(dtype: torch.dtype = dtype) -> Work:
            query, dout = torch.randn(2, batch, heads, 1, head_dim).to(dtype)
            key, value = torch.randn(2, batch, heads, keys, head_dim).to(dtype)
            x = [tensor.requires_grad_() for tensor in (query, key, value)]

            return training_work(x, dout)

        name = f"forward and backward ({batch}, {heads}, 1:{keys}, {head_dim}) {name_of(dtype)}"
        yield Row("pooling", name, {"speedup": speedup}, prepare)


def module_row(
    shape: Sizes,
    dtype: torch.dtype,
    speedup: float,
    *,
    need_weights: bool = False,
    training_step: bool = False,
    dropout: float = 0.0,
) -> Row:
    """nn.MultiheadAttention and ours around the same parameters, self-attention."""
    batch, length, width, heads = shape

    def prepare() -> Work:
        stock = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True, dtype=dtype)
        x, dout = torch.randn(2, batch, length, width).to(dtype)

        def call(module: nn.Module) -> Callable[[], object]:
            def forward() -> None:
                with torch.no_grad():
                    module(x, x, x, need_weights=need_weights)

            def forward_and_backward() -> None:
                module(x, x, x, need_weights=need_weights)[0].backward(dout)

            return forward_and_backward if training_step else forward

        return Work(call(attn_ext.MultiheadAttention.from_module(stock)), call(stock))

    label = "training step" if training_step else "forward"
    label += ", default arguments" if need_weights else ", need_weights=False"
    label += f", dropout {dropout}" if dropout else ""
    return Row("module", f"module {shape} {name_of(dtype)}, {label}", {"speedup": speedup}, prepare)


def module_rows() -> Iterator[Row]:
    for shape in MODULES:
        yield module_row(shape, torch.float32, 2.2, need_weights=True)
    for shape, dtype in itertools.product(MODULES, (torch.float32, torch.bfloat16)):
        yield module_row(shape, dtype, 1.7)
        yield module_row(shape, dtype, 1.6, training_step=True)
        yield module_row(shape, dtype, 3.5, training_step=True, dropout=0.1)
    for training_step in (False, True):
        yield module_row(
            MODULE_OF_PROJECTIONS,
            torch.float32,
            1.4,
            need_weights=True,
            training_step=training_step,
        )


def inference_rows() -> Iterator[Row]:
    """16 tokens under inference_mode, where stock takes its own fast path."""
    batch, length, width, heads = MODULE_OF_16_TOKENS

    def attention() -> nn.Module:
        return nn.MultiheadAttention(width, heads, batch_first=True)

    def encoder_layer() -> nn.Module:
        return nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)

    def call(module: nn.Module, *arguments: Tensor, **keywords: bool) -> Callable[[], object]:
        def forward() -> None:
            with torch.inference_mode():
                module(*arguments, **keywords)

        return forward

    def prepare(make: Callable[[], nn.Module], inputs: int, **keywords: bool) -> Work:
        stock = make().eval()
        holder = nn.ModuleList([copy.deepcopy(stock)])
        attn_ext.replace_multihead_attention(holder)
        x = [torch.randn(batch, length, width)] * inputs
        return Work(call(holder[0], *x, **keywords), call(stock, *x, **keywords))

    name = f"{MODULE_OF_16_TOKENS} float32, eval"
    for label, function in (
        (f"module {name}, default arguments", lambda: prepare(attention, 3)),
        (f"module {name}, need_weights=False", lambda: prepare(attention, 3, need_weights=False)),
        (f"encoder layer {name}", lambda: prepare(encoder_layer, 1)),
    ):
        yield Row("inference", label, {"speedup": 1.0}, function)


def overhead_rows() -> Iterator[Row]:
    """So little work that a call's own cost is what remains."""
    without, with_grad, gradients = "without requires_grad", "with requires_grad", "with gradients"
    for kind, masked in itertools.product((without, with_grad, gradients), (False, True)):

        def prepare(kind: str = kind, masked: bool = masked) -> Work:
            x = tensors_of(TINY, torch.float32, kind != without)
            mask = torch.ones(TINY[2], TINY[2], dtype=torch.bool) if masked else None
            dout = torch.randn(TINY)

            def side(function: Callable[..., Tensor]) -> Callable[[], object]:
                if kind == gradients:
                    return lambda: torch.autograd.grad(function(*x, mask), x, dout)
                return lambda: function(*x, mask)

            return Work(
                side(attn_ext.scaled_dot_product_attention), side(F.scaled_dot_product_attention)
            )

        name = f"call of {TINY} float32, {kind}{', bool mask' if masked else ''}"
        yield Row("overhead", name, {"extra microseconds": 5.0}, prepare)


def avx2_rows() -> Iterator[Row]:
    """The same source with 256-bit vectors, against the peak of these."""
    for shape in LARGE:
        row = forward_row(shape, torch.float32, False, {"percent of peak": 85}, group="avx2")
        yield dataclasses.replace(
            row, name=f"{row.name}, AVX2", peak="float32_avx2", capability="avx2"
        )


def all_rows() -> list[Row]:
    return [
        *forward_rows(),
        *backward_rows(),
        *forward_and_backward_rows(),
        *mask_rows(),
        *decode_rows(),
        *pooling_rows(),
        *module_rows(),
        *inference_rows(),
        *overhead_rows(),
        *avx2_rows(),
    ]
