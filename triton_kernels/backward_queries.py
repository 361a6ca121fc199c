"""Backward pass, dQ = scale dS K (Dao, arXiv:2307.08691, algorithm 2, the row's half of it: nothing
is atomic, so the result does not depend on timing).

    S = Q K^T;  dP = dO V^T;  dS = exp2(S - lse) (dP + term);  dQ += dS K

Grid: a program for BLOCK_M query rows of one head, as in `forward`, whose plan this follows. It
reads queries, output gradients, LSE and terms once, and the keys and values that its rows see,
BLOCK_N at a time; it writes dQ. With a gradient of the weights instead of one of the output
(dweights), dP is read, the term is 0 and minus the sum of each row of dS is written as dlse. With
dq_sums, which `backward_keys` has added up, only dQ = scale dq_sums is left to do, and the rows in
which a hidden key was not finite.
Tested against attn_ext/backends/reference.py and by gradcheck, interpreted, in
tests/test_contract.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Problem, Tile
from attn_ext.triton_kernels.gradients import gradients_of, keep_of, load_row_values
from attn_ext.triton_kernels.scores import (
    CAREFUL,
    edge_tile,
    head_of,
    is_finite,
    keys_of_rows,
    load_entries,
    load_passing_tile,
    load_tile,
    store_tile,
    store_values,
)


@triton.jit
def add_tile(
    dq,
    sums,
    q,
    do,
    keys,
    values,
    l_i,
    term,
    dweights,
    share,
    tile,
    problem,
    shape: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds what one tile of keys contributes."""
    offs_n = tl.arange(0, shape.BLOCK_N)
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    k = load_passing_tile(
        keys, tile.start_n, offs_n[:, None], offs_d[None, :], shape.HEAD_DIM, EDGE
    )
    entries = load_entries(tile, problem, EDGE)
    product = tl.dot(q, tl.trans(k), input_precision=shape.PRECISION)
    ADDED: tl.constexpr = problem.dropout is None and dweights is None
    dp = product
    if dweights is None:
        v = load_passing_tile(
            values, tile.start_n, offs_n[None, :], offs_dv[:, None], shape.VALUE_DIM, EDGE
        )
        start = tl.zeros_like(product)
        if ADDED:
            start += term
        dp = tl.dot(do, v, start, input_precision=shape.PRECISION)
    keep = keep_of(tile, problem, shape.BLOCK_M, shape.BLOCK_N, shape.WHOLE_CALLS)
    _, ds, dproduct = gradients_of(
        product, entries, dp, l_i, term, dweights, share, tile, problem, shape, keep,
        EDGE=EDGE, ADDED=ADDED, WEIGHTS=False,
    )  # fmt: skip
    if dweights is not None:
        sums += tl.sum(ds, 1)
    dq = tl.dot(dproduct.to(k.dtype), k, dq, input_precision=shape.PRECISION)
    return dq, sums


@triton.jit
def sum_key_by_key(
    queries, gradients, keys, values, outputs, lse, terms, dweights, share, dlse, first, stop,
    tile, problem, shape: tl.constexpr,
):  # fmt: skip
    """Writes a block's rows of dQ, CAREFUL at a time, no hidden key being touched; of weights,
    their dLSE too."""
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    rows, one = tl.arange(0, CAREFUL)[:, None], tl.arange(0, 1)
    for start_m in range(tile.start_m, tile.start_m + shape.BLOCK_M, CAREFUL):
        q = load_tile(queries, start_m, rows, offs_d[None, :], shape.HEAD_DIM, True).to(tl.float32)
        do = q
        if dweights is None:
            do = load_tile(gradients, start_m, rows, offs_dv[None, :], shape.VALUE_DIM, True)
            do = do.to(tl.float32)
        here = Tile(tile.batch, tile.head, start_m, tile.start_n, rows, one[None, :])
        l_i, term = load_row_values(lse, terms, here, rows, problem, shape, True)
        dq = tl.zeros((CAREFUL, shape.BLOCK_D), tl.float32)
        sums = tl.zeros((CAREFUL,), tl.float32)
        for key in range(first, stop):
            here = Tile(tile.batch, tile.head, start_m, key, rows, one[None, :])
            k = load_tile(keys, key, one[:, None], offs_d[None, :], shape.HEAD_DIM, False)
            k = k.to(tl.float32)
            entries = load_entries(here, problem, True)
            product = tl.sum(q * k, 1)[:, None]
            dp = product
            if dweights is None:
                v = load_tile(values, key, one[:, None], offs_dv[None, :], shape.VALUE_DIM, False)
                dp = tl.sum(do * v.to(tl.float32), 1)[:, None]
            keep = keep_of(here, problem, CAREFUL, 1, False)
            weights, ds, dproduct = gradients_of(
                product, entries, dp, l_i, term, dweights, share, here, problem, shape, keep,
                EDGE=True, ADDED=False, WEIGHTS=True,
            )  # fmt: skip
            sums += tl.sum(ds, 1)
            dq = tl.where((dproduct != 0) | (weights != 0), dq + dproduct * k, dq)
        dq *= problem.scoring.scale
        store_tile(outputs, start_m, rows, offs_d[None, :], dq, shape.HEAD_DIM)
        if dweights is not None:
            store_dlse(dlse, tile, start_m, sums, CAREFUL, problem)


@triton.jit
def store_dlse(dlse, tile, start_m, sums, ROWS: tl.constexpr, problem):
    """Minus the sums of a head's rows from `start_m` on."""
    here = Tile(tile.batch, tile.head, start_m, tile.start_n, tile.rows, tile.columns)
    store_values(dlse, here, tl.arange(0, ROWS), -sums, problem.sizes.query_length)


@triton.jit(do_not_specialize=["reach", "dropout", "sizes"])
def backward_queries(
    q,
    k,
    v,
    dout,  # or None with dweights
    lse,
    terms,  # or None with dweights
    dq,
    dweights,  # or None
    share,
    dlse,  # with dweights: written
    dq_sums,  # or None
    scoring,
    reach,
    dropout,  # or None
    sizes,
    shape: tl.constexpr,
):
    problem = Problem(scoring, reach, dropout, sizes)
    length = sizes.query_length
    blocks = tl.cdiv(length, shape.BLOCK_M)
    index = tl.program_id(0)
    start_m = (blocks - 1 - index % blocks) * shape.BLOCK_M
    head, batch = index // blocks % sizes.query_heads, index // blocks // sizes.query_heads
    key_head = head // sizes.group
    queries = head_of(q, batch, head, length)
    keys = head_of(k, batch, key_head, sizes.key_length)
    values = head_of(v, batch, key_head, sizes.key_length)
    rows, offs_n = tl.arange(0, shape.BLOCK_M)[:, None], tl.arange(0, shape.BLOCK_N)[None, :]
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D)[None, :], tl.arange(0, shape.BLOCK_DV)[None, :]
    q_tile = load_tile(queries, start_m, rows, offs_d, shape.HEAD_DIM, True)
    gradients, do_tile = queries, q_tile
    if dweights is None:
        gradients = head_of(dout, batch, head, length)
        do_tile = load_tile(gradients, start_m, rows, offs_dv, shape.VALUE_DIM, True)
    tile = Tile(batch, head, start_m, 0, rows, offs_n)
    l_i, term = load_row_values(lse, terms, tile, rows, problem, shape, True)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_D), tl.float32)
    sums = tl.zeros((shape.BLOCK_M,), tl.float32)

    first, stop, full_first, full_stop = keys_of_rows(start_m, problem, shape)
    if dq_sums is not None:
        sources = head_of(dq_sums, batch, head, length)
        acc = load_tile(sources, start_m, rows, offs_d, shape.HEAD_DIM, True)
    else:
        for i in tl.range(0, stop - first - (full_stop - full_first), num_stages=1):
            start_n = edge_tile(i, first, full_first, full_stop) * shape.BLOCK_N
            tile = Tile(batch, head, start_m, start_n, rows, offs_n)
            acc, sums = add_tile(
                acc, sums, q_tile, do_tile, keys, values, l_i, term, dweights, share,
                tile, problem, shape, True,
            )  # fmt: skip
        for start_n in tl.range(
            full_first * shape.BLOCK_N, full_stop * shape.BLOCK_N, shape.BLOCK_N
        ):
            tile = Tile(batch, head, start_m, start_n, rows, offs_n)
            acc, sums = add_tile(
                acc, sums, q_tile, do_tile, keys, values, l_i, term, dweights, share,
                tile, problem, shape, False,
            )  # fmt: skip

    outputs = head_of(dq, batch, head, length)
    done_again = False
    if shape.HIDES:
        done_again = not is_finite(acc)
    if done_again:
        tile = Tile(batch, head, start_m, 0, rows, offs_n)
        end = tl.minimum(stop * shape.BLOCK_N, sizes.key_length)
        sum_key_by_key(
            queries, gradients, keys, values, outputs, lse, terms, dweights, share, dlse,
            first * shape.BLOCK_N, end, tile, problem, shape,
        )  # fmt: skip
    else:
        store_tile(outputs, start_m, rows, offs_d, acc * scoring.scale, shape.HEAD_DIM)
        if dweights is not None:
            store_dlse(dlse, tile, start_m, sums, shape.BLOCK_M, problem)
