"""Dropout's random numbers in plain PyTorch, the same bits as csrc/philox.h.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC'11). The generator is a function of a 128-bit counter and a 64-bit key, so a weight's random
word depends on its place alone and on no block size, thread count or backend:

    key     = (seed's low word, seed's high word)
    counter = (column // 4, row, batch * Hq + head, offset)      word = column % 4

A weight is kept where its word is at least dropout_p * 2**32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFF_FFFF


def dropout_threshold(dropout_p: float) -> int:
    """The smallest 32-bit word that keeps a weight."""
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
    row = (torch.arange(rows, device=device) + q_start) & _WORD
    column = (torch.arange(columns, device=device) + k_start) & _WORD
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    counter = (
        (column // 4).view(1, 1, 1, -1),
        row.view(1, 1, -1, 1),
        head,
        torch.full((1, 1, 1, 1), offset, device=device),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed)), dim=-1)
    choice = (column % 4).view(1, 1, 1, -1, 1).expand(batch, heads, rows, columns, 1)
    return words.gather(-1, choice).squeeze(-1) >= dropout_threshold(dropout_p)
