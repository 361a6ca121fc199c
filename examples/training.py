"""The training loop's step and the evaluation of a language model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Trainer:
    """Trains one model with AdamW and keeps the loss and time of each step.

    The learning rate rises over the first tenth of the steps and then falls along a cosine to a
    tenth of its peak.

    Attributes:
        model: what is trained, in place.
        losses: the loss of each step, before its update.
        seconds: the time of each step: forward, backward and update.
    """

    def __init__(self, model: nn.Module, steps: int, learning_rate: float) -> None:
        self.model = model
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _rate(step, steps)
        )

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One update on a batch: inputs and targets are (B, L) token numbers; returns the loss."""
        start = time.perf_counter()
        loss = next_token_loss(self.model(inputs), targets)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self._schedule.step()
        return self.losses[-1]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of logits (B, L, V) against the tokens that came, (B, L)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The mean loss a token over all batches of (inputs, targets); exp of it is the perplexity."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for inputs, targets in batches:
        total += next_token_loss(model(inputs), targets).item() * targets.numel()
        tokens += targets.numel()
    model.train(training)
    return total / tokens


def _rate(step: int, steps: int) -> float:
    """The learning rate at a step, as a fraction of its peak."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
