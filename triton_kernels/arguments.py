"""What kernels take: tensors with their strides, and settings. Absent ones are None.

Strides count elements. Names as in `attn_ext.problem`: B Hq Hkv Lq Lk D Dv.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import attn_ext.problem


class Rows(NamedTuple):
    """A tensor (B, H, L, D) whose rows are contiguous, or (B, H, L): a value a row."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    descriptor: Any = None  # of tiles (1, 1, L, D), where they are copied by hardware


class Pairs(NamedTuple):
    """A tensor (B, Hq, Lq, Lk); a stride of 0 broadcasts."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


class KeyMask(NamedTuple):
    """A tensor (B, Lk)."""

    ptr: Any
    stride_b: Any
    stride_n: Any


class Sizes(NamedTuple):
    query_heads: Any
    group: Any  # query heads a key head serves
    query_length: Any
    key_length: Any


class Reach(NamedTuple):
    """Row i may see the keys from i + low to i + high; None: no limit hides a pair."""

    low: Any
    high: Any


class Scoring(NamedTuple):
    """What a product of query and key goes through: scale, softcap, ALiBi and masks."""

    scale: Any
    softcap: Any
    alibi_slopes: Any  # Rows of (B, Hq)
    diagonal: Any  # the key index that stands on row 0's diagonal, for ALiBi
    mask: Any  # Pairs, bool (True takes part) or floating (added)
    key_mask: Any  # KeyMask, likewise


class Dropout(NamedTuple):
    """Words of 32 bits are passed as signed ones."""

    threshold: Any  # dropout_p in units of 2**-32
    factor: Any  # 1 / (1 - dropout_p)
    seed_low: Any
    seed_high: Any
    seed_ptr: Any  # an int64 on the device instead of the two words
    offset: Any
    q_start: Any
    k_start: Any


class Problem(NamedTuple):
    """What stays the same in a whole call."""

    scoring: Any
    reach: Any
    dropout: Any  # or None
    sizes: Any
    sinks_ptr: Any = None


class Shape(NamedTuple):
    """The constants that a kernel is compiled for.

    UNIT: what a natural score is multiplied with, see `scores`. FOLD: whether a score is a product
    times a positive factor, or hidden. HIDES: whether a key that exists can be hidden from a row.
    MASKED: whether by a mask.
    WHOLE_CALLS: whether q_start is a multiple of 16 and k_start of 32, and positions do not start
    again after 2**32, see `dropout`. PRECISION:
    tl.dot's input_precision.
    """

    HEAD_DIM: Any
    VALUE_DIM: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any  # HEAD_DIM and VALUE_DIM, rounded up to a power of 2
    BLOCK_DV: Any
    UNIT: Any
    FOLD: Any
    HIDES: Any
    MASKED: Any
    WHOLE_CALLS: Any
    PRECISION: Any


class Head(NamedTuple):
    """The rows of one head, a source of tiles."""

    base: Any
    stride: Any
    length: Any
    descriptor: Any  # or None
    batch: Any
    head: Any


class Tile(NamedTuple):
    """Where a tile of pairs lies.

    `rows` and `columns` count from `start_m` and `start_n` and broadcast to the tile: (M, 1) and
    (1, N), or (1, M) and (N, 1) where the tile is transposed.
    """

    batch: Any
    head: Any
    start_m: Any
    start_n: Any
    rows: Any
    columns: Any


def pairs_of(tensor: Tensor) -> Pairs:
    """A tensor that broadcasts to (B, Hq, Lq, Lk)."""
    strides = (0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return Pairs(tensor, *strides)


def masks_of(problem: attn_ext.problem.Problem) -> tuple[Pairs | None, KeyMask | None]:
    """The masks of pairs and of keys. Without key_padding_mask, an attn_mask that all heads and
    rows share is one of keys, which costs less."""
    mask, key_mask = problem.attn_mask, problem.key_padding_mask
    pairs = None if mask is None else pairs_of(mask)
    if key_mask is not None:
        return pairs, KeyMask(key_mask, *key_mask.stride())
    if pairs is not None and pairs.stride_h == 0 and pairs.stride_m == 0:
        return None, KeyMask(pairs.ptr, pairs.stride_b, pairs.stride_n)
    return pairs, None
