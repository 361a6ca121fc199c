"""A small Transformer language model, built from PyTorch's own modules only.

Nothing here knows of `attn_ext`: `attn_ext.replace_multihead_attention(model)` swaps the attention
of a model like this one from outside. Letters in shapes: B batch, L length, E embedding dimension,
V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `LanguageModel`.

    Attributes:
        vocabulary: number of different tokens, V.
        context: the longest sequence that the model sees.
        width: embedding dimension, E.
        heads: attention heads a layer.
        layers: number of layers.
        encoder_layers: build the layers from nn.TransformerEncoderLayer instead of `Block`.
    """

    vocabulary: int
    context: int = 512
    width: int = 128
    heads: int = 4
    layers: int = 4
    encoder_layers: bool = False


class Block(nn.Module):
    """One layer: causal multi-head self-attention, then a feed-forward network.

    Each reads a layer-normalised input and adds its output to it (pre-norm). The arguments of
    `forward` have the names that nn.TransformerEncoderLayer gives them, so either may be the layer.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, src_mask: Tensor, is_causal: bool) -> Tensor:
        """(B, L, E) to (B, L, E); src_mask is the (L, L) causal mask, which is_causal announces."""
        normed = self.attention_norm(hidden)
        attended, _ = self.attention(
            normed, normed, normed, attn_mask=src_mask, is_causal=is_causal, need_weights=False
        )
        hidden = hidden + attended
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class LanguageModel(nn.Module):
    """Predicts each next token of a sequence: embedding, layers, output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocabulary)
        positions = sinusoidal_positions(config.context, config.width)
        mask = nn.Transformer.generate_square_subsequent_mask(config.context)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (B, L), L at most the context, to logits of the next tokens (B, L, V)."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens must be at most {self.config.context} long, got {length}")
        hidden = self.embedding(tokens) + self.positions[:length]
        mask = self.mask[:length, :length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.output(self.norm(hidden))

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, count: int, temperature: float = 0.7, seed: int = 0
    ) -> Tensor:
        """Continue a prompt by sampling one token after the other.

        Args:
            prompt: (L,) token numbers.
            count: how many tokens to add.
            temperature: below 1 favours likely tokens.
            seed: of the sampling.

        Returns:
            (L + count,) token numbers, prompt included.
        """
        training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        tokens = prompt
        for _ in range(count):
            logits = self(tokens[None, -self.config.context :])[0, -1] / temperature
            sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, sampled])
        self.train(training)
        return tokens


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """The fixed position vectors (length, width) of "Attention is all you need"."""
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = position * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _layer(config: ModelConfig) -> nn.Module:
    if not config.encoder_layers:
        return Block(config.width, config.heads)
    return nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        dim_feedforward=4 * config.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
