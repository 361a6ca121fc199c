"""AMD's assembly as `bench.sass` takes it: loops found by control flow, and their instructions.

Reads what LLVM writes for a kernel (`kernel.asm["amdgcn"]` of Triton's):

    loop, *others = function(text).main_loops()
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.sass import MATRIX_UNIT, Function, Instruction

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\t([a-z]\w+)(?:\s+([^;]*))?")
_UNITS = {
    "v_mfma": "tensor",
    "v_smfma": "tensor",
    "v_wmma": "tensor",
    "v_swmmac": "tensor",
    "scratch_": "local memory",
}


@dataclass(frozen=True)
class AmdInstruction(Instruction):
    """One line of assembly; `address` counts instructions, `goes_to` is a branch's."""

    goes_to: int | None = None

    @property
    def name(self) -> str:
        return self.opcode

    @property
    def is_padding(self) -> bool:
        return self.opcode in ("s_nop", "s_code_end")

    @property
    def unit(self) -> str:
        return next((x for start, x in _UNITS.items() if self.opcode.startswith(start)), "other")

    @property
    def matrix_work(self) -> float | None:
        """The matrix products of one wavefront, in units of an HMMA.16816."""
        if self.unit != "tensor":
            return 0.0
        shape = re.search(r"_(\d+)x(\d+)x(\d+)", self.opcode)
        if shape is None:
            return None
        m, n, k = map(int, shape.groups())
        return m * n * k / MATRIX_UNIT

    @property
    def ends_block(self) -> bool:
        return self.opcode.startswith(("s_branch", "s_cbranch", "s_endpgm", "s_setpc"))

    @property
    def target(self) -> int | None:
        return self.goes_to

    @property
    def may_continue(self) -> bool:
        return not self.opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))


def function(text: str) -> Function:
    """The kernel of an assembly file that holds one."""
    name = re.search(r"^\s*\.amdhsa_kernel\s+(\S+)", text, re.M)
    target = re.search(r'\.amdgcn_target "\S+-(gfx\w+)"', text)
    if name is None or target is None:
        raise ValueError("no .amdhsa_kernel or no target in this assembly")
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text[: name.start()].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append((found[1], (found[2] or "").strip()))
    instructions = [
        AmdInstruction(address, "", opcode, operands, labels.get(operands))
        for address, (opcode, operands) in enumerate(lines)
    ]
    return Function(name[1], target[1], instructions)
