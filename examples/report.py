"""What the demo shows in the end: a table and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, STOCK = "#d1495b", "#2e4057"


@dataclass(frozen=True)
class Result:
    """What was measured of one side.

    Attributes:
        losses: the training loss of each step.
        step_seconds: the median time of a step.
        tokens_per_second: tokens of a step over that time.
        peak_bytes: see `examples.memory.peak_memory`.
        validation_loss: on held-out text, after training.
    """

    losses: list[float]
    step_seconds: float
    tokens_per_second: float
    peak_bytes: int
    validation_loss: float


def results_table(ours: Result, stock: Result) -> Table:
    """The figures of both sides and their ratios, ours / stock."""
    table = Table(title="Training, side by side")
    table.add_column()
    for header in ("ours", "stock", "ours / stock"):
        table.add_column(header, justify="right")
    rows = (
        ("time a step (median)", "step_seconds", 1e3, "{:.1f} ms"),
        ("tokens a second", "tokens_per_second", 1.0, "{:,.0f}"),
        ("peak memory", "peak_bytes", 2.0**-20, "{:.0f} MiB"),
        ("validation loss", "validation_loss", 1.0, "{:.4f}"),
    )
    for label, name, unit, form in rows:
        left, right = (getattr(result, name) * unit for result in (ours, stock))
        table.add_row(label, form.format(left), form.format(right), f"{left / right:.2f}")
    return table


def save_plot(ours: list[float], stock: list[float], tolerance: list[float], path: Path) -> None:
    """Plot both loss curves above their difference at each step and save it as a PNG.

    Args:
        ours, stock: the training loss of each step.
        tolerance: the largest difference that each step may have.
        path: the file; its folder is made if need be.
    """
    steps = np.arange(1, len(ours) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot(
        steps, stock, color=STOCK, linewidth=4, alpha=0.45, label="stock nn.MultiheadAttention"
    )
    top.plot(steps, ours, color=OURS, linewidth=1.3, label="attn_ext")
    top.set_title("A Transformer language model, trained with stock and swapped attention")
    top.set_ylabel("training loss (nats a token)")
    top.legend(frameon=False)
    difference = np.abs(np.subtract(ours, stock))
    seen = difference > 0
    bottom.semilogy(steps, tolerance, color="gray", linestyle="--", linewidth=1, label="allowed")
    bottom.semilogy(
        steps[seen], difference[seen], ".", color=OURS, label="seen (where not exactly 0)"
    )
    bottom.set_ylabel("loss difference")
    bottom.set_xlabel("step")
    bottom.set_ylim(1e-8, 1e-2)
    bottom.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
