"""Second derivatives, through the reference: no kernel exists for them.

They hold (B, Hq, Lq, Lk) tensors in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ext.backends import reference
from attn_ext.problem import Problem


def differentiable_inputs(problem: Problem) -> tuple[Tensor | None, ...]:
    return problem.query, problem.key, problem.value, problem.attn_mask, problem.sinks


def second_derivative(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    mask_gradient: bool,
    second_gradients: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of the backward pass for (query, key, value, attn_mask, sinks, dout, dlse)."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            _fresh(tensor, index != 3 or mask_gradient)
            for index, tensor in enumerate(differentiable_inputs(problem))
        ]
        output_gradients = [_fresh(dout), _fresh(dlse)]
        query, key, value, attn_mask, sinks = inputs
        outputs: tuple[Tensor, ...] = reference.forward(
            problem.replace(query=query, key=key, value=value, attn_mask=attn_mask, sinks=sinks)
        )
        first = output_gradients
        if dlse is None:
            outputs, first = outputs[:1], output_gradients[:1]
        return _differentiate_twice(
            outputs, inputs, first, second_gradients, inputs + output_gradients, create_graph
        )


def weights_second_derivative(
    problem: Problem,
    lse: Tensor,
    dweights: Tensor,
    average: bool,
    mask_gradient: bool,
    second_gradients: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of the weights' backward pass for (query, key, attn_mask, lse, dweights)."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            _fresh(problem.query),
            _fresh(problem.key),
            _fresh(problem.attn_mask, mask_gradient),
            _fresh(lse),
        ]
        output_gradient = _fresh(dweights)
        query, key, attn_mask, lse_input = inputs
        problem = problem.replace(query=query, key=key, attn_mask=attn_mask)
        assert lse_input is not None
        outputs = (reference.weights(problem, lse_input, average),)
        return _differentiate_twice(
            outputs,
            inputs,
            [output_gradient],
            second_gradients,
            [*inputs, output_gradient],
            create_graph,
        )


def _fresh(tensor: Tensor | None, differentiable: bool = True) -> Tensor | None:
    """An alias that needs a gradient and stays connected to whatever graph the tensor is in."""
    if tensor is None or not differentiable or not tensor.is_floating_point():
        return tensor
    alias = tensor.view_as(tensor)
    return alias if alias.requires_grad else alias.detach().requires_grad_()


def _differentiate_twice(
    outputs: Any,
    inputs: list[Tensor | None],
    output_gradients: list[Tensor | None],
    second_gradients: tuple[Tensor | None, ...],
    wanted: list[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    grads = iter(
        torch.autograd.grad(
            outputs, leaves, output_gradients, create_graph=True, materialize_grads=True
        )
    )
    first = [
        next(grads) if tensor is not None and tensor.requires_grad else None for tensor in inputs
    ]
    pairs = [
        (grad, second)
        for grad, second in zip(first, second_gradients, strict=True)
        if grad is not None and second is not None
    ]
    active = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
    results = iter(
        torch.autograd.grad(
            [grad for grad, _ in pairs],
            active,
            [second for _, second in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
    return [
        next(results) if tensor is not None and tensor.requires_grad else None for tensor in wanted
    ]
