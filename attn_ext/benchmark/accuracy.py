"""How far a result is from the exact one, and how far it may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 2.0
"""How many times PyTorch's own error a result may have."""


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference; infinite unless NaN and inf are in the same places."""
    if not expected.numel():
        return 0.0
    mean = (actual.double() - expected).square().mean().item()
    if math.isfinite(mean):
        return math.sqrt(mean)
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(actual), finite):
        return math.inf
    beyond = (x[~finite].double().nan_to_num(5.0) for x in (actual, expected))
    if not torch.equal(*beyond):
        return math.inf
    if not finite.any():
        return 0.0
    return (actual[finite].double() - expected[finite]).square().mean().sqrt().item()


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two elements; infinite where either is NaN or inf."""
    difference = (actual.double() - expected).abs().nan_to_num(math.inf, posinf=math.inf)
    return difference.max().item() if difference.numel() else 0.0


def rounding_unit(expected: Tensor, dtype: torch.dtype) -> float:
    """What rounding a right result to a dtype may cost: the least that an error limit can be.

    Where the exact result cancels to nothing, that of the terms, which are of size 1.
    """
    size = _size(expected)
    return torch.finfo(dtype).eps * (size if size > 1e-12 else 1.0)


def _size(tensor: Tensor) -> float:
    """The root mean square of the finite elements."""
    mean = tensor.double().square().mean().item()
    if math.isfinite(mean):
        return math.sqrt(mean)
    finite = tensor[torch.isfinite(tensor)]
    return finite.double().square().mean().sqrt().item() if finite.numel() else 0.0
