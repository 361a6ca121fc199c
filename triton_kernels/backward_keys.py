"""Backward pass, dV = P^T dO and dK = scale dS^T Q (Dao, arXiv:2307.08691, algorithm 2, the
column's half of it; nothing is atomic, unless dQ is asked for).

    S^T = K Q^T;  dP^T = V dO^T;  P^T = exp2(S^T - lse);  dS^T = P^T (dP^T + term)
    dV += P^T dO;  dK += dS^T Q
    dq_sums += dS K, atomic, where the whole of algorithm 2 is asked for: float32, in any order

Grid: a program for BLOCK_N keys of one key head. It reads its keys and values once and the rows
that see them, of all heads that share the key head, BLOCK_M at a time, with their output gradients;
it writes dK and dV. Everything is transposed, keys being the rows, so that weights are operands of
the next product as they are. With dq_sums it also adds to those rows' sums, which start from 0 and
from which `backward_queries` then makes dQ. Tested like `backward_queries`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Problem, Tile
from attn_ext.triton_kernels.gradients import gradients_of, keep_of, load_row_values
from attn_ext.triton_kernels.scores import (
    CAREFUL,
    add_to_tile,
    edge_tile,
    head_of,
    is_finite,
    load_entries,
    load_passing_tile,
    load_tile,
    rows_of_keys,
    store_tile,
)


@triton.jit
def add_tile(
    dk, dv, k, v, queries, gradients, lse, terms, dweights, share, sums, tile, problem,
    shape: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of rows contributes."""
    offs_m = tl.arange(0, shape.BLOCK_M)
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    l_i, term = load_row_values(lse, terms, tile, offs_m[None, :], problem, shape, EDGE)
    q = load_passing_tile(
        queries, tile.start_m, offs_m[:, None], offs_d[None, :], shape.HEAD_DIM, EDGE
    )
    entries = load_entries(tile, problem, EDGE)
    product = tl.dot(k, tl.trans(q), input_precision=shape.PRECISION)
    ADDED: tl.constexpr = problem.dropout is None and dweights is None
    dp, do = product, q
    if dweights is None:
        do = load_passing_tile(
            gradients, tile.start_m, offs_m[:, None], offs_dv[None, :], shape.VALUE_DIM, EDGE
        )
        start = tl.zeros_like(product)
        if ADDED:
            start += term
        dp = tl.dot(v, tl.trans(do), start, input_precision=shape.PRECISION)
    keep = keep_of(tile, problem, shape.BLOCK_M, shape.BLOCK_N, shape.WHOLE_CALLS)
    if keep is not None:
        keep = tl.trans(keep)
    # Where keys can be hidden, what such rows make of an infinite key is done again, without them.
    ROWS: tl.constexpr = EDGE and not shape.HIDES
    weights, _, dproduct = gradients_of(
        product, entries, dp, l_i, term, dweights, share, tile, problem, shape, keep,
        EDGE=EDGE, ADDED=ADDED, WEIGHTS=True, ROWS=ROWS,
    )  # fmt: skip
    if dweights is None:
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=shape.PRECISION)
    dproduct = dproduct.to(q.dtype)
    dk = tl.dot(dproduct, q, dk, input_precision=shape.PRECISION)
    if sums is not None:
        dq = tl.dot(tl.trans(dproduct), k, input_precision=shape.PRECISION)
        add_to_tile(sums, tile.start_m, offs_m[:, None], offs_d[None, :], dq, shape.HEAD_DIM)
    return dk, dv


@triton.jit
def sum_row_by_row(
    q, dout, keys, values, dkeys, dvalues, lse, terms, dweights, share, first, stop,
    tile, problem, shape: tl.constexpr,
):  # fmt: skip
    """Writes dK and dV of a block's keys, CAREFUL at a time; a row that does not see a key is not
    touched. `tile.head` is the key head."""
    sizes = problem.sizes
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D)[None, :], tl.arange(0, shape.BLOCK_DV)[None, :]
    columns, one = tl.arange(0, CAREFUL)[:, None], tl.arange(0, 1)
    for start_n in range(tile.start_n, tile.start_n + shape.BLOCK_N, CAREFUL):
        k = load_tile(keys, start_n, columns, offs_d, shape.HEAD_DIM, True).to(tl.float32)
        v = load_tile(values, start_n, columns, offs_dv, shape.VALUE_DIM, True).to(tl.float32)
        dk, dv = tl.zeros_like(k), tl.zeros_like(v)
        for head in range(tile.head * sizes.group, (tile.head + 1) * sizes.group):
            queries = head_of(q, tile.batch, head, sizes.query_length)
            gradients = queries
            if dweights is None:
                gradients = head_of(dout, tile.batch, head, sizes.query_length)
            for row in range(first, stop):
                here = Tile(tile.batch, head, row, start_n, one[None, :], columns)
                l_i, term = load_row_values(lse, terms, here, one[None, :], problem, shape, False)
                q_row = load_tile(queries, row, one[:, None], offs_d, shape.HEAD_DIM, False)
                q_row = q_row.to(tl.float32)
                entries = load_entries(here, problem, True)
                product = tl.sum(k * q_row, 1)[:, None]
                dp, do_row = product, q_row
                if dweights is None:
                    do_row = load_tile(
                        gradients, row, one[:, None], offs_dv, shape.VALUE_DIM, False
                    )
                    do_row = do_row.to(tl.float32)
                    dp = tl.sum(v * do_row, 1)[:, None]
                keep = keep_of(here, problem, 1, CAREFUL, shape.WHOLE_CALLS)
                if keep is not None:
                    keep = tl.trans(keep)
                weights, _, dproduct = gradients_of(
                    product, entries, dp, l_i, term, dweights, share, here, problem, shape, keep,
                    EDGE=True, ADDED=False, WEIGHTS=True,
                )  # fmt: skip
                touched = (weights != 0) | (dproduct != 0)
                dk = tl.where(touched, dk + dproduct * q_row, dk)
                if dweights is None:
                    dv = tl.where(touched, dv + weights * do_row, dv)
        store_tile(dkeys, start_n, columns, offs_d, dk * problem.scoring.scale, shape.HEAD_DIM)
        if dweights is None:
            store_tile(dvalues, start_n, columns, offs_dv, dv, shape.VALUE_DIM)


@triton.jit(do_not_specialize=["reach", "dropout", "sizes"])
def backward_keys(
    q,
    k,
    v,
    dout,  # or None with dweights
    lse,
    terms,  # or None with dweights
    dk,
    dv,  # or None with dweights
    dweights,  # or None
    share,
    dq_sums,  # or None
    scoring,
    reach,
    dropout,  # or None
    sizes,
    shape: tl.constexpr,
):
    problem = Problem(scoring, reach, dropout, sizes)
    length = sizes.query_length
    blocks = tl.cdiv(sizes.key_length, shape.BLOCK_N)
    index = tl.program_id(0)
    start_n = index % blocks * shape.BLOCK_N
    key_heads = sizes.query_heads // sizes.group
    key_head, batch = index // blocks % key_heads, index // blocks // key_heads
    keys = head_of(k, batch, key_head, sizes.key_length)
    values = head_of(v, batch, key_head, sizes.key_length)
    columns, offs_m = tl.arange(0, shape.BLOCK_N)[:, None], tl.arange(0, shape.BLOCK_M)[None, :]
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D)[None, :], tl.arange(0, shape.BLOCK_DV)[None, :]
    k_tile = load_tile(keys, start_n, columns, offs_d, shape.HEAD_DIM, True)
    v_tile = load_tile(values, start_n, columns, offs_dv, shape.VALUE_DIM, True)
    acc_k = tl.zeros((shape.BLOCK_N, shape.BLOCK_D), tl.float32)
    acc_v = tl.zeros((shape.BLOCK_N, shape.BLOCK_DV), tl.float32)

    first, stop, full_first, full_stop = rows_of_keys(start_n, problem, shape)
    for head in range(key_head * sizes.group, (key_head + 1) * sizes.group):
        queries = head_of(q, batch, head, length)
        gradients, sums = queries, dq_sums
        if dweights is None:
            gradients = head_of(dout, batch, head, length)
        if dq_sums is not None:
            sums = head_of(dq_sums, batch, head, length)
        for i in tl.range(0, stop - first - (full_stop - full_first), num_stages=1):
            start_m = edge_tile(i, first, full_first, full_stop) * shape.BLOCK_M
            tile = Tile(batch, head, start_m, start_n, offs_m, columns)
            acc_k, acc_v = add_tile(
                acc_k, acc_v, k_tile, v_tile, queries, gradients, lse, terms, dweights, share,
                sums, tile, problem, shape, True,
            )  # fmt: skip
        for start_m in tl.range(
            full_first * shape.BLOCK_M, full_stop * shape.BLOCK_M, shape.BLOCK_M
        ):
            tile = Tile(batch, head, start_m, start_n, offs_m, columns)
            acc_k, acc_v = add_tile(
                acc_k, acc_v, k_tile, v_tile, queries, gradients, lse, terms, dweights, share,
                sums, tile, problem, shape, False,
            )  # fmt: skip

    dkeys = head_of(dk, batch, key_head, sizes.key_length)
    dvalues = dkeys
    if dweights is None:
        dvalues = head_of(dv, batch, key_head, sizes.key_length)
    done_again = False
    if shape.HIDES:
        exists = columns < sizes.key_length - start_n
        done_again = not (
            is_finite(tl.where(exists, acc_k, 0.0)) & is_finite(tl.where(exists, acc_v, 0.0))
        )
    if done_again:
        tile = Tile(batch, key_head, 0, start_n, offs_m, columns)
        end = tl.minimum(stop * shape.BLOCK_M, length)
        sum_row_by_row(
            q, dout, keys, values, dkeys, dvalues, lse, terms, dweights, share,
            first * shape.BLOCK_M, end, tile, problem, shape,
        )  # fmt: skip
    else:
        store_tile(dkeys, start_n, columns, offs_d, acc_k * scoring.scale, shape.HEAD_DIM)
        if dweights is None:
            store_tile(dvalues, start_n, columns, offs_dv, acc_v, shape.VALUE_DIM)
