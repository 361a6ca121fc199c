"""Philox4x32-10 against the known answers of its authors' Random123 library, and its use for dropout."""

from __future__ import annotations

import pytest
import torch

from attn_ext.philox import dropout_threshold, keep_mask, philox

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    signed = seed - 2**64 if seed >= 2**63 else seed
    tensors = tuple(torch.tensor(word) for word in counter)
    assert tuple(int(w) for w in philox(tensors, torch.tensor(signed))) == words  # type: ignore[arg-type]


def test_threshold() -> None:
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(1 - 1e-12) == 2**32 - 1


@pytest.mark.parametrize("dropout_p", [0.0, 1e-4, 0.5 / 256, 0.1, 0.3, 0.5, 0.999, 1 - 1e-4])
def test_dropped_share(dropout_p: float) -> None:
    """Also where dropout_p * 256 is no whole number; within six standard deviations, of which the
    rounding that 16 weights share is a small part."""
    shape = (2, 4, 512, 512)
    dropped = 1 - keep_mask(shape, dropout_p, seed=1, offset=0).double().mean().item()
    count = 2 * 4 * 512 * 512
    deviation = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert dropped == pytest.approx(dropout_p, abs=6 * deviation)


def test_weights_of_a_call_are_independent_of_each_other() -> None:
    """Rows r and r + 8, and eight columns: no two of their 16 weights go together."""
    kept = keep_mask((4, 8, 512, 512), 0.1, seed=3, offset=0)
    calls = kept.view(32, 32, 2, 8, 16, 4, 4, 2).permute(0, 1, 3, 4, 6, 2, 5, 7)
    correlations = torch.corrcoef(calls.reshape(-1, 16).double().T)
    assert correlations.fill_diagonal_(0).abs().max() < 5 / (calls.numel() / 16) ** 0.5


def test_streams_differ() -> None:
    masks = [
        keep_mask((2, 3, 9, 11), 0.5, seed, offset)
        for seed, offset in ((1, 0), (1, 1), (2, 0), (2**32 + 1, 0))
    ]
    for index, mask in enumerate(masks):
        assert all(not torch.equal(mask, other) for other in masks[index + 1 :])
    heads = masks[0].flatten(0, 1)
    assert not torch.equal(heads[0], heads[1])
