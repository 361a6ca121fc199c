"""Every kernel of the backends for GPUs, on problems of a few tiles: what `make gpu` runs under
compute-sanitizer, memcheck and racecheck. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE_BACKENDS, Case, Options, Sizes, _everything, make_inputs
from test_contract import assert_contract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIONS = {
    "plain": lambda s: {},
    "causal": lambda s: {"causal": True, "window": (100, None)},
    "general": _everything,
    "dropout": lambda s: {"dropout_p": 0.3, "seed": 7},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256, 67])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", DEVICE_BACKENDS)
def test_kernels(name: str, kind: str, head_dim: int, dtype: torch.dtype) -> None:
    """Two tiles and a rest of queries and of keys, in both passes of attention and its weights."""

    def options(sizes: Sizes) -> Options:
        return OPTIONS[kind](sizes)

    with torch.device("cuda"):
        sizes = Sizes(1, 2, 1, 261, 293, head_dim, head_dim)
        assert_contract(make_inputs(Case(kind, options, sizes), dtype), dtype, name, average=True)
