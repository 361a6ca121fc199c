"""Dropout's random words, the same bits as csrc/philox.h and attn_ext/philox.py.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC'11). The key is the seed, the counter
(column // 4, row, batch * Hq + head, offset), and word column % 4 decides about a weight.
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
def words_of(problem, tile, rows, fours):
    """The words of every row and group of four columns; `fours` are whole column numbers / 4."""
    dropout = problem.dropout
    if dropout.seed_ptr is None:
        key0, key1 = as_word(dropout.seed_low), as_word(dropout.seed_high)
    else:
        seed = tl.load(dropout.seed_ptr)
        key0, key1 = as_word(seed), as_word(seed >> 32)
    row = as_word(tile.start_m + rows) + as_word(dropout.q_start)
    head = as_word(tile.batch * problem.sizes.query_heads + tile.head)
    # Not broadcast before the rounds need it: the first two are a row's or a column's alone.
    return philox(fours, row, head, as_word(dropout.offset), key0, key1)


@triton.jit
def keep_mask(problem, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IN_FOURS: tl.constexpr):
    """Which weights of a tile (M, N) are kept. One call of the generator serves four of them,
    unless k_start is no multiple of 4."""
    dropout = problem.dropout
    rows = tl.arange(0, BLOCK_M)[:, None]
    first = as_word(tile.start_n) + as_word(dropout.k_start)
    threshold = as_word(dropout.threshold)
    if IN_FOURS and BLOCK_N % 4 == 0:
        fours = first // 4 + tl.arange(0, BLOCK_N // 4)[None, :].to(tl.uint32)
        w0, w1, w2, w3 = words_of(problem, tile, rows, fours)
        even = tl.join(w0 >= threshold, w2 >= threshold)
        odd = tl.join(w1 >= threshold, w3 >= threshold)
        return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))
    else:
        column = first + tl.arange(0, BLOCK_N)[None, :].to(tl.uint32)
        w0, w1, w2, w3 = words_of(problem, tile, rows, column // 4)
        choice = column % 4
        low = tl.where(choice == 0, w0, w1)
        high = tl.where(choice == 2, w2, w3)
        return tl.where(choice < 2, low, high) >= threshold
