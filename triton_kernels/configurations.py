"""Block sizes, warps and pipeline stages, for each kernel, family of architectures and head_dim.

Chosen from `python -m bench.compile_report`, by the instructions of the main loop for the products
that a tile needs: these count for every warp, so that warps which repeat each other's products,
because a tile has too few rows for them, show. Nothing spills where a choice without spills was
found, among tiles of 16 to 128 rows and columns for 4 and 8 warps, that needs no third more
instructions (some gradients of float32 at a head_dim of 128 have none); for masks not every such
tile was compiled for every architecture. RDNA3 has 256 registers for operands that lie twice in a
wavefront of 32: from a head_dim of 128 on what does not spill there has too few rows for its warps,
and takes 1.4 to 4 times the instructions. So its choice is by what is spilled in the main loop,
which is counted there, and not by what waits on the stack for a loop's end; of the family only
gfx1100 was looked at. Shared memory fits. Of about equal ones those with more rows: every block of
rows reads keys and values from L2, and tcgen05's instructions fill 128. None has been timed: there
was no GPU. `tuning` times these and others on the GPU at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import triton


class Configuration(NamedTuple):
    """`descriptors`: whether the tiles that pass by are copied by hardware (TMA).

    `waves_per_eu`: for how many waves of a SIMD AMD's compiler plans, by which it orders loads and
    hands out registers; 0 leaves that to it.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 1
    descriptors: bool = False
    waves_per_eu: int = 0


INTERPRETED = Configuration(32, 32, descriptors=True)
"""So small that the sizes of tests cross blocks."""

_C = Configuration
_WIDTHS = (32, 64, 128, 256)

# By family and bits of an element; for each kernel, by width: the larger head_dim, rounded up to a
# power of 2, at least 32.
_TABLE: dict[tuple[str, int], dict[str, dict[int, Configuration]]] = {
    ("mma", 16): {  # mma.sync: compute capability 8.x and 12.x, within 99 KiB
        "forward": {
            32: _C(128, 64, 8, 2),
            64: _C(128, 128, 8, 2),
            128: _C(128, 64, 8, 2),
            256: _C(64, 64, 8, 1),
        },
        "backward_queries": {
            32: _C(128, 64, 8, 2),
            64: _C(128, 64, 8, 2),
            128: _C(128, 32, 8),
            256: _C(32, 32, 4),
        },
        "backward_keys": {
            32: _C(64, 128, 8, 2),
            64: _C(32, 128, 8, 2),
            128: _C(64, 64, 8, 2),
            256: _C(32, 32, 4),
        },
        "backward_atomic": {
            32: _C(32, 128, 8, 1),
            64: _C(32, 128, 8),
            128: _C(16, 64, 8, 1),
            256: _C(32, 32, 8),
        },
    },
    ("wgmma", 16): {
        "forward": {
            32: _C(128, 64, 8, 2, True),
            64: _C(128, 128, 8, 2, True),
            128: _C(64, 128, 4, 1, True),
            256: _C(128, 64, 8, 1, True),
        },
        "backward_queries": {
            32: _C(128, 64, 8, 2),
            64: _C(64, 128, 4, 2, True),
            128: _C(64, 128, 4, 1, True),
            256: _C(128, 64, 8, 1, True),
        },
        "backward_keys": {
            32: _C(64, 64, 4, 2),
            64: _C(64, 64, 4, 2),
            128: _C(32, 128, 8, 2, True),
            256: _C(32, 32, 4, 1, True),
        },
        "backward_atomic": {
            32: _C(64, 128, 8, 1, True),
            64: _C(64, 128, 8),
            128: _C(32, 128, 8, 2, True),
            256: _C(16, 32, 8, 1),
        },
    },
    ("tcgen05", 16): {
        "forward": {
            32: _C(128, 64, 8, 2, True),
            64: _C(128, 128, 8, 2, True),
            128: _C(128, 128, 8, 2, True),
            256: _C(128, 128, 8, 1, True),
        },
        "backward_queries": {
            32: _C(128, 64, 8, 2, True),
            64: _C(128, 64, 4, 2, True),
            128: _C(128, 128, 8, 1, True),
            256: _C(64, 128, 4, 1, True),
        },
        "backward_keys": {
            32: _C(64, 128, 8, 2, True),
            64: _C(32, 128, 4),
            128: _C(64, 128, 8, 1, True),
            256: _C(64, 16, 4, 1, True),
        },
        "backward_atomic": {
            32: _C(64, 128, 8, 2, True),
            64: _C(64, 128, 8),
            128: _C(32, 64, 4, 1, True),
            256: _C(16, 32, 8, 1),
        },
    },
    ("amd", 16): {  # MFMA, within 64 KiB
        "forward": {32: _C(128, 64), 64: _C(128, 64), 128: _C(128, 32), 256: _C(64, 32, 2)},
        "backward_queries": {
            32: _C(64, 32, 2),
            64: _C(64, 32, 2),
            128: _C(128, 32),
            256: _C(32, 16, 2),
        },
        "backward_keys": {
            32: _C(32, 64, 2),
            64: _C(32, 64, 2),
            128: _C(16, 64, 2),
            256: _C(16, 32, 2),
        },
        "backward_atomic": {
            32: _C(16, 64, 2),
            64: _C(16, 64, 2),
            128: _C(16, 64, 2),
            256: _C(16, 16),
        },
    },
    ("rdna", 16): {  # 256 registers, and operands twice in a wavefront of 32
        "forward": {32: _C(128, 128, 8), 64: _C(128, 64, 8), 128: _C(64, 64), 256: _C(64, 32)},
        "backward_queries": {
            32: _C(64, 64),
            64: _C(64, 32),
            128: _C(64, 16),
            256: _C(64, 16),
        },
        "backward_keys": {
            32: _C(32, 32, 2),
            64: _C(16, 32, 2),
            128: _C(16, 64),
            256: _C(16, 64),
        },
        "backward_atomic": dict.fromkeys(_WIDTHS, _C(16, 64)),
    },
    ("nvidia", 32): {
        "forward": {
            32: _C(64, 32),
            64: _C(32, 64, 8),
            128: _C(32, 32, 4, 1, True),
            256: _C(16, 32, 8),
        },
        "backward_queries": {
            32: _C(32, 32),
            64: _C(32, 32),
            128: _C(32, 64, 8, 1, True),
            256: _C(16, 16, 8),
        },
        "backward_keys": {
            32: _C(32, 32),
            64: _C(32, 32),
            128: _C(64, 32, 8, 1, True),
            256: _C(16, 16, 8),
        },
        "backward_atomic": {32: _C(16, 32), 64: _C(16, 32), 128: _C(16, 16, 8), 256: _C(16, 16, 8)},
    },
    ("amd", 32): {
        "forward": {32: _C(32, 32), 64: _C(32, 32), 128: _C(32, 16), 256: _C(16, 16)},
        "backward_queries": {32: _C(32, 16), 64: _C(32, 16), 128: _C(16, 16), 256: _C(16, 16)},
        "backward_keys": {32: _C(16, 32), 64: _C(16, 32), 128: _C(16, 16), 256: _C(16, 16)},
        "backward_atomic": {32: _C(16, 32), 64: _C(16, 32), 128: _C(16, 16), 256: _C(16, 16)},
    },
    ("rdna", 32): {
        "forward": {32: _C(32, 16, 8), 64: _C(32, 16, 8), 128: _C(16, 16, 8), 256: _C(16, 16, 8)},
        "backward_queries": dict.fromkeys(_WIDTHS, _C(16, 16, 8)),
        "backward_keys": {
            32: _C(16, 16, 8),
            64: _C(16, 16, 8),
            128: _C(16, 16, 16),
            256: _C(16, 16, 16),
        },
        "backward_atomic": dict.fromkeys(_WIDTHS, _C(16, 16, 16)),
    },
}
# The same where every pair has an entry of a mask or a random number, or every key has an entry of
# one (padding), which takes registers and shared memory; by width from 64 on.
_LADEN: dict[str, dict[str, dict[str, dict[int, Configuration]]]] = {
    "mma": {
        "dropout": {
            "forward": {64: _C(64, 64, 4)},
            "backward_queries": {64: _C(128, 32, 8)},
            "backward_keys": {64: _C(32, 128, 8)},
            "backward_atomic": {64: _C(32, 64, 8), 128: _C(32, 64, 8)},
        },
        "mask": {
            "forward": {64: _C(128, 64, 8)},
            "backward_queries": {64: _C(128, 64, 8)},
            "backward_keys": {64: _C(32, 128, 8)},
            "backward_atomic": {64: _C(32, 32, 4), 128: _C(32, 32, 8)},
        },
        "padding": {
            "forward": {64: _C(128, 64, 8, 2), 128: _C(128, 64, 8)},
            "backward_queries": {64: _C(128, 64, 8)},
        },
    },
    "wgmma": {
        "dropout": {
            "forward": {64: _C(64, 128, 4, 1, True)},
            "backward_queries": {64: _C(128, 32, 4), 128: _C(64, 64, 4)},
            "backward_keys": {64: _C(32, 64, 4), 128: _C(64, 32, 4, 1, True)},
            "backward_atomic": {64: _C(32, 64, 4, 1, True), 128: _C(32, 128, 8, 2, True)},
        },
        "mask": {
            "forward": {
                64: _C(128, 128, 8, 1, True),
                256: _C(64, 32, 4, 1, True),
            },
            "backward_queries": {
                64: _C(64, 128, 4, 1, True),
                128: _C(128, 64, 8),
                256: _C(128, 32, 8),
            },
            "backward_keys": {64: _C(32, 64, 4), 128: _C(32, 128, 8)},
            "backward_atomic": {64: _C(32, 64, 4), 128: _C(128, 32, 8, 1, True)},
        },
    },
    "tcgen05": {
        "dropout": {
            "forward": {64: _C(64, 128, 4, 1, True), 128: _C(64, 128, 4, 1, True)},
            "backward_queries": {64: _C(128, 64, 4), 128: _C(128, 64, 4)},
            "backward_keys": {64: _C(32, 128, 4), 128: _C(32, 64, 4)},
            "backward_atomic": {64: _C(32, 128, 4), 128: _C(32, 128, 8)},
        },
        "mask": {
            "forward": {64: _C(128, 64, 4, 1, True)},
            "backward_queries": {64: _C(128, 64, 4, 1, True), 128: _C(128, 64, 8)},
            "backward_keys": {64: _C(32, 128, 4), 128: _C(64, 64, 8)},
            "backward_atomic": {64: _C(64, 64, 4, 1, True), 128: _C(16, 128, 8)},
        },
    },
    "amd": {"padding": {"backward_keys": {128: _C(16, 32, 2)}}},
    "rdna": {
        "dropout": {
            "forward": {128: _C(64, 32)},
            "backward_keys": {64: _C(32, 64)},
        },
        "mask": {"forward": {128: _C(64, 32)}},
        "padding": {"forward": {128: _C(64, 32)}, "backward_keys": {128: _C(16, 32, 2)}},
    },
}
_ONE_PASS_RDNA_FLOAT32 = {
    32: _C(32, 16, 8),
    64: _C(32, 16, 8),
    128: _C(16, 16, 8),
    256: _C(16, 16, 8),
}
_WEIGHTS = {
    ("", 16): dict.fromkeys(_WIDTHS, _C(64, 128)),
    ("mma", 16): {32: _C(128, 64), 64: _C(128, 64), 128: _C(128, 64), 256: _C(64, 128)},
    ("rdna", 16): {32: _C(64, 64), 64: _C(64, 64), 128: _C(128, 64, 8), 256: _C(32, 32)},
    ("nvidia", 32): {32: _C(64, 32), 64: _C(128, 32, 8), 128: _C(128, 16, 8), 256: _C(16, 32)},
    ("amd", 32): {32: _C(64, 64), 64: _C(64, 64), 128: _C(64, 64), 256: _C(32, 32, 2)},
    ("rdna", 32): _ONE_PASS_RDNA_FLOAT32,
}
# Of the weights, without and with a mask (at 256 also with padding and dropout), and of the mask's
# gradient, whose loops are over heads; "" is any other family.
_ONE_PASS: dict[str, dict[tuple[str, int], dict[int, Configuration]]] = {
    "weights": _WEIGHTS,
    "masked_weights": {
        **_WEIGHTS,
        ("", 16): dict.fromkeys(_WIDTHS, _C(128, 64, 8)),
        ("mma", 16): {**dict.fromkeys(_WIDTHS, _C(128, 64, 8)), 256: _C(64, 64, 8)},
        ("amd", 16): _WEIGHTS["", 16],
        ("rdna", 16): {**_WEIGHTS["rdna", 16], 128: _C(128, 32, 8)},
    },
    "mask_gradient": {
        ("", 16): {32: _C(64, 64), 64: _C(64, 64), 128: _C(64, 64), 256: _C(64, 32, 8)},
        ("mma", 16): {32: _C(64, 64), 64: _C(32, 64), 128: _C(64, 64), 256: _C(64, 32)},
        ("tcgen05", 16): {32: _C(64, 64), 64: _C(64, 64), 128: _C(64, 64, 8), 256: _C(64, 32, 8)},
        ("amd", 16): dict.fromkeys(_WIDTHS, _C(64, 64)),
        ("rdna", 16): {32: _C(64, 64, 8), 64: _C(64, 32), 128: _C(32, 64, 8), 256: _C(32, 32)},
        ("nvidia", 32): {
            32: _C(32, 64),
            64: _C(32, 64, 8),
            128: _C(32, 64, 8),
            256: _C(16, 32),
        },
        ("amd", 32): {**dict.fromkeys(_WIDTHS, _C(32, 16, 2)), 64: _C(64, 64)},
        ("rdna", 32): {**_ONE_PASS_RDNA_FLOAT32, 64: _C(16, 16, 8)},
    },
}
# Of one architecture for which the compiler makes spills, or memory has room, where it does not for
# the others of a family: by kernel, bits, width and `laden`, see `configuration_of`.
_ALONE: dict[str, dict[tuple[str, int, int, str | None], Configuration]] = {
    "sm_80": {
        ("backward_keys", 16, 256, None): _C(64, 32, 8, 2),
        ("backward_keys", 32, 128, None): _C(64, 16, 8),
        ("weights", 16, 128, None): _C(128, 64, 8),
        ("masked_weights", 16, 256, None): _C(128, 64, 8),
    },
    "sm_86": {
        ("backward_keys", 16, 128, "mask"): _C(16, 128, 8),
        ("backward_keys", 32, 128, None): _C(64, 16, 8),
    },
    "sm_90": {
        ("weights", 32, 64, None): _C(128, 128, 8),
        ("weights", 32, 128, None): _C(128, 64, 8),
        ("masked_weights", 32, 64, None): _C(128, 64, 8),
        ("masked_weights", 32, 128, None): _C(128, 32, 8),
        ("mask_gradient", 32, 64, None): _C(128, 32, 8),
        ("mask_gradient", 16, 256, None): _C(64, 128, 8),
    },
    "sm_100": {
        ("weights", 32, 64, None): _C(128, 128, 8),
        ("weights", 32, 128, None): _C(64, 128, 8),
        ("masked_weights", 32, 64, None): _C(64, 128, 8),
        ("masked_weights", 32, 128, None): _C(64, 128, 8),
    },
    "sm_120": {
        ("backward_queries", 16, 256, None): _C(32, 32, 4, 1, True),
        ("backward_queries", 16, 128, "dropout"): _C(32, 64, 4, 1, True),
        ("backward_queries", 16, 128, "mask"): _C(32, 64, 4),
        ("backward_queries", 16, 128, "padding"): _C(32, 64, 8, 2),
        ("backward_keys", 16, 128, "mask"): _C(128, 32, 8),
        ("backward_keys", 16, 256, None): _C(32, 32, 4, 1, True),
        ("weights", 16, 256, None): _C(64, 128, 8),
        ("mask_gradient", 16, 64, None): _C(128, 64, 8),
        ("mask_gradient", 16, 128, None): _C(64, 32),
        ("mask_gradient", 16, 256, None): _C(32, 64, 8),
    },
}
_RDNA_WAVES = 1
"""A plan for more of them, the compiler's own, takes up to a third more instructions in loops with
matrix instructions, and nowhere less."""
_LIKE = {"sm_87": "sm_86", "sm_89": "sm_86", "sm_121": "sm_120"}
"""Architectures with the instructions and the least shared memory of another."""
_ROW_TERMS = [_C(32, 32), _C(16, 32), _C(64, 32), _C(128, 32)]


def family_of(architecture: str, bits: int) -> str:
    """Which of NVIDIA's or AMD's architectures have a configuration in common."""
    if architecture.startswith("gfx"):
        return "amd" if architecture.startswith("gfx9") else "rdna"
    if bits == 32:
        return "nvidia"
    number = int(architecture.removeprefix("sm_"))
    return {9: "wgmma", 10: "tcgen05"}.get(number // 10, "mma")


def _has_descriptors(architecture: str) -> bool:
    return architecture.startswith("sm_") and int(architecture.removeprefix("sm_")) >= 90


def block_of(head_dim: int) -> int:
    """The power of 2 that holds a head_dim; 16 is the least that tl.dot takes."""
    return max(triton.next_power_of_2(head_dim), 16)


def configuration_of(
    kernel: str, architecture: str, bits: int, width: int, laden: str | None = None
) -> Configuration:
    """The configuration of a kernel.

    Args:
        kernel: its name.
        architecture: "sm_80", "gfx942" and the like, or "interpreter".
        bits: of an element of query.
        width: `block_of` the larger head_dim.
        laden: "mask" or "dropout" where every pair has an entry or a random number of its own,
            "padding" where only every key has an entry.
    """
    if architecture == "interpreter":
        return INTERPRETED
    width = max(width, 32)
    if kernel == "row_terms":
        return _ROW_TERMS[0]
    found = _found(kernel, architecture, bits, width, laden)
    if family_of(architecture, bits) == "rdna" and bits == 16:
        found = found._replace(waves_per_eu=_RDNA_WAVES)
    return found if _has_descriptors(architecture) else found._replace(descriptors=False)


def _found(
    kernel: str, architecture: str, bits: int, width: int, laden: str | None
) -> Configuration:
    """What the tables say."""
    if kernel == "weights" and (laden == "mask" or (laden is not None and width == 256)):
        kernel = "masked_weights"
    if kernel in _ONE_PASS or bits == 32:
        laden = None
    alone = _ALONE.get(_LIKE.get(architecture, architecture), {})
    if (kernel, bits, width, laden) in alone:
        return alone[kernel, bits, width, laden]
    family = family_of(architecture, bits)
    if kernel in _ONE_PASS:
        by_family = _ONE_PASS[kernel]
        return (by_family.get((family, bits)) or by_family["", bits])[width]
    if laden is None:
        return _TABLE[family, bits][kernel][width]
    by_width = _LADEN.get(family, {}).get(laden, {}).get(kernel, {})
    plain = _found(kernel, architecture, bits, width, None)
    # A key's entries take hardly any memory, so that stages stay.
    other = plain if laden == "padding" else plain._replace(num_stages=1)
    return by_width.get(max(width, 64), other)


def candidates_of(
    kernel: str, architecture: str, bits: int, width: int, laden: str | None = None
) -> list[Configuration]:
    """What is worth timing, `configuration_of` first: 4 to 26.

    They are the kernel's configurations for any head_dim and family of that vendor, and its own one
    with other warps, other stages or waves, and with and without descriptors where hardware reads
    them.
    """
    own = configuration_of(kernel, architecture, bits, width, laden)
    if architecture == "interpreter":
        return [own, own._replace(BLOCK_M=16), own._replace(BLOCK_N=16, descriptors=False)]
    if kernel == "row_terms":
        return _ROW_TERMS
    nearby = [own._replace(num_warps=warps) for warps in (4, 8)]
    nearby += [own._replace(num_stages=stages) for stages in (1, 2, 3)]
    amd = architecture.startswith("gfx")
    if amd:
        nearby += [own._replace(waves_per_eu=waves) for waves in (0, 1, 2)]
    by_family = _ONE_PASS.get(kernel) or {key: kernels[kernel] for key, kernels in _TABLE.items()}
    for (family, size), by_width in by_family.items():
        if size == bits and (family in ("amd", "rdna")) == amd:
            nearby += [x._replace(waves_per_eu=own.waves_per_eu) for x in by_width.values()]
    copies = _has_descriptors(architecture) and kernel in _TABLE["wgmma", 16]
    chosen = [
        x._replace(descriptors=d) for x in nearby for d in ((False, True) if copies else (False,))
    ]
    return list(dict.fromkeys([own, *chosen]))
