"""Swapping attention in a model and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attn_ext
from attn_ext import MultiheadAttention


def model() -> nn.Module:
    tied = nn.MultiheadAttention(12, 4)
    return nn.ModuleDict(
        {
            "layer": nn.TransformerDecoderLayer(12, 4, 24),
            "first": tied,
            "second": tied,
            "linear": nn.Linear(12, 12),
        }
    )


def test_there_and_back() -> None:
    module = model().eval()
    parameters = dict(module.named_parameters())
    keys = list(module.state_dict())
    before = dict(module.named_modules(remove_duplicate=False))
    replaced = attn_ext.replace_multihead_attention(module)
    assert sorted(replaced) == ["first", "layer.multihead_attn", "layer.self_attn", "second"]
    assert all(replaced[name] is before[name] for name in replaced)
    assert all(type(module.get_submodule(name)) is MultiheadAttention for name in replaced)
    assert module["first"] is module["second"]
    assert not module["first"].training
    assert all(p is parameters[name] for name, p in module.named_parameters())
    assert list(module.state_dict()) == keys
    assert module["first"].out_proj is replaced["first"].out_proj
    assert attn_ext.replace_multihead_attention(module) == {}
    module.train()
    attn_ext.restore_multihead_attention(module, replaced)
    after = dict(module.named_modules(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)
    assert module["first"].training


def test_hooks_move_along_and_the_old_module_keeps_its_own() -> None:
    holder = nn.Sequential(nn.MultiheadAttention(12, 4))
    seen = []
    holder[0].register_forward_hook(lambda *_: seen.append(1))
    replaced = attn_ext.replace_multihead_attention(holder)
    x = torch.randn(5, 2, 12)
    holder[0](x, x, x)
    assert seen == [1]
    assert len(replaced["0"]._forward_pre_hooks) == 0


def test_an_optimizer_built_before_trains_the_new_module() -> None:
    holder = nn.Sequential(nn.MultiheadAttention(12, 4))
    optimizer = torch.optim.SGD(holder.parameters(), 0.1)
    attn_ext.replace_multihead_attention(holder)
    x = torch.randn(5, 2, 12)
    before = holder[0].in_proj_weight.detach().clone()
    holder[0](x, x, x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(holder[0].in_proj_weight, before)


def test_subclasses_are_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    holder = nn.Sequential(Own(12, 4))
    assert attn_ext.replace_multihead_attention(holder) == {}
    assert type(holder[0]) is Own


def test_from_module() -> None:
    stock = nn.MultiheadAttention(12, 4, kdim=6, vdim=10, add_bias_kv=True).eval()
    ours = MultiheadAttention.from_module(stock)
    query, key, value = torch.randn(5, 2, 12), torch.randn(7, 2, 6), torch.randn(7, 2, 10)
    torch.testing.assert_close(ours(query, key, value), stock(query, key, value))
    assert not ours.training
    assert ours.bias_k is stock.bias_k


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        attn_ext.replace_multihead_attention([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_module"):
        attn_ext.replace_multihead_attention(nn.MultiheadAttention(12, 4))
    with pytest.raises(
        TypeError,
        match=r"module must be a torch\.nn\.MultiheadAttention and no subclass, got Linear",
    ):
        MultiheadAttention.from_module(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_from_module_takes_no_subclass() -> None:
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="and no subclass, got Own"):
        MultiheadAttention.from_module(Own(12, 4))


def test_what_changed_since_goes_back() -> None:
    holder = nn.Sequential(nn.MultiheadAttention(12, 4))
    replaced = attn_ext.replace_multihead_attention(holder)
    state = {name: tensor + 1 for name, tensor in holder.state_dict().items()}
    holder.load_state_dict(state, assign=True)
    holder[0].register_forward_pre_hook(lambda *_: None)
    assigned = holder[0].in_proj_weight
    attn_ext.restore_multihead_attention(holder, replaced)
    assert holder[0].in_proj_weight is assigned
    assert len(holder[0]._forward_pre_hooks) == 1


def test_modules_with_another_forward_are_left_alone() -> None:
    patched, compiled = nn.MultiheadAttention(12, 4), nn.MultiheadAttention(12, 4)
    patched.forward = lambda *_: None  # type: ignore[method-assign]
    compiled.compile(backend="eager")
    assert attn_ext.replace_multihead_attention(nn.Sequential(patched, compiled)) == {}
    for module in (patched, compiled):
        with pytest.raises(ValueError, match="got one with another"):
            MultiheadAttention.from_module(module)


def test_modules_that_know_their_parent() -> None:
    holder = nn.Sequential(nn.MultiheadAttention(12, 4), nn.Linear(2, 2))
    holder[1].parent = holder
    assert list(attn_ext.replace_multihead_attention(holder)) == ["0"]


def test_restoring_what_was_not_replaced() -> None:
    holder = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'0', got Linear"):
        attn_ext.restore_multihead_attention(holder, {"0": nn.MultiheadAttention(12, 4)})
