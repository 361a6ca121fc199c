"""Builds the native modules. Metadata and tool settings are in pyproject.toml.

torch is not needed to build: bindings pass addresses (see csrc/attention.h), so that one binary
serves every torch release.
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which build isolation leaves out
import setup_cuda

COMMON_HEADERS = glob("csrc/*.h")

# No -march: each instruction set names its features in its own file. NaN and inf are respected.
# -Wno-uninitialized: GCC 12 warns about its own AVX-512 header.
COMPILE_FLAGS = [
    "-Wno-uninitialized",
    "-O3",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]

extensions = [
    Pybind11Extension(
        "attn_ext._cpu",
        [
            "csrc/bindings_cpu.cpp",
            "csrc/cpu/amx.cpp",
            "csrc/cpu/avx512.cpp",
            "csrc/cpu/avx512_bf16.cpp",
            "csrc/cpu/avx2.cpp",
            "csrc/cpu/portable.cpp",
        ],
        depends=[*COMMON_HEADERS, *glob("csrc/cpu/*.h")],
        cxx_std=17,
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=["-fopenmp"],
    )
]

nvcc = setup_cuda.wanted_nvcc(os.environ)
if nvcc is not None:
    toolkit = setup_cuda.BuildExtension.toolkit = setup_cuda.Toolkit(nvcc, os.environ)
    extensions.append(
        Pybind11Extension(
            "attn_ext._cuda",
            [
                "csrc/cuda/backward_keys.cu",
                "csrc/cuda/backward_queries.cu",
                "csrc/cuda/forward.cu",
                "csrc/cuda/weights.cu",
                "csrc/cuda/device.cu",
                "csrc/bindings_cuda.cpp",
            ],
            depends=[*COMMON_HEADERS, *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")],
            cxx_std=17,
            extra_objects=[toolkit.runtime],
            libraries=["dl", "pthread", "rt"],
        )
    )

ParallelCompile("ATTN_EXT_BUILD_JOBS", default=0).install()

setup(ext_modules=extensions, cmdclass={"build_ext": setup_cuda.BuildExtension})
