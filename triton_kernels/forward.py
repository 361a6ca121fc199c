"""Forward pass: out = softmax(scores) V and lse, by online softmax (Dao, arXiv:2307.08691,
algorithm 1).

    S = Q K^T;  m' = max(m, max S);  P = exp2(S - m');  O = O exp2(m - m') + P V

Grid: a program for BLOCK_M query rows of one head, the last rows first (causality makes them
long). It reads its queries once and the keys and values that its rows see, BLOCK_N at a time, which
later blocks of the head find in L2; it writes its outputs and LSE. Tiles outside causality and the
window are never visited, full ones go through a loop without a compare. A block with an output that
is not finite is done again, key by key, where pairs can be hidden: 0 times NaN is NaN.
Block sizes: `configurations`. Tested against attn_ext/backends/reference.py, interpreted, in
tests/test_contract.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Problem, Tile
from attn_ext.triton_kernels.dropout import keep_mask
from attn_ext.triton_kernels.scores import (
    CAREFUL,
    INFINITY,
    LN2,
    LOWEST,
    edge_tile,
    exp_of,
    factor_of,
    head_of,
    is_finite,
    keys_of_rows,
    load_entries,
    load_passing_tile,
    load_tile,
    scores_of,
    start_of,
    store_tile,
)


@triton.jit
def attend(acc, l_i, m_i, q, keys, values, tile, problem, shape: tl.constexpr, EDGE: tl.constexpr):
    """The online softmax over one tile of keys."""
    offs_n = tl.arange(0, shape.BLOCK_N)
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    k = load_passing_tile(
        keys, tile.start_n, offs_n[None, :], offs_d[:, None], shape.HEAD_DIM, EDGE
    )
    entries = load_entries(tile, problem, EDGE)
    product = tl.dot(q, k, input_precision=shape.PRECISION)
    s, _ = scores_of(product, entries, tile, problem, shape, EDGE)
    factor = factor_of(problem, shape)
    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    p = exp_of(s * factor - m_new[:, None], shape.UNIT)
    rescale = exp_of(m_i - m_new, shape.UNIT)
    l_i = l_i * rescale + tl.sum(p, 1)
    if problem.dropout is not None:
        p = tl.where(
            keep_mask(problem, tile, shape.BLOCK_M, shape.BLOCK_N, shape.WHOLE_CALLS), p, 0.0
        )
    v = load_passing_tile(
        values, tile.start_n, offs_n[:, None], offs_dv[None, :], shape.VALUE_DIM, EDGE
    )
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=shape.PRECISION)
    return acc, l_i, m_new


@triton.jit
def attend_key_by_key(
    queries, keys, values, outputs, first, stop, tile, problem, shape: tl.constexpr
):
    """Writes the outputs of a block's rows, CAREFUL at a time, no hidden value being touched."""
    offs_d, offs_dv = tl.arange(0, shape.BLOCK_D), tl.arange(0, shape.BLOCK_DV)
    rows, one = tl.arange(0, CAREFUL)[:, None], tl.arange(0, 1)
    factor = factor_of(problem, shape)
    for start_m in range(tile.start_m, tile.start_m + shape.BLOCK_M, CAREFUL):
        q = load_tile(queries, start_m, rows, offs_d[None, :], shape.HEAD_DIM, True).to(tl.float32)
        acc = tl.zeros((CAREFUL, shape.BLOCK_DV), tl.float32)
        l_i = tl.zeros((CAREFUL, 1), tl.float32)
        m_i = tl.full((CAREFUL, 1), LOWEST, tl.float32)
        if problem.sinks_ptr is not None:
            m_i, l_i = start_at_sink(m_i, l_i, problem.sinks_ptr + tile.head, shape)
        for key in range(first, stop):
            here = Tile(tile.batch, tile.head, start_m, key, rows, one[None, :])
            k = load_tile(keys, key, one[:, None], offs_d[None, :], shape.HEAD_DIM, False)
            product = tl.sum(q * k.to(tl.float32), 1)[:, None]
            entries = load_entries(here, problem, True)
            s, _ = scores_of(product, entries, here, problem, shape, True)
            m_new = tl.maximum(m_i, s * factor)
            p = exp_of(s * factor - m_new, shape.UNIT)
            rescale = exp_of(m_i - m_new, shape.UNIT)
            l_i, m_i = l_i * rescale + p, m_new
            if problem.dropout is not None:
                p = tl.where(keep_mask(problem, here, CAREFUL, 1, False), p, 0.0)
            v = load_tile(values, key, one[:, None], offs_dv[None, :], shape.VALUE_DIM, False)
            acc *= rescale
            acc = tl.where(s != -INFINITY, acc + p * v.to(tl.float32), acc)
        out = acc * normalizer(l_i, problem)
        store_tile(outputs, start_m, rows, offs_dv[None, :], out, shape.VALUE_DIM)


@triton.jit
def start_at_sink(m_i, l_i, sink_ptr, shape: tl.constexpr):
    """The maximum and the sum of rows that have seen the sink."""
    sink = tl.load(sink_ptr)
    return tl.maximum(m_i, sink * shape.UNIT), l_i + tl.where(sink == -INFINITY, 0.0, 1.0)


@triton.jit
def normalizer(l_i, problem):
    """What takes sums of weighted values to outputs."""
    scale = 1 / tl.where(l_i == 0, 1.0, l_i)
    if problem.dropout is not None:
        scale *= problem.dropout.factor
    return scale


@triton.jit(do_not_specialize=["reach", "dropout", "sizes"])
def forward(
    q,
    k,
    v,
    out,
    lse,  # or None
    sinks_ptr,  # or None
    scoring,
    reach,
    dropout,  # or None
    sizes,
    shape: tl.constexpr,
):
    problem = Problem(scoring, reach, dropout, sizes, sinks_ptr)
    blocks = tl.cdiv(sizes.query_length, shape.BLOCK_M)
    index = tl.program_id(0)
    start_m = (blocks - 1 - index % blocks) * shape.BLOCK_M
    head, batch = index // blocks % sizes.query_heads, index // blocks // sizes.query_heads
    key_head = head // sizes.group
    queries = head_of(q, batch, head, sizes.query_length)
    keys = head_of(k, batch, key_head, sizes.key_length)
    values = head_of(v, batch, key_head, sizes.key_length)
    offs_m, offs_n = tl.arange(0, shape.BLOCK_M), tl.arange(0, shape.BLOCK_N)[None, :]
    rows = offs_m[:, None]
    q_tile = load_tile(
        queries, start_m, rows, tl.arange(0, shape.BLOCK_D)[None, :], shape.HEAD_DIM, True
    )

    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_DV), tl.float32)
    l_i = tl.zeros((shape.BLOCK_M,), tl.float32)
    # Finite, so that a hidden score less the maximum of a row that has seen nothing is -inf.
    m_i = tl.full((shape.BLOCK_M,), LOWEST, tl.float32)
    if sinks_ptr is not None:
        m_i, l_i = start_at_sink(m_i, l_i, sinks_ptr + head, shape)

    first, stop, full_first, full_stop = keys_of_rows(start_m, problem, shape)
    for i in tl.range(0, stop - first - (full_stop - full_first), num_stages=1):
        start_n = edge_tile(i, first, full_first, full_stop) * shape.BLOCK_N
        tile = Tile(batch, head, start_m, start_n, rows, offs_n)
        acc, l_i, m_i = attend(acc, l_i, m_i, q_tile, keys, values, tile, problem, shape, True)
    for start_n in tl.range(full_first * shape.BLOCK_N, full_stop * shape.BLOCK_N, shape.BLOCK_N):
        tile = Tile(batch, head, start_m, start_n, rows, offs_n)
        acc, l_i, m_i = attend(acc, l_i, m_i, q_tile, keys, values, tile, problem, shape, False)

    outputs = head_of(out, batch, head, sizes.query_length)
    done_again = False
    if shape.HIDES:
        done_again = not is_finite(acc)
    if done_again:
        tile = Tile(batch, head, start_m, 0, rows, offs_n)
        end = tl.minimum(stop * shape.BLOCK_N, sizes.key_length)
        attend_key_by_key(
            queries, keys, values, outputs, first * shape.BLOCK_N, end, tile, problem, shape
        )
    else:
        offs_dv = tl.arange(0, shape.BLOCK_DV)[None, :]
        acc *= normalizer(l_i, problem)[:, None]
        store_tile(outputs, start_m, rows, offs_dv, acc, shape.VALUE_DIM)
    if lse is not None:
        natural = m_i * (1 if shape.UNIT == 1 else LN2) + tl.log(l_i)
        natural = tl.where(l_i == 0, -INFINITY, natural)
        # A weight that is infinitely larger than the others.
        natural = tl.where(m_i == INFINITY, INFINITY, natural)
        pointers = start_of(lse, batch, head) + (start_m + offs_m).to(tl.int64) * lse.stride_l
        tl.store(pointers, natural, mask=offs_m < sizes.query_length - start_m)
