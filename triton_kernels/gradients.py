"""What the backward kernels share: weights from products and LSE, and the gradients of scores.

P = exp2(S - lse),  dS = P (keep * dP + term),  term = dlse - sum(dO * O), a value a row
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ext.triton_kernels.dropout import keep_mask
from attn_ext.triton_kernels.scores import (
    INFINITY,
    exp_of,
    factor_of,
    load_pairs,
    load_values,
    scores_of,
)


@triton.jit
def load_row_values(lse, terms, tile, rows, problem, shape: tl.constexpr, EDGE: tl.constexpr):
    """LSE in score units and the row terms (0 if there are none) of some rows.

    LSE is +inf, which makes weights of 0, for rows that see nothing and, with EDGE, for those that
    do not exist. With terms, `row_terms` has made `lse` so.
    """
    length = problem.sizes.query_length
    l_i = load_values(lse, tile, rows, length, INFINITY, EDGE)
    if terms is None:
        l_i = score_lse(l_i, shape.UNIT)
        return l_i, tl.zeros_like(l_i)
    else:
        return l_i, load_values(terms, tile, rows, length, 0.0, EDGE)


@triton.jit
def score_lse(lse, UNIT: tl.constexpr):
    """LSE in score units; +inf where nothing is seen."""
    l_i = lse * UNIT
    return tl.where(l_i == -INFINITY, INFINITY, l_i)


@triton.jit
def gradients_of(
    product,
    entries,
    dp,
    l_i,
    term,
    dweights,
    share,
    tile,
    problem,
    shape: tl.constexpr,
    keep,
    EDGE: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr = False,
):
    """(dropped) weights, gradients of scores, and gradients of products.

    Args:
        product: Q K^T. dp: dO V^T; with ADDED, plus the row terms.
        entries: what `load_entries` gives.
        l_i, term: what `load_row_values` gives, broadcast against the tile.
        dweights: Pairs, the gradient of the weights, which takes the place of dp; or None.
        share: what dweights are multiplied with.
        keep: the tile of `keep_mask`, or None.
        WEIGHTS: whether the weights are used; without, a hidden pair's may be NaN. Its gradients
            are 0 in any case.
        ROWS: whether what rows that do not exist have is used.
    """
    s, t = scores_of(product, entries, tile, problem, shape, EDGE, ROWS)
    HIDES: tl.constexpr = EDGE or shape.MASKED
    x = s * factor_of(problem, shape) - l_i
    # LSE may be NaN because of what other keys hold, and so may everything of a hidden pair. Where
    # weights are used, pairs are hidden before the exponential and not in the results: in these the
    # compiler would do it after rounding to 16 bits, which takes more instructions.
    visible = s != -INFINITY
    if HIDES and WEIGHTS:
        x = tl.where(visible, x, -INFINITY)
    p = exp_of(x, shape.UNIT)
    if dweights is not None:
        dp = load_pairs(dweights, tile, problem.sizes, EDGE).to(tl.float32) * share
    weights = p
    if problem.dropout is not None:
        weights = tl.where(keep, p * problem.dropout.factor, 0.0)
        dp = tl.where(keep, dp * problem.dropout.factor, 0.0)
    if not ADDED:
        dp += term
    if HIDES and WEIGHTS:
        dp = tl.where(visible, dp, 0.0)
    ds = p * dp
    if HIDES and not WEIGHTS:
        ds = tl.where(visible, ds, 0.0)
    dproduct = ds
    if problem.scoring.softcap is not None:
        slope = 1 - t * t
        if HIDES:
            slope = tl.where(visible, slope, 0.0)
        dproduct = ds * slope
    return weights, ds, dproduct


@triton.jit
def keep_of(tile, problem, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_CALLS: tl.constexpr):
    """The tile's `keep_mask`, or None without dropout."""
    if problem.dropout is None:
        return None
    else:
        return keep_mask(problem, tile, BLOCK_M, BLOCK_N, WHOLE_CALLS)
