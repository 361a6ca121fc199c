"""What the emulator sees of the CUDA kernels beyond their results."""

from __future__ import annotations

from types import ModuleType

import emulated
import pytest
import torch
from cases import Case, Sizes, make_inputs
from test_contract import assert_contract

import attn_ext
from attn_ext import dispatch
from attn_ext.benchmark import accuracy


def register(architecture: int, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend of an emulated architecture, which a test may then ask for."""
    module = emulated.backend(architecture)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "cuda_emulated"))
    monkeypatch.setitem(dispatch._modules, "cuda_emulated", module)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_matrices_are_loaded_without_bank_conflicts(
    dropout_p: float, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = register(emulated.ARCHITECTURES[0], monkeypatch)
    tensors = [torch.randn(1, 1, 70, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    module._cuda.take_bank_conflicts()
    options = {"causal": True, "dropout_p": dropout_p, "backend": "cuda_emulated"}
    out = attn_ext.attention(*tensors, **options)
    out.sum().backward()
    attn_ext.attention_weights(*tensors[:2], **options)
    extra, phases = module._cuda.take_bank_conflicts()
    assert phases > 0
    assert extra == 0


WIDTHS = (32, 64, 96, 128, 192, 256)
KIB = 1024


@pytest.mark.parametrize(
    ("kib", "dtype", "widest"),
    [
        (64, torch.float16, 256),  # 7.5
        (64, torch.float32, 128),
        (99, torch.float32, 256),  # 8.6, 8.9 and 12.0
        (99, torch.bfloat16, 256),
    ],
)
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_widths_that_a_block_has_room_for(
    kib: int, dtype: torch.dtype, widest: int, allow_tf32: bool
) -> None:
    module = emulated.backend(emulated.ARCHITECTURES[0])._cuda
    needed = [module.shared_bytes(dtype, w, w, allow_tf32, kib * KIB) for w in WIDTHS]
    assert [w for w, n in zip(WIDTHS, needed, strict=True) if n <= kib * KIB] == [
        w for w in WIDTHS if w <= widest
    ]


@pytest.mark.parametrize("value_dim", [128, 189, 192, 250, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", emulated.ARCHITECTURES)
def test_gradients_of_wide_heads(
    architecture: int, dtype: torch.dtype, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an operand has no room in shared memory, it is read in place."""
    register(architecture, monkeypatch)
    if architecture == 750 and dtype is torch.float32 and value_dim > 128:
        pytest.skip("7.5 has too little shared memory")
    sizes = [(1, 2, 70, 128), (1, 1, 75, 128), (1, 1, 75, value_dim), (1, 2, 70, value_dim)]
    tensors = [torch.randn(size).to(dtype) for size in sizes]

    def results(backend: str, dtype: torch.dtype, **more: object) -> list[torch.Tensor]:
        *inputs, dout = (x.to(dtype) for x in tensors)
        for x in inputs:
            x.requires_grad_()
        out = attn_ext.attention(*inputs, causal="lower_right", backend=backend, **more)
        return [out, *torch.autograd.grad(out, inputs, dout)]

    for more in ({}, {"softcap": 20.0}):  # of halves: the plain kernels and the general ones
        exact = results("reference", torch.float64, **more)
        ours = results("cuda_emulated", dtype, **more)
        theirs = results("reference", dtype, **more)
        for x, y, z in zip(ours, theirs, exact, strict=True):
            unit = accuracy.rounding_unit(z, dtype)
            assert accuracy.error(x, z) <= accuracy.FACTOR * accuracy.error(y, z) + unit


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", emulated.ARCHITECTURES)
@pytest.mark.parametrize("start", [0, 2**32 - 64])
def test_dropout_of_every_width(
    start: int,
    architecture: int,
    dtype: torch.dtype,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Halves have kernels for dropout alone; a block's rows and two tiles of keys, and rests."""
    if start > 0 and head_dim != 64:
        pytest.skip("where positions start again is the same at any width")
    if architecture == 750 and dtype is torch.bfloat16:
        pytest.skip("7.5 has no bfloat16")
    register(architecture, monkeypatch)
    sizes = Sizes(1, 2, 1, 140, 270, head_dim, head_dim)
    options = {"dropout_p": 0.3, "seed": 11, "causal": "lower_right", "window": (200, None)}
    options |= {"q_start": start, "k_start": start} if start > 0 else {}
    case = Case("", lambda s: options, sizes)
    assert_contract(make_inputs(case, dtype), dtype, "cuda_emulated", average=True)
