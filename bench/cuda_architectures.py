"""What a multiprocessor of each GPU architecture has, and how far a kernel's loop uses it.

Limits are those of cuda_occupancy.h in the CUDA toolkit and of the CUDA C++ Programming Guide's
table of technical specifications; rates follow from the published peak rates of each GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.sass import Count, Instruction

REGISTERS = 65_536
REGISTER_UNIT = 256
"""Registers of a multiprocessor, and how many at a time a warp is given."""
PARTITIONS = 4
"""Of a multiprocessor: each has a scheduler, a tensor core and a quarter of the registers."""


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor.

    Attributes:
        number: 80 for compute capability 8.0.
        shared_bytes: of shared memory, for all blocks.
        block_shared_bytes: what one block may have of it.
        reserved_bytes: what the system takes of it for each block.
        shared_unit: shared memory is given in multiples of it, in bytes.
        blocks: at most so many.
        warps: likewise.
        tensor_cycles: for an HMMA.16816 that accumulates in float32, in one partition; None where
            mma.sync's rate was not found.
    """

    number: int
    shared_bytes: int
    block_shared_bytes: int
    reserved_bytes: int
    shared_unit: int
    blocks: int
    warps: int
    tensor_cycles: int | None

    @property
    def name(self) -> str:
        return f"{self.number // 10}.{self.number % 10}"

    @property
    def has_bfloat16(self) -> bool:
        """And TF32, and cp.async."""
        return self.number >= 80

    def blocks_that_fit(self, registers: int, threads: int, shared_bytes: int) -> int:
        """How many blocks of so many registers a thread and bytes of shared memory run at once."""
        warps = -(-threads // 32)
        warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        warps_by_registers = PARTITIONS * (REGISTERS // PARTITIONS // warp_registers)
        taken = shared_bytes + self.reserved_bytes
        taken = -(-taken // self.shared_unit) * self.shared_unit
        limits = [self.blocks, self.warps // warps, warps_by_registers // warps]
        if taken:
            limits.append(self.shared_bytes // taken)
        return min(limits)


def _architecture(
    number: int, shared: int, block: int, blocks: int, warps: int, tensor_cycles: int | None
) -> Architecture:
    oldest = number < 80
    reserved, unit = (0, 256) if oldest else (1024, 128)
    return Architecture(
        number, shared << 10, block << 10, reserved, unit, blocks, warps, tensor_cycles
    )


ARCHITECTURES = {
    x.name: x
    for x in (
        _architecture(75, 64, 64, 16, 32, None),
        _architecture(80, 164, 163, 32, 64, 8),
        _architecture(86, 100, 99, 16, 48, 16),
        _architecture(89, 100, 99, 24, 48, 16),
        _architecture(90, 228, 227, 32, 64, None),
        _architecture(100, 228, 227, 32, 64, None),
        _architecture(120, 100, 99, 24, 48, 16),
    )
}


def shares(architecture: Architecture, loop: Count) -> dict[str, float] | None:
    """How long each unit is busy for a loop, as a share of the time that its tensor core is.

    Counted for four warps, one a partition: an exp takes its partition 8 cycles (4 lanes a cycle),
    an instruction of the FMA or the ALU pipe 2, issuing any 1; shared memory serves all four, 128
    bytes a cycle, bank conflicts not counted. Newer FMA pipes than 8.0's are faster: theirs is an
    upper bound. A share above 1 is what the loop waits for.
    """
    if architecture.tensor_cycles is None or not loop.matrix_work or loop.unsized:
        return None
    # TF32 multiplies at half the rate.
    tensor = architecture.tensor_cycles * sum(
        (x.matrix_work or 0) * (2 if "TF32" in x.opcode else 1) for x in loop.code
    )
    cycles = {
        "shared memory": PARTITIONS * _shared_cycles(loop.code),
        "exp": 8 * loop.units["MUFU"],
        "FMA pipe": 2 * loop.units["FMA pipe"],
        "ALU pipe": 2 * loop.units["ALU pipe"],
        "issue": loop.instructions,
    }
    return {name: round(busy / tensor, 3) for name, busy in cycles.items()}


def _shared_cycles(code: Iterable[Instruction]) -> int:
    """128 bytes a cycle: 8 rows of 16 bytes of an ldmatrix, or 4 bytes of each lane."""
    cycles = 0
    for x in code:
        if x.unit not in ("LDSM", "LDS", "STS", "LDGSTS") or x.guard == "@!PT":
            continue
        if x.unit == "LDSM":
            matrices = re.search(r"\.M\w*88\.([24])$", x.opcode)
            cycles += int(matrices[1]) if matrices else 1
        else:
            width = re.search(r"\.(64|128)\b", x.opcode)
            cycles += int(width[1]) // 32 if width else 1
    return cycles
