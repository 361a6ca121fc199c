"""The CUDA kernels as nvcc compiles them: resources, launches and main loops of every instance.

Objects are kept in build/cuda_report under a hash of all that they are made of.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import setup_cuda
from bench import sass
from bench.cuda_architectures import Architecture, shares

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# The slowest first, so that none is left for the end.
SOURCES = ("backward_keys", "backward_queries", "forward", "weights")
LAUNCHES = ROOT / "bench" / "cuda_launches.cpp"

_OPERATIONS = {
    "run_forward": "forward",
    "query_gradients": "backward_queries",
    "key_gradients": "backward_keys",
    "run_weights": "weights",
}
_DTYPES = {
    "Float16": "float16",
    "TuringFloat16": "float16",
    "TuringFloat32": "float32",
    "BFloat16": "bfloat16",
    "TF32": "TF32",
    "float": "float32",
}


@dataclass(frozen=True)
class Launch:
    """How the library launches a kernel, and for which kinds of problems."""

    readable: str
    threads: int
    shared_bytes: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Name:
    """A kernel's readable name, from its template's arguments.

    `variant` is plain, dropout, general (any mask, ...) or empty, and what else tells instances
    apart; `head_dim` is that of the tile, None where it makes no difference.
    """

    operation: str
    dtype: str
    head_dim: int | None
    variant: str

    @classmethod
    def of(cls, readable: str) -> Name:
        match = re.match(r"(?:void )?attn_ext::cuda::(\w+)(?:<(.*)>)?\(", readable)
        if match is None:
            raise ValueError(f"{readable!r} is no kernel of attn_ext::cuda")
        arguments = (match[2] or "").replace("attn_ext::cuda::", "").split(", ")
        dtype = next((_DTYPES[x] for x in arguments if x in _DTYPES), "")
        rest = [x for x in arguments if x and x not in _DTYPES]
        head_dim = int(rest.pop(0)) if rest and rest[0].isdigit() else None
        words = {
            "false": "plain",
            "true": "general",
            "(Variant)0": "plain",
            "(Variant)1": "dropout",
            "(Variant)2": "general",
        }
        variant = " ".join(words.get(x, re.sub(r"\((\w+)\)", r"\1 ", x)) for x in rest)
        return cls(_OPERATIONS.get(match[1], match[1]), dtype, head_dim, variant)

    def __str__(self) -> str:
        parts = (self.operation, self.dtype, self.head_dim, self.variant)
        return " ".join(str(x) for x in parts if x not in ("", None))


@dataclass(frozen=True)
class Kernel:
    """An instance on an architecture; `loops` are its main loops' figures, the leanest first."""

    architecture: Architecture
    name: Name
    kinds: tuple[str, ...]
    resources: sass.Resources
    threads: int
    shared_bytes: int
    loops: tuple[dict[str, Any], ...]

    @property
    def blocks(self) -> int:
        """That a multiprocessor runs at once."""
        return self.architecture.blocks_that_fit(
            self.resources.registers, self.threads, self.shared_bytes + self.resources.shared
        )

    @property
    def spills(self) -> bool:
        return bool(self.resources.spill_stores or self.resources.spill_loads)


class Compiler:
    """nvcc with the flags of setup_cuda.py, one architecture at a time, and a folder of results."""

    def __init__(self, nvcc: str, jobs: int) -> None:
        self.nvcc = nvcc
        self.jobs = jobs
        self.version = re.findall(r"release .*", _run([nvcc, "--version"]))[0]
        files = [*CSRC.iterdir(), *(CSRC / "cuda").iterdir(), ROOT / "setup_cuda.py"]
        sources = _hash(self.version, *sorted(x for x in files if x.is_file()))
        self.folder = ROOT / "build" / "cuda_report" / sources
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self, architecture: Architecture) -> list[str]:
        """What compiles a file, without its names."""
        environment = {
            **os.environ,
            "TORCH_CUDA_ARCH_LIST": architecture.name,
            "ATTN_EXT_BUILD_JOBS": "1",
        }
        flags = setup_cuda.Toolkit(self.nvcc, environment).flags
        return [self.nvcc, *flags, "-Xptxas", "-v", "-c"]

    def kernels(self, architectures: Sequence[Architecture]) -> list[Kernel]:
        """Every instance that the library can launch on these architectures."""
        work = [(source, x) for source in SOURCES for x in architectures]
        with ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(lambda task: self._object(*task), work))
        launches = {x.number: self._launches(x, architectures[0]) for x in architectures}
        with ProcessPoolExecutor(self.jobs) as pool:
            tasks = [(x, path) for (_, x), path in zip(work, objects, strict=True)]
            figures = pool.map(loop_figures, *zip(*tasks, strict=True))
            found = [
                kernel
                for (architecture, path), loops in zip(tasks, figures, strict=True)
                for kernel in _kernels(architecture, path, loops, launches[architecture.number])
            ]
        order = [x.number for x in architectures]
        return sorted(found, key=lambda x: (order.index(x.architecture.number), _sort_key(x.name)))

    def _object(self, source: str, architecture: Architecture) -> pathlib.Path:
        path = self.folder / f"{source}_{architecture.number}.o"
        log = path.with_suffix(".log")
        if not log.exists():
            command = [*self.command(architecture), str(CSRC / "cuda" / f"{source}.cu")]
            text = _run([*command, "-o", str(path)])
            log.write_text(text)  # last, so that an interrupted compilation leaves none
        return path

    def _launches(self, architecture: Architecture, host: Architecture) -> dict[str, Launch]:
        """By mangled name. Code for the host is the same in every object: `host` says in which."""
        program = self.folder / f"launches_{_hash('', LAUNCHES)}"
        if not program.exists():
            objects = [str(self.folder / f"{source}_{host.number}.o") for source in SOURCES]
            command = [*os.environ.get("CXX", "g++").split(), "-std=c++17", f"-I{CSRC}"]
            unfinished = program.with_suffix(".unfinished")
            _run([*command, str(LAUNCHES), *objects, "-o", str(unfinished)])
            unfinished.rename(program)
        limit, newer = str(architecture.block_shared_bytes), str(int(architecture.has_bfloat16))
        return parse_launches(_run([str(program), limit, newer]))


def parse_launches(text: str) -> dict[str, Launch]:
    """What cuda_launches.cpp prints, by the kernels' mangled names."""
    found: dict[str, Launch] = {}
    for line in text.splitlines():
        kind, name, readable, threads, shared_bytes = line.split("\t")
        before = found.get(name, Launch(readable, int(threads), 0, ()))
        kinds = before.kinds if kind in before.kinds else (*before.kinds, kind)
        most = max(before.shared_bytes, int(shared_bytes))
        found[name] = Launch(readable, before.threads, most, kinds)
    return found


def loop_figures(
    architecture: Architecture, path: pathlib.Path
) -> dict[str, tuple[dict[str, Any], ...]]:
    """What is said of each kernel's main loops, by the kernel's mangled name."""
    return {
        function.name: tuple(
            {
                "matrix_units": loop.body.matrix_work,
                "instructions": loop.body.instructions,
                "per_matrix_unit": _rounded(loop.body.per_matrix_unit),
                "hot_path_instructions": loop.hot_path.instructions,
                "hot_path_per_matrix_unit": _rounded(loop.hot_path.per_matrix_unit),
                "inner_loops": [x.body.instructions for x in function.inside(loop)],
                "mix": {x: loop.body.units[x] for x in sass.CLASSES if loop.body.units[x]},
                "shares_of_tensor_time": shares(architecture, loop.body),
            }
            for loop in function.main_loops()
        )
        for function in sass.disassemble(path)
    }


def _kernels(
    architecture: Architecture,
    path: pathlib.Path,
    loops: dict[str, tuple[dict[str, Any], ...]],
    launches: dict[str, Launch],
) -> Iterable[Kernel]:
    """The instances of one object that the library launches; others serve other architectures."""
    for name, resources in sass.resources_from_log(path.with_suffix(".log").read_text()).items():
        launch = launches.get(name)
        if launch is not None:
            yield Kernel(
                architecture,
                Name.of(launch.readable),
                launch.kinds,
                resources,
                launch.threads,
                launch.shared_bytes,
                loops[name],
            )


def _sort_key(name: Name) -> tuple[str, str, int, str]:
    return (name.operation, name.dtype, name.head_dim or 0, name.variant)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _hash(text: str, *paths: pathlib.Path) -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
