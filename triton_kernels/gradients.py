"""What the backward kernels share: weights from products and LSE, and the gradients of scores.

P = exp2(S - lse),  dS = P (keep * dP - term),  term = sum(dO * O) - dlse, a value a row
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
    do not exist.
    """
    length = problem.sizes.query_length
    l_i = load_values(lse, tile, rows, length, INFINITY, EDGE) * shape.UNIT
    l_i = tl.where(l_i == -INFINITY, INFINITY, l_i)
    if terms is None:
        return l_i, tl.zeros_like(l_i)
    else:
        return l_i, load_values(terms, tile, rows, length, 0.0, EDGE)


@triton.jit
def gradients_of(
    product,
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
    SUBTRACTED: tl.constexpr,
    ROWS: tl.constexpr = False,
):
    """(dropped) weights, gradients of scores, and gradients of products.

    Args:
        product: Q K^T. dp: dO V^T; with SUBTRACTED, less the row terms.
        l_i, term: what `load_row_values` gives, broadcast against the tile.
        dweights: Pairs, the gradient of the weights, which takes the place of dp; or None.
        share: what dweights are multiplied with.
        keep: the tile of `keep_mask`, or None.
        ROWS: whether what rows that do not exist have is used.
    """
    s, t = scores_of(product, tile, problem, shape, EDGE, ROWS)
    p = exp_of(s * factor_of(problem, shape) - l_i, shape.UNIT)
    if dweights is not None:
        dp = load_pairs(dweights, tile, problem.sizes).to(tl.float32) * share
    weights = p
    if problem.dropout is not None:
        weights = tl.where(keep, p * problem.dropout.factor, 0.0)
        dp = tl.where(keep, dp * problem.dropout.factor, 0.0)
    if not SUBTRACTED:
        dp -= term
    ds = p * dp
    dproduct = ds
    if problem.scoring.softcap is not None:
        dproduct = ds * (1 - t * t)
    if EDGE or problem.scoring.mask is not None or problem.scoring.key_mask is not None:
        # LSE may be NaN because of what other keys hold, and so may everything of a hidden pair.
        visible = s != -INFINITY
        weights = tl.where(visible, weights, 0.0)
        ds = tl.where(visible, ds, 0.0)
        dproduct = tl.where(visible, dproduct, 0.0)
    return weights, ds, dproduct


@triton.jit
def keep_of(tile, problem, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_CALLS: tl.constexpr):
    """The tile's `keep_mask`, or None without dropout."""
    if problem.dropout is None:
        return None
    else:
        return keep_mask(problem, tile, BLOCK_M, BLOCK_N, WHOLE_CALLS)
