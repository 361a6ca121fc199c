"""What `make gpu` measures: our kernels beside each of SDPA's backends, in turns, on any device.

A time is that of one call on the device, between two CUDA events, after a write over the whole L2
cache, so that no call finds its inputs there. Sides take turns in rounds; a figure is the median
over the rounds of each round's mean.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext import dispatch
from attn_ext.benchmark.measure import alternate
from attn_ext.problem import Problem
from bench.cpu_rows import flops

Shape = tuple[int, int, int, int]

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES: tuple[Shape, ...] = (
    (4, 16, 1024, 64),
    (4, 16, 4096, 64),
    (4, 16, 4096, 128),
    (1, 16, 16384, 128),
    (4, 8, 2048, 256),
)
MASKED_SHAPE: Shape = (4, 16, 2048, 64)
KINDS = ("full", "causal", "float mask", "dropout 0.1")
PASSES = {"forward": 2, "forward and backward": 7}
"""And how many products each is; a backward pass is 5, whatever a kernel recomputes."""


@dataclass(frozen=True)
class Row:
    """A problem and what is done with it."""

    shape: Shape
    dtype: torch.dtype
    kind: str
    direction: str

    @property
    def name(self) -> str:
        return f"{self.direction} {self.shape} {_name(self.dtype)}, {self.kind}"

    @property
    def flops(self) -> float:
        return flops(self.shape, PASSES[self.direction], self.kind == "causal")


def all_rows(shapes: Sequence[Shape] = SHAPES, masked: Shape = MASKED_SHAPE) -> list[Row]:
    """Every shape without and with causality, one shape with what fused kernels tend to refuse."""
    problems = [
        *itertools.product(shapes, DTYPES, ("full", "causal")),
        *itertools.product([masked], DTYPES, KINDS[2:]),
    ]
    return [Row(*problem, direction) for problem in problems for direction in PASSES]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sides(row: Row, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What there is to compare: our backends that take the problem, and SDPA's."""
    query, key, value = (
        torch.randn(row.shape, device=device).to(row.dtype).requires_grad_() for _ in range(3)
    )
    dout = torch.randn_like(query)
    mask = None
    if row.kind == "float mask":
        mask = torch.randn(row.shape[2], row.shape[2], device=device).to(row.dtype)
    settings: dict[str, Any] = {"attn_mask": mask, "dropout_p": 0.1 * (row.kind == KINDS[3])}
    causal = row.kind == "causal"

    def ours(backend: str) -> Tensor:
        return attn_ext.attention(query, key, value, causal=causal, backend=backend, **settings)

    def theirs(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, **settings)

    def whole(attention: Callable[[], Tensor]) -> object:
        if row.direction == "forward":
            with torch.no_grad():
                return attention()
        return torch.autograd.grad(attention(), (query, key, value), dout)

    problem = Problem.build(query, key, value, attn_mask=mask, dropout_p=settings["dropout_p"])
    for name in attn_ext.BACKENDS:
        if name != "reference" and not dispatch.load(name).not_supported_reasons(problem):
            yield f"attn_ext {name}", functools.partial(whole, functools.partial(ours, name))
    for name, backend in SDPA.items():
        yield name, functools.partial(whole, functools.partial(theirs, backend))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        size = torch.cuda.get_device_properties(device).L2_cache_size if self.is_cuda else 0
        self.everything_in_l2 = torch.empty(2 * size, dtype=torch.int8, device=device)

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        """The mean of a number of calls, enqueued one after another."""
        if not self.is_cuda:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start_event, end_event in pairs:
            self.everything_in_l2.zero_()
            start_event.record()
            function()
            end_event.record()
        synchronize(self.device)
        return statistics.mean(x.elapsed_time(y) for x, y in pairs) / 1e3

    def prepared(self, function: Callable[[], object], burst: float) -> Callable[[], float]:
        """A function that gives the mean over `burst` seconds or at least three calls."""
        for _ in range(2):
            function()
        synchronize(self.device)
        calls = max(3, round(burst / max(self.seconds(function, 3), 1e-7)))
        return lambda: self.seconds(function, calls)


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a call for each side, or why there are none."""

    row: Row
    milliseconds: dict[str, float]
    refusals: dict[str, str]

    def as_dictionary(self) -> dict[str, Any]:
        times = {name: round(x, 5) for name, x in self.milliseconds.items()}
        rates = {name: round(self.row.flops / x / 1e9, 2) for name, x in self.milliseconds.items()}
        return {
            "shape": list(self.row.shape),
            "dtype": _name(self.row.dtype),
            "kind": self.row.kind,
            "pass": self.row.direction,
            "milliseconds": times,
            "teraflops_per_second": rates,
            "refusals": self.refusals,
        }

    @property
    def speedup(self) -> float | None:
        """Our fastest beside SDPA's fastest."""
        ours = [x for name, x in self.milliseconds.items() if name.startswith("attn_ext")]
        theirs = [x for name, x in self.milliseconds.items() if not name.startswith("attn_ext")]
        return min(theirs) / min(ours) if ours and theirs else None


def measure(row: Row, device: torch.device, rounds: int, burst: float) -> Measured:
    """Every side of a row, in turns. One that fails is left out, with what it said."""
    watch = Stopwatch(device)
    ready: dict[str, Callable[[], float]] = {}
    refusals = {}
    for name, function in sides(row, device):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA says twice why it can't
                ready[name] = watch.prepared(function, burst)
        except (RuntimeError, NotImplementedError) as error:  # out of memory is a RuntimeError
            refusals[name] = str(error).strip().split("\n")[0][:200]
            if device.type == "cuda":
                torch.cuda.empty_cache()
    times = alternate(list(ready.values()), rounds)
    medians = {name: 1e3 * statistics.median(x) for name, x in zip(ready, times, strict=True)}
    return Measured(row, medians, refusals)
