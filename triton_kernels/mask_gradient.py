"""The gradient of a floating mask: dS, summed over whatever the mask broadcasts over.

Grid: a program for BLOCK_M by BLOCK_N entries of the mask, as it is in memory; where a dimension
broadcasts (its stride is 0), the program goes through all of it, adding in registers, so that
nothing is atomic and no (Lq, Lk) tensor is needed beyond the mask's own. It reads queries, keys,
values and output gradients of every tile that it visits, and compares no positions where all pairs
exist and are within reach. Tested like `backward_queries`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Problem, Tile
from attn_ext.triton_kernels.gradients import gradients_of, keep_of, load_row_values
from attn_ext.triton_kernels.scores import head_of, is_full, load_entries, load_tile, start_of


@triton.jit
def score_gradients(
    q, k, v, dout, lse, terms, dweights, share, tile, problem, shape: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """dS of one tile."""
    sizes = problem.sizes
    batch, head = tile.batch, tile.head
    key_head = head // sizes.group
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    queries = head_of(q, batch, head, sizes.query_length)
    keys = head_of(k, batch, key_head, sizes.key_length)
    q_tile = load_tile(queries, tile.start_m, tile.rows, offs_d[None, :], shape.HEAD_DIM, EDGE)
    k_tile = load_tile(keys, tile.start_n, tile.columns, offs_d[:, None], shape.HEAD_DIM, EDGE)
    product = tl.dot(q_tile, k_tile, input_precision=shape.PRECISION)
    dp = product
    if dweights is None:
        values = head_of(v, batch, key_head, sizes.key_length)
        gradients = head_of(dout, batch, head, sizes.query_length)
        do_tile = load_tile(
            gradients, tile.start_m, tile.rows, offs_dv[None, :], shape.VALUE_DIM, EDGE
        )
        v_tile = load_tile(
            values, tile.start_n, tile.columns, offs_dv[:, None], shape.VALUE_DIM, EDGE
        )
        dp = tl.dot(do_tile, v_tile, input_precision=shape.PRECISION)
    l_i, term = load_row_values(lse, terms, tile, tile.rows, problem, shape, EDGE)
    keep = keep_of(tile, problem, shape.BLOCK_M, shape.BLOCK_N, shape.WHOLE_CALLS)
    entries = load_entries(tile, problem, EDGE)  # so late because registers are few
    _, ds, _ = gradients_of(
        product, entries, dp, l_i, term, dweights, share, tile, problem, shape, keep,
        EDGE=EDGE, ADDED=False, WEIGHTS=False, ROWS=EDGE,
    )  # fmt: skip
    return ds


@triton.jit
def sum_gradients(
    q, k, v, dout, lse, terms, dweights, share, ranges, problem, shape: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The sum over some batches, heads, and tiles of rows and keys."""
    rows, columns = tl.arange(0, shape.BLOCK_M)[:, None], tl.arange(0, shape.BLOCK_N)[None, :]
    batches, heads, row_range, key_range = ranges
    total = tl.zeros((shape.BLOCK_M, shape.BLOCK_N), tl.float32)
    for batch in range(batches[0], batches[1]):
        for head in range(heads[0], heads[1]):
            for start_m in range(row_range[0], row_range[1], shape.BLOCK_M):
                for start_n in range(key_range[0], key_range[1], shape.BLOCK_N):
                    tile = Tile(batch, head, start_m, start_n, rows, columns)
                    total += score_gradients(
                        q, k, v, dout, lse, terms, dweights, share, tile, problem, shape, EDGE
                    )
    return total


@triton.jit
def span(BROADCASTS: tl.constexpr, block, size, STEP: tl.constexpr):
    """The part of one dimension that a program goes through."""
    if BROADCASTS:
        return 0, size
    else:
        return block * STEP, tl.minimum(block * STEP + STEP, size)


@triton.jit(do_not_specialize=["reach", "dropout", "sizes", "batches"])
def mask_gradient(
    q,
    k,
    v,
    dout,  # or None with dweights
    lse,
    terms,  # or None with dweights
    dmask,  # Pairs
    dweights,  # or None
    share,
    scoring,
    reach,
    dropout,  # or None
    sizes,
    batches,
    OVER_BATCHES: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_KEYS: tl.constexpr,
    shape: tl.constexpr,
):
    problem = Problem(scoring, reach, dropout, sizes)
    index = tl.program_id(0)
    key_blocks = 1 if OVER_KEYS else tl.cdiv(sizes.key_length, shape.BLOCK_N)
    row_blocks = 1 if OVER_ROWS else tl.cdiv(sizes.query_length, shape.BLOCK_M)
    head_blocks = 1 if OVER_HEADS else sizes.query_heads
    first_key, last_key = span(OVER_KEYS, index % key_blocks, sizes.key_length, shape.BLOCK_N)
    index = index // key_blocks
    first_row, last_row = span(OVER_ROWS, index % row_blocks, sizes.query_length, shape.BLOCK_M)
    index = index // row_blocks
    first_head, last_head = span(OVER_HEADS, index % head_blocks, sizes.query_heads, 1)
    first_batch, last_batch = span(OVER_BATCHES, index // head_blocks, batches, 1)
    ranges = (
        (first_batch, last_batch), (first_head, last_head),
        (first_row, last_row), (first_key, last_key),
    )  # fmt: skip
    row_count = tl.cdiv(last_row - first_row, shape.BLOCK_M) * shape.BLOCK_M
    key_count = tl.cdiv(last_key - first_key, shape.BLOCK_N) * shape.BLOCK_N
    if is_full(first_row, row_count, first_key, key_count, problem):
        total = sum_gradients(
            q, k, v, dout, lse, terms, dweights, share, ranges, problem, shape, False
        )
    else:
        total = sum_gradients(
            q, k, v, dout, lse, terms, dweights, share, ranges, problem, shape, True
        )
    rows, columns = tl.arange(0, shape.BLOCK_M)[:, None], tl.arange(0, shape.BLOCK_N)[None, :]
    if OVER_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        rows = tl.arange(0, 1)[:, None]
    if OVER_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        columns = tl.arange(0, 1)[None, :]
    base = start_of(dmask, first_batch, first_head)
    base += tl.cast(first_row, tl.int64) * dmask.stride_m
    base += tl.cast(first_key, tl.int64) * dmask.stride_n
    inside = (rows < last_row - first_row) & (columns < last_key - first_key)
    tl.store(base + (rows * dmask.stride_m + columns * dmask.stride_n), total, mask=inside)
