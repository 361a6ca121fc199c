"""The Triton kernels compiled for any architecture on a machine without it.

What is compiled is what `attn_ext.triton_kernels.launch` would launch, through Triton's own
just-in-time path: only the driver, which would ask the GPU what it is, is replaced.
"""

from __future__ import annotations

import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attn_ext.problem import Problem
from attn_ext.triton_kernels import configurations, launch, tuning
from bench import amdgcn, sass
from bench.cuda_architectures import ARCHITECTURES as MULTIPROCESSORS

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.1},
    "mask": {"attn_mask": torch.empty(2, 1, 4096, 4096, dtype=torch.bool, device="meta")},
    "padding": {"key_padding_mask": torch.empty(2, 4096, dtype=torch.bool, device="meta")},
    # One for every batch, as a learned bias is, whose gradient is then a sum over batches.
    "bias": {"attn_mask": torch.empty(1, 8, 4096, 4096, device="meta")},
}
VARIANTS = (
    ("float16", (64, 128, 256), ("plain", "causal")),
    ("float16", (64, 128), ("dropout", "mask", "padding")),
    ("float32", (64, 128), ("plain",)),
)
"""(dtype, head_dims, kinds) of the report. Of bfloat16, instructions have other names only."""
KERNELS = ("forward", "backward_queries", "backward_keys", "backward_atomic")
ONE_PASS = (("weights", "plain"), ("weights", "mask"), ("mask_gradient", "bias"))
"""Kernels whose loops are over heads and batches, and the kind of problem that has them."""
PRODUCTS = {
    "forward": 2,
    "backward_queries": 3,
    "backward_keys": 4,
    "backward_atomic": 5,
    "weights": 1,
    "mask_gradient": 2,
}
"""Matrix products that a tile of queries and keys takes in each kernel."""
WAVE64 = ("gfx9",)
"""AMD's architectures with 64 threads a wavefront."""


@dataclass(frozen=True, order=True)
class Name:
    """Which kernel: `kind` is what the problem asks for, one of KINDS."""

    architecture: str
    kernel: str
    dtype: str
    head_dim: int
    kind: str

    def __str__(self) -> str:
        return f"{self.architecture} {self.kernel} {self.dtype} {self.head_dim} {self.kind}"


class OfflineDriver:
    """What Triton asks of a driver in order to compile, for an architecture that is not there."""

    def __init__(self) -> None:
        self.architecture = ""

    def get_current_device(self) -> str:
        return self.architecture

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        kind, _, number = self.architecture.partition("_")
        if kind == "sm":
            return GPUTarget("cuda", int(number), 32)
        return GPUTarget("hip", self.architecture, 64 if kind.startswith(WAVE64) else 32)


_offline = OfflineDriver()


def names(
    architectures: tuple[str, ...] = ARCHITECTURES,
    variants: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = VARIANTS,
) -> Iterator[Name]:
    """The kernels of the report."""
    for architecture in architectures:
        for dtype, head_dims, kinds in variants:
            for head_dim in head_dims:
                for kind in kinds:
                    for kernel in KERNELS:
                        yield Name(architecture, kernel, dtype, head_dim, kind)
                if "plain" in kinds:
                    for kernel, kind in ONE_PASS:
                        yield Name(architecture, kernel, dtype, head_dim, kind)


def compiled(name: Name) -> Any:
    """Triton's compiled kernel."""
    if launch.INTERPRETED:
        raise RuntimeError("the kernels of this process are interpreted; unset TRITON_INTERPRET")
    _offline.architecture = name.architecture
    driver.set_active(_offline)  # for good: this process launches nothing
    call = _call(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call.kernel.warmup(**call.arguments, **call.options, grid=(call.grid,))


def figures(name: Name, kernel: Any) -> dict[str, Any]:
    """Registers, spills, shared memory, the main loops and, for NVIDIA, blocks."""
    row: dict[str, Any] = {
        "architecture": name.architecture,
        "kernel": name.kernel,
        "dtype": name.dtype,
        "head_dim": name.head_dim,
        "kind": name.kind,
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
    }
    if name.architecture.startswith("gfx"):
        function = amdgcn.function(kernel.asm["amdgcn"])
        row |= _amd_resources(kernel.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "kernel.cubin")
            path.write_bytes(kernel.asm["cubin"])
            (function,) = sass.disassemble(path)
            (resources,) = sass.resources(path).values()
        number = name.architecture.removeprefix("sm_")
        multiprocessor = MULTIPROCESSORS[f"{number[:-1]}.{number[-1]}"]
        row |= {
            "registers": resources.registers,
            "spills": function.count.units["local memory"],
            "blocks_per_multiprocessor": multiprocessor.blocks_that_fit(
                resources.registers, 32 * kernel.metadata.num_warps, kernel.metadata.shared
            ),
        }
    needed = matrix_work(name, configuration(name)) / kernel.metadata.num_warps
    return row | {
        "matrix_instructions": _matrix_instructions(function),
        "loops": [
            {
                "instructions": loop.body.instructions,
                "matrix_work": needed,
                "per_matrix_unit": round(loop.body.instructions / needed, 2),
                "times_done": _rounded((loop.body.matrix_work or 0) / needed or None),
                "spills": loop.body.units["local memory"],
            }
            for loop in function.main_loops()
        ],
    }


def matrix_work(name: Name, config: configurations.Configuration) -> float:
    """What a tile's products take in units of m16n8k16, were none done by more than one warp.

    A loop's iteration is one tile. Its machine code says how much each warp does: `times_done` is
    above 1 where Triton has several warps do the same, None of tcgen05, which one thread starts.
    """
    width = configurations.block_of(name.head_dim)
    roundings = 3 if name.dtype == "float32" else 1  # products of parts rounded to TF32
    pairs = config.BLOCK_M * config.BLOCK_N
    return roundings * PRODUCTS[name.kernel] * pairs * width / sass.MATRIX_UNIT


def _matrix_instructions(function: sass.Function) -> dict[str, int]:
    found: dict[str, int] = {}
    for x in function.instructions:
        if x.unit == "tensor":
            found[x.name] = found.get(x.name, 0) + 1
    return found


def _amd_resources(assembly: str) -> dict[str, Any]:
    """From the metadata that the compiler writes into its assembly."""

    def entry(key: str) -> int:
        match = re.search(rf"^\s+\.{key}:\s+(\d+)", assembly, re.M)
        return int(match[1]) if match else 0

    return {
        "registers": entry("vgpr_count"),
        "spills": entry("vgpr_spill_count"),
        # These go to lanes of vector registers, not to memory.
        "scalar_spills": entry("sgpr_spill_count"),
    }


def _rounded(x: float | None) -> float | None:
    return None if x is None else round(x, 2)


def configuration(name: Name) -> configurations.Configuration:
    """What the library launches this kernel with."""
    size = tuning.size_of(name.architecture, _problem(name))
    return configurations.configuration_of(name.kernel, *size)


def _problem(name: Name) -> Problem:
    """8 heads of 4096 queries and keys, contiguous and aligned."""
    shape = (2, 8, 4096, name.head_dim)
    tensor = torch.empty(shape, dtype=DTYPES[name.dtype], device="meta")
    return Problem.build(tensor, tensor, tensor, **KINDS[name.kind])


def _call(name: Name) -> launch.Call:
    problem = _problem(name)
    tensor = problem.query
    lse = torch.empty(2, 8, 4096, device="meta")
    dropout = (1, 0) if problem.dropout_p else None
    start = (name.architecture, 0, problem, dropout)
    weights = torch.empty(2, 1, 4096, 4096, dtype=tensor.dtype, device="meta")
    dmask = problem.attn_mask if name.kernel == "mask_gradient" else None
    plans = [
        launch.forward_plan(*start, tensor, lse),
        launch.weights_plan(*start, lse, weights, True),
        *launch.backward_plans(
            *(*start, tensor, lse, tensor, None, None, 1.0, tensor, tensor, tensor, dmask, lse),
            atomic=name.kernel == "backward_atomic",
        ),
    ]
    plan = next(plan for plan in plans if plan.name == name.kernel)
    return plan.call(configuration(name))


def measured(name: Name) -> dict[str, Any]:
    """`figures` of a kernel compiled now. For a process of its own, as in a pool."""
    os.nice(5)
    return figures(name, compiled(name))
