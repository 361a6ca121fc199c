"""What the emulator sees of the CUDA kernels beyond their results."""

from __future__ import annotations

import emulated
import pytest
import torch

import attn_ext
from attn_ext import dispatch


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_matrices_are_loaded_without_bank_conflicts(
    head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = emulated.backend(emulated.ARCHITECTURES[0])
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "cuda_emulated"))
    monkeypatch.setitem(dispatch._modules, "cuda_emulated", module)
    tensors = [torch.randn(1, 1, 70, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    module._cuda.take_bank_conflicts()
    out = attn_ext.attention(*tensors, causal=True, backend="cuda_emulated")
    out.sum().backward()
    attn_ext.attention_weights(*tensors[:2], causal=True, backend="cuda_emulated")
    extra, phases = module._cuda.take_bank_conflicts()
    assert phases > 0
    assert extra == 0
