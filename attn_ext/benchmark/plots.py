"""What was measured, as plots: SVG whose text and axes take the colour of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from attn_ext.benchmark.cases import DTYPES
from attn_ext.benchmark.results import Group, Row, Run
from attn_ext.benchmark.scaling import NAMES, Fit, fits, size

INK = "#010203"
"""Stands for the page's own colour of text, in light and in dark."""
COLORS = {
    "PyTorch": "#4c78a8",
    "PyTorch math": "#9c9ea6",
    "PyTorch flash": "#76b7b2",
    "PyTorch efficient": "#b279a2",
    "PyTorch cuDNN": "#b5892f",
    "PyTorch nested": "#9d755d",
    "flex_attention": "#54a24b",
    "flash-attn": "#f58518",
    "xformers": "#b8a200",
    "flashinfer": "#e377c2",
}
OUR_COLORS = ("#d1495b", "#e07b39", "#a23b72", "#7f4ca5")
MARKERS = "osD^vPX*"
SCHEMES = (
    "<style>:root{color:#1f2328}@media(prefers-color-scheme:dark){:root{color:#e6edf3}}</style>"
)
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def plots(run: Run) -> dict[str, str]:
    """Every plot that the run has figures for, by its name, as SVG."""
    drawers: dict[str, Callable[[Run], Figure | None]] = {
        "speedup": _speedup,
        "time": lambda run: _by_length(run, "time", lambda group, row: 1e3 * row.median),
        "gflops": lambda run: _by_length(run, "GFLOP/s", lambda group, row: group.gflops(row)),
        "memory": lambda run: _by_length(
            run, "peak memory", lambda group, row: (row.peak_memory or 0) / 2**20
        ),
        "error": _error_by_dtype,
        "roofline": _roofline,
        "scaling-time": lambda run: _scaling(run, "time"),
        "scaling-memory": lambda run: _scaling(run, "memory"),
    }
    found = {}
    for name, draw in drawers.items():
        with matplotlib.rc_context(cast(Any, {**STYLE, "svg.hashsalt": name})):
            figure = draw(run)
            if figure is not None:
                found[name] = _svg(figure, name)
    return found


def standalone(svg: str) -> str:
    """A plot for a file of its own, which brings its colours for light and dark."""
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return head + re.sub(r"(<svg\b[^>]*>)", rf"\1{SCHEMES}", svg, count=1) + "\n"


def color_of(side: str, sides: Sequence[str]) -> str:
    """A side's colour, the same in every plot; `sides` are all that a run has."""
    if side.startswith("attn_ext"):
        ours = [x for x in sides if x.startswith("attn_ext")]
        return OUR_COLORS[ours.index(side) % len(OUR_COLORS)]
    return COLORS.get(side, "#7f7f7f")


def _svg(figure: Figure, name: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Title": name})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"[ \t]+\n", "\n", svg).strip()


def _sides(groups: Iterable[Group]) -> list[str]:
    return list(dict.fromkeys(row.side for group in groups for row in group.rows))


def _line(axes: Axes, side: str, sides: Sequence[str], x: list[float], y: list[float]) -> None:
    ours = side.startswith("attn_ext")
    axes.plot(
        x,
        y,
        marker=MARKERS[sides.index(side) % len(MARKERS)],
        color=color_of(side, sides),
        linewidth=2.2 if ours else 1.2,
        markersize=5 if ours else 4,
        zorder=3 if ours else 2,
        label=side,
    )


def _plain_numbers(axes: Axes) -> None:
    """0.1, 1, 10 rather than powers, and no numbers between."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, max(1, len(labels))))


def _speedup(run: Run) -> Figure | None:
    """A bar a case: how many times faster than PyTorch's own choice."""
    bars = [
        (f"{group.case}", group.ratio(row, group.stock), row.side)
        for group in run.groups
        if not group.case.sweep and group.stock is not None
        for row in group.rows
        if row.ours
    ]
    if not bars:
        return None
    sides = _sides(run.groups)
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.23 * len(bars)), layout="constrained")
    places = range(len(bars), 0, -1)
    axes.set_xscale("log", base=2)
    colors = [color_of(side, sides) for *_, side in bars]
    axes.barh(places, [ratio - 1 for _, ratio, _ in bars], 0.68, left=1, color=colors)
    for place, (_, ratio, _) in zip(places, bars, strict=True):
        axes.text(max(ratio, 1), place, f" {ratio:.2f}x", va="center", fontsize=8)
    several = len({side for *_, side in bars}) > 1
    axes.set_yticks(
        places, [f"{name}, {side}" if several else name for name, _, side in bars], fontsize=8
    )
    axes.set_xlim(left=min(0.75, *(0.9 * ratio for _, ratio, _ in bars)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_ylim(0.3, len(bars) + 0.7)
    axes.set_xlabel("times as fast as PyTorch's own choice of kernel (the line: as fast)")
    axes.grid(axis="y", visible=False)
    return figure


def _by_length(run: Run, label: str, value: Callable[[Group, Row], float]) -> Figure | None:
    """A panel for each kind of work and dtype, a line a side."""
    groups = [group for group in run.groups if group.case.sweep == "L"]
    panels = list(dict.fromkeys((group.case.kind, group.case.dtype) for group in groups))
    if not panels:
        return None
    sides = _sides(groups)
    figure, axes_list = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.5), layout="constrained", squeeze=False
    )
    for axes, (kind, dtype) in zip(axes_list[0], panels, strict=True):
        shown = [x for x in groups if (x.case.kind, x.case.dtype) == (kind, dtype)]
        for side in sides:
            points = [
                (size("L", group.case.shape), value(group, row))
                for group in shown
                if (row := group.row(side)) is not None
            ]
            points = [(x, y) for x, y in points if y > 0]
            if points:
                _line(axes, side, sides, *map(list, zip(*points, strict=True)))
        shape = shown[0].case.shape
        sizes = f"B {shape.batch}, H {shape.query_heads}, D {shape.head_dim}"
        axes.set_title(f"{kind}, {dtype}, {sizes}")
        axes.set_xscale("log", base=2)
        lengths = sorted({size("L", group.case.shape) for group in shown})
        axes.set_xticks(lengths, [str(x) for x in lengths])
        axes.set_xlabel("length L")
        if label == "GFLOP/s":
            limits = [x for group in shown for x in group.compute_limits]
            if limits:
                axes.axhline(max(limits) / 1e9, color=INK, linestyle="--", linewidth=1)
                axes.annotate(
                    "measured limit of multiply-adds",
                    (lengths[0], max(limits) / 1e9),
                    (0, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        else:
            axes.set_yscale("log")
            _plain_numbers(axes)
    units = {"time": "time of a call, ms", "peak memory": "peak memory beyond the inputs, MiB"}
    axes_list[0][0].set_ylabel(units.get(label, label))
    _legend_below(figure, axes_list[0][0])
    return figure


def _error_by_dtype(run: Run) -> Figure | None:
    """The largest error of output and gradients, at the one shape that has every dtype."""
    shapes: dict[tuple[str, str], dict[str, Group]] = {}
    for group in run.groups:
        if group.case.needs_gradients and not group.case.option and not group.case.sweep:
            key = (group.case.kind, str(group.case.shape))
            shapes.setdefault(key, {})[group.case.dtype] = group
    if not shapes:
        return None
    (kind, shape), found = max(shapes.items(), key=lambda item: len(item[1]))
    # In float64 there is nothing finer to measure against.
    dtypes = [dtype for dtype in DTYPES if dtype in found and dtype != "float64"]
    sides = _sides(found.values())
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    width = 0.8 / len(sides)
    for number, side in enumerate(sides):
        points = [
            (place + (number - (len(sides) - 1) / 2) * width, row.max_error)
            for place, dtype in enumerate(dtypes)
            if (row := found[dtype].row(side)) is not None
        ]
        x, y = map(list, zip(*points, strict=True))
        axes.bar(x, y, 0.9 * width, color=color_of(side, sides), label=side)
    axes.set_yscale("log")
    axes.set_xticks(range(len(dtypes)), dtypes)
    axes.set_ylabel("largest error against float64")
    axes.set_title(f"{kind} {shape}: the output and all gradients")
    axes.grid(axis="x", visible=False)
    _legend_below(figure, axes)
    return figure


def _roofline(run: Run) -> Figure | None:
    """Operations a second by operations a byte, under the limits that were measured."""
    groups = [group for group in run.groups if group.compute_limits]
    dtypes = [dtype for dtype in DTYPES if any(x.case.dtype == dtype for x in groups)]
    if not dtypes:
        return None
    figure, axes_list = plt.subplots(
        1, len(dtypes), figsize=(4.6 * len(dtypes), 3.8), layout="constrained", squeeze=False
    )
    sides = [x for x in _sides(groups) if x.startswith("attn_ext") or x == "PyTorch"]
    for axes, dtype in zip(axes_list[0], dtypes, strict=True):
        shown = [group for group in groups if group.case.dtype == dtype]
        compute = max(x for group in shown for x in group.compute_limits) / 1e9
        memory = max(x for group in shown for x in group.memory_limits) / 1e9
        places = [group.intensity for group in shown]
        left, right = min(0.25, *places) / 1.5, max(*places, compute / memory) * 2
        ridge = compute / memory
        axes.plot([left, ridge, right], [left * memory, compute, compute], color=INK, linewidth=1.5)
        axes.annotate(
            f"multiply-adds: {compute:.0f} GFLOP/s", (right, compute), (0, 4),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
        axes.annotate(
            f"memory: {memory:.0f} GB/s", (left * 1.2, left * 1.2 * memory), (8, -4),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
        for side in reversed(sides):
            points = [
                (group.intensity, group.gflops(row))
                for group in shown
                if (row := group.row(side)) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                color = color_of(side, sides)
                marker = MARKERS[sides.index(side)]
                axes.scatter(x, y, 26, color=color, marker=marker, label=side, alpha=0.85, zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(dtype)
        axes.set_xlabel("operations for each byte that must be moved")
    axes_list[0][0].set_ylabel("GFLOP/s")
    _legend_below(figure, axes_list[0][0])
    return figure


def _scaling(run: Run, quantity: str) -> Figure | None:
    """A panel a dimension: ours and PyTorch's, and the fitted power laws."""
    shown = [
        fit
        for fit in fits(run.groups)
        if fit.quantity == quantity and (fit.side.startswith("attn_ext") or fit.side == "PyTorch")
    ]
    if not shown:
        return None
    kinds = list(dict.fromkeys((fit.kind, fit.dtype) for fit in shown))
    dimensions = [x for x in NAMES if any(fit.dimension == x for fit in shown)]
    sides = list(dict.fromkeys(fit.side for fit in shown))
    figure, axes_grid = plt.subplots(
        len(kinds), len(dimensions), figsize=(2.7 * len(dimensions), 2.6 * len(kinds)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, (kind, dtype) in zip(axes_grid, kinds, strict=True):
        for axes, dimension in zip(row, dimensions, strict=True):
            for fit in shown:
                if (fit.dimension, fit.kind, fit.dtype) == (dimension, kind, dtype):
                    _fitted_line(axes, fit, sides)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(NAMES[dimension])
            axes.xaxis.set_major_formatter("{x:.0f}")
            _plain_numbers(axes)
            axes.legend(fontsize=7, loc="upper left", handlelength=1.2)
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        unit = "ms" if quantity == "time" else "MiB"
        row[0].set_ylabel(f"{kind}\n{dtype}, {unit}")
    return figure


def _fitted_line(axes: Axes, fit: Fit, sides: Sequence[str]) -> None:
    unit = 1e3 if fit.quantity == "time" else 2.0**-20
    color = color_of(fit.side, sides)
    marker = MARKERS[sides.index(fit.side) % len(MARKERS)]
    x = list(fit.points)
    axes.plot(x, [unit * y for y in fit.points.values()], marker, color=color, markersize=4)
    axes.plot(
        x,
        [unit * fit.factor * size**fit.exponent for size in x],
        color=color,
        linewidth=1.2,
        label=f"{fit.side}: {fit.dimension}$^{{{fit.exponent:.2f}}}$",
    )
