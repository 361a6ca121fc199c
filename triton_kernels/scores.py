"""From products of query and key to scores and weights: the terms of the contract, a tile at once.

Scores are kept in units of log2, so that a weight is one exp2 (UNIT is log2(e)); for float32 in
natural units (UNIT is 1), because rounding LSE to another unit would cost precision. A hidden
pair's score is -inf, set by selection: a NaN behind a mask stays there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.problem import LOWEST_ENTRY as LOWEST_ENTRY_VALUE
from attn_ext.triton_kernels.arguments import Head

LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
CAREFUL = tl.constexpr(16)
"""How many rows or keys at a time are done again, see `forward`."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOWEST_ENTRY = tl.constexpr(LOWEST_ENTRY_VALUE)


@triton.jit
def exp_of(x, UNIT: tl.constexpr):
    """exp of a number in score units."""
    if UNIT == 1:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def tanh_of(x, UNIT: tl.constexpr):
    """tanh, within two roundings where scores are natural, else with an absolute error of one."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0, -t, t)
    if UNIT == 1:
        # The quotient cancels near 0. The series' next term is below 1e-8 there.
        y = x * x
        series = 1382.0 / 155925 - y * (21844.0 / 6081075)
        series = 62.0 / 2835 - y * series
        series = 17.0 / 315 - y * series
        series = 2.0 / 15 - y * series
        series = 1.0 / 3 - y * series
        t = tl.where(y < 0.125, x - x * y * series, t)
    return t


@triton.jit
def start_of(rows, batch, head):
    """Where one head starts."""
    return (
        rows.ptr
        + tl.cast(batch, tl.int64) * rows.stride_b
        + tl.cast(head, tl.int64) * rows.stride_h
    )


@triton.jit
def head_of(rows, batch, head, length):
    """One head of a tensor, as a source of tiles."""
    return Head(
        start_of(rows, batch, head), rows.stride_l, length, rows.descriptor, batch, head
    )  # fmt: skip


@triton.jit
def load_tile(head, start, rows, columns, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """The rows of a head from `start` on; zeros beyond WIDTH and, where EDGE looks for it,
    beyond its length. `rows` (L, 1) and `columns` (1, D), or transposed, count from the start."""
    WHOLE: tl.constexpr = columns.shape[0] * columns.shape[1] == WIDTH
    pointers = head.base + tl.cast(start, tl.int64) * head.stride + (rows * head.stride + columns)
    if EDGE and WHOLE:
        return tl.load(pointers, mask=rows < head.length - start, other=0.0)
    elif EDGE:
        inside = (rows < head.length - start) & (columns < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    elif WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns < WIDTH, other=0.0)


@triton.jit
def load_passing_tile(head, start, rows, columns, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """The same of a tile of BLOCK_M or BLOCK_N rows, for which there may be a descriptor: zeros
    beyond the width and the length are then the hardware's."""
    if head.descriptor is None:
        return load_tile(head, start, rows, columns, WIDTH, EDGE)
    else:
        tile = head.descriptor.load([head.batch, head.head, tl.cast(start, tl.int32), 0])
        L: tl.constexpr = rows.shape[0] * rows.shape[1]
        D: tl.constexpr = columns.shape[0] * columns.shape[1]
        tile = tl.reshape(tile, (L, D))
        if rows.shape[0] == 1:
            return tl.trans(tile)
        else:
            return tile


@triton.jit
def store_tile(head, start, rows, columns, x, WIDTH: tl.constexpr):
    """Writes what exists of a tile."""
    pointers = head.base + tl.cast(start, tl.int64) * head.stride + (rows * head.stride + columns)
    inside = (rows < head.length - start) & (columns < WIDTH)
    tl.store(pointers, x.to(head.base.dtype.element_ty), mask=inside)


@triton.jit
def add_to_tile(head, start, rows, columns, x, WIDTH: tl.constexpr):
    """Adds to what exists of a tile, as other programs do: in no order."""
    pointers = head.base + tl.cast(start, tl.int64) * head.stride + (rows * head.stride + columns)
    inside = (rows < head.length - start) & (columns < WIDTH)
    tl.atomic_add(pointers, x, mask=inside, sem="relaxed")


@triton.jit
def load_values(values, tile, rows, length, other: tl.constexpr, EDGE: tl.constexpr):
    """A value a row, of LSE or the row terms; with EDGE, `other` beyond the last one."""
    base = start_of(values, tile.batch, tile.head)
    pointers = base + tl.cast(tile.start_m, tl.int64) * values.stride_l + rows * values.stride_l
    if EDGE:
        return tl.load(pointers, mask=rows < length - tile.start_m, other=other)
    else:
        return tl.load(pointers)


@triton.jit
def store_values(values, tile, rows, x, length):
    """Writes a value for each row that exists."""
    base = start_of(values, tile.batch, tile.head)
    pointers = base + tl.cast(tile.start_m, tl.int64) * values.stride_l + rows * values.stride_l
    tl.store(pointers, x, mask=rows < length - tile.start_m)


@triton.jit
def load_pairs(pairs, tile, sizes, EDGE: tl.constexpr):
    """A tile of a tensor of pairs, or None; beyond the last row, and with EDGE beyond the last key,
    the last one's entries. (Without EDGE a block of rows may end beyond the last one, too.)"""
    if pairs is None:
        return None
    else:
        base = start_of(pairs, tile.batch, tile.head)
        base += (
            tl.cast(tile.start_m, tl.int64) * pairs.stride_m
            + tl.cast(tile.start_n, tl.int64) * pairs.stride_n
        )
        rows = tl.minimum(tile.rows, sizes.query_length - 1 - tile.start_m)
        columns = keys_that_exist(tile, sizes, EDGE)
        pointers = base + (rows[None, :, :] * pairs.stride_m + columns[None, :, :] * pairs.stride_n)
        return load_mask_tile(pointers)


@triton.jit
def load_key_mask(mask, tile, sizes, EDGE: tl.constexpr):
    """Likewise, of a mask (B, Lk)."""
    if mask is None:
        return None
    else:
        base = mask.ptr + tl.cast(tile.batch, tl.int64) * mask.stride_b
        base += tl.cast(tile.start_n, tl.int64) * mask.stride_n
        return load_mask_tile(base + keys_that_exist(tile, sizes, EDGE)[None, :, :] * mask.stride_n)


@triton.jit
def load_mask_tile(pointers):
    """What lies at pointers (1, M, N), as (M, N); bools as bytes.

    The sum over the dimension of 1 is for the compiler: to lay out the operand of a product, it
    looks for the narrowest load that leads to it, and stops at reductions. Because of bytes it
    would have weights in fours instead of pairs, and threads exchange them.
    """
    if pointers.dtype.element_ty == tl.int1:
        entries = tl.load(pointers.to(tl.pointer_type(tl.int8), bitcast=True))
    else:
        entries = tl.load(pointers)
    return tl.sum(entries, 0, dtype=entries.dtype)


@triton.jit
def keys_that_exist(tile, sizes, EDGE: tl.constexpr):
    """The tile's columns, at an edge none beyond the last key. Elsewhere the compiler should see
    that they follow each other: then it loads many entries at once."""
    if EDGE:
        return tl.minimum(tile.columns, sizes.key_length - 1 - tile.start_n)
    else:
        return tile.columns


@triton.jit
def masked(s, entries, UNIT: tl.constexpr):
    """Scores under a mask: bool (True takes part) or floating (added, -inf and about the lowest
    number forbid)."""
    if entries.dtype == tl.int8:
        # Wider, so that the compiler changes the layout of bytes and not of what the compare gives.
        return tl.where(entries.to(tl.int32) != 0, s, -INFINITY)
    else:
        x = entries.to(tl.float32) * UNIT
        if UNIT == 1:
            return tl.where(x < LOWEST_ENTRY, -INFINITY, s + x)
        else:
            return tl.where(x < LOWEST, x, s + x)  # the unit has made -inf of lower entries


@triton.jit
def hide_by_position(s, tile, problem, ROWS: tl.constexpr):
    """-inf beyond the last key and outside the rows' reach; with ROWS, beyond the last row too,
    whose zeros have NaN products with a key that is infinite."""
    reach = problem.reach
    # What differs from tile to tile is a key alone, so that no tile of indices stays in registers.
    keys, rows = tile.start_n + tile.columns, tile.start_m + tile.rows
    end = problem.sizes.key_length
    if reach.high is not None:
        end = tl.minimum(rows + reach.high + 1, end)
    if ROWS:
        end = tl.where(rows < problem.sizes.query_length, end, 0)
    visible = keys < end
    if reach.low is not None:
        visible = visible & (keys >= rows + reach.low)
    return tl.where(visible, s, -INFINITY)


@triton.jit
def load_entries(tile, problem, EDGE: tl.constexpr):
    """The tile's entries of both masks, or None.

    Where scores are reduced, load before the product: the compiler then reduces them in the layout
    of the product and not, a second time, in that of a mask; and the loads are on their way
    meanwhile.
    """
    scoring = problem.scoring
    return (
        load_pairs(scoring.mask, tile, problem.sizes, EDGE),
        load_key_mask(scoring.key_mask, tile, problem.sizes, EDGE),
    )


@triton.jit
def scores_of(
    product,
    entries,
    tile,
    problem,
    shape: tl.constexpr,
    EDGE: tl.constexpr,
    ROWS: tl.constexpr = False,
):
    """Scores of products, and the softcap's tanh (without softcap: anything). EDGE and ROWS: see
    `hide_by_position`.

    With shape.FOLD the factor scale * UNIT is left to whoever takes the exponential.
    """
    scoring, unit = problem.scoring, shape.UNIT
    t = product
    if scoring.softcap is not None:
        t = tanh_of(product * (scoring.scale / scoring.softcap), unit)
        s = t * (scoring.softcap * unit)
    elif shape.FOLD:
        s = product
    else:
        s = product * (scoring.scale * unit)
    if scoring.alibi_slopes is not None:
        slope = tl.load(start_of(scoring.alibi_slopes, tile.batch, tile.head))
        distance = tile.rows + (tile.start_m + scoring.diagonal - tile.start_n) - tile.columns
        s -= slope * unit * tl.abs(distance.to(tl.float32))
    if scoring.mask is not None:
        s = masked(s, entries[0], unit)
    if scoring.key_mask is not None:
        s = masked(s, entries[1], unit)
    if EDGE:
        s = hide_by_position(s, tile, problem, ROWS)
    return s, t


@triton.jit
def factor_of(problem, shape: tl.constexpr):
    """What takes the results of `scores_of` to score units."""
    if shape.FOLD:
        return problem.scoring.scale * shape.UNIT
    else:
        return 1.0


@triton.jit
def keys_of_rows(start_m, problem, shape: tl.constexpr):
    """The tiles of keys of a block of rows: (first, stop, full_first, full_stop), in tiles.

    Those in [first, stop) hold a key that some row sees, of these those in [full_first, full_stop)
    only keys that all rows see.
    """
    sizes, reach = problem.sizes, problem.reach
    last = tl.minimum(start_m + shape.BLOCK_M, sizes.query_length) - 1
    begin, full_begin = 0, 0
    end, full_end = sizes.key_length, sizes.key_length
    if reach.low is not None:
        begin = tl.maximum(start_m + reach.low, 0)
        full_begin = tl.maximum(last + reach.low, 0)
    if reach.high is not None:
        end = tl.minimum(tl.maximum(last + reach.high + 1, 0), sizes.key_length)
        full_end = tl.minimum(tl.maximum(start_m + reach.high + 1, 0), sizes.key_length)
    first = begin // shape.BLOCK_N
    stop = tl.maximum(tl.cdiv(end, shape.BLOCK_N), first)
    full_first = tl.minimum(tl.cdiv(full_begin, shape.BLOCK_N), stop)
    full_stop = tl.maximum(full_end // shape.BLOCK_N, full_first)
    return first, stop, full_first, full_stop


@triton.jit
def rows_of_keys(start_n, problem, shape: tl.constexpr):
    """The same for the tiles of rows that see a block of keys.

    A key or a row beyond the last makes an edge.
    """
    sizes, reach = problem.sizes, problem.reach
    last = start_n + shape.BLOCK_N - 1
    begin, full_begin = 0, 0
    end, full_end = sizes.query_length, sizes.query_length
    if reach.high is not None:
        begin = tl.minimum(tl.maximum(start_n - reach.high, 0), sizes.query_length)
        full_begin = tl.minimum(tl.maximum(last - reach.high, 0), sizes.query_length)
    if reach.low is not None:
        end = tl.minimum(tl.maximum(last - reach.low + 1, 0), sizes.query_length)
        full_end = tl.minimum(tl.maximum(start_n - reach.low + 1, 0), sizes.query_length)
    first = begin // shape.BLOCK_M
    stop = tl.maximum(tl.cdiv(end, shape.BLOCK_M), first)
    full_first = tl.minimum(tl.cdiv(full_begin, shape.BLOCK_M), stop)
    full_stop = tl.maximum(full_end // shape.BLOCK_M, full_first)
    if last >= sizes.key_length:
        full_stop = full_first
    return first, stop, full_first, full_stop


@triton.jit
def is_full(first_row, rows, first_key, keys, problem):
    """Whether all of so many rows and keys exist and every row may see every key, masks apart."""
    sizes, reach = problem.sizes, problem.reach
    last_row, last_key = first_row + rows - 1, first_key + keys - 1
    full = (last_row < sizes.query_length) & (last_key < sizes.key_length)
    if reach.high is not None:
        full = full & (last_key <= first_row + reach.high)
    if reach.low is not None:
        full = full & (first_key >= last_row + reach.low)
    return full


@triton.jit
def edge_tile(index, first, full_first, full_stop):
    """The index-th tile that is not full."""
    tile = first + index
    return tl.where(tile < full_first, tile, tile + full_stop - full_first)


@triton.jit
def is_finite(x):
    """Whether all of a tile is."""
    return tl.max(tl.max(tl.where(x - x == 0, 0, 1), 1), 0) == 0
