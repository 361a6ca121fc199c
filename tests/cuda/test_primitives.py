"""The inline PTX of csrc/cuda/primitives.cuh, which the emulator never sees.

Each wrapper alone in a kernel, compiled to PTX: the instruction's operands must be what was loaded
from the kernel's parameters and what is stored, in the order that the PTX ISA states.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import tempfile

import pytest

import setup_cuda

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = setup_cuda.find_nvcc(os.environ)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not there")

# By kernel: its instructions, where d is what it stores and p0, p1, ... are its parameters, an
# address standing for what is loaded from there.
MMA = "mma.sync.aligned.{}.row.col.f32.{}.f32"
LOAD = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{d0, d1, d2, d3}}, [p1 in shared memory];"
SINCE_75 = {
    "load_plain": [LOAD.format("")],
    "load_transposed": [LOAD.format(".trans")],
    "address": ["mad.wide.s32 d0, p2, p3, p1;"],
    "product_wide": ["mul.wide.u32 d0, p1, p2;"],
    "bytes": ["prmt.b32 d0, p1, p2, p3;"],
    "comparison": ["set.ge.u32.f16x2 d0, p1, p2;"],
    "power": ["ex2.approx.ftz.f32 d0, p1;"],
    "shuffle_by_xor": ["shfl.sync.bfly.b32 d0, p1, p2, 0x1f, 0xffffffff;"],
    "shuffle_by_lane": ["shfl.sync.idx.b32 d0, p1, p2, 0x1f, 0xffffffff;"],
}
SUMS = "{d0, d1, d2, d3}"
WHOLE = f" {SUMS}, {{p1.0, p1.1, p1.2, p1.3}}, {{p2.0, p2.1}}, {SUMS};"
EXPECTED = {
    75: {
        **SINCE_75,
        # Two halves of the summed dimension: the first of two chunks, then the second.
        "product_float16": [
            MMA.format("m16n8k8", "f16.f16") + f" {SUMS}, {{p1.0, p1.1}}, {{p2.0}}, {SUMS};",
            MMA.format("m16n8k8", "f16.f16") + f" {SUMS}, {{p1.2, p1.3}}, {{p2.1}}, {SUMS};",
        ],
    },
    80: {
        **SINCE_75,
        "product_float16": [MMA.format("m16n8k16", "f16.f16") + WHOLE],
        "product_bfloat16": [MMA.format("m16n8k16", "bf16.bf16") + WHOLE],
        "product_tf32": [MMA.format("m16n8k8", "tf32.tf32") + WHOLE],
        # The first source becomes the upper half.
        "pack_float16": ["cvt.rn.f16x2.f32 d0, p2, p1;"],
        "pack_bfloat16": ["cvt.rn.bf16x2.f32 d0, p2, p1;"],
        "round_to_tf32": ["cvt.rna.tf32.f32 d0, p1;"],
        "copy": ["cp.async.cg.shared.global [p0 in shared memory], [p1], 16, p2;"],
        "commit": ["cp.async.commit_group;"],
        "wait": ["cp.async.wait_group 3;"],
    },
}


@functools.cache
def bodies(architecture: int) -> dict[str, str]:
    """The PTX of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "primitives.ptx"
        options = ["-ptx", f"-arch=sm_{architecture}", "-std=c++17", f"-I{ROOT / 'csrc'}"]
        options.append(f"-DATTN_EXT_TESTED={architecture}")
        source = ROOT / "tests" / "cuda" / "primitives.cu"
        subprocess.run([str(NVCC), *options, str(source), "-o", str(output)], check=True)
        found = re.findall(r"\.entry (\w+)\((.*?)\n\}", output.read_text(), flags=re.DOTALL)
    return dict(found)


def instructions(kernel: str, body: str) -> list[str]:
    """The inline instructions of a kernel, with registers named by where they come from."""
    names: dict[str, str] = {}
    for register, number in re.findall(rf"ld\.param\.\w+\s+(%\w+), \[{kernel}_param_(\d+)\]", body):
        names[register] = f"p{number}"
    for register, source in re.findall(r"cvta\.to\.global\.u64\s+(%\w+), (%\w+);", body):
        names[register] = names[source]
    for registers, address in re.findall(r"ld\.global\.v\d\.\w+\s+\{(.*?)\}, \[(%\w+)\]", body):
        for number, register in enumerate(registers.split(", ")):
            names[register] = f"{names[address]}.{number}"
    # A register plus the start of shared memory.
    (start,) = re.findall(r"mov\.u32\s+(%\w+), \w*dynamic_shared_memory\w*;", body) or [None]
    for register, left, right in re.findall(r"add\.s32\s+(%\w+), (%\w+), (%\w+);", body):
        if start in (left, right):
            names[register] = f"{names[right if left == start else left]} in shared memory"
    stored = re.search(r"st\.global\.(?:v\d\.)?\w+\s+\[.*?\], \{?(.*?)\}?;", body)
    for number, register in enumerate(stored[1].split(", ") if stored else []):
        names[register] = f"d{number}"
    lines = re.findall(r"// begin inline asm\n\s*(.*?)\n\s*// end inline asm", body)
    return [re.sub(r"%\w+", lambda match: names[match[0]], line) for line in lines]


@pytest.mark.parametrize(
    ("architecture", "kernel"),
    [(architecture, kernel) for architecture in EXPECTED for kernel in EXPECTED[architecture]],
)
def test_operands_of_inline_ptx(architecture: int, kernel: str) -> None:
    assert instructions(kernel, bodies(architecture)[kernel]) == EXPECTED[architecture][kernel]


def test_every_wrapper_is_among_them() -> None:
    source = (ROOT / "csrc" / "cuda" / "primitives.cuh").read_text()
    opcodes = set(re.findall(r'asm(?: volatile)?\(\s*"([a-z0-9]+)', source))
    seen = {
        line.split(".")[0] for kernels in EXPECTED.values() for x in kernels.values() for line in x
    }
    # cvt between one half and a float has a single operand of each type: it can't be mistaken.
    assert opcodes == seen
