"""The peak memory of a training step, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch

import attn_ext
from attn_ext.benchmark.memory import peak_bytes
from examples.language_model import LanguageModel, ModelConfig
from examples.training import Trainer


def peak_memory(config: ModelConfig, batch: int, swapped: bool) -> int:
    """Bytes that training steps of a (batch, context) batch need on top of a tiny step's.

    A new process takes a step on sequences of 8 tokens, so that libraries, weights, gradients and
    the optimizer's state are there, notes its memory, then takes full steps and notes its peak.

    Args:
        config: sizes of the model.
        batch: sequences a step.
        swapped: whether attn_ext replaces the model's attention.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_measure, config, batch, swapped, torch.get_num_threads()).result()


def _measure(config: ModelConfig, batch: int, swapped: bool, threads: int) -> int:
    warnings.simplefilter("ignore", attn_ext.ReferenceFallbackWarning)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LanguageModel(config)
    if swapped:
        attn_ext.replace_multihead_attention(model)
    trainer = Trainer(model, steps=4, learning_rate=1e-3)
    _step(trainer, batch, min(8, config.context))

    def steps() -> None:
        for _ in range(2):
            _step(trainer, batch, config.context)

    return peak_bytes(steps)


def _step(trainer: Trainer, batch: int, context: int) -> None:
    tokens = torch.zeros(batch, context, dtype=torch.int64)
    trainer.step(tokens, tokens)
