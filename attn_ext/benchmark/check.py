"""`attn-ext check`: every backend that can run here, against float64, forward and backward.

The truth is PyTorch's own attention in float64, from the same inputs; what it lacks (softcap,
ALiBi, sinks, dropout) is computed by the reference in float64. A result may have twice the error
that PyTorch has in the inputs' dtype. Where PyTorch's happens to be less than what rounding costs,
the limit is that: half a unit of the result's dtype, and for gradients what follows from an LSE
that was rounded to float32 (float64 for float64). In float64 there is nothing finer to measure
against: there PyTorch's error in float32, scaled to float64's precision, stands for its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_ext import dispatch
from attn_ext.benchmark.accuracy import FACTOR, error, rounding_unit
from attn_ext.benchmark.cases import DTYPES, Shape
from attn_ext.functional import attention, explain

Attention = Callable[..., Tensor]

SHAPES = tuple(
    map(Shape.parse, ("2,4,197,64", "1,6:2,130:150,80", "2,8:2,1:513,128", "3,5,33:47,20"))
)
"""Whole and broken tiles, grouped heads, decoding, a head_dim that no kernel was made for."""
RESULTS = ("output", "output without gradients", "query's gradient", "key's", "value's", "mask's")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result of one backend, measured.

    Attributes:
        backend, device, dtype, shape, problem: what ran.
        result: one of `RESULTS`.
        error: root mean square of the difference to the truth.
        theirs: PyTorch's own error.
        limit: the most that `error` may be.
        failure: what was raised instead; "" if nothing was.
    """

    backend: str
    device: str
    dtype: str
    shape: str
    problem: str
    result: str = ""
    error: float = math.inf
    theirs: float = math.inf
    limit: float = math.inf
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.limit < math.inf

    @property
    def ratio(self) -> float:
        """The error in units of its limit."""
        if self.failure or math.isinf(self.error):
            return math.inf
        return self.error / self.limit if self.limit else self.error

    def __str__(self) -> str:
        where = f"{self.backend} on {self.device}, {self.dtype} {self.shape}, {self.problem}"
        if self.failure:
            return f"{where}: {self.failure}"
        return (
            f"{where}, {self.result}: error {self.error:.2e}, PyTorch's own {self.theirs:.2e}, "
            f"limit {self.limit:.2e}"
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """Tensors in one dtype, and what is asked of `attention` and of PyTorch."""

    tensors: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    options: dict[str, Any]
    torch_mask: Tensor | None
    only_ours: bool

    def to(self, dtype: torch.dtype) -> Question:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        query, key, value = map(cast, self.tensors)
        options = {name: cast(x) for name, x in self.options.items()}
        return dataclasses.replace(
            self,
            tensors=(query, key, value),
            dout=cast(self.dout),
            options=options,
            torch_mask=cast(self.torch_mask),
        )

    def ask(self, backend: str | None) -> list[Tensor]:
        """All of `RESULTS` from a backend, or from PyTorch if None."""
        leaves = [x.detach().clone().requires_grad_() for x in self.tensors]
        options, mask = dict(self.options), self.torch_mask
        floating = options.get("attn_mask") is not None
        if floating:
            options["attn_mask"] = mask = options["attn_mask"].detach().clone().requires_grad_()
            leaves.append(options["attn_mask"])

        def call() -> Tensor:
            query, key, value = leaves[:3]
            if backend is None:
                grouped = query.shape[1] != key.shape[1]
                return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
            result = attention(query, key, value, backend=backend, **options)
            assert isinstance(result, Tensor)
            return result

        with torch.no_grad():
            alone = call()
        out = call()
        gradients = torch.autograd.grad(out, leaves, self.dout.to(out.dtype))
        return [out.detach(), alone, *gradients]


def problems(shape: Shape, device: str) -> Iterator[tuple[str, Question]]:
    """What is asked at a shape, in float64; numbers are the same on every device."""
    generator = torch.Generator().manual_seed(20)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device)

    tensors = random(*shape.queries), random(*shape.keys), random(*shape.keys)
    dout = random(*shape.queries)
    rows, columns = shape.query_length, shape.key_length
    # The last row stands on the last key, so that no row is without a key to attend to.
    diagonal = torch.arange(rows)[:, None] + columns - rows
    distance = torch.arange(columns) - diagonal
    causal, window = distance <= 0, distance.abs() <= columns // 3
    padding = torch.ones(shape.batch, columns, dtype=torch.bool)
    padding[:, columns - columns // 4 :] = False
    float_mask = random(rows, columns)
    everything = {
        "causal": "lower_right",
        "softcap": 4.0,
        "alibi_slopes": torch.full((shape.query_heads,), 0.01, dtype=torch.float64).to(device),
        "sinks": random(shape.query_heads),
        "dropout_p": 0.1,
        "seed": 20,
    }

    def question(
        options: dict[str, Any], mask: Tensor | None = None, only_ours: bool = False
    ) -> Question:
        mask = None if mask is None else mask.to(device)
        return Question(tensors, dout, options, mask, only_ours)

    yield "plain", question({})
    if rows <= columns:
        yield "causal", question({"causal": "lower_right"}, causal)
        around = {"causal": "lower_right", "window": (columns // 3, 0)}
        yield "causal window", question(around, causal & window)
        yield "softcap, ALiBi, sinks, dropout", question(everything, only_ours=True)
    yield "padding", question({"key_padding_mask": padding.to(device)}, padding[:, None, None])
    yield "float mask", question({"attn_mask": float_mask}, float_mask)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def refusals(backends: Sequence[str], device: str, dtype: str = "float32") -> dict[str, str]:
    """Why each backend that can't run on a device can't."""
    x = torch.zeros(1, 1, 2, 64, dtype=DTYPES[dtype], device=device)
    found = {name: explain(x, x, x, backend=name) for name in backends}
    return {name: "; ".join(x.reasons[name]) for name, x in found.items() if x.backend is None}


def check(
    backends: Sequence[str] = (),
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[Shape] = SHAPES,
) -> Iterator[Finding]:
    """Run everything on every device; a backend that can't run something is left out of that.

    Args:
        backends: names of `attn_ext.BACKENDS`; all by default.
        dtypes: names of `DTYPES`.
        shapes: of query and key.
    """
    for device in devices():
        for shape in shapes:
            for problem, exact in problems(shape, device):
                for dtype in dtypes:
                    named = {"device": device, "dtype": dtype, "shape": str(shape)}
                    yield from _findings(
                        exact.to(DTYPES[dtype]),
                        backends or dispatch.BACKENDS,
                        {**named, "problem": problem},
                    )


def summary(findings: Sequence[Finding]) -> list[tuple[Finding, int, int]]:
    """For each backend, device and dtype: the worst result, how many there are, how many failed."""
    grouped: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.backend, finding.device, finding.dtype)
        grouped.setdefault(key, []).append(finding)
    return [
        (max(found, key=lambda x: x.ratio), len(found), sum(not x.passed for x in found))
        for found in grouped.values()
    ]


def _findings(
    question: Question, backends: Sequence[str], named: dict[str, Any]
) -> Iterator[Finding]:
    able = [
        name
        for name in backends
        if explain(*question.tensors, backend=name, **question.options).backend is not None
    ]
    if not able:
        return
    truth, theirs = _truth_and_errors(question)
    floors = _floors(question, truth)
    for backend in able:
        try:
            results = question.ask(backend)
        except Exception as raised:  # whatever a broken installation does is a finding
            failure = f"{type(raised).__name__}: {raised}"
            yield Finding(backend, **named, failure=failure)
            continue
        for result, ours, expected, their_error, floor in zip(
            RESULTS, results, truth, theirs, floors, strict=False
        ):
            yield Finding(
                backend,
                **named,
                result=result,
                error=error(ours, expected),
                theirs=their_error,
                limit=max(FACTOR * their_error, floor),
            )


def _truth_and_errors(question: Question) -> tuple[list[Tensor], list[float]]:
    """The results in float64, and PyTorch's errors in the question's dtype."""
    dtype = question.dout.dtype
    asked = "reference" if question.only_ours else None
    truth = question.to(torch.float64).ask(asked)
    if dtype is not torch.float64:
        return truth, [error(x, y) for x, y in zip(question.ask(asked), truth, strict=True)]
    narrow = question.to(torch.float32)
    pairs = zip(narrow.ask(asked), narrow.to(torch.float64).ask(asked), strict=True)
    precision = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return truth, [precision * error(x, y) for x, y in pairs]


def _floors(question: Question, truth: Sequence[Tensor]) -> list[float]:
    """For each result what rounding alone costs; the first two are outputs."""
    dtype = question.dout.dtype
    exact = question.to(torch.float64)
    with torch.no_grad():
        _, lse = attention(*exact.tensors, backend="reference", return_lse=True, **exact.options)
    accumulator = torch.float64 if dtype is torch.float64 else torch.float32
    floors = []
    for number, expected in enumerate(truth):
        floor = rounding_unit(expected, dtype) / 2
        if number >= 2:
            floor = max(floor, rounding_unit(expected, accumulator) * lse.abs().max().item())
        floors.append(floor)
    return floors
