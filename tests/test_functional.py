"""The public functions beyond what the contract suite covers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attn_ext


def test_signature_is_pytorchs() -> None:
    parameters = inspect.signature(attn_ext.scaled_dot_product_attention).parameters
    expected = {"query": inspect.Parameter.empty, "key": inspect.Parameter.empty, "value": inspect.Parameter.empty, "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}  # fmt: skip
    assert {name: p.default for name, p in parameters.items()} == expected


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6), (5, 7)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 6), (3, 5, 7)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (2, 1, 5, 7)),
    "5-D": ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 6), (2, 1, 3, 5, 7)),
    "5-D, 4-D mask": ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 6), (4, 1, 5, 7)),
    "6-D": ((2, 2, 4, 3, 5, 8), (2, 2, 4, 3, 7, 8), (2, 2, 4, 3, 7, 6), (5, 7)),
    "keys broadcast": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6), (5, 7)),
    "heads broadcast": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6), (5, 7)),
    "queries broadcast": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (2, 3, 5, 7)),
}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_like_pytorchs_at_any_rank(name: str, kind: str) -> None:
    query, key, value, mask_shape = SHAPES[name]
    tensors = [torch.randn(shape, requires_grad=True) for shape in (query, key, value)]
    options: dict[str, Any] = {"is_causal": kind == "causal", "scale": 0.3}
    if kind == "bool":
        options["attn_mask"] = torch.rand(mask_shape) < 0.8
    elif kind == "float":
        options["attn_mask"] = torch.randn(mask_shape)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    actual = attn_ext.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(actual, expected)
    dout = torch.randn(expected.shape)
    grads = torch.autograd.grad(actual, tensors, dout)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, tensors, dout), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_grouped_heads_want_the_flag() -> None:
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    actual = attn_ext.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        attn_ext.scaled_dot_product_attention(query, key, value)


def test_refusals() -> None:
    query = torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal"):
        attn_ext.scaled_dot_product_attention(
            query, query, query, torch.ones(5, 5).bool(), is_causal=True
        )
    with pytest.raises(ValueError, match="query must be at least 2-D"):
        attn_ext.scaled_dot_product_attention(query[0, 0, 0], query, query)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor"):
        attn_ext.scaled_dot_product_attention(query, 3, query)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(5, 5), (5, 9)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias(make: Any, lengths: tuple[int, int]) -> None:
    query, key = torch.randn(2, 3, lengths[0], 8), torch.randn(2, 3, lengths[1], 8)
    bias = make(*lengths)
    expected = F.scaled_dot_product_attention(query, key, key, bias)
    torch.testing.assert_close(
        attn_ext.scaled_dot_product_attention(query, key, key, bias), expected
    )


def test_torch_function_is_honoured() -> None:
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    plain = torch.randn(2, 3, 5, 8)
    out = attn_ext.scaled_dot_product_attention(
        plain.as_subclass(Logged), plain, plain, is_causal=True
    )
    assert seen[0] is attn_ext.scaled_dot_product_attention
    assert type(out) is Logged
    expected = attn_ext.scaled_dot_product_attention(plain, plain, plain, is_causal=True)
    assert torch.equal(out.as_subclass(Tensor), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5)
    with torch.autocast("cpu", dtype=dtype):
        out = attn_ext.attention(query, key, value, attn_mask=mask)
        weights = attn_ext.attention_weights(query, key, attn_mask=mask)
        wide = attn_ext.attention(query.double(), key.double(), value.double())
    assert out.dtype == weights.dtype == dtype
    assert wide.dtype == torch.float64
    low = [x.detach().to(dtype) for x in (query, key, value)]
    assert torch.equal(out, attn_ext.attention(*low, attn_mask=mask))
    out.float().sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


def test_seeds_and_generators() -> None:
    query = torch.randn(2, 3, 50, 8)

    def dropped(**options: Any) -> Tensor:
        return attn_ext.attention(query, query, query, dropout_p=0.5, **options)

    torch.manual_seed(3)
    first = dropped()
    assert not torch.equal(dropped(), first)
    torch.manual_seed(3)
    assert torch.equal(dropped(), first)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    assert torch.equal(dropped(generator=generators[0]), dropped(generator=generators[1]))
    assert torch.equal(dropped(seed=-1), dropped(seed=2**64 - 1))
    assert torch.equal(dropped(seed=9), dropped(seed=torch.tensor(9)))
    assert not torch.equal(dropped(seed=9), dropped(seed=9, offset=1))


def test_no_draw_without_dropout() -> None:
    query = torch.randn(2, 3, 50, 8)
    state = torch.get_rng_state()
    attn_ext.attention(query, query, query)
    assert torch.equal(torch.get_rng_state(), state)


def test_float_padding_has_a_gradient() -> None:
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    padding = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 5) < 0.7
    for attn_mask in (None, mask, torch.randn(5, 5, dtype=torch.float64)):

        def function(padding: Tensor, attn_mask: Tensor | None = attn_mask) -> Tensor:
            return attn_ext.attention(
                query, query, query, attn_mask=attn_mask, key_padding_mask=padding
            )

        assert torch.autograd.gradcheck(function, padding)


def test_only_lse_is_used() -> None:
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    function = lambda q: attn_ext.attention(q, key, key, return_lse=True)[1]
    assert torch.autograd.gradcheck(function, query)


@pytest.mark.parametrize(
    "which",
    ["query", "key", "value", "attn_mask", "key_padding_mask", "alibi_slopes", "sinks", "lse"],
)
def test_views_that_negate(which: str) -> None:
    """Of these a tensor's memory does not say what it holds."""
    shapes = {
        "query": (2, 4, 5, 8), "key": (2, 4, 7, 8), "value": (2, 4, 7, 6), "attn_mask": (1, 1, 5, 7),
        "key_padding_mask": (2, 7), "alibi_slopes": (4,), "sinks": (4,),
    }  # fmt: skip
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}

    def results(arguments: dict[str, Tensor], lse: Tensor | None) -> tuple[Tensor, ...]:
        out, own = attn_ext.attention(**arguments, return_lse=True)
        others = {name: x for name, x in arguments.items() if name != "value"}
        weights = attn_ext.attention_weights(**others, lse=own if lse is None else lse)
        return attn_ext.attention(**arguments), out, own, weights

    lse = None
    if which == "lse":
        lse = torch.randn(2, 4, 5)
        expected = results(arguments, lse)
        lse = (-lse)._neg_view()
    else:
        expected = results(arguments, None)
        arguments[which] = (-arguments[which])._neg_view()
    for one, other in zip(results(arguments, lse), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("average", [False, True])
def test_gradients_that_negate(average: bool) -> None:
    """As the backward pass of torch.complex hands out after a conjugate."""
    query, key, value = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    out, lse = attn_ext.attention(query, key, value, return_lse=True)
    weights = attn_ext.attention_weights(query, key, lse=lse, average=average)
    plain = attn_ext.attention(query, key, value)
    leaves = (query, key)
    for outputs in ((out,), (lse,), (out, lse), (weights,), (plain,)):
        grads = [torch.randn_like(x) for x in outputs]
        negated = [(-x)._neg_view() for x in grads]
        expected = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        for create_graph in (False, True):
            actual = torch.autograd.grad(
                outputs, leaves, negated, retain_graph=True, create_graph=create_graph
            )
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other)
