"""Real text that ships with Python, and a tokenizer of frequent words and single characters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

PIECE = re.compile(r" ?[^\W\d_]+| +|\n+ *|.", re.DOTALL)
"""A word with the space before it, spaces, a line's end and indentation, or one character."""


def load_text() -> str:
    """The language reference behind Python's `help()`, each paragraph once.

    Some topics quote others; a repeated paragraph would put held-out text into the training text.
    """
    paragraphs = (
        part for name in sorted(topics) for part in re.split("\n\n+", topics[name].strip("\n"))
    )
    return "\n\n".join(dict.fromkeys(paragraphs))


class Tokenizer:
    """The most frequent pieces of a text (see `PIECE`) are a token each; others are spelled out.

    Args:
        text: where pieces are counted; each of its characters is a token too.
        size: number of different tokens.
    """

    def __init__(self, text: str, size: int = 1024) -> None:
        characters = sorted(set(text))
        frequent = Counter(piece for piece in PIECE.findall(text) if len(piece) > 1)
        pieces = [piece for piece, _ in frequent.most_common(max(0, size - len(characters)))]
        self.tokens = characters + pieces
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text: str) -> Tensor:
        """A string to its token numbers, (L,) int64."""
        unknown = sorted(set(text) - set(self.numbers))
        if unknown:
            raise ValueError(f"text has characters that the training text lacks: {unknown}")
        numbers: list[int] = []
        for piece in PIECE.findall(text):
            parts = [piece] if piece in self.numbers else piece
            numbers += [self.numbers[part] for part in parts]
        return torch.tensor(numbers, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """(L,) token numbers to the string."""
        return "".join(self.tokens[number] for number in tokens.tolist())


@dataclass(frozen=True)
class Corpus:
    """A tokenized text in two parts.

    Attributes:
        tokenizer: what encoded it.
        train: (N,) token numbers to learn from.
        validation: (M,) token numbers held out, the text's last tenth.
    """

    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor


def load_corpus() -> Corpus:
    """`load_text`, split and tokenized."""
    text = load_text()
    tokenizer = Tokenizer(text)
    split = len(text) * 9 // 10
    return Corpus(tokenizer, tokenizer.encode(text[:split]), tokenizer.encode(text[split:]))


def random_batches(
    tokens: Tensor, batch: int, context: int, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `count` pairs of inputs and targets, (batch, context) each, from random places."""
    if len(tokens) <= context:
        raise ValueError(f"context must be below the text's {len(tokens)} tokens, got {context}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
        windows = tokens[starts[:, None] + torch.arange(context + 1)]
        yield windows[:, :-1], windows[:, 1:]


def consecutive_batches(
    tokens: Tensor, batch: int, context: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs as `random_batches`, from neighbouring windows that cover the text once.

    What is left after the last whole window is dropped; the last batch may be smaller.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"context must be below the text's {len(tokens)} tokens, got {context}")
    inputs = tokens[: count * context].view(count, context)
    targets = tokens[1 : count * context + 1].view(count, context)
    yield from zip(inputs.split(batch), targets.split(batch), strict=True)
