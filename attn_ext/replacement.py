"""Swapping the attention of an existing model, and the way back."""

from __future__ import annotations

from torch import nn

from attn_ext.multihead import MultiheadAttention, hand_back, has_stock_forward


def replace_multihead_attention(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Replace every torch.nn.MultiheadAttention in a model, in place.

    The new modules share parameters, buffers, hooks and out_proj with the old ones, so optimizers
    and references to parameters stay valid. A module that stands in several places is replaced by
    one and the same. Subclasses of torch.nn.MultiheadAttention, and modules that were compiled with
    `module.compile()` or given another forward, are left alone: they have a forward of their own.

    Args:
        model: any module that contains some.

    Returns:
        What was replaced, by qualified name: give it to `restore_multihead_attention`.

    Raises:
        TypeError: model is not a module.
        ValueError: model itself is one, so that there is nothing to put the new one into.
    """
    _check(model)
    if type(model) is nn.MultiheadAttention:
        raise ValueError(
            "model must contain the torch.nn.MultiheadAttention to replace, got one itself; "
            "MultiheadAttention.from_module(model) gives the new module"
        )
    # Each parent once, so that a cycle of modules ends; each of its children, so that a module in
    # two places is found in both.
    replaced = {
        f"{parent_name}.{name}" if parent_name else name: module
        for parent_name, parent in model.named_modules()
        for name, module in parent._modules.items()
        if isinstance(module, nn.MultiheadAttention) and has_stock_forward(module)
    }
    new = {id(module): MultiheadAttention.from_module(module) for module in replaced.values()}
    for name, module in replaced.items():
        _set(model, name, new[id(module)])
    return replaced


def restore_multihead_attention(
    model: nn.Module, replaced: dict[str, nn.MultiheadAttention]
) -> None:
    """Undo `replace_multihead_attention`: put the old modules back, in the new ones' state.

    Parameters assigned, hooks registered and settings changed since then go with them.

    Args:
        model: the model that it was called on.
        replaced: what it returned.

    Raises:
        TypeError: model is not a module.
        AttributeError: model has no module of such a name.
        ValueError: the module of that name is not a MultiheadAttention of this package.
    """
    _check(model)
    present = {name: model.get_submodule(name) for name in replaced}
    for name, module in present.items():
        if not isinstance(module, MultiheadAttention):
            raise ValueError(
                f"model must hold an attn_ext.MultiheadAttention at {name!r}, "
                f"got {type(module).__name__}"
            )
    for name, module in replaced.items():
        hand_back(present[name], module)  # type: ignore[arg-type]
        _set(model, name, module)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
