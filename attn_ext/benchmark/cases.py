"""What is measured: kinds of work, shapes, their inputs, operations and bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
KINDS = {
    "forward": "the output alone, without gradients",
    "backward": "the gradients alone, of a graph that is kept",
    "forward and backward": "the output and the gradients of query, key and value",
    "masks": "the output under causality, a window or a mask",
    "decode": "one query against a cache of keys and values that is read from memory",
    "varlen": "sequences of different lengths, padded, with the padding hidden",
    "module": "MultiheadAttention, projections included",
}
OPTIONS = {
    "masks": ("causal", "window", "bool mask", "float mask"),
    "module": ("default arguments", "need_weights=False", "training step"),
}
"""What a kind of work has variants in; the other kinds may be causal, which "causal" asks for."""

Sizes = tuple[int, int, int, int]
LARGE: tuple[Sizes, ...] = ((1, 8, 4096, 64), (1, 8, 2048, 128))
SMALL: tuple[Sizes, ...] = ((2, 8, 1024, 64), (2, 8, 128, 64), (32, 8, 32, 64), (1, 12, 197, 64))
MODULES: tuple[Sizes, ...] = ((8, 512, 512, 8), (2, 2048, 768, 12))
"""(N, L, E, H); all others are (B, H, L, D)."""
DECODE_KEYS = (4096, 32768)
DECODE_HEADS = ((32, 32), (32, 8))
DECODE_MANY_HEADS = (64, 4)
"""More heads a key head than there are lanes for in the kernel that decodes with few."""
DECODE_HEAD_DIM = 128
DECODE_BYTES = 2**28
"""Decoding goes from cache to cache, as from layer to layer: so much of them that all are read from
memory."""
WINDOW = 128
"""Keys before the diagonal, and as many after it, in the option "window"."""
TABLE_DTYPES_SHAPE: Sizes = (2, 8, 256, 64)
"""Where every dtype is measured."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """(B, Hq:Hkv, Lq:Lk, D); a pair of equal numbers is written once."""

    batch: int
    query_heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_dim: int

    @classmethod
    def of(cls, sizes: Sizes) -> Shape:
        """The shape (B, H, L, D)."""
        batch, heads, length, head_dim = sizes
        return cls(batch, heads, heads, length, length, head_dim)

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "B,H,L,D", as in "2,8,1024,64" or, grouped and with one query, "1,32:8,1:4096,128".

        Raises:
            ValueError: it is not of that form, or query heads are no multiple of key heads.
        """
        parts = [part.split(":") for part in text.strip("() ").replace(" ", "").split(",")]
        try:
            numbers = [[int(number) for number in part] for part in parts]
        except ValueError:
            numbers = []
        good = [len(part) for part in numbers] in _LENGTHS
        if not good or min(map(min, numbers)) < 1 or numbers[1][0] % numbers[1][-1]:
            raise ValueError(
                f"shape must be B,H,L,D in positive integers, where H may be Hq:Hkv, Hq a multiple "
                f"of Hkv, and L may be Lq:Lk, got {text!r}"
            )
        (batch,), heads, lengths, (head_dim,) = numbers
        return cls(batch, heads[0], heads[-1], lengths[0], lengths[-1], head_dim)

    def __str__(self) -> str:
        def pair(left: int, right: int) -> str:
            return f"{left}" if left == right else f"{left}:{right}"

        heads = pair(self.query_heads, self.key_heads)
        lengths = pair(self.query_length, self.key_length)
        return f"({self.batch}, {heads}, {lengths}, {self.head_dim})"

    @property
    def queries(self) -> tuple[int, int, int, int]:
        return (self.batch, self.query_heads, self.query_length, self.head_dim)

    @property
    def keys(self) -> tuple[int, int, int, int]:
        return (self.batch, self.key_heads, self.key_length, self.head_dim)

    @property
    def width(self) -> int:
        """The embedding's size E in a module."""
        return self.query_heads * self.head_dim


_LENGTHS = [[1, heads, lengths, 1] for heads in (1, 2) for lengths in (1, 2)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work, which all sides do.

    Attributes:
        kind: one of `KINDS`.
        shape: for "module" that of the heads.
        dtype: one of `DTYPES`.
        option: one of the kind's `OPTIONS`, or "causal" or "" for kinds without.
        device: "cpu" or "cuda".
        sweep: the dimension, "L", "B", "H" or "D", of whose sweep this is a point; "" if of none.
    """

    kind: str
    shape: Shape
    dtype: str
    option: str = ""
    device: str = "cpu"
    sweep: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, tuple(KINDS)),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("option", self.option, options_of(self.kind)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")

    def __str__(self) -> str:
        option = f", {self.option}" if self.option else ""
        return f"{self.kind} {self.shape} {self.dtype}{option}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def needs_gradients(self) -> bool:
        return self.kind in ("backward", "forward and backward") or self.option == "training step"

    @property
    def flops(self) -> int:
        """Floating-point operations of one call: those of the pairs that nothing hides."""
        products = {"backward": 5, "forward and backward": 7}.get(self.kind, 2)
        attention = 2 * products * visible_pairs(self) * self.shape.width
        if self.kind != "module":
            return attention
        projections = 8 * self.shape.batch * self.shape.query_length * self.shape.width**2
        if self.option == "training step":
            return attention // 2 * 7 + 3 * projections
        return attention + projections

    @property
    def bytes(self) -> int:
        """The least that a call must read and write: each input and each output once."""
        queries, keys = math.prod(self.shape.queries), math.prod(self.shape.keys)
        elements = 2 * queries + 2 * keys  # query, key, value; output
        if self.kind == "backward":
            elements = 4 * queries + 4 * keys  # query, out, dout, dquery; key, value, gradients
        elif self.needs_gradients:
            elements = 6 * queries + 6 * keys  # both passes: one writes what the other reads
        if self.kind == "module":  # the input, the output, four weights; gradients as many
            sequence = self.shape.batch * self.shape.query_length * self.shape.width
            elements = (2 * sequence + 4 * self.shape.width**2) * (3 if self.needs_gradients else 1)
        total = elements * self.torch_dtype.itemsize
        if self.option == "bool mask":
            return total + self.shape.query_length * self.shape.key_length
        if self.option == "float mask":
            pairs = self.shape.query_length * self.shape.key_length
            return total + pairs * self.torch_dtype.itemsize
        return total


def options_of(kind: str) -> tuple[str, ...]:
    """The options that a kind of work may have."""
    return OPTIONS.get(kind, ("",) if kind in ("decode", "varlen") else ("", "causal"))


@dataclasses.dataclass
class Inputs:
    """A case's tensors, representable in its dtype.

    Attributes:
        query, key, value: (B, Hq, Lq, D) and (B, Hkv, Lk, D); for "module" query is (B, L, E) and
            the others are query itself.
        dout: the output's gradient, of the output's shape; None where no gradient is asked.
        mask: (L, S), bool (True takes part) or floating.
        lengths: how many of each sequence's tokens there are; the rest is padding.
        causal, window: as `attn_ext.attention` takes them.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    causal: bool = False
    window: tuple[int, int] | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """The same numbers in another dtype."""

        def cast(x: Tensor | None) -> Tensor | None:
            return x.to(device, dtype) if x is not None and x.is_floating_point() else x

        names = ("query", "key", "value", "dout", "mask")
        changes: dict[str, Any] = {name: cast(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **changes)

    @property
    def padding(self) -> Tensor | None:
        """(B, Lk) bool, True for tokens that are there."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.case.shape.key_length, device=self.lengths.device)
        return positions < self.lengths[:, None]


def make_inputs(case: Case) -> Inputs:
    """Random inputs; the same for each call with the same case, but for the caches of "decode"."""
    shape, dtype, device = case.shape, case.torch_dtype, case.device
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).to(device)

    if case.kind == "module":
        x = random(shape.batch, shape.query_length, shape.width)
        return Inputs(case, x, x, x, random(*x.shape) if case.needs_gradients else None)
    query, key, value = random(*shape.queries), random(*shape.keys), random(*shape.keys)
    inputs = Inputs(case, query, key, value, causal=case.option == "causal")
    if case.needs_gradients:
        inputs.dout = random(*shape.queries)
    if case.option == "window":
        inputs.window = (WINDOW, WINDOW)
    if case.option == "bool mask":
        # Every row sees itself: none is empty, for which PyTorch's kernels disagree.
        mask = torch.rand(shape.query_length, shape.key_length, generator=generator) < 0.7
        inputs.mask = (mask | torch.eye(*mask.shape, dtype=torch.bool)).to(device)
    if case.option == "float mask":
        inputs.mask = random(shape.query_length, shape.key_length)
    if case.kind == "varlen":
        inputs.lengths = varied_lengths(shape).to(device)
    return inputs


def varied_lengths(shape: Shape) -> Tensor:
    """(B,) lengths, evenly from the whole down to 1 / B of it."""
    steps = torch.arange(shape.batch, 0, -1)
    return torch.clamp(steps * shape.key_length // shape.batch, min=1)


def visible_pairs(case: Case) -> int:
    """How many (query, key) pairs of one head, summed over the batch, take part."""
    shape = case.shape
    rows, columns = shape.query_length, shape.key_length
    if case.option == "causal":
        return shape.batch * sum(min(row + 1, columns) for row in range(rows))
    if case.option == "window":
        reach = ((max(0, row - WINDOW), min(columns, row + WINDOW + 1)) for row in range(rows))
        return shape.batch * sum(max(0, last - first) for first, last in reach)
    if case.option == "bool mask":
        mask = make_inputs(dataclasses.replace(case, device="cpu")).mask
        assert mask is not None
        return shape.batch * int(mask.sum())
    if case.kind == "varlen":
        return int(varied_lengths(shape).square().sum())
    return shape.batch * rows * columns


def padding_mask(batch: int, length: int, hidden_share: float) -> Tensor:
    """(B, 1, 1, S) bool, False for the given share of keys at the end of each sequence."""
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    mask[..., length - round(hidden_share * length) :] = False
    return mask


def flops(sizes: Sizes, products: int, causal: bool = False) -> int:
    """Floating-point operations of `products` matrix products over the pairs of query and key.

    A forward pass makes 2 (scores, output), a backward 5 (scores, and the gradients of weights,
    query, key and value). Causal counts only the pairs that are needed, key <= query.
    """
    case = Case("forward", Shape.of(sizes), "float32", "causal" if causal else "")
    return case.flops // 2 * products


def key_value_bytes(heads: int, length: int, head_dim: int, dtype: torch.dtype) -> int:
    """The size of one sequence's keys and values."""
    return 2 * heads * length * head_dim * dtype.itemsize


def module_shape(sizes: Sizes) -> Shape:
    """Of the heads of a module (N, L, E, H)."""
    batch, length, width, heads = sizes
    return Shape.of((batch, heads, length, width // heads))


def short_cases(device: str = "cpu") -> list[Case]:
    """What `pytest bench` runs: each kind of work at one shape or two."""
    half = "bfloat16" if device == "cpu" else "float16"
    shape = Shape.of(SMALL[0])
    caches = [
        Shape(1, heads, key_heads, 1, DECODE_KEYS[0], DECODE_HEAD_DIM)
        for heads, key_heads in (DECODE_HEADS[1], DECODE_MANY_HEADS)
    ]
    cases = [
        Case("forward", shape, "float32"),
        Case("forward", shape, half),
        Case("forward", Shape.of(LARGE[1]), half),
        Case("backward", shape, "float32"),
        Case("forward and backward", shape, "float32"),
        Case("forward and backward", shape, half),
        *(Case("masks", shape, "float32", option) for option in OPTIONS["masks"]),
        *(Case("decode", cache, dtype) for cache in caches for dtype in ("float32", half)),
        Case("varlen", Shape.of((8, 8, 512, 64)), "float32"),
        *(
            Case("module", module_shape(MODULES[0]), "float32", option)
            for option in OPTIONS["module"]
        ),
    ]
    return [dataclasses.replace(case, device=device) for case in cases]


def full_cases(device: str = "cpu") -> list[Case]:
    """Every shape and dtype."""
    cases = short_cases(device)
    sizes = (*LARGE, *SMALL) if device == "cpu" else (*LARGE, *SMALL, (4, 16, 8192, 128))
    for dtype in ("float32", "bfloat16", "float16"):
        for kind in ("forward", "backward", "forward and backward"):
            for option in options_of(kind):
                cases += [Case(kind, Shape.of(x), dtype, option, device) for x in sizes]
        for heads, key_heads in (*DECODE_HEADS, DECODE_MANY_HEADS):
            for keys in DECODE_KEYS:
                cache = Shape(1, heads, key_heads, 1, keys, DECODE_HEAD_DIM)
                cases.append(Case("decode", cache, dtype, device=device))
        cases.append(Case("varlen", Shape.of((8, 8, 512, 64)), dtype, device=device))
        for module in MODULES:
            cases += [
                Case("module", module_shape(module), dtype, option, device)
                for option in OPTIONS["module"]
            ]
    return list(dict.fromkeys(cases))


def dtype_cases(device: str = "cpu") -> list[Case]:
    """One shape in every dtype: what the plot of errors shows."""
    shape = Shape.of(TABLE_DTYPES_SHAPE)
    return [Case("forward and backward", shape, dtype, device=device) for dtype in DTYPES]


def sweeps(device: str = "cpu", dtypes: Sequence[str] = ("float32",)) -> Iterator[Case]:
    """Series of cases that differ in one dimension."""
    lengths = (256, 512, 1024, 2048, 4096) if device == "cpu" else (512, 1024, 2048, 4096, 8192)
    series: dict[str, list[Sizes]] = {
        "L": [(1, 8, length, 64) for length in lengths],
        "B": [(batch, 4, 512, 64) for batch in (1, 2, 4, 8)],
        "H": [(2, heads, 512, 64) for heads in (2, 4, 8, 16)],
        "D": [(1, 4, 1024, head_dim) for head_dim in (16, 32, 64, 128, 256)],
    }
    for dtype in dtypes:
        for sweep, shapes in series.items():
            for kind in ("forward", "forward and backward"):
                for sizes in shapes:
                    yield Case(kind, Shape.of(sizes), dtype, "", device, sweep)
