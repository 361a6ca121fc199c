"""bench.sass on code with a known control flow, and on what the machine's own tools print."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

import setup_cuda
from bench import sass

# A loop over tiles that holds two others, as the forward pass has: `edge`, a part of which lies
# behind the function's end and which is left by a guarded CALL, and `full`, which skips a part.
FORWARD = """
            MOV R1, c[0x0][0x28]
            @P6 CALL.REL.NOINC .subroutine
    outer:  IADD3 R2, R2, 0x1, RZ
    edge:   LDSM.16.M88.4 R4, [R3]
            @!P1 BRA .behind
    back:   HMMA.16816.F32 R8, R4, R6, R8
            HMMA.16816.F32.BF16 R8, R4, R6, R8
            @P0 CALL.REL.NOINC .between
            BRA .edge
    between: MOV R2, RZ
            BRA.U UP0, .latch
    full:   LDSM.16.MT88.4 R4, [R3]
            NOP
            MUFU.EX2 R9, R9
            BRA P3, .skip
            FMUL R8, R8, R9
            @!PT LDS RZ, [RZ]
    skip:   HMMA.1688.F32 R8, R4, R6, R8
            HMMA.1688.F32.TF32 R8, R4, R6, R8
            HMMA.16816.F32 R8, R4, R6, R8
            @!P0 BRA .full
    latch:  STL [R1], R2
            @P2 BRA .outer
            STG.E [R2.64], R8
            EXIT
    behind: ISETP.GE.AND P4, PT, R2, 0x3, PT
            FSEL R8, R8, -INF , !P4
            BRA .back
    subroutine: FADD R2, R2, 1
            RET.REL.NODEC R20 `(_Z6kernel)
    trap:   BRA .trap
            NOP
"""


def assembled(code: str, name: str = "_Z6kernel", target: str = "sm_80") -> str:
    """What cuobjdump would print of lines with labels: 16 bytes each, in two lines of text."""
    lines = [line.strip() for line in code.strip().splitlines()]
    labels = {
        f".{line.split(':')[0]}": f"{16 * i:#x}" for i, line in enumerate(lines) if ":" in line
    }
    text = [f"\n\tcode for {target}", f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM80"']
    for i, line in enumerate(lines):
        line = re.sub(r"^\w+:\s*", "", line)
        line = re.sub(r" (\.[a-z]+)$", lambda match: f" {labels[match[1]]}", line)
        text.append(f"        /*{16 * i:04x}*/       {line} ;      /* 0x00000a00ff017624 */")
        text.append(f"{'':40}/* 0x000fe400078e00ff */")
    return "\n".join([*text, "\t\t..........\n"])


def function_of(code: str) -> sass.Function:
    (function,) = sass.parse(assembled(code))
    return function


def lines_of(function: sass.Function, loop: sass.Loop) -> list[str]:
    return [x.name for block in loop.blocks for x in function.blocks[block]]


def test_instructions_are_read() -> None:
    function = function_of(FORWARD)
    assert (function.name, function.architecture) == ("_Z6kernel", "sm_80")
    assert len(function.instructions) == len(FORWARD.strip().splitlines())
    second = function.instructions[1]
    assert (second.address, second.guard, second.opcode) == (16, "@P6", "CALL.REL.NOINC")
    fsel = next(x for x in function.instructions if x.name == "FSEL")
    assert (fsel.guard, fsel.operands) == ("", "R8, R8, -INF , !P4")


def test_loops_follow_control_flow_not_addresses() -> None:
    function = function_of(FORWARD)
    outer, edge, full = function.loops
    behind = ["ISETP", "FSEL", "BRA"]
    inside = ["LDSM", "BRA", "HMMA", "HMMA", "CALL", "BRA"]
    assert lines_of(function, edge) == [*inside, *behind]
    rest = ["HMMA", "HMMA", "HMMA", "BRA"]
    assert lines_of(function, full) == ["LDSM", "NOP", "MUFU", "BRA", "FMUL", "LDS", *rest]
    assert set(outer.blocks) > set(edge.blocks) | set(full.blocks)
    # Neither the subroutine, nor what comes before and after, nor the trap.
    assert not {"RET", "FADD", "EXIT", "STG"} & set(outer.body.opcodes)
    assert outer.body.opcodes["MOV"] == 1


def test_figures_of_a_loop() -> None:
    _, edge, full = function_of(FORWARD).loops
    # Padding is not counted; an HMMA.1688 is half an HMMA.16816.
    assert (full.body.instructions, full.body.matrix_work) == (9, 2.0)
    assert full.body.per_matrix_unit == 4.5
    assert (full.hot_path.instructions, full.hot_path.per_matrix_unit) == (7, 3.5)
    assert full.body.units == {
        "tensor": 3, "LDSM": 1, "LDS": 1, "MUFU": 1, "FMA pipe": 1, "other": 2,
    }  # fmt: skip
    assert edge.body.instructions == 9
    # The shorter of the ways with all of the matrix products leaves the block behind out.
    assert edge.hot_path.instructions == 6
    assert edge.body.units["ALU pipe"] == 2
    assert not edge.hot_path.units["ALU pipe"]


def test_main_loops_are_the_innermost_ones_the_leanest_first() -> None:
    _, edge, full = (function := function_of(FORWARD)).loops
    # Edge: 6 instructions for 2 HMMA; full: 7 for 2.
    assert function.main_loops() == (edge, full)
    longer = FORWARD.replace("    back:", "            NOP\n" + "MOV R2, RZ\n" * 2 + "    back:")
    _, edge, full = (function := function_of(longer)).loops
    assert function.main_loops() == (full, edge)


def test_a_loop_with_little_matrix_work_is_no_main_loop() -> None:
    code = """
    main:   HMMA.16816.F32 R8, R4, R6, R8
            HMMA.16816.F32 R8, R4, R6, R8
            HMMA.16816.F32 R8, R4, R6, R8
            @P0 BRA .main
    small:  HMMA.16816.F32 R8, R4, R6, R8
            @P0 BRA .small
    copy:   LDG.E R8, [R4.64]
            @P0 BRA .copy
            EXIT
    """
    main, *others = (function := function_of(code)).loops
    assert len(others) == 2
    assert function.main_loops() == (main,)
    assert others[1].body.per_matrix_unit is None


def test_a_loop_around_one_without_products_is_innermost() -> None:
    code = """
    main:   HMMA.16816.F32 R8, R4, R6, R8
    copy:   LDG.E R8, [R4.64]
            @P1 BRA .copy
            @P0 BRA .main
            EXIT
    """
    main, copy = (function := function_of(code)).loops
    assert function.main_loops() == (main,)
    assert main.body.instructions == main.hot_path.instructions == 4
    assert function.inside(main) == (copy,)
    assert not function.inside(copy)


@pytest.mark.parametrize(
    "branch", ["BRA.DIV UR4, .out", "BRA.DIV .out", "BRA.U !UP0, .out", "@UP1 BRA .out"]
)
def test_conditional_branches(branch: str) -> None:
    (loop,) = function_of(f"""
    loop:   HMMA.16816.F32 R8, R4, R6, R8
            {branch}
            @P0 BRA .loop
    out:    EXIT
    """).loops
    assert loop.body.instructions == 3


@pytest.mark.parametrize("branch", ["BRA .out", "@PT BRA .out", "EXIT"])
def test_what_follows_a_branch_that_is_always_taken_is_no_part_of_it(branch: str) -> None:
    function = function_of(f"""
    loop:   HMMA.16816.F32 R8, R4, R6, R8
            {branch}
            @P0 BRA .loop
    out:    EXIT
    """)
    assert not function.loops


def test_the_cases_of_a_switch_belong_to_its_loop() -> None:
    """What nvcc makes of a switch, which names no targets; the next one has its own."""
    function = function_of("""
    loop:   BRX R2 -0x10
            MOV R1, RZ
            BRA .join
            FADD R1, R1, R1
    join:   HMMA.16816.F32 R8, R4, R6, R8
            @P0 BRA .loop
            BRXU UR4 -0x10
            FMUL R1, R1, R1
            EXIT
    """)
    (loop,) = function.main_loops()
    assert loop.body.opcodes == {"BRX": 1, "MOV": 1, "BRA": 2, "FADD": 1, "HMMA": 1}
    assert loop.hot_path.instructions == 4


def test_a_loop_with_two_entrances_is_refused() -> None:
    function = function_of("""
    main:   @P1 BRA .second
    first:  MOV R1, RZ
    second: MOV R2, RZ
            @P0 BRA .first
            @P2 BRA .main
            EXIT
    """)
    with pytest.raises(ValueError, match="more than one place"):
        _ = function.loops


@pytest.mark.parametrize(
    ("opcode", "work"),
    [
        ("HMMA.16816.F32", 1),
        ("HMMA.16816.F32.BF16", 1),
        ("HMMA.1688.F32", 0.5),
        ("HMMA.1688.F32.TF32", 0.5),
        ("HMMA.1684.F32.TF32", 0.25),
        ("HMMA.884.F32", 0.125),
        ("IMMA.16832.S8.S8", 2),
        ("QMMA.16832.F32.E4M3.E4M3", 2),
        ("HGMMA.64x128x16.F32", 16),
        ("UTCHMMA", None),
        ("FFMA", 0),
    ],
)
def test_matrix_work(opcode: str, work: float | None) -> None:
    """By multiply-adds: m16n8k16 is one, a wgmma of m64 is shared by four warps."""
    assert sass.Instruction(0, "", opcode, "R8, R4, R6, R8").matrix_work == work


def test_work_of_unknown_shape_gives_no_figure() -> None:
    (loop,) = function_of("""
    loop:   UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR16], tmem[UR18], idesc[UR19], !UPT
            @P0 BRA .loop
            EXIT
    """).main_loops()
    assert (loop.body.unsized, loop.body.matrix_work) == (1, 0)
    assert loop.body.per_matrix_unit is None


def test_several_functions_and_architectures() -> None:
    text = assembled("EXIT", "first", "sm_75") + assembled("NOP\nEXIT", "second", "sm_90a")
    first, second = sass.parse(text)
    assert (first.name, first.architecture, len(first.instructions)) == ("first", "sm_75", 1)
    assert (second.name, second.architecture, second.count.instructions) == ("second", "sm_90a", 1)


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    112 bytes stack frame, 108 bytes spill stores, 148 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 936 bytes cmem[0]
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_resources_from_a_log() -> None:
    """A helper that is not inlined has a line of its own, which is not the kernel's."""
    assert sass.resources_from_log(LOG) == {
        "_Z1aPf": sass.Resources(255, 112, 1024, 108, 148),
        "_Z1bPf": sass.Resources(32, 0, 0, 0, 0),
    }
    with pytest.raises(ValueError, match="_Z1aPf"):
        sass.resources_from_log(LOG[: LOG.index("Used 255")])


KERNEL = """
__global__ void kernel(float *out, const float *in, int count) {
  __shared__ float sums[64];
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) sum = fmaf(sum, in[i], exp2f(sum));
  sums[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = sums[63 - threadIdx.x];
}
"""


@pytest.mark.skipif(setup_cuda.find_nvcc(os.environ) is None, reason="needs nvcc")
@pytest.mark.skipif(sass.find_cuobjdump() is None, reason="needs cuobjdump and nvdisasm")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_120"])
def test_a_kernel_of_nvcc(architecture: str, tmp_path: pathlib.Path) -> None:
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(KERNEL)
    log = subprocess.run(
        [
            setup_cuda.find_nvcc(os.environ),
            f"-arch={architecture}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            cubin,
            source,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    (function,) = sass.disassemble(cubin)
    assert function.architecture == architecture
    (loop,) = function.loops
    assert loop.body.opcodes["MUFU"] == loop.body.opcodes["LDG"] == 1
    assert not function.main_loops()
    (name,) = sass.resources(cubin)
    assert name == function.name
    seen, said = sass.resources(cubin)[name], sass.resources_from_log(log)[name]
    assert (seen.registers, seen.stack) == (said.registers, said.stack)
    system = 1024 if architecture == "sm_120" else 0
    assert (seen.shared, said.shared) == (256 + system, 256)
    assert said.spill_stores == 0


def test_a_file_that_is_no_kernel_is_refused(tmp_path: pathlib.Path) -> None:
    if sass.find_cuobjdump() is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    (tmp_path / "text.cubin").write_text("no machine code")
    with pytest.raises(RuntimeError, match=r"text\.cubin"):
        sass.disassemble(tmp_path / "text.cubin")
