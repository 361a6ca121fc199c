"""pytest-benchmark: `pytest bench` compares our attention with PyTorch's, by shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attn_ext

KERNELS: dict[str, Callable[..., Any]] = {
    "attn_ext": attn_ext.scaled_dot_product_attention,
    "torch": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 8, 1024, 64), (1, 8, 2048, 128)], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_attention(
    benchmark: Any, kernel: str, dtype: str, shape: tuple[int, ...], backward: bool
) -> None:
    benchmark.group = f"{shape} {dtype}, {'forward and backward' if backward else 'forward'}"
    tensors = [torch.randn(shape).to(getattr(torch, dtype)) for _ in range(3)]
    if backward:
        tensors = [x.requires_grad_() for x in tensors]
        benchmark(lambda: torch.autograd.grad(KERNELS[kernel](*tensors).sum(), tensors))
    else:
        benchmark(KERNELS[kernel], *tensors)
