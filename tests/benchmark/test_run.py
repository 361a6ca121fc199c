"""Cases count work right, all sides agree with float64, rounds interleave; no timing is tested."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

from attn_ext.benchmark import memory, results, scaling
from attn_ext.benchmark.cases import (
    KINDS,
    Case,
    Shape,
    dtype_cases,
    full_cases,
    make_inputs,
    options_of,
    short_cases,
    sweeps,
    visible_pairs,
)
from attn_ext.benchmark.results import Group, Row, Run
from attn_ext.benchmark.run import Meter, exact_results, memory_of
from attn_ext.benchmark.sides import UnavailableError, sides

SMALL = Shape(2, 4, 2, 19, 19, 16)
SQUARE = Shape.of((3, 4, 19, 16))
SMALL_CASES = [
    Case(kind, SMALL if kind in ("forward", "backward") else SQUARE, "float32", option)
    for kind in KINDS
    for option in options_of(kind)
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_all_sides_agree_with_float64(case: Case) -> None:
    """But flex_attention, whose compilation takes a minute: `pytest bench` runs it."""
    inputs = make_inputs(case)
    truth = exact_results(inputs)
    seen = set()
    for side in sides(case):
        if side.name == "flex_attention":
            continue
        try:
            found = side.prepare(inputs).results()
        except (UnavailableError, RuntimeError):
            continue
        seen.add(side.name)
        assert len(found) == len(truth)
        rows = (
            inputs.padding
            if inputs.padding is not None
            else torch.ones(3, 19, dtype=torch.bool)[: len(inputs.query)]
        )
        for actual, expected in zip(found, truth, strict=True):
            if case.kind == "varlen":
                actual, expected = (x.transpose(1, 2)[rows] for x in (actual, expected))
            torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)
    assert {"attn_ext cpu", "attn_ext reference", "PyTorch"} <= seen
    assert case.kind == "module" or {"PyTorch math", "PyTorch flash"} & seen


def test_visible_pairs_are_those_that_the_reference_sees() -> None:
    for case in SMALL_CASES:
        if case.kind in ("module", "varlen"):
            continue
        inputs = make_inputs(case)
        ones = torch.ones(case.shape.query_length, case.shape.key_length, dtype=torch.bool)
        if inputs.causal:
            ones = ones.tril()
        if inputs.window is not None:
            ones = ones.tril(inputs.window[1]).triu(-inputs.window[0])
        if inputs.mask is not None and inputs.mask.dtype is torch.bool:
            ones &= inputs.mask
        assert visible_pairs(case) == case.shape.batch * int(ones.sum()), case


def test_operations_and_bytes() -> None:
    forward = Case("forward", SQUARE, "bfloat16")
    assert forward.flops == 4 * 3 * 4 * 19 * 19 * 16
    assert forward.bytes == 4 * 3 * 4 * 19 * 16 * 2
    both, backward = (dataclasses.replace(forward, kind=x) for x in list(KINDS)[2:0:-1])
    assert both.flops == forward.flops + backward.flops
    assert both.bytes == forward.bytes + backward.bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sets(device: str) -> None:
    assert set(short_cases(device)) <= set(full_cases(device))
    assert {case.kind for case in short_cases(device)} == set(KINDS)
    assert {case.dtype for case in dtype_cases(device)} == {
        "float32", "bfloat16", "float16", "float64",
    }  # fmt: skip
    for dimension in scaling.NAMES:
        series = [x for x in sweeps(device) if x.sweep == dimension and x.kind == "forward"]
        assert len({scaling.size(dimension, x.shape) for x in series}) == len(series) > 2
        for other in set(scaling.NAMES) - {dimension}:
            assert len({scaling.size(other, x.shape) for x in series}) == 1


def test_a_wrong_case_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'sideways'"):
        Case("sideways", SMALL, "float32")
    with pytest.raises(ValueError, match="option must be one of"):
        Case("decode", SMALL, "float32", "causal")


def test_sides_take_turns_within_rounds() -> None:
    order: list[int] = []

    def seconds(function: object, burst: float, wait: object) -> object:
        number = len({id(x) for x in made})
        made.append(function)

        def turn() -> float:
            order.append(number)
            return float(len(order))

        return turn

    made: list[object] = []
    names = ("attn_ext cpu", "PyTorch", "PyTorch math")
    with Meter(3, with_memory=False, with_limits=False) as meter:
        group = meter.measure(
            Case("forward", SQUARE, "float32"), lambda side: side.name in names, seconds
        )
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert [row.seconds for row in group.rows] == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert [row.side for row in group.rows] == list(names)


def test_who_takes_no_part_has_a_reason() -> None:
    case = Case("forward", SQUARE, "float32")
    names = ("attn_ext cuda", "PyTorch efficient", "flash-attn", "flashinfer")
    with Meter(1, with_memory=False, with_limits=False) as meter:
        group = meter.measure(case, lambda side: side.name in names)
    assert set(group.left_out) | {row.side for row in group.rows} == set(names)
    assert all(group.left_out.values())
    assert "tensors" in group.left_out["attn_ext cuda"]


def test_figures_are_medians_of_each_rounds_own() -> None:
    case = Case("forward", SQUARE, "float32")
    ours = Row("attn_ext cpu", True, [1.0, 10.0, 2.0])
    stock = Row("PyTorch", False, [2.0, 20.0, 4.0])
    limits = [4.0 * case.flops / x for x in ours.seconds]
    group = Group(case, [ours, stock], {}, limits, [1e30] * 3)
    figures = group.figures(ours)
    assert figures["speedup_over_pytorch"] == 2.0
    assert figures["percent_of_peak"] == 25.0
    assert figures["milliseconds"] == 2000.0
    assert Group(case, [ours, stock]).figures(ours)["percent_of_peak"] is None


def test_runs_are_written_and_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new folder" / "run.json"
    run = example_run()
    run.write(path)
    assert Run.read(path) == run
    figures = json.loads(path.read_text())["groups"][0]["rows"][0]["figures"]
    assert figures == run.groups[0].figures(run.groups[0].rows[0])


def example_run() -> Run:
    """Made up: times grow as L^2, B, H and D, memory as all of these, errors with the dtype."""
    groups = []
    for case in [*short_cases(), *dtype_cases(), *sweeps()]:
        rows = [
            Row("attn_ext cpu", True, [2e-12 * case.flops] * 2, 2.0**-20, case.bytes),
            Row("PyTorch", False, [5e-12 * case.flops] * 2, 2.0**-21, 2 * case.bytes),
        ]
        left_out = {"flash-attn": "it is not installed"}
        groups.append(Group(case, rows, left_out, [8e11, 8e11], [4e10, 4e10]))
    machine = {"processor": "a processor", "threads": 2, "instruction_set": "avx512", "torch": "2"}
    machine |= {"python": "3", "attn_ext": "0.1"}
    for group in groups:
        for row in group.rows:
            row.seconds = [results._rounded(x, 5) for x in row.seconds]
    return Run("attn-ext bench <&>", "cpu", machine, 2, "limits were made up", groups)


def test_exponents_of_made_up_times() -> None:
    expected = {"L": (2.0, 1.0), "B": (1.0, 1.0), "H": (1.0, 1.0), "D": (1.0, 1.0)}
    found = scaling.fits(example_run().groups)
    assert len(found) == 2 * 2 * 2 * 4
    for fit in found:
        exponent = expected[fit.dimension][fit.quantity == "memory"]
        assert fit.exponent == pytest.approx(exponent, abs=1e-3), fit


@pytest.mark.skipif(not memory.can_reset_peak(), reason="Linux does not reset peaks here")
def test_peak_memory_is_that_of_the_call() -> None:
    assert 63 < memory.peak_bytes(lambda: torch.ones(2**24)) / 2**20 < 66
    assert memory.peak_bytes(lambda: None) < 2**20


@pytest.mark.skipif(not memory.can_reset_peak(), reason="Linux does not reset peaks here")
@pytest.mark.parametrize("kind", ["forward", "forward and backward"])
def test_memory_is_linear_in_length(kind: str) -> None:
    """And PyTorch's kernel that holds the weights is not: the measure tells them apart."""

    def mebibytes(side: str, length: int) -> float:
        shape = Shape.of((1, 4, length, 64))
        return memory_of(Case(kind, shape, "float32"), side) / 2**20

    lengths = (1024, 2048, 4096)
    ours = {length: mebibytes("attn_ext cpu", length) for length in lengths}
    assert scaling.power_law(ours)[0] < 1.15
    math = {length: mebibytes("PyTorch math", length) for length in lengths}
    assert scaling.power_law(math)[0] > 1.6
