"""Builds the native modules. Metadata and tool settings are in pyproject.toml.

torch is not needed to build: bindings pass addresses (see csrc/attention.h), so that one binary
    serves every torch release.
"""

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

HEADERS = [
    "csrc/attention.h",
    "csrc/philox.h",
    "csrc/cpu/amx.h",
    "csrc/cpu/backward.h",
    "csrc/cpu/decode.h",
    "csrc/cpu/decode_products.h",
    "csrc/cpu/forward.h",
    "csrc/cpu/headers.h",
    "csrc/cpu/instruction_set.h",
    "csrc/cpu/kernels.h",
    "csrc/cpu/linear.h",
    "csrc/cpu/matmul.h",
    "csrc/cpu/matmul_amx.h",
    "csrc/cpu/scores.h",
    "csrc/cpu/simd.h",
    "csrc/cpu/tile.h",
    "csrc/cpu/weights.h",
]

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

ParallelCompile("ATTN_EXT_BUILD_JOBS", default=0).install()

setup(
    ext_modules=[
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
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
