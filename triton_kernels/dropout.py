"""Dropout's random bytes, the same bits as csrc/philox.h and attn_ext/philox.py, which has the
pattern and its reasons: Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC'11), of whose 16 bytes
each decides about a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
KEY_STEP_0 = tl.constexpr(0x9E3779B9)
KEY_STEP_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """The four words of a counter; everything is uint32."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, MULTIPLIER_0), tl.umulhi(c2, MULTIPLIER_1)
        low0, low1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + KEY_STEP_0, key1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def as_word(x):
    """The low 32 bits, as uint32."""
    return tl.cast(x, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def random_bits(problem, tile, row_words, column_words):
    """What every call decides, by the first two words of their counters: a bit for each of its 16
    bytes, set where that keeps its weight. Bytes 0 and 1 of word i have bits 2 i and 2 i + 1, its
    bytes 2 and 3 the same ones of the upper half."""
    dropout = problem.dropout
    if dropout.seed_ptr is None:
        key0, key1 = as_word(dropout.seed_low), as_word(dropout.seed_high)
    else:
        seed = tl.load(dropout.seed_ptr)
        key0, key1 = as_word(seed), as_word(seed >> 32)
    head = as_word(tile.batch * problem.sizes.query_heads + tile.head)
    # Not broadcast before the rounds need it: the first two are a row's or a column's alone.
    w0, w1, w2, w3 = philox(column_words, row_words, head, as_word(dropout.offset), key0, key1)
    threshold = as_word(dropout.threshold)
    least = threshold >> 24
    # Two bytes are compared at once: 256 - least more, and bit 8 tells.
    down = (256 - least) * 0x00010001
    more = tl.where((w0 ^ w1 ^ w2 ^ w3) < threshold << 8, down - 0x00010001, down)
    first = kept_bytes(w0, more) | kept_bytes(w1, more) << 2
    last = kept_bytes(w2, more) << 4 | kept_bytes(w3, more) << 6
    # A sum over the first dimension, because the compiler stops there when it moves conversions of
    # layouts towards the start: threads exchange bits instead of making each other's calls again.
    return tl.sum(tl.permute(tl.join(first, last), (2, 0, 1)), 0)


@triton.jit
def kept_bytes(word, more):
    """Bits 0, 1, 16 and 17: whether the word's bytes 0 to 3 reach the threshold."""
    even = (word & 0x00FF00FF) + more
    odd = (word >> 8 & 0x00FF00FF) + more
    return (even >> 8 & 0x00010001) | (odd >> 7 & 0x00020002)


@triton.jit
def keep_mask(
    problem, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_CALLS: tl.constexpr
):
    """Which weights of a tile (M, N) are kept. One call of the generator serves 16 of them, of two
    rows and eight columns, if WHOLE_CALLS and the tile's sizes say that it lies within the tile."""
    dropout = problem.dropout
    first_row = as_word(tile.start_m) + as_word(dropout.q_start)
    first_column = as_word(tile.start_n) + as_word(dropout.k_start)
    if WHOLE_CALLS and BLOCK_M % 16 == 0 and BLOCK_N % 16 == 0:
        ROWS: tl.constexpr = BLOCK_M // 16
        # Of 32 columns, or the half of them that is this tile's.
        GROUPS: tl.constexpr = max(BLOCK_N // 32, 1)
        HALVES: tl.constexpr = min(BLOCK_N // 16, 2)
        row_words = first_row // 2 + tl.arange(0, 8 * ROWS)[:, None].to(tl.uint32)
        column_words = first_column // 32 * 4 + tl.arange(0, 4 * GROUPS)[None, :].to(tl.uint32)
        bits = random_bits(problem, tile, row_words, column_words)
        if HALVES == 1:
            bits = bits >> first_column % 32 // 16 * 2
        # A call's weights: which of two rows, half, which of two eights of columns, which column.
        index = tl.arange(0, 8 * HALVES)
        row, half = index // (4 * HALVES), index // 4 % HALVES
        position = row * 4 + half * 2 + index // 2 % 2 * 16 + index % 2
        kept = (bits[:, :, None] >> position[None, None, :].to(tl.uint32) & 1) != 0
        kept = tl.reshape(kept, (ROWS, 8, GROUPS, 4, 2, HALVES, 2, 2))
        kept = tl.permute(kept, (0, 4, 1, 2, 5, 6, 3, 7))
        return tl.reshape(kept, (BLOCK_M, BLOCK_N))
    else:
        row = first_row + tl.arange(0, BLOCK_M)[:, None].to(tl.uint32)
        column = first_column + tl.arange(0, BLOCK_N)[None, :].to(tl.uint32)
        bits = random_bits(
            problem, tile, row // 16 * 8 + row % 8, column // 32 * 4 + column % 8 // 2
        )
        position = row % 16 // 8 * 4 + column % 32 // 16 * 2 + column % 16 // 8 * 16 + column % 2
        return (bits >> position & 1) != 0
