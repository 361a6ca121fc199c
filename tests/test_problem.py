"""Wrong arguments: each one's error names it, its value and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_ext
from attn_ext.problem import Problem

B, H, L, S, D = 2, 6, 5, 7, 8


def good() -> dict[str, Any]:
    """A call that is right."""
    return {
        "query": torch.randn(B, H, L, D),
        "key": torch.randn(B, 3, S, D),
        "value": torch.randn(B, 3, S, 4),
    }


def x(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


WRONG = {
    "query not a tensor": ({"query": [[1.0]]}, TypeError, "query must be a torch.Tensor, got list"),
    "key not a tensor": ({"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
    "query 3-D": ({"query": x(H, L, D)}, ValueError, r"query must be 4-D .* got shape \(6, 5, 8\)"),
    "key 5-D": ({"key": x(1, B, 3, S, D)}, ValueError, "key must be 4-D"),
    "value 2-D": ({"value": x(S, D)}, ValueError, "value must be 4-D"),
    "batch": ({"key": x(3, 3, S, D)}, ValueError, "key must have query's batch size 2, got 3"),
    "head_dim": ({"key": x(B, 3, S, 9)}, ValueError, "key must have query's head_dim 8, got 9"),
    "head_dim 0": ({"query": x(B, H, L, 0), "key": x(B, 3, S, 0)}, ValueError, "head_dim of at least 1"),
    "value length": ({"value": x(B, 3, 6, D)}, ValueError, r"value must have key's .* \(2, 3, 7\), got \(2, 3, 6\)"),
    "heads": ({"query": x(B, 5, L, D)}, ValueError, "multiple of key's 3 heads .* got 5"),
    "no key heads": ({"key": x(B, 0, S, D), "value": x(B, 0, S, D)}, ValueError, "multiple of key's 0 heads"),
    "integer query": ({"query": x(B, H, L, D, dtype=torch.int64)}, TypeError, "query must be float32, .* got torch.int64"),
    "complex query": ({"query": x(B, H, L, D, dtype=torch.complex64)}, TypeError, "query must be float32"),
    "mixed dtypes": ({"key": x(B, 3, S, D, dtype=torch.float64)}, TypeError, "key must have query's dtype torch.float32, got torch.float64"),
    "integer value": ({"value": x(B, 3, S, D, dtype=torch.int32)}, TypeError, "value must be of a floating dtype"),
    "mixed devices": ({"value": x(B, 3, S, D, device="meta")}, ValueError, "value must be on query's device cpu, got meta"),
    "sparse": ({"query": x(B, H, L, D).to_sparse()}, TypeError, "query must be a dense strided tensor"),
    "nested": ({"query": torch.nested.as_nested_tensor([x(H, L, D)] * B)}, TypeError, "query must be a dense strided tensor"),
    "too long": ({"key": x(1, 1, 1, D).expand(B, 3, 2**31, D), "value": x(1, 1, 1, D).expand(B, 3, 2**31, D)}, ValueError, "at most 2147483647 long, got 5 and 2147483648"),
    "too many heads": ({"query": x(1, 1, 1, D).expand(2**16, 2**15, L, D), "key": x(1, 1, 1, D).expand(2**16, 1, S, D), "value": x(1, 1, 1, D).expand(2**16, 1, S, D)}, ValueError, "at most 2147483647 batch"),
    "mask shape": ({"attn_mask": x(L, 6)}, ValueError, r"attn_mask must broadcast to .* \(2, 6, 5, 7\), got shape \(5, 6\)"),
    "mask 5-D": ({"attn_mask": x(1, 1, 1, L, S)}, ValueError, "attn_mask must broadcast"),
    "mask integer": ({"attn_mask": x(L, S, dtype=torch.int64)}, TypeError, "attn_mask must be of a floating dtype, got torch.int64"),
    "mask dtype": ({"attn_mask": x(L, S, dtype=torch.float64)}, TypeError, "attn_mask must be bool .* got torch.float64"),
    "mask device": ({"attn_mask": x(L, S, device="meta")}, ValueError, "attn_mask must be on query's device"),
    "mask not a tensor": ({"attn_mask": True}, TypeError, "attn_mask must be a torch.Tensor, got bool"),
    "padding shape": ({"key_padding_mask": x(B, L, dtype=torch.bool)}, ValueError, r"key_padding_mask must have shape .* \(2, 7\), got \(2, 5\)"),
    "padding dtype": ({"key_padding_mask": x(B, S, dtype=torch.uint8)}, TypeError, "key_padding_mask must be of a floating dtype"),
    "slopes shape": ({"alibi_slopes": x(3)}, ValueError, r"alibi_slopes must have shape .* got \(3,\)"),
    "slopes dtype": ({"alibi_slopes": x(H, dtype=torch.int64)}, TypeError, "alibi_slopes must be of a floating dtype"),
    "sinks shape": ({"sinks": x(B, H)}, ValueError, r"sinks must have shape .* \(6,\), got \(2, 6\)"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    "dropout NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in .* got nan"),
    "dropout bool": ({"dropout_p": False}, TypeError, "dropout_p must be a float, got bool"),
    "dropout tensor": ({"dropout_p": x(2)}, TypeError, "dropout_p must be a float, got Tensor"),
    "dropout type": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, got str"),
    "causal": ({"causal": "left"}, ValueError, "causal must be False, True, .* got 'left'"),
    "window negative": ({"window": (-2, 3)}, ValueError, r"window must hold sizes of at least 0, .* got \(-2, 3\)"),
    "window type": ({"window": (1.5, 3)}, TypeError, "window must be an int, got float 1.5"),
    "window length": ({"window": (1, 2, 3)}, TypeError, "window must be an int or a pair"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale type": ({"scale": "1"}, TypeError, "scale must be a float, got str"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    "q_start": ({"q_start": 2.0}, TypeError, "q_start must be an int, got float"),
    "k_start": ({"k_start": 2**63}, ValueError, "k_start must fit in 63 bits"),
    "seed type": ({"dropout_p": 0.1, "seed": 1.0}, TypeError, "seed must be an int"),
    "seed size": ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed must fit in 64 bits"),
    "seed tensor": ({"dropout_p": 0.1, "seed": x(2)}, TypeError, "seed must be an int or an int64 tensor"),
    "seed and generator": ({"dropout_p": 0.1, "seed": 1, "generator": torch.Generator()}, ValueError, "generator must be None"),
    "offset": ({"dropout_p": 0.1, "offset": -1}, ValueError, r"offset must be in \[0, 2\*\*32\), got -1"),
    "offset type": ({"dropout_p": 0.1, "offset": "1"}, TypeError, "offset must be an int"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        attn_ext.attention(**{**good(), **change})


@pytest.mark.parametrize(
    ("lse", "error", "message"),
    [
        (x(B, H, 4), ValueError, r"lse must have shape .* \(2, 6, 5\), got \(2, 6, 4\)"),
        (x(B, H, L, dtype=torch.float64), TypeError, "lse must be torch.float32"),
        ([1.0], TypeError, "lse must be a torch.Tensor"),
        (x(B, H, L, device="meta"), ValueError, "lse must be on query's device"),
    ],
)
def test_wrong_lse(lse: Any, error: type[Exception], message: str) -> None:
    tensors = good()
    with pytest.raises(error, match=message):
        attn_ext.attention_weights(tensors["query"], tensors["key"], lse=lse)


def test_what_build_leaves_alone() -> None:
    mask = x(1).bool()
    problem = Problem.build(**good(), attn_mask=mask, window=3, causal=True)
    assert problem.attn_mask is not None
    assert problem.attn_mask.shape == (1, 1, 1, 1)
    assert problem.attn_mask.data_ptr() == mask.data_ptr()
    assert problem.window == (3, 3)
    assert problem.reach == (3, 0)
    assert problem.scale == pytest.approx(D**-0.5)


def test_positions_as_far_apart_as_allowed() -> None:
    """Their difference and the lengths' do not fit in 64 bits."""
    query, key = torch.randn(1, 1, 1, D), torch.randn(1, 1, S, D)
    ends = {"q_start": 2**62 - 1, "k_start": 1 - 2**62}
    actual = attn_ext.attention(query, key, key, causal="lower_right", **ends)
    torch.testing.assert_close(actual, attn_ext.attention(query, key, key))


SIZE = st.integers(0, 3)
SHAPE = st.lists(SIZE, min_size=3, max_size=5).map(tuple)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shapes=st.tuples(SHAPE, SHAPE, SHAPE),
    mask_shape=st.none() | st.lists(SIZE, max_size=5).map(tuple),
    window=st.none() | st.tuples(st.integers(-3, 5), st.integers(-3, 5)),
    causal=st.sampled_from([None, True, "upper_left", "lower_right", "other"]),
    start=st.integers(-(2**63), 2**63),
    softcap=st.floats(),
    scale=st.floats(),
    dropout=st.floats(-0.5, 1.5),
)
def test_any_arguments_run_or_are_refused(
    shapes: Any,
    mask_shape: Any,
    window: Any,
    causal: Any,
    start: int,
    softcap: float,
    scale: float,
    dropout: float,
) -> None:
    """Fuzzing: no call ends in anything but a result of the right shape or one of two exceptions."""
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    mask = None if mask_shape is None else torch.randn(mask_shape)
    try:
        out = attn_ext.attention(
            query, key, value, attn_mask=mask, window=window, causal=causal, q_start=start,
            softcap=softcap, scale=scale, dropout_p=dropout,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        assert "must" in str(error)
        return
    assert out.shape == (*query.shape[:3], value.shape[3])
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape
