"""Dropout's random numbers in plain PyTorch, the same bits as csrc/philox.h.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC'11). The generator is a function of a 128-bit counter and a 64-bit key, so what becomes of a
weight depends on its place alone and on no block size, thread count or backend. A call makes four
words, and each of their 16 bytes decides about a weight; which ones share a call is chosen so that
a lane of a tensor core holds them all. With absolute rows and columns:

    key     = (seed's low word, seed's high word)
    counter = (column // 32 * 4 + column % 8 // 2, row // 16 * 8 + row % 8,
               batch * Hq + head, offset)
    byte    = row % 16 // 8 * 8 + column % 32 // 8 * 2 + column % 2

A weight is dropped where its byte is below the call's threshold. dropout_p * 256 is hardly ever a
whole number. So it is rounded at random, up or down by the exclusive or of the call's words, which
knows nothing of any one of them: every weight is dropped with probability dropout_p, exact to
2**-32. Weights of one call are independent but for that rounding, which all 16 share.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFF_FFFF


def dropout_threshold(dropout_p: float) -> int:
    """dropout_p in units of 2**-32: a byte's threshold with 24 bits after the point."""
    return min(round(dropout_p * 2.0**32), _WORD)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words of every counter, as int64 tensors of the counters' broadcast shape."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap, but their bits are those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ key0,
            product1 & _WORD,
            high0 ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    shape: tuple[int, int, int, int],
    dropout_p: float,
    seed: int | Tensor,
    offset: int,
    *,
    q_start: int = 0,
    k_start: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Which weights dropout keeps.

    Args:
        shape: (B, Hq, Lq, Lk).
        dropout_p: probability that a weight is dropped.
        seed, offset: as in `attn_ext.attention`.
        q_start, k_start: absolute position of the first row and column.

    Returns:
        A bool tensor of that shape.
    """
    batch, heads, rows, columns = shape
    if not isinstance(seed, Tensor):
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)
    row = ((torch.arange(rows, device=device) + q_start) & _WORD).view(1, 1, -1, 1)
    column = ((torch.arange(columns, device=device) + k_start) & _WORD).view(1, 1, 1, -1)
    counter = (
        column // 32 * 4 + column % 8 // 2,
        row // 16 * 8 + row % 8,
        torch.arange(batch * heads, device=device).view(batch, heads, 1, 1),
        torch.full((1, 1, 1, 1), offset, device=device),
    )
    w0, w1, w2, w3 = philox(counter, seed)
    threshold = dropout_threshold(dropout_p)
    rounded_up = (w0 ^ w1 ^ w2 ^ w3) < (threshold << 8 & _WORD)
    first_word = torch.where(column % 32 < 16, w0, w1)
    second_word = torch.where(column % 32 < 16, w2, w3)
    word = torch.where(row % 16 < 8, first_word, second_word)
    byte = word >> (column % 16 // 8 * 16 + column % 2 * 8) & 0xFF
    return byte >= (threshold >> 24) + rounded_up
