"""MultiheadAttention beside torch.nn.MultiheadAttention: results, gradients, errors, and everything around."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import compiled_backward
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ext
from attn_ext import MultiheadAttention, multihead, multihead_forward
from attn_ext.backends import cpu

N, L, S, E, H = 3, 5, 7, 12, 4
INF = float("-inf")


def pair(seed: int = 0, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """The stock module and ours, drawn under the same seed, with biases that are not zero."""
    modules = []
    for make in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(seed)
        module = make(**{"embed_dim": E, "num_heads": H, **options})
        with torch.no_grad():
            for parameter in (module.in_proj_bias, module.out_proj.bias):
                if parameter is not None:
                    parameter.normal_()
        modules.append(module)
    return modules[0], modules[1]  # type: ignore[return-value]


def masks(kind: str) -> dict[str, Tensor]:
    """attn_mask and key_padding_mask by name; True and -inf are ignored, and no row is left without keys."""
    attn = torch.rand(L, S) < 0.4
    attn[:, 0] = False
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:] = padding[1, 6:] = True
    heads = (torch.rand(N * H, L, S) < 0.4).index_fill(2, torch.tensor([0]), False)
    table = {
        "none": {},
        "bool": {"attn_mask": attn},
        "float": {"attn_mask": torch.randn(L, S).masked_fill(attn, INF)},
        "bool heads": {"attn_mask": heads},
        "float heads": {"attn_mask": torch.randn(N * H, L, S)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(N, S).masked_fill(padding, INF)},
        "both bool": {"attn_mask": attn, "key_padding_mask": padding},
        "both float": {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.randn(N, S)},
        "float heads, padding": {
            "attn_mask": torch.randn(N * H, L, S),
            "key_padding_mask": padding,
        },
    }
    return table[kind]


MASKS = ("none", "bool", "float", "bool heads", "float heads", "padding", "float padding", "both bool", "both float", "float heads, padding")  # fmt: skip


def inputs(
    module: nn.MultiheadAttention, which: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    def make(length: int, width: int) -> Tensor:
        shape = (N, length, width) if module.batch_first else (length, N, width)
        return torch.randn(shape, dtype=dtype).requires_grad_()

    if which == "self":
        x = make(S, E)
        return [x, x, x]
    query, key = make(L, E), make(S, module.kdim)
    return [query, key, key] if which == "key is value" else [query, key, make(S, module.vdim)]


def results(
    module: nn.MultiheadAttention, tensors: list[Tensor], **options: Any
) -> dict[str, Tensor]:
    out, weights = module(*tensors, **options)
    generator = torch.Generator().manual_seed(4)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    found = {"out": out}
    if weights is not None:
        found["weights"] = weights
        loss = (
            loss + (weights * torch.randn(weights.shape, generator=generator).to(out.dtype)).sum()
        )
    leaves = {
        f"input {i}": x for i, x in enumerate(tensors) if all(x is not y for y in tensors[:i])
    }
    leaves.update(module.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found.update(
        {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    )
    return {name: x.detach() for name, x in found.items()}


def rms(difference: Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


def assert_like_stock(
    stock: nn.MultiheadAttention, ours: nn.MultiheadAttention, tensors: list[Tensor], **options: Any
) -> None:
    """Our error against the stock module in float64 is at most twice that of the stock module.

    On top come four roundings of the result: one for each product on a gradient's way through the module.
    """
    wide = copy.deepcopy(stock).double()
    wide_tensors: list[Tensor] = []
    for index, x in enumerate(tensors):
        same = next((j for j in range(index) if tensors[j] is x), None)
        wide_tensors.append(
            x.detach().double().requires_grad_() if same is None else wide_tensors[same]
        )
    wide_options = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    truth = results(wide, wide_tensors, **wide_options)
    theirs, actual = results(stock, tensors, **options), results(ours, tensors, **options)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].dtype == theirs[name].dtype, name
        assert actual[name].shape == theirs[name].shape, name
        rounding = 4 * torch.finfo(theirs[name].dtype).eps * max(rms(expected), 1e-2)
        assert rms(actual[name] - expected) <= 2 * rms(theirs[name] - expected) + rounding, name


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks(kind: str, batch_first: bool, need_weights: bool) -> None:
    stock, ours = pair(batch_first=batch_first)
    assert_like_stock(stock, ours, inputs(stock, "cross"), need_weights=need_weights, **masks(kind))


CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 6, "vdim": 10},
    "kdim, no bias": {"kdim": 6, "bias": False},
    "one head": {"num_heads": 1},
    "every option": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}  # fmt: skip


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["none", "both bool", "both float"])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name: str, kind: str, average: bool) -> None:
    stock, ours = pair(**CONSTRUCTORS[name])
    options = masks(kind)
    assert_like_stock(stock, ours, inputs(stock, "cross"), average_attn_weights=average, **options)


@pytest.mark.parametrize("which", ["self", "key is value", "cross"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_identities_of_the_inputs(which: str, batch_first: bool) -> None:
    stock, ours = pair(batch_first=batch_first)
    assert_like_stock(stock, ours, inputs(stock, which))
    assert_like_stock(stock.eval(), ours.eval(), inputs(stock, which), need_weights=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_dtypes(dtype: torch.dtype, need_weights: bool) -> None:
    stock, ours = pair(dtype=dtype)
    tensors = inputs(stock, "cross", dtype)
    if dtype is torch.float64:
        torch.testing.assert_close(results(ours, tensors), results(stock, tensors))
    else:
        assert_like_stock(stock, ours, tensors, need_weights=need_weights)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_float32_masks_beside_float64(name: str) -> None:
    stock, ours = pair(dtype=torch.float64)
    tensors = inputs(stock, "cross", torch.float64)
    options = {name: torch.randn((L, S) if name == "attn_mask" else (N, S)), "need_weights": False}
    torch.testing.assert_close(
        results(ours, tensors, **options), results(stock, tensors, **options)
    )


@pytest.mark.parametrize("kind", ["none", "bool", "float", "heads"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind: str, padded: bool, batch_first: bool) -> None:
    stock, ours = pair(batch_first=batch_first)
    tensors = [
        torch.randn(L, E).requires_grad_(),
        *(torch.randn(S, E).requires_grad_() for _ in range(2)),
    ]
    options = masks({"heads": "none"}.get(kind, kind))
    if kind == "heads":
        options["attn_mask"] = torch.randn(H, L, S)
    if padded:
        padding = torch.arange(S) > 4
        options["key_padding_mask"] = (
            padding if kind == "bool" else torch.zeros(S).masked_fill(padding, INF)
        )
    assert_like_stock(stock, ours, tensors, **options)


@pytest.mark.parametrize("entry", [INF, torch.finfo(torch.float32).min, -1e4])
def test_masks_that_say_what_causality_says(entry: float) -> None:
    forbids = entry < -1e30
    for shape in ((5, 5), (5, 7), (7, 5), (1, 3)):
        mask = torch.full((1, 1, *shape), entry).triu(1)
        assert multihead_forward._is_causal_mask(mask) == forbids
        assert not multihead_forward._is_causal_mask(mask.triu(2))
    assert not multihead_forward._is_causal_mask(torch.zeros(1, 1, 5, 0))


def test_causal_hint_with_its_mask() -> None:
    stock, ours = pair()
    for mask in (
        nn.Transformer.generate_square_subsequent_mask(S),
        torch.full((S, S), torch.finfo(torch.float32).min).triu(1),
        torch.ones(S, S).triu(1).bool(),
    ):
        for need_weights in (False, True):
            options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
            assert_like_stock(stock, ours, inputs(stock, "self"), **options)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causality_and_the_mask_both_hold_on_every_path(
    extra: dict[str, bool], training: bool, need_weights: bool
) -> None:
    """Where the hint is wrong, the original drops the mask or the hint, depending on the path."""
    stock, ours = pair(**extra)
    x = torch.randn(S, N, E)
    wrong = torch.rand(S, S) < 0.3
    wrong.fill_diagonal_(False)
    both = wrong | torch.ones(S, S).triu(1).bool()
    expected, expected_weights = stock.eval()(x, x, x, attn_mask=both)
    for mask in (wrong, torch.zeros(S, S).masked_fill(wrong, INF)):
        out, weights = ours.train(training)(
            x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights
        )
        torch.testing.assert_close(out, expected)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_without_keys(need_weights: bool) -> None:
    """The original gives NaN."""
    _, ours = pair()
    query, key, value = inputs(ours, "cross")
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(L, E))
    assert torch.isfinite(out).all()
    if need_weights:
        assert (weights[1] == 0).all()
        out = out + weights.sum()
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_dropout_is_applied_and_seen_in_the_weights() -> None:
    _, ours = pair(dropout=0.5)
    x = torch.randn(40, N, E)
    torch.manual_seed(1)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert (weights == 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    value = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    heads = value.unflatten(-1, (H, -1)).permute(1, 2, 0, 3)
    torch.testing.assert_close(
        ours.out_proj((weights @ heads).permute(2, 0, 1, 3).flatten(-2)), out
    )
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], out)
    assert (ours.eval()(x, x, x, average_attn_weights=False)[1] != 0).all()


def test_everything_dropped() -> None:
    stock, ours = pair(dropout=1.0)
    tensors = inputs(stock, "cross")
    expected, actual = results(stock, tensors), results(ours, tensors)
    assert torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["weights"], expected["weights"])


# --- What stays the same around it


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_parameters_are_drawn_and_kept_alike(name: str) -> None:
    stock, ours = pair(**CONSTRUCTORS[name])
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())


def test_copies_and_pickles() -> None:
    _, ours = pair()
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin(x, x, x)[0], expected)
        assert len(twin._forward_pre_hooks) == 1
    state = ours.__getstate__()
    del state["_qkv_same_embed_dim"]
    old = MultiheadAttention.__new__(MultiheadAttention)
    old.__setstate__(state)
    assert torch.equal(old(x, x, x)[0], expected)


def test_constructor_signature() -> None:
    def listed(module: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(module).parameters.values()]

    assert listed(MultiheadAttention) == listed(nn.MultiheadAttention)


def test_device_and_dtype_arguments() -> None:
    module = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_out_proj_is_called_as_a_module() -> None:
    _, ours = pair()
    x = torch.randn(L, N, E)
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, out: seen.append(1) or out * 2)
    expected = F.linear(torch.zeros(1, E), ours.out_proj.weight, ours.out_proj.bias)
    assert ours(x, x, x)[0].shape == (L, N, E)
    assert seen == [1]
    assert expected.shape == (1, E)
    ours.out_proj = nn.Sequential(ours.out_proj, nn.Linear(E, 3))  # such as LoRA and adapters
    assert ours(x, x, x)[0].shape == (L, N, 3)


def test_whatever_watches_out_proj_sees_it() -> None:
    _, ours = pair()
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)[0]
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        ours(x, x, x)
    assert seen == [ours.out_proj, ours]
    ours.out_proj.forward = lambda y: seen.append(ours) or y  # type: ignore[method-assign]
    assert not torch.equal(ours(x, x, x)[0], expected)
    assert seen[2:] == [ours]


@pytest.mark.parametrize("which", ["self", "key is value", "cross"])
def test_a_product_for_each_where_one_for_all_is_large(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multihead_forward, "_LARGEST_PRODUCT", 0)
    stock, ours = pair()
    assert_like_stock(stock, ours, inputs(stock, which))


@pytest.mark.parametrize("which", ["self", "key is value", "cross"])
def test_projections_of_a_size_for_the_fast_operator(which: str) -> None:
    stock, ours = pair(embed_dim=384, batch_first=True)
    width = torch.randn(N, 200, 384).requires_grad_()
    other = torch.randn(N, 150, 384).requires_grad_()
    value = torch.randn(N, 150, 384).requires_grad_()
    tensors = {"self": [width] * 3, "key is value": [width, other, other]}
    assert_like_stock(stock, ours, tensors.get(which, [width, other, value]), need_weights=False)


class Copies(TorchDispatchMode):
    """Counts operations that copy whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.cat.default):  # fmt: skip
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("which", ["self", "key is value", "cross"])
def test_no_transpose_copies(batch_first: bool, which: str) -> None:
    ours = MultiheadAttention(E, H, batch_first=batch_first)
    tensors = inputs(ours, which)
    with Copies() as copies:
        out, _ = ours(*tensors, need_weights=False)
    assert copies.names == []
    assert out.is_contiguous()


# --- Self-attention of few tokens without gradients, which is one native call


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that the native call was tried: whether it did something."""
    seen: list[bool] = []
    original = cpu.plain_self_attention

    def plain_self_attention(*arguments: Any) -> Any:
        result = original(*arguments)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(cpu, "plain_self_attention", plain_self_attention)
    monkeypatch.setattr(multihead, "has_fast_kernel", True)  # wins or not, it must be right
    return seen


needs_native_calls = pytest.mark.skipif(
    not cpu.has_plain_forward, reason="this torch has no DLPack exchange API of C's"
)


def errors(
    module: nn.MultiheadAttention, wide: nn.Module, x: Tensor, **options: Any
) -> list[float]:
    """Against the module in float64, of the output and of the weights if there are any."""
    with torch.no_grad():
        results, truth = module(x, x, x, **options), wide(*(x.double(),) * 3, **options)
    assert [y is None for y in results] == [y is None for y in truth]
    pairs = [(one, true) for one, true in zip(results, truth, strict=True) if true is not None]
    assert [one.shape for one, _ in pairs] == [true.shape for _, true in pairs]
    assert {one.dtype for one, _ in pairs} == {torch.float32}
    return [rms(one - true) for one, true in pairs]


@needs_native_calls
@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "capability", [name for name, there in cpu.capabilities().items() if there]
)
def test_few_tokens(
    capability: str,
    batch_first: bool,
    bias: bool,
    options: dict[str, Any],
    native_calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "capability", capability)
    shapes = [(1,), (5,), (16,), (1, 9), (9, 1), (3, 5), (5, 3), (2, 16), (1, 47), (4, 16)]
    for width, heads in ((48, 3), (112, 1)):
        stock, ours = pair(
            embed_dim=width, num_heads=heads, batch_first=batch_first, bias=bias, dropout=0.5
        )
        stock.eval(), ours.eval()
        wide = copy.deepcopy(stock).double()
        for shape in shapes:
            x = torch.randn(*shape, width)
            theirs = errors(stock, wide, x, **options)
            for error, other in zip(errors(ours, wide, x, **options), theirs, strict=True):
                assert error <= 2 * other + 2**-24
    assert native_calls == [True] * 2 * len(shapes)


@needs_native_calls
@pytest.mark.parametrize("threads", [1, 3])
def test_few_tokens_on_several_threads(threads: int, native_calls: list[bool]) -> None:
    stock, ours = pair(embed_dim=512, batch_first=True)
    x = torch.randn(2, 31, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            actual, weights = ours(x, x, x)
        expected = stock(x, x, x)
    finally:
        torch.set_num_threads(before)
    assert native_calls == [True]
    assert actual.is_inference()
    torch.testing.assert_close(actual, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, expected[1], atol=1e-5, rtol=1e-4)


NOT_ONE_CALL: dict[str, Callable[[MultiheadAttention, Tensor], Any]] = {
    "gradients": lambda module, x: module(x, x, x),
    "a gradient of the input": lambda module, x: module.requires_grad_(False)(
        *(x.requires_grad_(),) * 3
    ),
    "a mask": lambda module, x: module(x, x, x, attn_mask=torch.zeros(7, 7)),
    "padding": lambda module, x: module(x, x, x, key_padding_mask=torch.zeros(2, 7).bool()),
    "another key": lambda module, x: module(x, x.clone(), x),
    "another value": lambda module, x: module(x, x, x.clone()),
    "too many tokens": lambda module, x: module(*(x.repeat(5, 1, 1),) * 3),
    "no tokens": lambda module, x: module(*(x[:0],) * 3),
    "float64": lambda module, x: module.double()(*(x.double(),) * 3),
    "a layout": lambda module, x: module(*(x.transpose(0, 1).contiguous().transpose(0, 1),) * 3),
    "a weight's layout": lambda module, x: _with_transposed_weight(module)(x, x, x),
    "a negated view": lambda module, x: module(*(x._neg_view(),) * 3),
    "a subclass": lambda module, x: module(*(x.as_subclass(_Other),) * 3),
    "autocast": lambda module, x: _within(torch.autocast("cpu"), module, x),
    "a function mode": lambda module, x: _within(_NoFunctionMode(), module, x),
    "a dispatch mode": lambda module, x: _within(Copies(), module, x),
    "the reference": lambda module, x: _within(attn_ext.use_backend("reference"), module, x),
    "vmap": lambda module, x: torch.func.vmap(lambda y: module(y, y, y, need_weights=False)[0])(x),
    "three weights": lambda module, x: _with_three_weights(module)(x, x, x),
    "a subclass of the module": lambda module, x: _as_other_class(module)(x, x, x),
    "a hook": lambda module, x: _with_hook(module)(x, x, x),
    "another projection": lambda module, x: _with_projection(module)(x, x, x),
    "no parameter": lambda module, x: _changed(module, "in_proj_weight", Tensor.clone)(x, x, x),
    "no parameter of a bias": lambda module, x: _changed(module, "in_proj_bias", Tensor.clone)(x, x, x),
    "no parameter of out_proj": lambda module, x: _changed(module, "out_proj.weight", Tensor.clone)(x, x, x),
    "no parameter of out_proj's bias": lambda module, x: _changed(module, "out_proj.bias", Tensor.clone)(x, x, x),
    "a parameter of a subclass": lambda module, x: _changed(module, "in_proj_weight", _as_other_parameter)(x, x, x),
    "a bias of a subclass": lambda module, x: _changed(module, "out_proj.bias", _as_other_parameter)(x, x, x),
}  # fmt: skip


class _Other(Tensor):
    pass


class _OtherModule(MultiheadAttention):
    pass


class _NoFunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _within(manager: Any, module: nn.Module, x: Tensor) -> Any:
    with manager:
        return module(x, x, x)


def _with_transposed_weight(module: MultiheadAttention) -> MultiheadAttention:
    module.in_proj_weight.data = module.in_proj_weight.data.t().contiguous().t()
    return module


def _as_other_class(module: MultiheadAttention) -> MultiheadAttention:
    module.__class__ = _OtherModule
    return module


def _with_three_weights(module: MultiheadAttention) -> MultiheadAttention:
    module._qkv_same_embed_dim = False
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        setattr(module, name, nn.Parameter(torch.randn(48, 48)))
    return module


def _with_hook(module: MultiheadAttention) -> MultiheadAttention:
    module.out_proj.register_forward_hook(lambda _, __, out: out.clone())
    return module


def _with_projection(module: MultiheadAttention) -> MultiheadAttention:
    module.out_proj = nn.Sequential(module.out_proj)  # type: ignore[assignment]
    return module


def _changed(
    module: MultiheadAttention, name: str, change: Callable[[Tensor], Tensor]
) -> MultiheadAttention:
    """The module with what takes a parameter's place."""
    *_, name = path = name.split(".")
    owner = module.get_submodule(".".join(path[:-1]))
    changed = change(getattr(owner, name).detach())
    delattr(owner, name)
    setattr(owner, name, changed)
    return module


def _as_other_parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.as_subclass(_Other))


@needs_native_calls
@pytest.mark.parametrize("name", NOT_ONE_CALL)
def test_more_than_few_tokens(name: str, native_calls: list[bool]) -> None:
    _, ours = pair(embed_dim=48, batch_first=True)
    other = copy.deepcopy(ours)
    x = torch.randn(2, 7, 48)
    with torch.set_grad_enabled("gradient" in name):
        NOT_ONE_CALL[name](ours.eval(), x)
        assert not any(native_calls)
        x = x.detach()
        other.eval().requires_grad_(False)(x, x, x)
    assert native_calls[-1:] == [True]


@needs_native_calls
def test_few_tokens_in_training_with_dropout(native_calls: list[bool]) -> None:
    _, ours = pair(embed_dim=48, batch_first=True, dropout=0.5)
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
        assert native_calls == []
        ours.eval()
        assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    assert native_calls == [True, True]


@needs_native_calls
def test_few_tokens_with_more_in_the_module(native_calls: list[bool]) -> None:
    x = torch.randn(2, 7, 48)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 48, "vdim": 24}):
        stock, ours = pair(embed_dim=48, batch_first=True, **options)
        inputs = (x, x, x[..., :24]) if "vdim" in options else (x, x, x)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs)[0], stock(*inputs)[0])
    _, ours = pair(embed_dim=12)  # no multiple of 16
    with torch.no_grad():
        ours(*(torch.randn(2, 7, 12),) * 3)
    assert native_calls == [False]


@needs_native_calls
def test_few_tokens_leave_complaints_to_the_checks(native_calls: list[bool]) -> None:
    _, ours = pair(embed_dim=48, batch_first=True)
    with torch.no_grad():
        for wrong in (torch.randn(2, 7, 32), torch.randn(32), torch.tensor(1.0)):
            with pytest.raises((AssertionError, RuntimeError)):
                ours(wrong, wrong, wrong)
        x = torch.randn(2, 7, 48)
        changes: list[Callable[[MultiheadAttention], Any]] = [
            lambda module: setattr(module.out_proj, "weight", nn.Parameter(torch.randn(48, 32))),
            lambda module: setattr(module, "embed_dim", 64),
            lambda module: setattr(module, "bias_v", nn.Parameter(torch.randn(1, 1, 48))),
            lambda module: setattr(module, "num_heads", 5),
            lambda module: setattr(module, "num_heads", 2**70),
            lambda module: setattr(module, "num_heads", 4.0),
        ]
        for change in changes:
            other = copy.deepcopy(ours)
            other(x, x, x)
            assert native_calls.pop()
            change(other)
            with pytest.raises((AssertionError, RuntimeError, TypeError)) as complaint:
                other(x, x, x)
            assert "plain_self_attention" not in str(complaint.value)
    assert not any(native_calls)


@needs_native_calls
def test_few_tokens_without_memory(native_calls: list[bool]) -> None:
    """Whose storage was freed, as those that sharding frees are, at its start and behind it."""
    _, ours = pair(embed_dim=48, batch_first=True)
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            for offset in (0, 64):
                freed = copy.deepcopy(ours)
                parameter = freed.get_parameter(name)
                shape, count = parameter.shape, parameter.numel()
                parameter.data = torch.randn(offset + count)[offset:].view(shape)
                parameter.untyped_storage().resize_(0)
                with pytest.raises(RuntimeError):
                    freed(x, x, x)
    assert not any(native_calls)


@needs_native_calls
def test_few_tokens_take_any_flag(native_calls: list[bool]) -> None:
    _, ours = pair(embed_dim=48)
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        for flag in (False, True):
            ours.batch_first = flag
            expected = ours(x, x, x, need_weights=True, average_attn_weights=True)
            ours.batch_first = "yes" if flag else []  # type: ignore[assignment]
            actual = ours(x, x, x, need_weights=1, average_attn_weights="yes")  # type: ignore[arg-type]
            assert all(torch.equal(*both) for both in zip(actual, expected, strict=True))
    assert native_calls == [True] * 4


@needs_native_calls
def test_tracing_sees_any_number_of_tokens(native_calls: list[bool]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = pair(embed_dim=48, batch_first=True)[1].eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Model()
    few, many = torch.randn(2, 9, 48), torch.randn(2, 300, 48)
    length = torch.export.Dim("length", min=2, max=512)
    counter = CompileCounter()
    with torch.no_grad():
        program = torch.export.export(model, (few,), strict=True, dynamic_shapes=({1: length},))
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        for x in (few, many):
            torch.testing.assert_close(program.module()(x), model(x))
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


# --- Errors


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


ERRORS: dict[str, tuple[dict[str, Any], list[Tensor], dict[str, Any]]] = {
    "4-D query": ({}, [x(1, L, N, E), x(S, N, E), x(S, N, E)], {}),
    "1-D query": ({}, [x(E), x(S, E), x(S, E)], {}),
    "2-D key": ({}, [x(L, N, E), x(S, E), x(S, E)], {}),
    "3-D key, unbatched query": ({}, [x(L, E), x(S, N, E), x(S, N, E)], {}),
    "wrong embed_dim": ({}, [x(L, N, 8), x(S, N, E), x(S, N, E)], {}),
    "wrong key width": ({}, [x(L, N, E), x(S, N, 8), x(S, N, 8)], {}),
    "value shape": ({}, [x(L, N, E), x(S, N, E), x(6, N, E)], {}),
    "value length, separate": ({"kdim": 6}, [x(L, N, E), x(S, N, 6), x(6, N, E)], {}),
    "key batch alone": ({}, [x(L, N, E), x(S, 2, E), x(S, N, E)], {}),
    "float64 mask": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(L, S).double()}),
    "float64 padding": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"key_padding_mask": x(N, S).double()}),
    "half mask": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(L, S).half(), "need_weights": False}),
    "key batch": ({}, [x(L, N, E), x(S, 2, E), x(S, 2, E)], {}),
    "2-D mask shape": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(L, 6)}),
    "3-D mask shape": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(N, L, S)}),
    "4-D mask": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(1, N, L, S)}),
    "integer mask": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": x(L, S).int()}),
    "integer padding": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"key_padding_mask": x(N, S).int()}),
    "3-D padding": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"key_padding_mask": x(1, N, S).bool()}),
    "padding length": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"key_padding_mask": x(N, L).bool()}),
    "padding batch": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"key_padding_mask": x(2, S).bool()}),
    "unbatched padding": ({}, [x(L, E), x(S, E), x(S, E)], {"key_padding_mask": x(N, S).bool()}),
    "unbatched mask": ({}, [x(L, E), x(S, E), x(S, E)], {"attn_mask": x(N, L, S)}),
    "mask not a tensor": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"attn_mask": [[True] * S] * L}),
    "causal without mask": ({}, [x(L, N, E), x(S, N, E), x(S, N, E)], {"is_causal": True}),
    "float64 input": ({}, [x(L, N, E).double(), x(S, N, E).double(), x(S, N, E).double()], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_the_originals_type(name: str) -> None:
    constructor, tensors, options = ERRORS[name]
    stock, ours = pair(**constructor)
    with pytest.raises(Exception) as theirs:
        stock(*tensors, **options)
    with pytest.raises(theirs.type):
        ours(*tensors, **options)


@pytest.mark.parametrize(
    "arguments",
    [{"embed_dim": 0}, {"num_heads": 0}, {"embed_dim": 10, "num_heads": 3}, {"num_heads": -1}],
)
def test_constructor_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(Exception) as theirs:
        nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, **arguments})
    with pytest.raises(theirs.type):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **arguments})


# --- The functional form


def projection(rows: int) -> Tensor:
    """A weight (rows, E) that keeps the size of its inputs.

    Scores of larger ones make weights that two right answers in float32 do not have in common.
    """
    return torch.randn(rows, E) / E**0.5


def functional_arguments() -> dict[str, Any]:
    return {
        "query": torch.randn(L, N, E), "key": torch.randn(S, N, E), "value": torch.randn(S, N, E),
        "embed_dim_to_check": E, "num_heads": H, "in_proj_weight": projection(3 * E),
        "in_proj_bias": torch.randn(3 * E), "bias_k": None, "bias_v": None, "add_zero_attn": False,
        "dropout_p": 0.0, "out_proj_weight": projection(E), "out_proj_bias": torch.randn(E),
    }  # fmt: skip


FUNCTIONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "eval": {"dropout_p": 0.5, "training": False},
    "no weights": {"need_weights": False},
    "bias_kv": {"bias_k": torch.randn(1, 1, E), "bias_v": torch.randn(1, 1, E), "attn_mask": torch.randn(L, S)},
    "static": {"static_k": torch.randn(N * H, S, E // H), "static_v": torch.randn(N * H, S, E // H)},
    "static with masks": {"static_k": torch.randn(N * H, S, E // H), "key_padding_mask": torch.arange(S).expand(N, S) > 5, "add_zero_attn": True},
    "separate": {"in_proj_weight": None, "use_separate_proj_weight": True, "q_proj_weight": projection(E), "k_proj_weight": projection(E), "v_proj_weight": projection(E), "average_attn_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional(name: str) -> None:
    arguments = {**functional_arguments(), **FUNCTIONAL[name]}
    expected = F.multi_head_attention_forward(**arguments)
    actual = attn_ext.multi_head_attention_forward(**arguments)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


FUNCTIONAL_ERRORS: dict[str, dict[str, Any]] = {
    "no packed weight": {"in_proj_weight": None},
    "no separate weight": {"use_separate_proj_weight": True, "q_proj_weight": projection(E)},
    "bias_k alone": {"bias_k": torch.randn(1, 1, E)},
    "bias_v alone": {"bias_v": torch.randn(1, 1, E)},
    "heads": {"num_heads": 5},
    "embed_dim": {"embed_dim_to_check": 24},
    "static batch": {"static_k": torch.randn(N, S, E // H)},
    "static width": {"static_v": torch.randn(N * H, S, E)},
    "static length": {"static_k": torch.randn(N * H, 9, E // H)},
    "static dtype": {"static_v": torch.randn(N * H, S, E // H).double()},
    "bias_k dtype": {"bias_k": torch.randn(1, 1, E).double(), "bias_v": torch.randn(1, 1, E).double()},
    "static with bias": {"bias_k": torch.randn(1, 1, E), "bias_v": torch.randn(1, 1, E), "static_k": torch.randn(N * H, S, E // H)},
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONAL_ERRORS)
def test_functional_errors(name: str) -> None:
    arguments = {**functional_arguments(), **FUNCTIONAL_ERRORS[name]}
    with pytest.raises(Exception) as theirs:
        F.multi_head_attention_forward(**arguments)
    with pytest.raises(theirs.type):
        attn_ext.multi_head_attention_forward(**arguments)


def test_functional_honours_torch_function() -> None:
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    arguments = functional_arguments()
    expected = attn_ext.multi_head_attention_forward(**arguments)
    arguments["query"] = arguments["query"].as_subclass(Logged)
    actual = attn_ext.multi_head_attention_forward(**arguments)
    assert seen[0] is attn_ext.multi_head_attention_forward
    torch.testing.assert_close(actual[0].as_subclass(Tensor), expected[0])


# --- PyTorch's other machinery


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_and_export(need_weights: bool) -> None:
    ours = MultiheadAttention(E, H, batch_first=True, dropout=0.1).eval()
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    options = {
        "need_weights": need_weights,
        "key_padding_mask": masks("padding")["key_padding_mask"],
    }
    expected = ours(query, key, key, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, key, **options), expected)
    compiled.train()(query, key, key, **options)[0].sum().backward()
    for strict in (False, True):
        program = torch.export.export(ours.eval(), (query, key, key), options, strict=strict)
        torch.testing.assert_close(program.module()(query, key, key, **options), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_jit_trace(batch_first: bool, need_weights: bool) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(E, H, batch_first=batch_first)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor | None, ...]:
            out = self.attention(x, x, x, attn_mask=mask, need_weights=need_weights)
            return out if need_weights else out[:1]

    ours = Wrapped().eval()
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    shape = (2, L, E) if batch_first else (L, 2, E)
    traced = torch.jit.trace(ours, (torch.randn(shape), causal))
    x, mask = torch.randn(shape), torch.randn(L, L)  # one that isn't causal
    torch.testing.assert_close(traced(x, mask), ours(x, mask))


def test_compile_with_a_causal_mask() -> None:
    ours = MultiheadAttention(E, H)
    tensor, mask = torch.randn(S, N, E), nn.Transformer.generate_square_subsequent_mask(S)
    options = {"attn_mask": mask, "is_causal": True}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tensor, tensor, tensor, **options), ours(tensor, tensor, tensor, **options)
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_autograd(need_weights: bool) -> None:
    """With projections large enough for the fast kernels."""
    ours = MultiheadAttention(256, 4, dropout=0.1)
    tokens = torch.randn(128, 8, 256)

    def loss() -> Tensor:
        torch.manual_seed(0)
        out, weights = ours(tokens, tokens, tokens, need_weights=need_weights)
        return out.square().sum() + (weights.square().sum() if need_weights else 0)

    expected = torch.autograd.grad(loss(), list(ours.parameters()))
    compiled_backward(loss())
    for parameter, grad in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-3, rtol=1e-3)


def test_per_sample_gradients() -> None:
    stock, ours = pair()
    samples = torch.randn(3, L, 2, E)

    def gradients(module: nn.Module) -> Any:
        parameters = dict(module.named_parameters())

        def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
            out, weights = torch.func.functional_call(module, p, (sample, sample, sample))
            return out.square().sum() + weights.square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)

    torch.testing.assert_close(gradients(ours), gradients(stock), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dropout", "need_weights"), list(itertools.product([0.0, 0.4], [False, True]))
)
def test_second_derivatives_and_forward_mode(dropout: float, need_weights: bool) -> None:
    ours = MultiheadAttention(4, 2, dropout=dropout, dtype=torch.float64)
    mask = torch.randn(3, 3, dtype=torch.float64)

    def function(tensor: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        found = ours(tensor, tensor, tensor, attn_mask=mask, need_weights=need_weights)
        return tuple(result for result in found if result is not None)

    tensor = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, tensor, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensor)


def test_autocast() -> None:
    stock, ours = pair()
    tensors = [y.detach() for y in inputs(stock, "cross")]
    padding = masks("padding")["key_padding_mask"]
    for need_weights in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            expected = stock(*tensors, key_padding_mask=padding, need_weights=need_weights)
            actual = ours(*tensors, key_padding_mask=padding, need_weights=need_weights)
        assert actual[0].dtype == expected[0].dtype == torch.bfloat16
        torch.testing.assert_close(actual[0], expected[0], atol=3e-2, rtol=3e-2)


def test_nothing_of_length_by_length_per_head_is_saved() -> None:
    length, kept = 130, []
    ours = MultiheadAttention(E, H)
    tensor = torch.randn(length, N, E)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: kept.append(y.numel()) or y, lambda y: y
    ):
        out, weights = ours(tensor, tensor, tensor)
    (out.sum() + weights.sum()).backward()
    assert max(kept) < N * length * length
