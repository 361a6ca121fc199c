"""Backward pass, before the rest: what every tile of the other kernels needs of a row.

    term = dlse - sum(dO * O),  and LSE in score units, +inf for rows that see nothing

Grid: a program for BLOCK_M rows of one head; it reads O, dO, LSE and dlse once. The sum is in
float64: a term is added to every dP, which it nearly cancels where few keys are visible. Negated,
as other backends have it, it goes out again for the gradient of sinks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.arguments import Tile
from attn_ext.triton_kernels.gradients import score_lse
from attn_ext.triton_kernels.scores import head_of, load_tile, load_values, store_values


@triton.jit(do_not_specialize=["sizes"])
def row_terms(
    out,
    dout,
    dlse,  # or None
    lse,
    terms,
    scored_lse,
    negated_terms,  # or None
    sizes,
    UNIT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    length = sizes.query_length
    blocks = tl.cdiv(length, BLOCK_M)
    index = tl.program_id(0)
    start_m = index % blocks * BLOCK_M
    head, batch = index // blocks % sizes.query_heads, index // blocks // sizes.query_heads
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_DV)[None, :]
    outputs = head_of(out, batch, head, length)
    gradients = head_of(dout, batch, head, length)
    o = load_tile(outputs, start_m, rows, columns, VALUE_DIM, True).to(tl.float64)
    do = load_tile(gradients, start_m, rows, columns, VALUE_DIM, True).to(tl.float64)
    term = -tl.sum(o * do, 1)
    tile = Tile(batch, head, start_m, 0, rows, columns)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)  # a gradient of LSE has any strides
    if dlse is not None:
        term += load_values(dlse, tile, offs_m, length, 0.0, True)
    term = term.to(tl.float32)
    store_values(terms, tile, offs_m, term, length)
    if negated_terms is not None:
        store_values(negated_terms, tile, offs_m, -term, length)
    l_i = score_lse(load_values(lse, tile, offs_m, length, 0.0, True), UNIT)
    store_values(scored_lse, tile, offs_m, l_i, length)
