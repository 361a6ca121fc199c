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
def random_words(problem, tile, row_words, column_words):
    """The four words of every call, by the first two words of their counters; and the least byte
    that keeps a weight."""
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
    rounded_up = (w0 ^ w1 ^ w2 ^ w3) < threshold << 8
    return w0, w1, w2, w3, (threshold >> 24) + rounded_up.to(tl.uint32)


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
        w0, w1, w2, w3, least = random_words(problem, tile, row_words, column_words)
        if HALVES == 2:
            above, below = tl.join(w0, w1), tl.join(w2, w3)
        else:
            first_half = first_column % 32 < 16
            above = tl.where(first_half, w0, w1)[:, :, None]
            below = tl.where(first_half, w2, w3)[:, :, None]
        words = tl.join(above, below)  # (row's call, column's call, half, which of two rows)
        shifts = (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, None, None, :]
        kept = (words[:, :, :, :, None] >> shifts & 255) >= least[:, :, None, None, None]
        kept = tl.reshape(kept, (ROWS, 8, GROUPS, 4, HALVES, 2, 2, 2))
        kept = tl.permute(kept, (0, 5, 1, 2, 4, 6, 3, 7))
        return tl.reshape(kept, (BLOCK_M, BLOCK_N))
    else:
        row = first_row + tl.arange(0, BLOCK_M)[:, None].to(tl.uint32)
        column = first_column + tl.arange(0, BLOCK_N)[None, :].to(tl.uint32)
        w0, w1, w2, w3, least = random_words(
            problem, tile, row // 16 * 8 + row % 8, column // 32 * 4 + column % 8 // 2
        )
        first_half = column % 32 < 16
        word = tl.where(row % 16 < 8, tl.where(first_half, w0, w1), tl.where(first_half, w2, w3))
        return (word >> (column % 16 // 8 * 16 + column % 2 * 8) & 255) >= least
