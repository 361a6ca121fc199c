"""The registered operators, and the parts of PyTorch that must work on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import compiled_backward
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.backends import cpu
from attn_ext.operators import split_arguments
from attn_ext.problem import Problem

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask and sinks": {"attn_mask": torch.randn(1, 1, 5, 7), "sinks": torch.randn(4), "causal": True},
    "dropout": {"dropout_p": 0.3, "softcap": 2.0, "window": (2, 1)},
}  # fmt: skip


def tensors(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Everything public that has an operator under it."""
    if options.get("dropout_p"):
        options = {"seed": 5, **options}
    out, lse = attn_ext.attention(query, key, value, return_lse=True, **options)
    weights = attn_ext.attention_weights(query, key, lse=lse, **options)
    return out, lse, weights, *attn_ext.attention_and_weights(query, key, value, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("operator", ["attention", "attention_backward", "attention_weights", "attention_weights_backward"])  # fmt: skip
def test_opcheck(operator: str, name: str) -> None:
    options = {
        k: v.clone().requires_grad_() if isinstance(v, Tensor) else v
        for k, v in OPTIONS[name].items()
    }
    problem = Problem.build(*tensors(), **options)
    problem.seed = 7
    with torch.no_grad():
        out, lse = attn_ext.attention(*tensors(), return_lse=True)
    mask_gradient = problem.attn_mask is not None
    weights = torch.randn(2, 5, 7)
    between: tuple[Any, ...] = {
        "attention": (),
        "attention_backward": (
            out,
            lse,
            torch.randn_like(out),
            torch.randn_like(lse),
            mask_gradient,
        ),
        "attention_weights": (lse, True),
        "attention_weights_backward": (lse, weights, True, mask_gradient),
    }[operator]
    if "weights" in operator:
        problem = problem.replace(sinks=None)
    arguments, options_ = split_arguments(problem, None)
    overload = getattr(torch.ops.attn_ext, operator).default
    torch.library.opcheck(overload, (*arguments, *between, *options_))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_compile(name: str, dynamic: bool) -> None:
    inputs = tensors()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 5):
        expected, actual = function(*inputs, **OPTIONS[name]), compiled(*inputs, **OPTIONS[name])
        directions = [torch.randn_like(x) for x in expected]
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(
            torch.autograd.grad(actual, inputs, directions),
            torch.autograd.grad(expected, inputs, directions),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        assert length == inputs[0].shape[2]


def test_compile_with_inductor_and_a_drawn_seed() -> None:
    inputs = tensors()
    compiled = torch.compile(
        lambda q, k, v: attn_ext.attention(q, k, v, dropout_p=0.5, causal=True) * 2, fullgraph=True
    )
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    grads = torch.autograd.grad(first.sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_compiled_code_looks_at_use_backend_when_it_runs() -> None:
    compiled = torch.compile(attn_ext.attention, fullgraph=True, backend="aot_eager")
    inputs = tensors(grad=False)
    compiled(*inputs)
    with attn_ext.use_backend("reference"):
        assert torch.equal(compiled(*inputs), attn_ext.attention(*inputs))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return function(query, key, value, causal="lower_right")

    inputs = tuple(tensors(grad=False))
    program = torch.export.export(Model(), inputs, strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"attn_ext.attention.default", "attn_ext.attention_weights.default"} <= names
    torch.testing.assert_close(program.module()(*inputs), function(*inputs, causal="lower_right"))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's rule
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_many_gradients_at_once(name: str, backend: str) -> None:
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    inputs = tensors(torch.float64)
    if "sinks" in options:
        inputs += [options[key].requires_grad_() for key in ("attn_mask", "sinks")]
    with attn_ext.use_backend(backend):
        outputs = function(*inputs[:3], **options)
    many = [torch.randn(6, *out.shape, dtype=out.dtype) for out in outputs]
    arguments = {"retain_graph": True, "allow_unused": True}
    for outs, directions in ((outputs, many), (outputs[:1], many[:1]), (outputs[2:], many[2:])):
        actual = torch.autograd.grad(outs, inputs, directions, is_grads_batched=True, **arguments)
        single = torch.autograd.grad(outs, inputs, [x[0] for x in directions], **arguments)
        assert [grad is None for grad in actual] == [grad is None for grad in single]
        used = [x for x, grad in zip(inputs, actual, strict=True) if grad is not None]

        def gradients(*one: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outs, used, one, retain_graph=True)  # noqa: B023

        mapped = torch.vmap(gradients)(*directions)
        found = [grad for grad in actual if grad is not None]
        for index in range(6):
            expected = gradients(*(direction[index] for direction in directions))
            for ours, other, theirs in zip(found, mapped, expected, strict=True):
                torch.testing.assert_close(ours[index], theirs)
                torch.testing.assert_close(other[index], theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_derivatives_of_plain_calls() -> None:
    check = {"check_batched_grad": True, "check_undefined_grad": False}
    inputs = [x[:, :, :3].detach().requires_grad_() for x in tensors(torch.float64)]
    assert torch.autograd.gradcheck(attn_ext.attention, inputs, **check)
    assert torch.autograd.gradgradcheck(attn_ext.attention, inputs, **check)


@pytest.mark.parametrize("name", ["plain", "mask and sinks"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 0, 2)])
def test_vmap(name: str, in_dims: tuple[int | None, ...]) -> None:
    options = OPTIONS[name]
    inputs = []
    for tensor, dim in zip(tensors(grad=False), in_dims, strict=True):
        parts = [torch.randn_like(tensor) for _ in range(3)]
        inputs.append(tensor if dim is None else torch.stack(parts, dim))
    mapped = lambda *x: function(*x, **options)
    actual = torch.func.vmap(mapped, in_dims)(*inputs)
    for index in range(3):
        sample = [
            x if dim is None else x.select(dim, index)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        for ours, theirs in zip(actual, mapped(*sample), strict=True):
            torch.testing.assert_close(ours[index], theirs)


def test_vmap_over_everything_else() -> None:
    query, key, value = tensors(grad=False)
    sinks, masks = torch.randn(3, 4), torch.rand(3, 5, 7) < 0.7
    attend = lambda s, m: attn_ext.attention(query, key, value, sinks=s, attn_mask=m)
    actual = torch.func.vmap(attend)(sinks, masks)
    for index in range(3):
        torch.testing.assert_close(actual[index], attend(sinks[index], masks[index]))


def test_per_sample_gradients() -> None:
    query, key, value = (torch.randn(3, *x.shape) for x in tensors(grad=False))
    mask = torch.randn(5, 7)

    def loss(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return sum(x.square().sum() for x in function(q, k, v, attn_mask=m))  # type: ignore[return-value]

    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    actual = torch.func.vmap(gradient, (0, 0, 0, None))(query, key, value, mask)
    for index in range(3):
        expected = gradient(query[index], key[index], value[index], mask)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours[index], theirs)


def test_jvp_and_hessian() -> None:
    inputs = tensors(torch.float64, grad=False)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    with attn_ext.use_backend("reference"):
        _, expected = torch.func.jvp(function, tuple(inputs), tangents)
    _, actual = torch.func.jvp(function, tuple(inputs), tangents)
    torch.testing.assert_close(actual, expected)
    step = 1e-6
    ahead = function(*(x + step * t for x, t in zip(inputs, tangents, strict=True)))
    behind = function(*(x - step * t for x, t in zip(inputs, tangents, strict=True)))
    for tangent, a, b in zip(actual, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), atol=1e-6, rtol=1e-5)
    small = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    loss = lambda q: attn_ext.attention(q, small, small).square().sum()
    expected_hessian = torch.autograd.functional.hessian(loss, small)
    torch.testing.assert_close(torch.func.hessian(loss)(small), expected_hessian)


def test_dual_tensors() -> None:
    query, key, value = tensors(torch.float64, grad=False)
    tangent = torch.randn_like(query)
    with forward_ad.dual_level():
        out = attn_ext.attention(forward_ad.make_dual(query, tangent), key, value)
        actual = forward_ad.unpack_dual(out).tangent
    _, expected = torch.func.jvp(lambda q: attn_ext.attention(q, key, value), (query,), (tangent,))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The recomputed forward pass drops the same weights."""
    inputs = tensors()

    def attend(*x: Tensor) -> Tensor:
        return attn_ext.attention(*x, dropout_p=0.5)

    torch.manual_seed(1)
    expected = attend(*inputs)
    grads = torch.autograd.grad(expected.sum(), inputs)
    torch.manual_seed(1)
    actual = checkpoint(attend, *inputs, use_reentrant=reentrant)
    actual.sum().backward()
    assert torch.equal(actual, expected)
    for ours, theirs in zip(inputs, grads, strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs)


def test_saved_tensor_hooks_see_every_tensor() -> None:
    packed = []
    inputs = tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        out = attn_ext.attention(*inputs)
    assert {x.data_ptr() for x in inputs} <= {x.data_ptr() for x in packed}
    out.sum().backward()


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_nothing_of_length_by_length() -> None:
    length = 700
    query, key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    padding = torch.ones(1, length, dtype=torch.bool)
    options: dict[str, Any] = {"causal": True, "key_padding_mask": padding, "dropout_p": 0.1}
    with Sizes() as traced:
        attn_ext.attention(query, key, value, **options).sum().backward()
    assert 0 < traced.largest < length * length
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        out = attn_ext.attention(query, key, value, **options)
    out.sum().backward()
    assert max(kept) < length * length
    with Sizes() as traced:
        attn_ext.attention_weights(query, key)
    assert traced.largest == length * length


def test_compilers_drop_weights_that_nothing_uses() -> None:
    targets: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def output(*inputs: Tensor) -> Tensor:
        return attn_ext.attention_and_weights(*inputs)[0]

    inputs = tensors()
    out = torch.compile(output, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(*inputs)
    out.sum().backward()
    assert "attn_ext.attention.default" in targets
    assert "attn_ext.attention_backward.default" in targets
    assert not any("weights" in target for target in targets)


def test_an_operator_is_what_a_dispatch_mode_sees() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    inputs = tensors()
    with Names():
        attn_ext.attention(*inputs).sum().backward()
    assert "attn_ext.attention.default" in names
    assert "attn_ext.attention_backward.default" in names


@pytest.mark.parametrize("name", ["plain", "LSE and sinks", "weights", "both", "both, plain"])
def test_compiled_autograd_sees_operators(name: str) -> None:
    inputs = tensors()
    sinks = torch.zeros(4, requires_grad=True)

    def loss() -> Tensor:
        if name == "weights":
            return attn_ext.attention_weights(*inputs[:2]).square().sum()
        if name == "plain":
            return attn_ext.attention(*inputs).square().sum()
        if name.startswith("both"):
            backend = None if name == "both, plain" else "cpu"
            both = attn_ext.attention_and_weights(*inputs, average=True, backend=backend)
            return sum(x.square().sum() for x in both)  # type: ignore[return-value]
        out, lse = attn_ext.attention(*inputs, sinks=sinks, return_lse=True)
        return out.square().sum() + lse.sum()

    used = {"weights": inputs[:2], "LSE and sinks": [*inputs, sinks]}.get(name, inputs)
    expected = torch.autograd.grad(loss(), used)
    compiled_backward(loss())
    for tensor, grad in zip(used, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


# --- Plain calls, which go to the CPU's kernel by a shorter way


def outcomes_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Of each call of this function of the CPU's backend from now on: whether it did something."""
    seen: list[bool] = []
    original = getattr(cpu, name)

    def tried(*arguments: Any) -> Any:
        result = original(*arguments)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(cpu, name, tried)
    return seen


@pytest.fixture
def plain_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that was tried the shorter way: whether it could go it."""
    return outcomes_of(monkeypatch, "plain_forward")


@pytest.fixture
def plain_gradients(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The same of their gradients."""
    return outcomes_of(monkeypatch, "plain_backward")


needs_plain_calls = pytest.mark.skipif(
    not cpu.has_plain_forward, reason="this torch has no DLPack exchange API of C's"
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "(B, L, H, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows apart": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "offset": lambda x: torch.cat([x, x], 2)[:, :, x.shape[2] :],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def outcome(
    call: Callable[..., Tensor], inputs: list[Tensor], requires_grad: bool, **options: Any
) -> list[Tensor]:
    """The output, the gradients, the same with a graph, and one second derivative."""
    leaves = [x.detach().requires_grad_(requires_grad) for x in inputs]
    out = call(*leaves, **options)
    if not requires_grad:
        return [out]
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    (second,) = torch.autograd.grad(grads[0].square().sum(), leaves[1])
    return [out, *first, *grads, second]


@needs_plain_calls
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_plain_calls_give_what_checked_ones_do(
    dtype: torch.dtype,
    layout: str,
    causal: str | None,
    requires_grad: bool,
    plain_calls: list[bool],
    plain_gradients: list[bool],
) -> None:
    for shapes in (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)), ((2, 3, 40, 16),) * 3):
        inputs = [LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for shape in shapes]
        for scale in (None, 0.3):
            options = {"causal": causal, "scale": scale}
            actual = outcome(attn_ext.attention, inputs, requires_grad, **options)
            expected = outcome(attn_ext.attention, inputs, requires_grad, **options, backend="cpu")
            for one, other in zip(actual, expected, strict=True):
                assert torch.equal(one, other)
                assert one.stride() == other.stride()
    assert plain_calls == [True] * 4
    # Two a call: a second derivative has one.
    assert plain_gradients == [True] * (8 * requires_grad)


@needs_plain_calls
def test_sdpa_and_no_grad_are_plain_too(plain_calls: list[bool]) -> None:
    query, key, value = tensors()
    expected = attn_ext.attention(query, key, value, causal=True, backend="cpu")
    sdpa = attn_ext.scaled_dot_product_attention
    with torch.no_grad():
        out = sdpa(query, key, value, is_causal=True, enable_gqa=True)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    assert sdpa(query, key, value, is_causal=True, enable_gqa=True).requires_grad
    assert plain_calls == [True, True]
    with pytest.raises(ValueError, match="leading dimensions that broadcast"):
        sdpa(query, key, value)


def plain_masks(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the sizes (2, 4, 5, 7), by a name of what they are."""
    kind = {"bool": torch.bool, "float32": torch.float32, "same dtype": dtype}[name.split(", ")[0]]
    if dtype is torch.float64 and kind is torch.float32:
        kind = dtype  # the only one that it takes
    shapes = {
        "full": (2, 4, 5, 7), "batch": (2, 1, 5, 7), "heads": (4, 1, 7), "rows": (1, 1, 5, 1), "matrix": (5, 7),
        "columns": (7,), "one": (1, 1), "number": (), "padding": (2, 7), "both": (5, 7),
    }  # fmt: skip
    layout = name.split(", ")[1]

    def make(*shape: int) -> Tensor:
        return torch.rand(shape) < 0.7 if kind is torch.bool else torch.randn(shape, dtype=kind)

    if layout == "expanded":
        return {"attn_mask": make(1, 1, 5, 7).expand(2, 4, 5, 7)}
    if layout == "transposed":
        return {"attn_mask": make(7, 5).t(), "key_padding_mask": make(7, 2).t()}
    if layout == "apart":
        return {"attn_mask": make(5, 14)[:, ::2], "key_padding_mask": make(2, 14)[:, ::2]}
    names = {"padding": ["key_padding_mask"], "both": ["attn_mask", "key_padding_mask"]}
    sizes = {"attn_mask": shapes[layout], "key_padding_mask": (2, 7)}
    return {which: make(*sizes[which]) for which in names.get(layout, ["attn_mask"])}


MASK_LAYOUTS = ("full", "batch", "heads", "rows", "matrix", "columns", "one", "number", "padding", "both", "expanded",
                "transposed", "apart")  # fmt: skip


@needs_plain_calls
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@pytest.mark.parametrize("kind", ["bool", "float32", "same dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_plain_calls_with_masks(
    dtype: torch.dtype,
    kind: str,
    layout: str,
    requires_grad: bool,
    plain_calls: list[bool],
    plain_gradients: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = plain_masks(f"{kind}, {layout}", dtype)
    inputs = tensors(dtype, grad=False)
    for causal in (None, "upper_left"):
        options = {**masks, "causal": causal}
        actual = outcome(attn_ext.attention, inputs, requires_grad, **options)
        expected = outcome(attn_ext.attention, inputs, requires_grad, **options, backend="cpu")
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
        both = attn_ext.attention_and_weights(*inputs, average=True, **options)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "plain_forward_and_weights", lambda *_: None)
            others = attn_ext.attention_and_weights(*inputs, average=True, **options)
        assert all(torch.equal(one, other) for one, other in zip(both, others, strict=True))
    assert plain_calls == [True] * 2
    assert plain_gradients == [True] * (4 * requires_grad)


def not_plain_gradients(like: Tensor) -> dict[str, tuple[Tensor, bool]]:
    """Gradients of an output, and whether the shorter way is tried with them, in vain."""
    apart = torch.randn(*like.shape[:-1], 2 * like.shape[-1])
    return {
        "a number's": (torch.tensor(2.0).expand(like.shape), True),
        "columns apart": (apart[..., ::2], True),
        "a negative view": (torch.view_as_complex(apart.unflatten(-1, (-1, 2))).conj().imag, True),
        "a subclass": (apart[..., ::2].as_subclass(type("Subclass", (Tensor,), {})), False),
        "zeros without memory": (torch._efficientzerotensor(like.shape), True),
    }


@needs_plain_calls
@pytest.mark.parametrize("name", not_plain_gradients(torch.empty(1, 1, 1, 1)))
def test_gradients_of_an_output_that_are_not_plain(name: str, plain_gradients: list[bool]) -> None:
    inputs = tensors()
    out = attn_ext.attention(*inputs)
    dout, tried = not_plain_gradients(out)[name]
    actual = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    assert plain_gradients == [False] * tried
    expected = torch.autograd.grad(out, inputs, dout.as_subclass(Tensor) + torch.zeros(out.shape))
    assert plain_gradients.pop()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.as_subclass(Tensor), other)


def test_gradients_of_zeros_without_memory() -> None:
    """As forward-mode derivatives have them; of LSE and of weights too."""
    inputs = tensors()
    out, lse = attn_ext.attention(*inputs, return_lse=True)
    weights = attn_ext.attention_weights(*inputs[:2], lse=lse)
    for result in (out, lse, weights):
        zeros = torch._efficientzerotensor(result.shape)
        grads = torch.autograd.grad(result, inputs, zeros, retain_graph=True, allow_unused=True)
        assert all(grad is None or not grad.any() for grad in grads)
        assert grads[0] is not None


@needs_plain_calls
def test_plain_gradients_read_what_hooks_gave_back(plain_gradients: list[bool]) -> None:
    """Or leave it to the longer way, as here, where columns are no longer contiguous."""
    inputs = tensors()
    expected = torch.autograd.grad(attn_ext.attention(*inputs).square().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.transpose(-1, -2).contiguous(), lambda x: x.transpose(-1, -2)
    ):
        out = attn_ext.attention(*inputs)
    actual = torch.autograd.grad((out * out.detach()).sum() * 2, inputs)
    assert plain_gradients == [True, False]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["plain", "checked", "weights", "both", "both, checked"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16() if x.dim() == 3 else x,
        lambda x: x[:, :, :3],
        lambda x: x[..., :3] if x.dim() == 3 else x,
    ],
    ids=["float64", "LSE in bfloat16", "fewer rows", "LSE of fewer rows"],
)
def test_hooks_that_give_back_something_else(name: str, pack: Callable[[Tensor], Tensor]) -> None:
    """As float64, what a float32 output's gradient and LSE hold would be read beyond their ends."""
    inputs = tensors()
    lse = attn_ext.attention(*inputs, return_lse=True)[1].detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = {
            "plain": lambda: attn_ext.attention(*inputs),
            "checked": lambda: attn_ext.attention(*inputs, backend="cpu"),
            "weights": lambda: attn_ext.attention_weights(*inputs[:2], lse=lse),
            "both": lambda: attn_ext.attention_and_weights(*inputs, average=True)[1],
            "both, checked": lambda: attn_ext.attention_and_weights(*inputs, backend="cpu")[1],
        }[name]()
    with pytest.raises(ValueError, match="saved_tensors_hooks must give back what was saved"):
        torch.autograd.grad(out.square().sum(), inputs[0], retain_graph=True)
    with pytest.raises(ValueError, match="saved_tensors_hooks must give back what was saved"):
        torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)


@needs_plain_calls
def test_masks_of_sdpa_are_plain_too(plain_calls: list[bool]) -> None:
    query, key, value = tensors(grad=False)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    expected = attn_ext.attention(query, key, value, attn_mask=mask, backend="cpu")
    sdpa = attn_ext.scaled_dot_product_attention
    assert torch.equal(sdpa(query, key, value, mask, enable_gqa=True), expected)
    assert plain_calls == [True]


def masks_that_are_not_plain() -> dict[str, dict[str, Tensor]]:
    mask = torch.randn(5, 7)
    negative = torch.randn(5, 7, dtype=torch.complex64).conj().imag
    return {
        "a subclass": {"attn_mask": mask.as_subclass(type("Subclass", (Tensor,), {}))},
        "a parameter": {"attn_mask": torch.nn.Parameter(mask)},
        "a gradient": {"attn_mask": mask.clone().requires_grad_()},
        "a gradient of the padding": {"key_padding_mask": torch.randn(2, 7).requires_grad_()},
        "a negative view": {"attn_mask": negative},
    }


@pytest.mark.parametrize("name", masks_that_are_not_plain())
def test_masks_that_are_not_plain(name: str, plain_calls: list[bool]) -> None:
    masks = masks_that_are_not_plain()[name]
    inputs = tensors()
    actual = attn_ext.attention(*inputs, **masks)
    expected = attn_ext.attention(*inputs, **masks, backend="reference")
    torch.testing.assert_close(actual, expected)
    assert not any(plain_calls)
    leaves = [*inputs, *(mask for mask in masks.values() if mask.requires_grad)]
    for one, other in zip(
        torch.autograd.grad(actual.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": [[True] * 7] * 5},
        {"attn_mask": torch.zeros(5, 6)},
        {"attn_mask": torch.zeros(3, 1, 5, 7)},
        {"attn_mask": torch.zeros(1, 1, 1, 5, 7)},
        {"attn_mask": torch.zeros(5, 7).int()},
        {"attn_mask": torch.zeros(5, 7).double()},
        {"attn_mask": torch.zeros(5, 7).half()},
        {"attn_mask": torch.zeros(5, 0)},
        {"attn_mask": torch.zeros(5, 7).to_sparse()},
        {"attn_mask": torch.zeros(5, 7, device="meta")},
        {"key_padding_mask": torch.zeros(7)},
        {"key_padding_mask": torch.zeros(1, 7)},
        {"key_padding_mask": torch.zeros(2, 1)},
        {"key_padding_mask": torch.zeros(2, 1, 7)},
        {"key_padding_mask": torch.zeros(2, 7).long()},
        {"key_padding_mask": "none"},
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_plain_calls_leave_complaints_about_masks(
    masks: dict[str, Any], requires_grad: bool
) -> None:
    inputs = tensors(grad=requires_grad)
    with pytest.raises((TypeError, ValueError)) as expected:
        attn_ext.attention(*inputs, **masks, backend="cpu")
    with pytest.raises((TypeError, ValueError)) as actual:
        attn_ext.attention(*inputs, **masks)
    assert type(actual.value) is type(expected.value)
    assert str(actual.value) == str(expected.value)


@needs_plain_calls
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_plain_calls_with_weights(
    dtype: torch.dtype,
    layout: str,
    causal: str | None,
    average: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def outcomes(inputs: list[Tensor]) -> Iterator[Tensor]:
        yield from attn_ext.attention_and_weights(*inputs, average=average, causal=causal)
        leaves = [x.detach().requires_grad_() for x in inputs]
        both = attn_ext.attention_and_weights(*leaves, average=average, causal=causal)
        yield from both
        for results in (both, both[:1], both[1:]):
            loss = sum(x.square().sum() for x in results)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            yield from (grad for grad in grads if grad is not None)
            yield torch.autograd.grad(grads[0].square().sum(), leaves[1], retain_graph=True)[0]

    calls = outcomes_of(monkeypatch, "plain_forward_and_weights")
    for shapes in (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)), ((2, 3, 40, 16),) * 3):
        inputs = [LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for shape in shapes]
        actual = list(outcomes(inputs))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "plain_forward_and_weights", lambda *_: None)
            expected = list(outcomes(inputs))
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
    assert calls == [True] * 4
    none = torch.empty(1, 0, 3, 8)
    assert attn_ext.attention_and_weights(none, none, none, average=True)[1].isnan().all()


@pytest.mark.parametrize("name", [*OPTIONS, "no options"])
def test_output_and_weights_are_those_of_separate_calls(name: str) -> None:
    """Each alone and both together, with their gradients and second ones."""
    options = OPTIONS.get(name, {})
    if "dropout_p" in options:
        options = {**options, "seed": 5}
    inputs = tensors(torch.float64)
    named = {k: v.double().requires_grad_() for k, v in options.items() if isinstance(v, Tensor)}
    inputs += named.values()
    options = {**options, **named}
    if name != "no options":
        options["backend"] = "cpu"  # by the longer way

    def separate(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attn_ext.attention(*inputs, return_lse=True, **options)
        return out, attn_ext.attention_weights(*inputs[:2], lse=lse, **options)

    def results(call: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[Tensor | None]:
        both = call(*inputs[:3], **options)
        yield from both
        directions = [torch.ones_like(x).cumsum(-1) for x in both]
        for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
            arguments = (both[chosen], inputs, directions[chosen])
            yield from torch.autograd.grad(*arguments, retain_graph=True, allow_unused=True)
            grads = torch.autograd.grad(*arguments, create_graph=True, allow_unused=True)
            loss = sum(grad.square().sum() for grad in grads if grad is not None)
            yield from torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    actual, expected = results(attn_ext.attention_and_weights), results(separate)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if other is None:  # of the value, which weights don't know
            assert one is None or not one.any(), index
        else:
            torch.testing.assert_close(one, other, msg=lambda text, i=index: f"{i}: {text}")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_hooks_that_give_back_a_longer_value(backend: str | None, create_graph: bool) -> None:
    """The kernels would read as many keys."""
    inputs = tensors()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x[:, :, :1].expand(-1, -1, 900, -1) if x.shape[-1] == 6 and x.dim() == 4 else x,
        lambda x: x,
    ):
        both = attn_ext.attention_and_weights(*inputs, backend=backend)
    loss = both[0].sum() + both[1].square().sum()
    with pytest.raises(ValueError, match="saved_tensors_hooks must give back what was saved"):
        torch.autograd.grad(loss, inputs[0], create_graph=create_graph)


@pytest.mark.parametrize("options", [{}, {"backend": "cpu"}, {"dropout_p": 0.5}])
def test_weights_may_be_changed_in_place(options: dict[str, Any]) -> None:
    inputs = tensors()
    _, weights = attn_ext.attention_and_weights(*inputs, seed=1, **options)
    expected = torch.autograd.grad(weights.square().sum() * 4, inputs[0], retain_graph=True)
    actual = torch.autograd.grad(weights.mul_(2).square().sum(), inputs[0])
    torch.testing.assert_close(actual, expected)


def test_weights_have_a_gradient_of_sinks_alone() -> None:
    inputs = tensors(grad=False)
    sinks = torch.randn(4, requires_grad=True)
    grads = [
        torch.autograd.grad(
            attn_ext.attention_and_weights(*inputs, sinks=sinks, backend=backend)[1].norm(), sinks
        )[0]
        for backend in ("cpu", "reference")
    ]
    assert grads[0].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_weights_need_no_gradient_of_value_alone(backend: str | None) -> None:
    inputs = tensors(grad=False)
    inputs[2].requires_grad_()
    out, weights = attn_ext.attention_and_weights(*inputs, average=True, backend=backend)
    assert out.requires_grad
    assert not weights.requires_grad
    (actual,) = torch.autograd.grad(out.square().sum(), inputs[2])
    out = attn_ext.attention(*inputs)
    assert torch.equal(actual, torch.autograd.grad(out.square().sum(), inputs[2])[0])


def not_plain() -> dict[str, tuple[Tensor, ...]]:
    x = torch.randn(1, 2, 6, 8)
    negative = torch.randn(1, 2, 6, 8, dtype=torch.complex64).conj().imag
    return {
        "a subclass": (x.as_subclass(type("Subclass", (Tensor,), {})), x, x),
        "a parameter": (x, torch.nn.Parameter(x), x),
        "a negative view": (x, x, negative),
        "columns apart": (x, torch.randn(1, 2, 6, 16)[..., ::2], x),
    }


@pytest.mark.parametrize("name", not_plain())
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_that_are_not_plain(
    name: str, requires_grad: bool, plain_calls: list[bool]
) -> None:
    query, key, value = not_plain()[name]
    if requires_grad:
        value = value.clone().requires_grad_() if name != "a negative view" else value
        query = query.clone().requires_grad_()
    actual = attn_ext.attention(query, key, value)
    expected = attn_ext.attention(query, key, value, backend="reference")
    torch.testing.assert_close(actual, expected)
    assert not any(plain_calls)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: (q, k, None),
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k[..., :4], v),
        lambda q, k, v: (q, k, v[:, :, :3]),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (torch.cat([q, q[:, :1]], 1), k, v),
        lambda q, k, v: (q, k[:, :0], v[:, :0]),
        lambda q, k, v: (q.double(), k, v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q.detach() > 0, k.detach() > 0, v.detach() > 0),
        lambda q, k, v: (q[..., :0], k[..., :0], v),
        lambda q, k, v: (q, k, v.to_sparse()),
        lambda q, k, v: (q, k.to("meta"), v),
        lambda q, k, v: (torch.nested.as_nested_tensor([q[0], q[1]], layout=torch.jagged), k, v),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_plain_calls_leave_complaints_to_the_checks(
    wrong: Callable[..., tuple[Any, ...]], requires_grad: bool
) -> None:
    arguments = wrong(*tensors(grad=requires_grad))
    with pytest.raises((TypeError, ValueError)) as expected:
        attn_ext.attention(*arguments, backend="cpu")
    with pytest.raises((TypeError, ValueError)) as actual:
        attn_ext.attention(*arguments)
    assert type(actual.value) is type(expected.value)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("scale", ["1", True, float("nan"), float("inf")])
def test_plain_calls_leave_a_wrong_scale_to_the_checks(scale: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="scale must be"):
        attn_ext.attention(*tensors(), scale=scale)


@pytest.mark.parametrize("which", [0, 1, 2, "attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_tensors_without_memory(backend: str | None, which: int | str) -> None:
    options = {"attn_mask": torch.randn(1, 1, 5, 7), "key_padding_mask": torch.randn(2, 7)}
    shape = options[which].shape if isinstance(which, str) else tensors()[which].shape
    freed = torch.randn(shape)
    behind = torch.randn(64 + freed.numel())[64:].view(shape)  # whose address is not null
    for tensor in (freed, behind):
        tensor.untyped_storage().resize_(0)
    for without in (freed, behind, torch._efficientzerotensor(shape)):
        inputs = tensors(grad=False)
        if isinstance(which, str):
            options[which] = without
        else:
            inputs[which] = without
        with pytest.raises(ValueError, match="must have memory"):
            attn_ext.attention(*inputs, **options, backend=backend)


def test_flags_need_not_be_bool(plain_calls: list[bool]) -> None:
    query, key, value = tensors()
    expected = attn_ext.attention(query, key, value, causal=True)
    out = attn_ext.scaled_dot_product_attention(query, key, value, is_causal=1, enable_gqa="yes")  # type: ignore[arg-type]
    assert torch.equal(out, expected)
    with torch.no_grad():
        weights = attn_ext.attention_and_weights(query, key, value, average="yes")[1]  # type: ignore[arg-type]
    assert weights.dim() == 3
    assert all(plain_calls)


def test_a_whole_number_is_a_scale() -> None:
    inputs = tensors()
    expected = attn_ext.attention(*inputs, scale=2.0)
    assert torch.equal(attn_ext.attention(*inputs, scale=2), expected)


def test_states_of_pytorch_in_which_no_call_is_plain(plain_calls: list[bool]) -> None:
    query, key, value = tensors(grad=False)
    expected = attn_ext.attention(query, key, value, backend="cpu")

    def check(out: Tensor) -> None:
        torch.testing.assert_close(out.to(expected.dtype), expected, atol=0.02, rtol=0.02)

    with torch.autocast("cpu", torch.bfloat16):
        out = attn_ext.attention(query, key, value)
        assert out.dtype is torch.bfloat16
        check(out)
    with attn_ext.use_backend("reference"):
        check(attn_ext.attention(query, key, value))
    with Sizes():
        check(attn_ext.attention(query, key, value))
    with torch.device("cpu"):  # a function mode
        check(attn_ext.attention(query, key, value))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        assert forward_ad.unpack_dual(attn_ext.attention(dual, key, value)).tangent is not None
    check(torch.func.vmap(attn_ext.attention)(query[None], key[None], value[None])[0])
    check(torch.compile(attn_ext.attention, backend="aot_eager")(query, key, value))
    assert plain_calls == []
    with attn_ext.use_backend("cpu"):
        check(attn_ext.attention(query, key, value))
    assert plain_calls == [True] * cpu.has_plain_forward


def test_calls_without_the_exchange_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.9, or a later version of the interface."""
    assert not cpu._cpu.set_plain(None, None, None)
    inputs = tensors()
    expected = attn_ext.attention(*inputs)
    monkeypatch.setattr(cpu, "has_plain_forward", False)
    assert torch.equal(attn_ext.attention(*inputs), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    inputs, others = tensors(grad=False), tensors(grad=False)
    traced = torch.jit.trace(lambda *x: attn_ext.attention(*x, causal=True), inputs)
    expected = attn_ext.attention(*others, causal=True)
    torch.testing.assert_close(traced(*others), expected)
