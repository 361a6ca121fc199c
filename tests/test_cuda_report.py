"""`make cuda-report`: what it reads, what it counts, and what it requires of the kernels."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess

import pytest
from rich.console import Console

import setup_cuda
from bench import cuda_report, sass
from bench.cuda_architectures import ARCHITECTURES, REGISTERS, shares
from bench.cuda_kernels import Compiler, Kernel, Launch, Name, parse_launches

NVCC = setup_cuda.find_nvcc(os.environ)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@pytest.mark.parametrize(
    ("readable", "expected"),
    [
        (
            "void attn_ext::cuda::run_forward<attn_ext::cuda::Float16, 64, (attn_ext::cuda::Variant)1>(attn_ext::Problem, attn_ext::ForwardArguments)",
            Name("forward", "float16", 64, "dropout"),
        ),
        (
            "void attn_ext::cuda::key_gradients<attn_ext::cuda::TF32, 256, true, (attn_ext::cuda::Pass)1, 2>(attn_ext::Problem, attn_ext::BackwardArguments)",
            Name("backward_keys", "TF32", 256, "general Pass 1 2"),
        ),
        (
            "void attn_ext::cuda::row_terms<float>(attn_ext::Problem, attn_ext::BackwardArguments)",
            Name("row_terms", "float32", None, ""),
        ),
    ],
)
def test_names(readable: str, expected: Name) -> None:
    assert Name.of(readable) == expected


def test_names_read_well() -> None:
    assert str(Name("forward", "float16", 64, "plain")) == "forward float16 64 plain"
    assert str(Name("row_terms", "float32", None, "")) == "row_terms float32"
    with pytest.raises(ValueError, match="main"):
        Name.of("main(int, char**)")


def test_launches_of_a_kernel_are_one() -> None:
    text = "plain\t_Z1a\ta()\t128\t1024\nmask\t_Z1b\tb()\t64\t0\ncausal\t_Z1a\ta()\t128\t512\nplain\t_Z1a\ta()\t128\t1024\n"
    assert parse_launches(text) == {
        "_Z1a": Launch("a()", 128, 1024, ("plain", "causal")),
        "_Z1b": Launch("b()", 64, 0, ("mask",)),
    }


OCCUPANCY = r"""
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
  int number, warps;
  std::size_t shared, block_shared, reserved;
  while (std::scanf("%d %d %zu %zu %zu", &number, &warps, &shared, &block_shared, &reserved) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = number / 10, device.computeMinor = number % 10;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared;
    device.sharedMemPerBlockOptin = block_shared, device.reservedSharedMemPerBlock = reserved;
    for (int threads = 32; threads <= 512; threads += 96) {
      for (int registers = 24; registers <= 255; registers += 33) {
        for (std::size_t bytes = 0; bytes <= block_shared; bytes += 7000) {
          cudaOccFuncAttributes kernel;
          kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
          kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
          kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
          kernel.maxDynamicSharedSizeBytes = bytes;
          cudaOccDeviceState state;
          state.carveoutConfig = 100;
          cudaOccResult result;
          const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes);
          std::printf("%d %d %zu %d\n", threads, registers, bytes,
                      error ? -error : result.activeBlocksPerMultiprocessor);
        }
      }
    }
  }
}
"""


@needs_nvcc
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_a_multiprocessor_holds(name: str, tmp_path: pathlib.Path) -> None:
    """As NVIDIA's own calculator has it."""
    architecture = ARCHITECTURES[name]
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    toolkit = setup_cuda.Toolkit(NVCC, {})
    include = pathlib.Path(toolkit.runtime).parent.parent / "include"
    command = ["g++", f"-I{include}", tmp_path / "occupancy.cpp", "-o", tmp_path / "occupancy"]
    subprocess.run(command, check=True)
    device = (
        architecture.number,
        architecture.warps,
        architecture.shared_bytes,
        architecture.block_shared_bytes,
        architecture.reserved_bytes,
    )
    output = subprocess.run(
        [tmp_path / "occupancy"],
        input=" ".join(map(str, device)),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert len(lines) > 400
    for threads, registers, shared_bytes, blocks in lines:
        ours = architecture.blocks_that_fit(registers, threads, shared_bytes)
        assert ours == blocks, (threads, registers, shared_bytes)


def test_registers_limit_blocks() -> None:
    assert ARCHITECTURES["8.0"].blocks_that_fit(255, 128, 0) == 2
    assert ARCHITECTURES["8.0"].blocks_that_fit(255, 256, 0) == 1
    assert REGISTERS // (168 * 128) == ARCHITECTURES["8.0"].blocks_that_fit(168, 128, 0) == 3


def loop_of(*opcodes: str) -> sass.Count:
    return sass.Count.of(sass.Instruction(0, *x.split("|"), "") for x in opcodes)


def test_shares_of_tensor_time() -> None:
    """At 8.0 a product takes 8 cycles; shared memory, 128 bytes a cycle, serves four of them."""
    loop = loop_of(
        *(["|HMMA.16816.F32"] * 8),  # 64 cycles
        "|LDSM.16.M88.4", "|LDSM.16.MT88.2", "|LDS.128", "|STS", "|LDGSTS.E.BYPASS.128", "@!PT|LDS",
        *(["|MUFU.EX2"] * 2),
        *(["|FFMA"] * 4),
        "|FMNMX", "|NOP",
    )  # fmt: skip
    assert shares(ARCHITECTURES["8.0"], loop) == {
        "shared memory": round(4 * (4 + 2 + 4 + 1 + 4) / 64, 3),
        "exp": 16 / 64,
        "FMA pipe": 8 / 64,
        "ALU pipe": round(2 / 64, 3),
        "issue": round(21 / 64, 3),
    }
    half = shares(ARCHITECTURES["8.6"], loop)
    assert half is not None
    assert half["exp"] == 8 / 64
    assert shares(ARCHITECTURES["9.0"], loop) is None
    assert shares(ARCHITECTURES["8.0"], loop_of("|FFMA")) is None


def test_tf32_multiplies_at_half_the_rate() -> None:
    loops = (loop_of(f"|HMMA.1688.F32{kind}", "|MUFU.EX2") for kind in ("", ".TF32"))
    half, tf32 = (shares(ARCHITECTURES["8.0"], loop) for loop in loops)
    assert half["exp"] == 2 * tf32["exp"] == 2


def kernel_of(
    per_matrix_unit: float,
    spills: int = 0,
    kinds: tuple[str, ...] = ("plain",),
    inner_loops: tuple[int, ...] = (),
    **name: object,
) -> Kernel:
    loop = {
        "per_matrix_unit": per_matrix_unit,
        "hot_path_per_matrix_unit": 3.0,
        "inner_loops": list(inner_loops),
        "mix": {"tensor": 256, "LDSM": 80},
        "shares_of_tensor_time": {"exp": 0.5, "issue": 0.25},
    }
    found = Name(
        **{"operation": "forward", "dtype": "float16", "head_dim": 64, "variant": "plain", **name}
    )
    resources = sass.Resources(255, 0, 0, spills, spills)
    return Kernel(ARCHITECTURES["8.0"], found, kinds, resources, 128, 49152, (loop,))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (kernel_of(4.5), [True]),
        (kernel_of(4.51), [False]),
        (kernel_of(4.0, spills=4), [False]),
        (kernel_of(4.0, dtype="bfloat16"), []),
        (kernel_of(4.0, head_dim=96), []),
        (kernel_of(4.0, kinds=("mask",)), []),
        (kernel_of(7.0, kinds=("dropout",)), [True]),
        (kernel_of(7.0, kinds=("dropout",), inner_loops=(90,)), [None]),
        (kernel_of(7.1, kinds=("dropout",), inner_loops=(90,)), [False]),
        (kernel_of(3.5, operation="backward_keys"), [True]),
        (kernel_of(3.51, operation="backward_queries"), [False]),
    ],
)
def test_verdicts(kernel: Kernel, expected: list[bool | None]) -> None:
    assert [met for _, _, met in cuda_report.verdicts([kernel])] == expected


def test_spilling_kernels_are_found() -> None:
    kernels = [
        kernel_of(4, 4),
        kernel_of(4, 0),
        kernel_of(4, 4, head_dim=192),
        kernel_of(4, 8, head_dim=None),
    ]
    assert cuda_report.spilling(kernels) == [kernels[0], kernels[3]]


def test_tables_and_file() -> None:
    kernels = [kernel_of(4.25), kernel_of(4.75, head_dim=96, spills=8)]
    output = io.StringIO()
    console = Console(file=output, width=200)
    console.print(cuda_report.kernel_table(kernels))
    console.print(cuda_report.target_table(kernels))
    text = output.getvalue()
    assert "forward float16 64 plain" in text
    assert "8, 8" in text
    (line,) = [line for line in text.splitlines() if "4.63, 4.56" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "forward 64", "4.63, 4.56", "320 B, 284 B", "4.50, 0 B", "4.25", "3.00", "0 B", "met",
    ]  # fmt: skip
    rows = [cuda_report.as_dictionary(x) for x in kernels]
    written = cuda_report.as_text({"command": "make", "kernels": rows})
    assert json.loads(written)["kernels"][1]["spill_stores_bytes"] == 8
    assert sum('"registers"' in line for line in written.splitlines()) == 2


@functools.cache
def compiled(name: str) -> list[Kernel]:
    return Compiler(NVCC, os.cpu_count() or 1).kernels([ARCHITECTURES[name]])


@needs_nvcc
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["7.5", "8.0", "9.0"])
def test_what_the_compiler_made(name: str) -> None:
    """Every kernel, nothing spilled up to a head_dim of 128, and no double in main loops."""
    kernels = compiled(name)
    operations = {
        "forward",
        "backward_queries",
        "backward_keys",
        "weights",
        "mask_gradient",
        "row_terms",
    }
    assert {x.name.operation for x in kernels} == operations
    plain = [
        x for x in kernels if x.name.operation == "forward" and x.name.variant.startswith("plain")
    ]
    found = {(x.name.dtype, x.name.head_dim) for x in plain}
    dtypes = ["float16", "bfloat16"] if ARCHITECTURES[name].has_bfloat16 else ["float16"]
    assert found >= set(itertools.product(dtypes, (32, 64, 96, 128)))
    assert all(x.loops for x in plain)
    # Double is 32 and 64 times slower than float on 7.5, 8.6 and 8.9.
    halves = [x for x in kernels if x.name.dtype in ("float16", "bfloat16")]
    assert [str(x.name) for x in halves if any("double" in loop["mix"] for loop in x.loops)] == []
    spilling = cuda_report.spilling(kernels)
    assert [f"{x.name}: {x.resources.spill_stores} B stored" for x in spilling] == []


@needs_nvcc
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_instructions_for_each_product(kind: str) -> None:
    """Beside FlashAttention-2, at 8.0."""
    verdicts = [x for x in cuda_report.verdicts(compiled("8.0")) if x[0].kind == kind]
    assert len(verdicts) >= sum(target.kind == kind for target in cuda_report.TARGETS)
    missed = [
        f"{kernel.name} ({target.kind}): {kernel.loops[0]['per_matrix_unit']}, at most {target.at_most}"
        for target, kernel, met in verdicts
        if met is False
    ]
    assert not missed
