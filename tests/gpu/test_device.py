"""Streams, CUDA graphs and several devices. Needs a GPU: `make gpu` runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES, DEVICE_BACKENDS, make_inputs
from test_contract import assert_contract
from torch import Tensor

import attn_ext
from attn_ext import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SLEEP_CYCLES = 1_000_000_000
"""Half a second and more on any GPU: no call may take as long."""


@pytest.fixture(params=DEVICE_BACKENDS)
def device_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend for GPUs; nothing is left on the device from one test to the next."""
    yield request.param
    torch.cuda.synchronize()


def leaves(
    device: str = "cuda", dtype: torch.dtype = torch.float16, length: int = 190
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, the same ones for each call."""
    generator = torch.Generator().manual_seed(8)
    made = torch.randn(3, 2, 3, length, 64, generator=generator).to(device, dtype)
    query, key, value = (x.contiguous().requires_grad_() for x in made)
    return query, key, value


def run(query: Tensor, key: Tensor, value: Tensor, **options: object) -> list[Tensor]:
    """Output, LSE and all gradients."""
    out, lse = attn_ext.attention(query, key, value, return_lse=True, **options)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    grads = torch.autograd.grad((out, lse), (query, key, value), (dout, dlse))
    return [out.detach(), lse.detach(), *grads]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["plain", "everything", "bool_mask", "padding"])
def test_without_a_default_device(name: str, device_backend: str) -> None:
    """The contract suite sets one, which would hide a tensor that is made on the wrong device."""
    (case,) = [case for case in CASES if case.name == name]
    inputs = make_inputs(case, torch.float16)
    for field in ("query", "key", "value"):
        setattr(inputs, field, getattr(inputs, field).detach().cuda().requires_grad_())
    inputs.options = {
        key: x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for key, x in inputs.options.items()
    }
    assert_contract(inputs, torch.float16, device_backend, average=False)


def test_a_gpu_is_chosen_by_itself() -> None:
    explanation = attn_ext.explain(*leaves())
    assert explanation.backend in DEVICE_BACKENDS, str(explanation)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_dropout_drops_what_it_drops_on_cpus(dropout_p: float, device_backend: str) -> None:
    query, key, _ = leaves(dtype=torch.float32)
    settings = {"dropout_p": dropout_p, "seed": 2**63 + 5, "offset": 3, "average": False}
    ours = attn_ext.attention_weights(query, key, backend=device_backend, **settings)
    theirs = attn_ext.attention_weights(query.cpu(), key.cpu(), backend="cpu", **settings)
    assert torch.equal((ours != 0).cpu(), theirs != 0)


def test_work_is_enqueued_on_the_current_stream(device_backend: str) -> None:
    """Inputs become right late, on a stream of their own: whoever reads earlier reads NaN."""
    expected = run(*leaves(), backend=device_backend)
    right, late = leaves(), leaves()
    with torch.no_grad():
        for x in late:
            x.fill_(float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES // 10)
        with torch.no_grad():
            for x, y in zip(late, right, strict=True):
                x.copy_(y)
        actual = run(*late, backend=device_backend)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 4}, {"causal": True}])
def test_nothing_waits_for_the_device(options: dict[str, object], device_backend: str) -> None:
    inputs, busy = leaves(), torch.cuda.Event()
    run(*inputs, backend=device_backend, **options)  # what is compiled at first use, is now
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    busy.record()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(*inputs, backend=device_backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not busy.query(), "the call came back only when the device had nothing left to do"


@pytest.mark.parametrize(
    "options", [{}, {"causal": "lower_right", "dropout_p": 0.3, "seed": 4}, {"softcap": 3.0}]
)
def test_both_passes_in_a_cuda_graph(options: dict[str, object], device_backend: str) -> None:
    """Capture fails at whatever waits for the device or allocates its memory behind torch's back."""
    static = leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*static, backend=device_backend, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static, backend=device_backend, **options)
    for factor in (1.0, -0.5):
        fresh = [(factor * x.detach()).requires_grad_() for x in leaves()]
        with torch.no_grad():
            for x, y in zip(static, fresh, strict=True):
                x.copy_(y)
        graph.replay()
        assert_same(captured, run(*fresh, backend=device_backend, **options))


def test_inference_in_a_cuda_graph(device_backend: str) -> None:
    static = [x.detach() for x in leaves()]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = attn_ext.attention(*static, backend=device_backend)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = attn_ext.attention(*static, backend=device_backend)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_choose_the_device(device_backend: str) -> None:
    """Not the current one, which stays what it was."""
    inputs = leaves("cuda:1")
    if dispatch.load(device_backend).not_supported_reasons(attn_ext.problem.Problem.build(*inputs)):
        pytest.skip("the second GPU is of another kind")
    with torch.cuda.device(0):
        results = run(*inputs, backend=device_backend)
        assert torch.cuda.current_device() == 0
    assert {x.device for x in results} == {torch.device("cuda:1")}
    expected = run(*(x.detach().double().requires_grad_() for x in inputs), backend="reference")
    for ours, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_two_devices_are_refused() -> None:
    query, key, value = leaves("cuda:0")
    with pytest.raises(ValueError, match=r"key must be on query's device cuda:0, got cuda:1"):
        attn_ext.attention(query, key.detach().to("cuda:1"), value)
