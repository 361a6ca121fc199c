"""What is in a compiled GPU kernel: its loops found by control flow, and their instructions.

Reads the machine code (SASS) that NVIDIA's cuobjdump prints, of nvcc's and Triton's kernels alike:

    for function in disassemble(path):
        loop, *others = function.main_loops()
        print(function.name, loop.body.per_matrix_unit, loop.hot_path.per_matrix_unit)

`python -m bench.sass FILE` prints that. Loops are the natural loops of the control-flow graph (Aho,
Lam, Sethi and Ullman, "Compilers", section 9.6), so that code which the compiler moved out of line
still belongs to its loop.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx

MATRIX_UNIT = 16 * 8 * 16
"""Multiply-adds of an HMMA.16816, the unit that matrix work is counted in."""

_ENTRY = -1  # in the graph of blocks, before the first one
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_TARGET = re.compile(r"^\s*code for (sm_\w+)", re.M)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P(?:T|\d+)\s)?\s*([^;/]+?)\s*;")
_ADDRESS = re.compile(r"(0x[0-9a-f]+)\s*$")

# Opcodes by the unit that runs them, up to the first dot. Everything else is "other".
_CLASSES = {
    "tensor": "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA "
    "UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "LDSM": "LDSM",
    "LDS": "LDS",
    "STS": "STS STSM",
    "LDGSTS": "LDGSTS",
    "MUFU": "MUFU F2F F2I I2F FRND POPC FLO",
    "FMA pipe": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 IMAD HFMA2 HADD2 HMUL2",
    "ALU pipe": "FMNMX FMNMX3 FSEL FSET FSETP FSWZADD F2FP I2FP I2IP IABS IADD IADD3 IMNMX ISETP "
    "LEA LOP3 MOV PLOP3 PRMT SEL SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3",
    "double": "DADD DFMA DMNMX DMUL DSETP",
    "local memory": "LDL STL",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}
CLASSES = (*_CLASSES, "other")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: `guard` is as "@!P0", or empty."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_padding(self) -> bool:
        """NOPs, with which sm_120 fills gaps."""
        return self.name == "NOP"

    @property
    def unit(self) -> str:
        """Which of CLASSES it belongs to."""
        return _CLASS_OF.get(self.name, "other")

    @property
    def matrix_work(self) -> float | None:
        """The share of matrix products that one warp has in it, in units of an HMMA.16816.

        A warpgroup's HGMMA is issued by four warps, each of which multiplies a quarter of its rows.
        None for those whose shape is not in the instruction (tcgen05's UTCHMMA).
        """
        if self.unit != "tensor":
            return 0.0
        if shape := re.search(r"\.(\d+)x(\d+)x(\d+)\b", self.opcode):
            m, n, k = map(int, shape.groups())
            return m * n * k / MATRIX_UNIT / 4
        # Digits without separators: 16816, 1688 and 884 are m16n8k16, m16n8k8 and m8n8k4.
        if shape := re.search(r"\.(16|8)8(\d+)\b", self.opcode):
            m, k = map(int, shape.groups())
            return m * 8 * k / MATRIX_UNIT
        return None

    @property
    def ends_block(self) -> bool:
        return self.name in ("BRA", "JMP", "EXIT", "RET", "BRX", "BRXU", "JMX", "CALL")

    @property
    def target(self) -> int | None:
        """Where a branch or call goes, if it says so."""
        match = _ADDRESS.search(self.operands)
        return int(match[1], 16) if match and self.name in ("BRA", "JMP", "CALL") else None

    @property
    def may_continue(self) -> bool:
        """Whether what follows may run next: not after a branch that every thread takes.

        A call comes back, or is a guarded way out of a loop, as which sm_80 uses CALL.REL.NOINC.
        """
        if not self.ends_block or self.name == "CALL":
            return True
        conditional = re.search(r"\bU?P\d", self.operands) or re.search(
            r"\.(DIV|CONV)", self.opcode
        )
        return self.guard not in ("", "@PT") or bool(conditional)


@dataclass(frozen=True)
class Count:
    """How many instructions there are, by unit and by opcode, and how much they multiply.

    Attributes:
        code: the instructions, without padding.
        instructions: how many.
        matrix_work: in units of an HMMA.16816.
        unsized: matrix instructions whose shape is unknown, left out of `matrix_work`.
        units: by CLASSES.
        opcodes: by name, without modifiers.
    """

    code: tuple[Instruction, ...]
    instructions: int
    matrix_work: float
    unsized: int
    units: Counter[str]
    opcodes: Counter[str]

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Count:
        counted = tuple(x for x in instructions if not x.is_padding)
        work = [x.matrix_work for x in counted]
        return cls(
            counted,
            len(counted),
            sum(x for x in work if x is not None),
            work.count(None),
            Counter(x.unit for x in counted),
            Counter(x.name for x in counted),
        )

    @property
    def per_matrix_unit(self) -> float | None:
        """Instructions for each HMMA.16816; None without any, or where its work is unknown."""
        if self.unsized or not self.matrix_work:
            return None
        return self.instructions / self.matrix_work


@dataclass(frozen=True)
class Loop:
    """A natural loop: all blocks from which control can only come back to `header`.

    Attributes:
        address: of the first instruction of the header.
        blocks: indices into the function's blocks, in order.
        body: all of them, the conservative figure.
        hot_path: the way through one iteration that multiplies most; of several, the shortest.
    """

    address: int
    blocks: tuple[int, ...]
    body: Count
    hot_path: Count


class Function:
    """A kernel's instructions, its basic blocks and their graph."""

    def __init__(self, name: str, architecture: str, instructions: Sequence[Instruction]) -> None:
        self.name = name
        self.architecture = architecture
        self.instructions = tuple(instructions)
        self.blocks = tuple(_blocks(self.instructions))
        self.graph = _graph(self.blocks)

    def __repr__(self) -> str:
        return f"Function({self.name!r}, {self.architecture!r}, {len(self.instructions)} lines)"

    @functools.cached_property
    def count(self) -> Count:
        return Count.of(self.instructions)

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Every natural loop, by address. Those that share a header are one."""
        back_edges = self._back_edges()
        forward = self.graph.copy()
        forward.remove_edges_from(back_edges)
        bodies: dict[int, set[int]] = {}
        for tail, header in back_edges:
            without_header = networkx.restricted_view(self.graph, [header], [])
            body = bodies.setdefault(header, {header})
            if tail != header:
                body |= {tail} | networkx.ancestors(without_header, tail)
        return tuple(
            self._loop(header, bodies[header], forward, {t for t, h in back_edges if h == header})
            for header in sorted(bodies)
        )

    def inside(self, loop: Loop) -> tuple[Loop, ...]:
        """The loops in a loop, each of whose instructions its figures count once."""
        return tuple(x for x in self.loops if set(x.blocks) < set(loop.blocks))

    def main_loops(self) -> tuple[Loop, ...]:
        """The loops that do the matrix products, the leanest first.

        Of the loops that multiply and hold no other that does, those with at least half as much
        work on their hot path as the one with most. Where a kernel has one loop for tiles in which
        nothing is hidden and one for the others, the first of them comes first.
        """
        matrix = [loop for loop in self.loops if loop.body.units["tensor"]]
        innermost = [x for x in matrix if not any(set(y.blocks) < set(x.blocks) for y in matrix)]
        most = max((_work(loop) for loop in innermost), default=0)
        main = [loop for loop in innermost if 2 * _work(loop) >= most]
        return tuple(sorted(main, key=lambda x: (x.hot_path.instructions / _work(x), x.address)))

    def _back_edges(self) -> list[tuple[int, int]]:
        dominator = networkx.immediate_dominators(self.graph, _ENTRY)

        def dominates(header: int, block: int) -> bool:
            while block != header and block != _ENTRY:
                block = dominator[block]
            return block == header

        return [(x, y) for x, y in self.graph.edges if x in dominator and dominates(y, x)]

    def _loop(
        self, header: int, body: set[int], forward: networkx.DiGraph, tails: set[int]
    ) -> Loop:
        path = self._hot_path(header, networkx.subgraph(forward, body), tails)
        blocks = tuple(sorted(body))
        return Loop(
            self.blocks[header][0].address,
            blocks,
            Count.of(x for block in blocks for x in self.blocks[block]),
            Count.of(x for block in path for x in self.blocks[block]),
        )

    def _hot_path(self, header: int, body: networkx.DiGraph, tails: set[int]) -> list[int]:
        """Blocks from the header to where it is jumped back to; inner loops once, or not at all."""
        best: dict[int, tuple[float, int, list[int]]] = {}
        try:
            order = list(networkx.topological_sort(body))
        except networkx.NetworkXUnfeasible:
            raise ValueError(
                f"{self.name} has a loop inside that at {self.blocks[header][0].address:#x} which "
                "can be entered at more than one place: no natural loop"
            ) from None
        for block in order:
            ways = [best[before] for before in body.predecessors(block) if before in best]
            if block != header and not ways:
                continue
            work, length, path = max(ways, key=lambda x: x[:2], default=(0.0, 0, []))
            count = Count.of(self.blocks[block])
            work += count.matrix_work + count.unsized  # as in _work
            best[block] = (work, length - count.instructions, [*path, block])
        return max((best[tail] for tail in tails if tail in best), key=lambda x: x[:2])[2]


def parse(text: str) -> list[Function]:
    """The functions in what `cuobjdump -sass` prints, of any number of architectures."""
    functions = []
    targets = [(match.start(), match[1]) for match in _TARGET.finditer(text)]
    heads = list(_FUNCTION.finditer(text))
    for head, end in zip(heads, [*(x.start() for x in heads[1:]), len(text)], strict=True):
        architecture = next((name for at, name in reversed(targets) if at < head.start()), "")
        instructions = []
        for address, guard, code in _INSTRUCTION.findall(text[head.end() : end]):
            opcode, _, operands = code.partition(" ")
            instructions.append(
                Instruction(int(address, 16), guard.strip(), opcode, operands.strip())
            )
        functions.append(Function(head[1], architecture, instructions))
    return functions


def disassemble(path: str | os.PathLike[str]) -> list[Function]:
    """The functions of a cubin, of an object file or of a library with device code.

    Raises:
        RuntimeError: there is no disassembler, or it can't read the file.
    """
    return parse(_cuobjdump("-sass", os.fspath(path)))


@dataclass(frozen=True)
class Resources:
    """What a thread or block of a kernel takes; bytes, except for registers.

    `shared` is what is known when compiling: dynamic shared memory comes with the launch. From
    sm_90 on a cubin adds the 1024 bytes that the system takes of each block; the compiler's log
    does not. Spills are None where only the cubin was looked at.
    """

    registers: int
    stack: int
    shared: int
    spill_stores: int | None = None
    spill_loads: int | None = None


def resources(path: str | os.PathLike[str]) -> dict[str, Resources]:
    """Resources of each function of a cubin, by its mangled name."""
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        _cuobjdump("-res-usage", os.fspath(path)),
    )
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


def resources_from_log(log: str) -> dict[str, Resources]:
    """Resources of each kernel, by its mangled name, from what `nvcc -Xptxas -v` says.

    The log of one architecture: nvcc may interleave those of several.
    """
    found = {}
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        name = entry.partition("'")[0]
        own = re.search(
            rf"Function properties for {re.escape(name)}\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            entry,
        )
        used = re.search(r"Used (\d+) registers(.*)", entry)
        if own is None or used is None:
            raise ValueError(f"ptxas says nothing of the registers or spills of {name}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = map(int, own.groups())
        shared_bytes = int(shared[1]) if shared else 0
        found[name] = Resources(int(used[1]), stack, shared_bytes, stores, loads)
    return found


@functools.cache
def find_cuobjdump() -> tuple[str, str] | None:
    """cuobjdump, and the folder of the nvdisasm that it calls; None where one is missing.

    Looked for in NVIDIA's packages on PyPI, in Triton's, in CUDA_HOME and on PATH: in this order,
    since a disassembler must not be older than the compiler.
    """
    places: list[str] = []
    for package, *inside in (("nvidia", "cu*", "bin"), ("triton", "backends", "nvidia", "bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            places += map(str, sorted(pathlib.Path(folder).glob("/".join(inside)), reverse=True))
    if os.environ.get("CUDA_HOME"):
        places.append(os.path.join(os.environ["CUDA_HOME"], "bin"))
    path = os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    cuobjdump, nvdisasm = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
    return (cuobjdump, os.path.dirname(nvdisasm)) if cuobjdump and nvdisasm else None


def _cuobjdump(*arguments: str) -> str:
    tools = find_cuobjdump()
    if tools is None:
        raise RuntimeError(
            "no cuobjdump and nvdisasm are found: `pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm`, or set CUDA_HOME or PATH"
        )
    cuobjdump, folder = tools
    environment = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")])}
    result = subprocess.run(
        [cuobjdump, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{cuobjdump} {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def _work(loop: Loop) -> float:
    """What loops are compared by; a matrix instruction of unknown shape counts as one unit."""
    return loop.hot_path.matrix_work + loop.hot_path.unsized


def _blocks(instructions: Sequence[Instruction]) -> Iterator[tuple[Instruction, ...]]:
    """Basic blocks: a target begins one, a branch ends it."""
    targets = {x.target for x in instructions}
    block: list[Instruction] = []
    for x in instructions:
        if block and x.address in targets:
            yield tuple(block)
            block = []
        block.append(x)
        if x.ends_block:
            yield tuple(block)
            block = []
    if block:
        yield tuple(block)


def _graph(blocks: Sequence[tuple[Instruction, ...]]) -> networkx.DiGraph:
    """Indices of blocks and _ENTRY, which leads to the first and to what nothing else does.

    A call leads both to its target and to what follows. The branch to itself that ends a function
    leads nowhere: it is never reached. An indirect branch, which is what becomes of a switch, does
    not name its targets: they are what nothing else leads to, up to the next such branch.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    index = {block[0].address: number for number, block in enumerate(blocks)}
    for number, block in enumerate(blocks):
        last = block[-1]
        if last.target in index and last.target != last.address:
            graph.add_edge(number, index[last.target])
        if last.may_continue and number + 1 < len(blocks):
            graph.add_edge(number, number + 1)
    source = _ENTRY
    for number, block in enumerate(blocks):
        if number == 0 or graph.in_degree(number) == 0:
            graph.add_edge(source, number)
        if block[-1].name in ("BRX", "BRXU", "JMX"):
            source = number
    return graph


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The main loops of compiled GPU kernels.")
    parser.add_argument("files", nargs="+", help="cubins, object files or libraries")
    for path in parser.parse_args(arguments).files:
        for function in disassemble(path):
            print(f"{function.architecture} {function.name}")
            for loop in function.main_loops():
                figures = [
                    f"{count.instructions} instructions, {count.matrix_work:g} HMMA.16816"
                    + (f", {count.per_matrix_unit:.2f} each" if count.per_matrix_unit else "")
                    for count in (loop.body, loop.hot_path)
                ]
                print(f"  loop at {loop.address:#x}: body {figures[0]}; hot path {figures[1]}")
                print(f"    body: {', '.join(f'{loop.body.units[x]} {x}' for x in CLASSES)}")


if __name__ == "__main__":
    main()
