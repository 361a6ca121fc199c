"""Which backend runs, who says so, and that nothing falls back in silence."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import attn_ext
from attn_ext import dispatch
from attn_ext.backends import cpu
from attn_ext.problem import Problem


def problem() -> Problem:
    return Problem.build(*(torch.zeros(1, 2, 3, 4) for _ in range(3)))


def chosen() -> str:
    return dispatch.select(problem()).__name__.rsplit(".", 1)[1]


def test_the_kernel_is_preferred() -> None:
    assert chosen() == "cpu"


def test_use_backend_nests_and_ends() -> None:
    with attn_ext.use_backend("reference"):
        assert chosen() == "reference"
        with attn_ext.use_backend(None):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_use_backend_belongs_to_its_thread() -> None:
    seen = []
    with attn_ext.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_use_backend_belongs_to_its_task() -> None:
    async def task(name: str) -> str:
        with attn_ext.use_backend(name):
            await asyncio.sleep(0.01)
            return chosen()

    async def both() -> list[str]:
        return await asyncio.gather(task("reference"), task("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"]


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"), attn_ext.use_backend("gpu"):
        pass


def test_a_requested_backend_never_falls_back() -> None:
    tensors = [torch.zeros(1, 2, 3, 4, device="meta") for _ in range(3)]
    with pytest.raises(NotImplementedError, match="backend 'cpu' can't run this: query is on meta"):
        attn_ext.attention(*tensors, backend="cpu")
    with attn_ext.use_backend("cpu"), pytest.raises(NotImplementedError, match="meta"):
        attn_ext.attention(*tensors)


def test_falling_back_to_the_reference_is_said() -> None:
    tensors = [torch.zeros(1, 2, 3, 4, device="meta") for _ in range(3)]
    with pytest.warns(attn_ext.ReferenceFallbackWarning, match="no attn_ext kernel .* on meta"):
        attn_ext.attention(*tensors)


def test_a_module_that_was_not_built_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_import_error", "No module named _cpu", raising=False)
    (reason,) = cpu.not_supported_reasons(problem())
    assert "attn_ext._cpu is not built (No module named _cpu)" in reason


def test_explain() -> None:
    tensors = [torch.zeros(1, 2, 3, 4) for _ in range(3)]
    explanation = attn_ext.explain(*tensors, causal=True, dropout_p=0.1, seed=3)
    assert explanation.backend == "cpu"
    assert list(explanation.reasons) == ["cuda", "triton", "reference"]
    assert "query is on cpu, and this backend takes CUDA tensors" in explanation.reasons["cuda"]
    assert explanation.reasons["reference"] == ["'cpu' is preferred"]
    assert str(explanation).startswith("cpu would run\n  not cuda: ")
    assert str(explanation).endswith("\n  not reference: 'cpu' is preferred")
    explanation = attn_ext.explain(*(x.to("meta") for x in tensors), backend="cpu")
    assert explanation.backend is None
    assert "query is on meta" in explanation.reasons["cpu"][0]
    assert str(explanation).startswith("nothing would run")
    with pytest.raises(ValueError, match="causal must be"):
        attn_ext.explain(*tensors, causal="x")
