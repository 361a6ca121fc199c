"""Inside nn.TransformerEncoderLayer, nn.TransformerDecoderLayer and nn.Transformer, training and eval."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_ext
from attn_ext import multihead_forward

N, L, S, E, H = 3, 5, 7, 12, 4
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every attention that our modules ask for."""
    seen: list[int] = []
    original = multihead_forward.attention

    def attention(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(multihead_forward, "attention", attention)
    return seen


def swapped(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    assert attn_ext.replace_multihead_attention(twin)
    return twin


def assert_same(stock: nn.Module, ours: nn.Module, *tensors: Tensor, **options: Any) -> None:
    torch.testing.assert_close(
        ours(*tensors, **options), stock(*tensors, **options), atol=2e-6, rtol=1e-4
    )


def padding() -> Tensor:
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[0, 4:] = mask[2, 6:] = True
    return mask


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(
    training: bool, norm_first: bool, batch_first: bool, calls: list[int]
) -> None:
    stock = nn.TransformerEncoderLayer(
        E, H, 24, 0.0, norm_first=norm_first, batch_first=batch_first
    )
    ours = swapped(stock)
    stock.train(training), ours.train(training)
    x = torch.randn((N, S, E) if batch_first else (S, N, E))
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    for options in (
        {},
        {"src_key_padding_mask": padding()},
        {"src_mask": causal, "is_causal": True},
        {"src_mask": causal.isinf(), "src_key_padding_mask": padding()},
    ):
        calls.clear()
        with torch.set_grad_enabled(training):
            assert_same(stock, ours, x, **options)
        assert calls == [1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("left_aligned", [False, True])
def test_encoder_with_padding(training: bool, left_aligned: bool, calls: list[int]) -> None:
    """In eval, nn.TransformerEncoder makes a nested tensor where the padding is on the right."""
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).train(training)
    ours = swapped(stock)
    x, mask = torch.randn(N, S, E), padding()
    if not left_aligned:
        mask = mask.flip(1)
    with torch.set_grad_enabled(training):
        assert_same(stock, ours, x, src_key_padding_mask=mask)
    assert len(calls) == 2


def test_hooks_run_once_on_nested_tensors() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    ours = swapped(nn.TransformerEncoder(layer, 1)).eval()
    seen = []
    ours.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        ours(torch.randn(N, S, E), src_key_padding_mask=padding())
    assert seen == [1]


def test_additive_masks_stay_additive_in_eval() -> None:
    """The original turns a floating mask into a boolean one there."""
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    ours = swapped(layer).eval()
    x, mask = torch.randn(N, S, E), torch.randn(S, S)
    expected = layer.train()(x, src_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, src_mask=mask), expected, atol=2e-6, rtol=1e-4)


def test_padding_under_autocast_in_eval() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    ours = nn.TransformerEncoder(swapped(layer), 2, enable_nested_tensor=False).eval()
    x = torch.randn(N, S, E)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = ours(x, src_key_padding_mask=padding())
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=padding())
    torch.testing.assert_close(out[~padding()].float(), expected[~padding()], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("training", [False, True])
def test_decoder_layer(training: bool, calls: list[int]) -> None:
    stock = nn.TransformerDecoderLayer(E, H, 24, 0.0).train(training)
    ours = swapped(stock)
    target, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.set_grad_enabled(training):
        assert_same(stock, ours, target, memory, tgt_mask=mask, tgt_is_causal=True)
        assert_same(stock, ours, target, memory, memory_key_padding_mask=padding())
    assert len(calls) == 4


@pytest.mark.parametrize("training", [False, True])
def test_transformer(training: bool) -> None:
    stock = nn.Transformer(E, H, 2, 2, 24, 0.0, batch_first=True).train(training)
    ours = swapped(stock)
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    with torch.set_grad_enabled(training):
        assert_same(stock, ours, source, target, tgt_mask=mask, src_key_padding_mask=padding(), memory_key_padding_mask=padding())  # fmt: skip


def test_encoder_built_from_our_layer() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    stock = nn.TransformerEncoder(copy.deepcopy(layer), 2).eval()
    attn_ext.replace_multihead_attention(layer)
    ours = nn.TransformerEncoder(layer, 2).eval()
    assert all(type(m.self_attn) is attn_ext.MultiheadAttention for m in ours.layers)
    x = torch.randn(N, S, E)
    with torch.no_grad():
        assert_same(stock, ours, x, src_key_padding_mask=padding())


def test_training_with_gradients_and_dropout() -> None:
    torch.manual_seed(0)
    ours = swapped(nn.TransformerEncoderLayer(E, H, 24, 0.2)).train()
    x = torch.randn(S, N, E, requires_grad=True)
    ours(x, src_key_padding_mask=padding()).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters())
