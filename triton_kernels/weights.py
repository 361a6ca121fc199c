"""The attention weights themselves, from the LSE: P = dropout(exp(S - lse)), per head or averaged
over heads, in one pass that never holds (B, Hq, Lq, Lk) if averaged.

Grid: a program for BLOCK_M queries by BLOCK_N keys of one head, or of all heads of a batch, whose
tiles it sums in registers. It reads the queries and keys of its tile, compares no positions where
all pairs exist and are within reach, and writes the tile. Tested against
attn_ext/backends/reference.py, interpreted, in tests/test_contract.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Problem, Tile
from attn_ext.triton_kernels.gradients import keep_of, load_row_values
from attn_ext.triton_kernels.scores import (
    INFINITY,
    exp_of,
    factor_of,
    head_of,
    is_full,
    load_entries,
    load_tile,
    scores_of,
    start_of,
)


@triton.jit
def sum_weights(q, k, lse, count, tile, problem, shape: tl.constexpr, EDGE: tl.constexpr):
    """The sum of the weights of some heads, of which `tile.head` is the first."""
    sizes = problem.sizes
    offs_d = tl.arange(0, shape.BLOCK_D)
    total = tl.zeros((shape.BLOCK_M, shape.BLOCK_N), tl.float32)
    for head in range(tile.head, tile.head + count):
        here = Tile(tile.batch, head, tile.start_m, tile.start_n, tile.rows, tile.columns)
        queries = head_of(q, tile.batch, head, sizes.query_length)
        keys = head_of(k, tile.batch, head // sizes.group, sizes.key_length)
        q_tile = load_tile(queries, tile.start_m, tile.rows, offs_d[None, :], shape.HEAD_DIM, EDGE)
        k_tile = load_tile(keys, tile.start_n, tile.columns, offs_d[:, None], shape.HEAD_DIM, EDGE)
        entries = load_entries(here, problem, EDGE)
        product = tl.dot(q_tile, k_tile, input_precision=shape.PRECISION)
        s, _ = scores_of(product, entries, here, problem, shape, EDGE)
        l_i, _ = load_row_values(lse, None, here, tile.rows, problem, shape, EDGE)
        x = s * factor_of(problem, shape) - l_i
        if EDGE or shape.MASKED:
            x = tl.where(s != -INFINITY, x, -INFINITY)  # LSE may be NaN because of other keys
        p = exp_of(x, shape.UNIT)
        if problem.dropout is not None:
            keep = keep_of(here, problem, shape.BLOCK_M, shape.BLOCK_N, shape.WHOLE_CALLS)
            p = tl.where(keep, p * problem.dropout.factor, 0.0)
        total += p
    return total


@triton.jit(do_not_specialize=["reach", "dropout", "sizes"])
def weights(
    q,
    k,
    lse,
    out,  # Pairs
    scoring,
    reach,
    dropout,  # or None
    sizes,
    AVERAGE: tl.constexpr,
    shape: tl.constexpr,
):
    problem = Problem(scoring, reach, dropout, sizes)
    key_blocks = tl.cdiv(sizes.key_length, shape.BLOCK_N)
    row_blocks = tl.cdiv(sizes.query_length, shape.BLOCK_M)
    index = tl.program_id(0)
    start_n = index % key_blocks * shape.BLOCK_N
    start_m = index // key_blocks % row_blocks * shape.BLOCK_M
    pair = index // key_blocks // row_blocks
    if AVERAGE:
        batch, first_head, count = pair, 0, sizes.query_heads
    else:
        batch, first_head, count = pair // sizes.query_heads, pair % sizes.query_heads, 1
    rows, columns = tl.arange(0, shape.BLOCK_M)[:, None], tl.arange(0, shape.BLOCK_N)[None, :]
    tile = Tile(batch, first_head, start_m, start_n, rows, columns)

    if is_full(start_m, shape.BLOCK_M, start_n, shape.BLOCK_N, problem):
        total = sum_weights(q, k, lse, count, tile, problem, shape, False)
    else:
        total = sum_weights(q, k, lse, count, tile, problem, shape, True)
    if AVERAGE:
        total *= 1 / count.to(tl.float32)
    base = start_of(out, batch, first_head)
    base += tl.cast(start_m, tl.int64) * out.stride_m + tl.cast(start_n, tl.int64) * out.stride_n
    inside = (rows < sizes.query_length - start_m) & (columns < sizes.key_length - start_n)
    pointers = base + (rows * out.stride_m + columns * out.stride_n)
    tl.store(pointers, total.to(out.ptr.dtype.element_ty), mask=inside)
