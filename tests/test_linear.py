"""linear beside torch.nn.functional.linear: results, derivatives, and where it stands back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from attn_ext import linear as implementation
from attn_ext.backends import cpu

linear = implementation.linear
M, K, N = 260, 190, 130  # large enough for the operator with one thread

needs_operator = pytest.mark.skipif(
    not implementation._has_fast_operator, reason="F.linear is as fast as the operator here"
)

needs_kernel = pytest.mark.skipif(
    not implementation.has_fast_kernel, reason="F.linear is as fast as our own kernel here"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the fast operator computes, in order; it takes products of any size."""
    seen: list[tuple[int, ...]] = []
    original = implementation._product

    def product(*arguments: Any) -> Tensor:
        out = original(*arguments)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(implementation, "_product", product)
    monkeypatch.setattr(implementation, "_SMALLEST_PRODUCT", 0)
    monkeypatch.setitem(implementation._FEW_ROWS, implementation._vendor, [(range(4, 17), 0)])
    monkeypatch.setattr(implementation, "_SMALLEST_WEIGHT_GRADIENT", 0)
    monkeypatch.setattr(implementation, "_fewest_features", 16)
    return seen


def operands(*leading: int, bias: bool = True) -> list[Tensor | None]:
    tensors = [torch.randn(*leading, K), torch.randn(N, K), torch.randn(N) if bias else None]
    return [None if x is None else x.requires_grad_() for x in tensors]


def results(
    function: Callable[..., Tensor], arguments: list[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """The output and the gradients of everything that has one, computed in a dtype."""
    copies = [
        None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)
        for x in arguments
    ]
    out = function(*copies)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = [x for x in copies if x is not None and x.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, factors)]


def rms(difference: Tensor) -> float:
    return difference.detach().double().square().mean().sqrt().item()


def assert_as_exact(arguments: list[Tensor | None]) -> None:
    """Our error against float64 is at most twice that of F.linear, and one rounding."""
    truth = results(F.linear, arguments, torch.float64)
    theirs = results(F.linear, arguments, torch.float32)
    ours = results(linear, arguments, torch.float32)
    for expected, other, actual in zip(truth, theirs, ours, strict=True):
        assert actual.shape == other.shape
        assert actual.dtype == other.dtype
        rounding = torch.finfo(torch.float32).eps * rms(expected)
        assert rms(actual - expected) <= 2 * rms(other - expected) + rounding


@needs_operator
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(M,), (2, M), (2, 3, M // 5)])
def test_results_and_gradients(
    leading: tuple[int, ...], bias: bool, calls: list[tuple[int, ...]]
) -> None:
    assert_as_exact(operands(*leading, bias=bias))
    assert calls == [(*leading, N), (*leading, K), (N, K)]


@needs_operator
def test_gradients_of_small_weights_are_left_to_pytorch(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_fewest_features", min(N, K) + 1)
    assert_as_exact(operands(M))
    assert calls == [(M, N), (M, K)]


@needs_operator
@pytest.mark.parametrize("size", [(3, 4096, 64), (4096, 65, 33), (1, 2048, 1030)])
def test_long_sums(size: tuple[int, int, int], calls: list[tuple[int, ...]]) -> None:
    rows, inner, columns = size
    tensors = [torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)]
    assert_as_exact([x.requires_grad_() for x in tensors])
    assert calls


@needs_operator
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_no_gradient_that_is_not_wanted(
    wanted: tuple[int, ...], calls: list[tuple[int, ...]]
) -> None:
    arguments = operands(M)
    for index, x in enumerate(arguments):
        assert x is not None
        x.requires_grad_(index in wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(*arguments)  # type: ignore[arg-type]
    assert len(kept) == (0 in wanted) + (1 in wanted)
    assert_as_exact(arguments)
    assert len(calls) == 2 + (0 in wanted) + (1 in wanted)


def strided(make: str, *shape: int) -> Tensor:
    if make == "transposed":
        return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))
    if make == "every second":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if make == "rows apart":
        return torch.randn(*shape[:-1], shape[-1] + 5)[..., 2:-3]
    if make == "negated":
        return torch.randn(*shape, dtype=torch.complex64).conj().imag
    return torch.randn(shape[-1]).expand(*shape)


@needs_operator
@pytest.mark.parametrize(
    "make", ["transposed", "every second", "rows apart", "expanded", "negated"]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_strides(which: int, make: str, calls: list[tuple[int, ...]]) -> None:
    shapes = [(3, 70, K), (N, K), (N,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[which] = strided(make, *shapes[which])
    expected = F.linear(*tensors)
    torch.testing.assert_close(linear(*tensors), expected, atol=1e-4, rtol=1e-5)
    leaf = tensors[which].detach().requires_grad_()
    tensors[which] = leaf
    other = [x.clone().requires_grad_() for x in tensors]
    actual = torch.autograd.grad(linear(*tensors).sum(), leaf)[0]  # an expanded gradient
    wanted = torch.autograd.grad(F.linear(*other).sum(), other[which])[0]
    torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=1e-5)
    assert len(calls) == 3 - (which == 2)


@pytest.mark.parametrize("sizes", [(0, K, N), (M, 0, N), (M, K, 0), (0, 0, 0)])
def test_nothing_to_compute(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    arguments = [torch.randn(2, rows, inner), torch.randn(columns, inner), torch.randn(columns)]
    for x in arguments:
        x.requires_grad_()
    theirs = results(F.linear, arguments, torch.float32)
    for actual, expected in zip(results(linear, arguments, torch.float32), theirs, strict=True):
        assert torch.equal(actual, expected)


@needs_operator
def test_tiny_products_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_product", None)
    linear(torch.randn(16, 64), torch.randn(64, 64))


# --- Few rows, which our own kernel computes


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of our own kernel has."""
    seen: list[int] = []
    original = cpu.linear

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(input.numel() // weight.shape[1])
        return original(input, weight, bias)

    monkeypatch.setattr(cpu, "linear", kernel)
    return seen


@needs_kernel
@pytest.mark.parametrize(
    "capability", [name for name, there in cpu.capabilities().items() if there]
)
@pytest.mark.parametrize("columns", [67, 96])
@pytest.mark.parametrize("leading", [(4,), (5,), (3, 5), (2, 2, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows(
    leading: tuple[int, ...],
    columns: int,
    bias: bool,
    capability: str,
    calls: list[tuple[int, ...]],
    few_rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "capability", capability)
    arguments: list[Tensor | None] = [
        torch.randn(*leading, 176),
        torch.randn(columns, 176),
        torch.randn(columns) if bias else None,
    ]
    truth = F.linear(*(None if x is None else x.double() for x in arguments))  # type: ignore[arg-type]
    theirs, ours = F.linear(*arguments), linear(*arguments)  # type: ignore[arg-type]
    assert few_rows == [math.prod(leading)]
    assert ours.shape == theirs.shape
    assert rms(ours - truth) <= 2 * rms(theirs - truth)
    assert_as_exact([None if x is None else x.requires_grad_() for x in arguments])
    if implementation._has_fast_operator:  # with gradients, only large products are ours
        assert len(few_rows) > 1


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [5, 16, 33, 64])
def test_few_rows_on_several_threads(
    few_rows: list[int], rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(implementation._FEW_ROWS, implementation._vendor, [(range(4, 65), 0)])
    x, weight = torch.randn(rows, 1024), torch.randn(1615, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert few_rows == [rows]
    torch.testing.assert_close(actual, F.linear(x, weight), atol=1e-3, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("rows", [6, 13])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_values_stay_in_their_row_and_column(
    which: int, rows: int, calls: list[tuple[int, ...]], few_rows: list[int]
) -> None:
    operands = [torch.randn(rows, 32), torch.randn(21, 32)]
    operands[which][3, 5], operands[which][1, 0] = float("nan"), float("inf")
    expected = F.linear(*operands)
    torch.testing.assert_close(linear(*operands), expected, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert few_rows == [rows]


@needs_operator
@pytest.mark.parametrize(
    "make", ["transposed", "every second", "rows apart", "expanded", "negated"]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_strides_of_few_rows(which: int, make: str, calls: list[tuple[int, ...]]) -> None:
    shapes = [(2, 7, 48), (37, 48), (37,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[which] = strided(make, *shapes[which])
    torch.testing.assert_close(linear(*tensors), F.linear(*tensors), atol=1e-4, rtol=1e-5)
    assert calls == [(2, 7, 37)]


@needs_kernel
def test_what_is_not_for_few_rows(monkeypatch: pytest.MonkeyPatch, few_rows: list[int]) -> None:
    weight, odd = torch.randn(1024, 1024), torch.randn(1024, 1023)
    linear(torch.randn(3, 1024), weight)
    linear(torch.randn(17, 512), torch.randn(512, 512))
    linear(torch.randn(65, 1024), weight)
    linear(torch.randn(16, 1023), odd)
    linear(torch.randn(4, 64), torch.randn(64, 64))
    assert few_rows == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1024)
    linear(torch.randn(16, 1024, requires_grad=True), weight)  # too small for our derivative
    assert few_rows == []
    linear(torch.randn(16, 1024), weight)
    assert few_rows == [16]


@needs_operator
def test_second_derivatives(calls: list[tuple[int, ...]]) -> None:
    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(5)
        arguments = [x.to(dtype) for x in (torch.randn(M, K), torch.randn(N, K), torch.randn(N))]
        for x in arguments:
            x.requires_grad_()
        out = function(*arguments)
        first = torch.autograd.grad(out.square().mean(), arguments, create_graph=True)
        loss = sum((grad.sin() * torch.arange(grad.numel()).view_as(grad)).mean() for grad in first)
        return [*first, *torch.autograd.grad(loss, arguments)]  # type: ignore[arg-type]

    truth, theirs = second(F.linear, torch.float64), second(F.linear, torch.float32)
    for expected, other, actual in zip(truth, theirs, second(linear, torch.float32), strict=True):
        rounding = torch.finfo(torch.float32).eps * rms(expected)
        assert rms(actual - expected) <= 2 * rms(other - expected) + rounding
    assert calls[0] == (M, N)


@needs_operator
def test_batched_gradients(calls: list[tuple[int, ...]]) -> None:
    arguments = operands(M)
    factors = torch.randn(3, M, N)
    actual, expected = (
        torch.autograd.grad(function(*arguments), arguments, factors, is_grads_batched=True)
        for function in (linear, F.linear)
    )
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


# --- Where F.linear takes over


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def plain(x: Tensor) -> Tensor:
    return x


REASONS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager], Callable]] = {
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), plain),
    "oneDNN disabled": (lambda: torch.backends.mkldnn.flags(enabled=False), plain),
    "oneDNN deterministic": (
        lambda: torch.backends.mkldnn.flags(enabled=True, deterministic=True),
        plain,
    ),
    "lower precision": (
        lambda: torch.backends.mkldnn.flags(enabled=True, fp32_precision="bf16"),
        plain,
    ),
    "float64": (contextlib.nullcontext, lambda x: x.double()),
    "bfloat16": (contextlib.nullcontext, lambda x: x.bfloat16()),
    "meta": (contextlib.nullcontext, lambda x: x.to("meta")),
    "a subclass": (contextlib.nullcontext, lambda x: x.as_subclass(Subclass)),
    "forward mode": (forward_ad.dual_level, plain),
    "a function mode": (lambda: torch.device("cpu"), plain),
    "a dispatch mode": (Operators, plain),
    "one dimension": (contextlib.nullcontext, lambda x: x[0] if len(x) in (M, 8) else x),
}


@pytest.mark.parametrize("rows", [M, 8])
@pytest.mark.parametrize("reason", REASONS)
def test_identical_where_it_stands_back(
    reason: str, rows: int, calls: list[tuple[int, ...]]
) -> None:
    context, change = REASONS[reason]
    arguments = [change(x) for x in (torch.randn(rows, 192), torch.randn(N, 192), torch.randn(N))]
    with context():
        actual, expected = linear(*arguments), F.linear(*arguments)
    assert type(actual) is type(expected)
    assert actual.dtype is expected.dtype
    assert actual.is_meta or torch.equal(actual, expected)
    assert calls == []


def test_without_the_operator(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not implementation._finds_fast_operator()
    monkeypatch.setattr(implementation, "_has_fast_operator", False)
    arguments = operands(M)
    assert torch.equal(linear(*arguments), F.linear(*arguments))  # type: ignore[arg-type]
    assert calls == []


@needs_operator
def test_deterministic_algorithms(calls: list[tuple[int, ...]]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        linear(*operands(M))  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == []


@needs_operator
def test_backward_under_other_settings_than_forward(calls: list[tuple[int, ...]]) -> None:
    arguments = operands(M)
    out = linear(*arguments)  # type: ignore[arg-type]
    with torch.backends.mkldnn.flags(enabled=False):
        actual = torch.autograd.grad(out.sum(), arguments)
    assert calls == [(M, N)]
    expected = torch.autograd.grad(F.linear(*arguments).sum(), arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_functional_transforms(calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = torch.randn(3, M, K), torch.randn(N, K), torch.randn(N)
    for transform in (
        lambda function: torch.func.vmap(function, (0, None, None)),
        lambda function: torch.func.grad(lambda *a: function(*a).sum(), argnums=(0, 1, 2)),
        lambda function: lambda *a: torch.func.jvp(function, a, a),
    ):
        torch.testing.assert_close(transform(linear)(x, weight, bias), transform(F.linear)(x, weight, bias))  # fmt: skip
    assert calls == []


def test_forward_mode(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(M, K), torch.randn(N, K)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight)).tangent
    torch.testing.assert_close(tangent, F.linear(x, weight))


def test_compile_and_export(calls: list[tuple[int, ...]]) -> None:
    arguments = operands(M)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), F.linear(*arguments))  # type: ignore[arg-type]

    class Wrapped(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight)

    x, weight = torch.randn(M, K), torch.randn(N, K)
    for strict in (False, True):
        program = torch.export.export(Wrapped(), (x, weight), strict=strict)
        assert "mkldnn" not in str(program.graph)
        torch.testing.assert_close(program.module()(x, weight), F.linear(x, weight))
    assert calls == []


ERRORS: dict[str, tuple[Any, ...]] = {
    "widths differ": (torch.zeros(M, K), torch.zeros(N, K + 1)),
    "bias too long": (torch.zeros(M, K), torch.zeros(N, K), torch.zeros(N + 1)),
    "3-D weight": (torch.zeros(M, K), torch.zeros(2, N, K)),
    "0-D weight": (torch.zeros(M, K), torch.zeros(())),
    "0-D input": (torch.zeros(()), torch.zeros(N, K)),
    "dtypes differ": (torch.zeros(M, K), torch.zeros(N, K).double()),
    "bias of another dtype": (torch.zeros(M, K), torch.zeros(N, K), torch.zeros(N).double()),
    "no tensor": ([1.0], torch.zeros(N, K)),
    "no weight": (torch.zeros(M, K), None),
    "bias no tensor": (torch.zeros(M, K), torch.zeros(N, K), 1.0),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_originals(name: str, calls: list[tuple[int, ...]]) -> None:
    with pytest.raises(Exception) as theirs:
        F.linear(*ERRORS[name])
    with pytest.raises(theirs.type) as ours:
        linear(*ERRORS[name])
    assert str(ours.value) == str(theirs.value)
    assert calls == []


def test_a_bias_that_broadcasts(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(M, K), torch.randn(N, K)
    for bias in (torch.randn(1), torch.randn(M, N), torch.randn(M, 1)):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert calls == []
