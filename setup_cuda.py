"""How setup.py builds attn_ext._cuda: with which nvcc, and for which architectures.

Environment variables:
    ATTN_EXT_CUDA          0 never builds it, 1 must, auto (the default) does where nvcc is found
    CUDA_HOME              the toolkit; else nvcc on PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   what to compile for, as "8.0;9.0+PTX"; PTX runs on newer devices too,
                           whose driver compiles it when first used. By default this machine's GPUs
                           with PTX, and "7.5;8.0+PTX" where it has none
    ATTN_EXT_BUILD_JOBS    how many files are compiled at once, for two architectures at a time; as
                           many as there are cores by default
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pybind11.setup_helpers import build_ext

OLDEST = 75
AMPERE = 80
"""From here on the sources are the same: one PTX serves every newer architecture."""
DEFAULT = "7.5;8.0+PTX"
"""Every GPU from Turing on: machine code for the two whose sources differ."""


@dataclass(frozen=True)
class Architectures:
    """Compute capabilities, 75 for 7.5, in ascending order; and whether PTX is kept as well."""

    machine_code: tuple[int, ...]
    ptx: bool

    def flags(self) -> list[str]:
        """What nvcc has to be told, and device.cu about machine code and PTX."""
        codes = [(min(AMPERE, a), f"sm_{a}") for a in self.machine_code]
        codes += [(AMPERE, f"compute_{AMPERE}")] if self.ptx else []
        comma = r"\,"  # for nvcc, which takes several options in one
        return [
            *(f"-gencode=arch=compute_{virtual},code={code}" for virtual, code in codes),
            f"-DATTN_EXT_CUDA_CODE={comma.join(map(str, self.machine_code))}",
            f"-DATTN_EXT_CUDA_PTX={AMPERE if self.ptx else 0}",
        ]


def choose_architectures(
    listed: str,
    supported: tuple[int, ...],
    present: Callable[[], Iterable[int]] = lambda: (),
) -> Architectures:
    """The architectures of a TORCH_CUDA_ARCH_LIST; where it is empty, of the GPUs that are present.

    Raises:
        ValueError: the list can't be read, or names what nvcc or the kernels don't support.
    """
    listed = listed.strip(" ;,\t\n")
    if not listed:
        usable = sorted({a for a in present() if a in supported and a >= OLDEST})
        if usable:
            return Architectures(tuple(usable), ptx=True)
        listed = DEFAULT
    machine_code, ptx = set(), False
    for entry in re.split(r"[;,\s]+", listed):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got {listed!r}')
        architecture = 10 * int(match[1]) + int(match[2])
        if architecture not in supported or architecture < OLDEST:
            able = ", ".join(f"{a // 10}.{a % 10}" for a in supported)
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must name architectures from 7.5 on that nvcc supports "
                f"({able}), got {entry}"
            )
        machine_code.add(architecture)
        ptx = ptx or match[3] is not None
    return Architectures(tuple(sorted(machine_code)), ptx)


def present_architectures(environment: Mapping[str, str]) -> tuple[int, ...]:
    """Those of this machine's GPUs as NVIDIA's driver lists them, none where there is no driver."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if program is None:
        return ()
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, check=False, text=True, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # of a broken driver, which is no builder's affair
        return ()
    found = re.findall(r"^(\d+)\.(\d)$", result.stdout, re.MULTILINE)
    return tuple(sorted({10 * int(major) + int(minor) for major, minor in found}))


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """nvcc of CUDA_HOME, of PATH or of the usual place."""
    folders = [environment.get("PATH", ""), "/usr/local/cuda/bin"]
    if environment.get("CUDA_HOME"):
        folders = [os.path.join(environment["CUDA_HOME"], "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def wanted_nvcc(environment: Mapping[str, str]) -> str | None:
    """nvcc, if ATTN_EXT_CUDA has the module built.

    Raises:
        ValueError: ATTN_EXT_CUDA is none of 0, 1 and auto.
        RuntimeError: it is 1 and there is no nvcc.
    """
    choice = environment.get("ATTN_EXT_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"ATTN_EXT_CUDA must be 0, 1 or auto, got {choice!r}")
    nvcc = None if choice == "0" else find_nvcc(environment)
    if choice == "1" and nvcc is None:
        raise RuntimeError(
            "ATTN_EXT_CUDA is 1 and no nvcc was found: set CUDA_HOME or PATH, or ATTN_EXT_CUDA=0"
        )
    return nvcc


class Toolkit:
    """A CUDA toolkit: its compiler, its version and its static runtime library."""

    def __init__(self, nvcc: str, environment: Mapping[str, str]) -> None:
        self.nvcc = nvcc
        # nvcc may be a wrapper elsewhere; what it would run says where the toolkit is.
        plan = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
        top = pathlib.Path(re.search(r"\bTOP=(.*)", plan)[1].strip())  # type: ignore[index]
        supported = re.findall(r"compute_(\d+)\b", _output(nvcc, "--list-gpu-arch"))
        self.architectures = choose_architectures(
            environment.get("TORCH_CUDA_ARCH_LIST", ""),
            tuple(sorted(map(int, supported))),
            lambda: present_architectures(environment),
        )
        places = (top / "lib64", top / "lib", *top.glob("targets/*/lib"))
        libraries = [folder / "libcudart_static.a" for folder in places]
        self.runtime = next((str(library) for library in libraries if library.exists()), None)
        if self.runtime is None:
            raise RuntimeError(f"the CUDA toolkit in {top} has no libcudart_static.a")
        jobs = int(environment.get("ATTN_EXT_BUILD_JOBS", "0")) or os.cpu_count() or 1
        self.flags = [
            "-O3",
            "-std=c++17",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            # Four files take long, side by side; where that leaves cores idle, at the end of
            # them at least, architectures of a file too. A ptxas takes a GiB.
            f"--threads={max(2, jobs // 4)}",
            "-Xfatbin=-compress-all",
            *self.architectures.flags(),
        ]


def _output(*command: str) -> str:
    result = subprocess.run(command, check=True, text=True, capture_output=True)
    return result.stdout + result.stderr


class BuildExtension(build_ext):
    """build_ext that has nvcc compile .cu files."""

    toolkit: Toolkit | None = None

    def build_extensions(self) -> None:
        compile_cpp = self.compiler._compile

        def compile_any(
            obj: str, src: str, ext: str, cc_args: Any, postargs: Any, pp_opts: Any
        ) -> None:
            if ext != ".cu":
                compile_cpp(obj, src, ext, cc_args, postargs, pp_opts)
                return
            assert self.toolkit is not None
            self.compiler.spawn([self.toolkit.nvcc, *self.toolkit.flags, "-c", src, "-o", obj])

        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        self.compiler._compile = compile_any
        super().build_extensions()
