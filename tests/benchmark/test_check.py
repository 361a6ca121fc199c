"""`attn-ext check` passes what is right, and fails what is not."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_ext import cli, dispatch
from attn_ext.backends import Gradients, cpu
from attn_ext.benchmark import accuracy, check
from attn_ext.benchmark.cases import Shape

SHAPE = "2,6:3,37:53,24"


def broken(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """A backend "broken", which is the CPU's but for some functions."""
    names = ("not_supported_reasons", "forward", "backward", "weights", "weights_backward")
    module = types.SimpleNamespace(**{**{name: getattr(cpu, name) for name in names}, **functions})
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "broken"))
    monkeypatch.setitem(dispatch._modules, "broken", module)


def findings(dtype: str = "float32") -> list[check.Finding]:
    return list(check.check(["broken"], [dtype], [Shape.parse(SHAPE)]))


def wrong_forward(*arguments: Any) -> Any:
    out, lse = cpu.forward(*arguments)
    return out * (1 + 1e-5), lse


def wrong_backward(*arguments: Any) -> Gradients:
    found = cpu.backward(*arguments)
    return found._replace(key=found.key.roll(1, dims=2))


def nan_forward(*arguments: Any) -> Any:
    out, lse = cpu.forward(*arguments)
    out[0, 0, 0, 0] = float("nan")
    return out, lse


def raising_forward(*arguments: Any) -> Any:
    raise RuntimeError("out of order")


def test_cpu_and_reference_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--shapes", SHAPE, "--backend", "cpu", "reference"]) == 0
    text = capsys.readouterr().out
    assert "FAILED" not in text
    for dtype in check.DTYPES:
        assert dtype in text


def test_every_problem_and_result_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    found = findings()
    assert all(x.passed for x in found)
    assert {x.problem for x in found} == {
        name for name, _ in check.problems(Shape.parse(SHAPE), "cpu")
    }
    assert {x.result for x in found} == set(check.RESULTS)


def test_a_wrong_output_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, forward=wrong_forward)
    failed = {x.result for x in findings() if not x.passed}
    assert {"output", "output without gradients"} <= failed


def test_a_wrong_gradient_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, backward=wrong_backward)
    assert {x.result for x in findings("bfloat16") if not x.passed} == {"key's"}


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, forward=nan_forward)
    assert not any(x.passed for x in findings() if x.result.startswith("output"))


def test_the_command_says_what_failed_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, forward=raising_forward)
    arguments = ["check", "--shapes", SHAPE, "--backend", "cpu", "broken", "--dtype", "float16"]
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert "FAILED broken on cpu, float16 (2, 6:3, 37:53, 24), plain: RuntimeError: out of" in text
    assert "FAILED cpu" not in text


def test_nothing_to_check_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CUDA backend can run here")
    assert cli.main(["check", "--backend", "cuda", "--shapes", SHAPE]) == 1
    assert "not cuda on cpu: query is on cpu" in capsys.readouterr().out


def test_error_is_infinite_where_nan_is_elsewhere() -> None:
    expected = torch.tensor([1.0, float("inf"), 3.0], dtype=torch.float64)
    assert accuracy.error(torch.tensor([1.0, float("inf"), 3.5]), expected) ** 2 == pytest.approx(
        0.125
    )
    assert accuracy.error(torch.tensor([1.0, 2.0, 3.0]), expected) == float("inf")
    assert accuracy.error(torch.tensor([1.0, float("nan"), 3.0]), expected) == float("inf")
    assert accuracy.largest_error(torch.tensor([float("nan")]), torch.ones(1).double()) == float(
        "inf"
    )


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "0,2,3,4", "1,3:2,4,8", "1,2,3:4:5,6", ""])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape must be B,H,L,D"):
        Shape.parse(text)


@pytest.mark.parametrize("text", ["(2, 8, 1024, 64)", "(1, 32:8, 1:4096, 128)"])
def test_shapes_are_read_as_they_are_written(text: str) -> None:
    assert str(Shape.parse(text)) == text
