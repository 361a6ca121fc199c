"""A run as one HTML file: it needs no network, prints, and follows light and dark."""

from __future__ import annotations

import html
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attn_ext.benchmark.cases import KINDS
from attn_ext.benchmark.plots import plots
from attn_ext.benchmark.results import Group, Run, geometric_mean
from attn_ext.benchmark.scaling import NAMES, Fit, fits
from attn_ext.benchmark.tables import COLUMNS, cells, left_out_lines

CAPTIONS = {
    "speedup": (
        "Against PyTorch",
        "The median over the rounds of each round's ratio; in a round all sides take their turns.",
    ),
    "time": ("Time by length", "Medians; both axes are logarithmic."),
    "gflops": (
        "GFLOP/s by length",
        "Operations of the pairs that take part, over the median time.",
    ),
    "memory": (
        "Memory by length",
        "The highest use of memory during a call, beyond its inputs; results count. A backward "
        "pass that holds the (L, L) weights grows with the square of the length.",
    ),
    "error": (
        "Error by dtype",
        "The largest difference of any element to the same computation in float64. Lower: better.",
    ),
    "roofline": (
        "Roofline",
        "The best rates of multiply-adds and of memory that this machine showed during the run. "
        "Small work stays in caches and may lie above the slope.",
    ),
    "scaling-time": (
        "Time against size",
        "Power laws fitted to sweeps of one dimension, the others held.",
    ),
    "scaling-memory": (
        "Memory against size",
        "Fused attention is linear in every dimension; what holds the weights is quadratic in L.",
    ),
}
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --page: #fff;
  --card: #f6f8fa; --ours: #d1495b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --page: #0d1117; --card: #161b22; --ours: #ff7b89; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .3rem; font-size: 1.2rem; }
h3 { margin: 1.4rem 0 .3rem; font-size: 1rem; }
p, figcaption, li { color: var(--soft); margin: .2rem 0; max-width: 50rem; }
code { font-size: .9em; } a { color: inherit; }
nav { margin: .8rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem 1rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; color: var(--ours); }
.tile span { color: var(--soft); font-size: .85rem; }
figure { margin: .6rem 0 0; } figure svg { width: 100%; height: auto; max-height: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; color: var(--ours); }
tbody.case { border-bottom: 1px solid var(--line); }
td.case { color: var(--soft); vertical-align: top; white-space: normal; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff;
    --card: #fff; --ours: #a8283c; }
  @page { margin: 14mm; } body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; } figure, tr, .tile { break-inside: avoid; } h2, h3 { break-after: avoid; }
  figure svg { max-height: 225mm; } table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; }
  .scroll { overflow: visible; } thead { display: table-header-group; }
}
"""

MOST_ROWS_SHOWN = 40
"""Of a table of compiled kernels; a longer one opens when it is clicked."""


def page(
    run: Run,
    kernel_reports: Sequence[pathlib.Path] = (),
    drawn: Mapping[str, str] | None = None,
) -> str:
    """The whole report.

    Args:
        run: what was measured.
        kernel_reports: JSON files that say what a compiler made of GPU kernels; each has one or
            more lists of rows, which become tables.
        drawn: the run's plots, where they are drawn already; see `plots`.
    """
    if drawn is None:
        drawn = plots(run)
    sections = [
        _section(name, CAPTIONS[name][0], _figure(svg, *CAPTIONS[name]))
        for name, svg in drawn.items()
    ]
    exponents = fits(run.groups)
    if exponents:
        sections.append(_section("exponents", "Exponents", _exponents(exponents)))
    sections += [
        _section("measured", "Everything that was measured", _measured(run.groups)),
        _section("left-out", "Who took no part", _list(left_out_lines(run))),
        _section("kernels", "Compiled GPU kernels", _kernel_reports(kernel_reports)),
        _section("how", "How it was measured", _how(run)),
    ]
    links = [
        *((name, CAPTIONS[name][0]) for name in drawn),
        ("measured", "Measured"),
        ("kernels", "GPU kernels"),
        ("how", "How"),
    ]
    machine = run.machine
    title = f"attn_ext {machine['attn_ext']} on {machine.get('gpu', machine['processor'])}"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(title)}</h1>",
            f"<p>{_text(_machine_line(run))}</p>",
            _tiles(run.groups),
            "<nav>" + " ".join(f'<a href="#{x}">{_text(y)}</a>' for x, y in links) + "</nav>",
            *sections,
            "</body>\n</html>\n",
        ]
    )


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{_text(heading)}</h2>\n{body}\n</section>'


def _figure(svg: str, title: str, caption: str) -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(title)}"', 1)
    return f"<p>{_text(caption)}</p>\n<figure>\n{svg}\n</figure>"


def _machine_line(run: Run) -> str:
    machine = run.machine
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}; "
        f"torch {machine['torch']}, Python {machine['python']}; {run.date}"
    )


def _tiles(groups: Sequence[Group]) -> str:
    """A figure for each kind of work: how many times faster than PyTorch, on average."""
    ratios: dict[str, list[float]] = {}
    for group in groups:
        if group.stock is not None and not group.case.sweep:
            ours = [group.ratio(row, group.stock) for row in group.rows if row.ours]
            if ours:
                ratios.setdefault(group.case.kind, []).append(max(ours))
    tiles = [
        f'<div class="tile" title="{_text(KINDS[kind])}"><b>{geometric_mean(found):.2f}x</b>'
        f"<span>{_text(kind)}, {len(found)} case{'s' * (len(found) > 1)}</span></div>"
        for kind, found in ratios.items()
    ]
    caption = "<p>Times as fast as PyTorch's own choice of kernel, geometric means:</p>"
    return f'{caption}\n<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _measured(groups: Sequence[Group]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in ("case (B, H, L, D)", *COLUMNS))
    bodies = []
    for group in groups:
        rows = []
        for number, row in enumerate(group.rows):
            first = (
                f'<td class="case" rowspan="{len(group.rows)}">{_text(str(group.case))}</td>'
                if number == 0
                else ""
            )
            figures = "".join(f"<td>{_text(cell)}</td>" for cell in cells(group, row))
            rows.append(f'<tr class="{"ours" if row.ours else "other"}">{first}{figures}</tr>')
        bodies.append(f'<tbody class="case">{"".join(rows)}</tbody>')
    return _scrolled(f"<thead><tr>{head}</tr></thead>{''.join(bodies)}")


def _exponents(found: Sequence[Fit]) -> str:
    rows = [
        {
            "side": fit.side,
            "work": f"{fit.kind} {fit.dtype}",
            "grows": f"{fit.quantity} with {NAMES[fit.dimension]}",
            "from": min(fit.points),
            "to": max(fit.points),
            "exponent": round(fit.exponent, 2),
        }
        for fit in found
    ]
    body = f"<details>\n<summary>{len(rows)} fits</summary>\n{_table(rows)}\n</details>"
    return f"<p>quantity = factor · size<sup>exponent</sup>, least squares of logarithms.</p>{body}"


def _kernel_reports(paths: Sequence[pathlib.Path]) -> str:
    if not paths:
        return (
            "<p>Left out: no report of compiled kernels was given. --kernels takes the JSON files "
            "that say what nvcc and Triton made of them.</p>"
        )
    parts = []
    for path in paths:
        found = json.loads(path.read_text())
        tables = {"rows": found} if isinstance(found, list) else found
        about = {name: value for name, value in tables.items() if isinstance(value, (str, int))}
        parts.append(f"<h3>{_text(path.stem.replace('_', ' '))}</h3>")
        parts.append(f"<p>{_text('; '.join(f'{x}: {y}' for x, y in about.items()))}</p>")
        for name, rows in tables.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                summary = f"<summary>{_text(name.replace('_', ' '))}: {len(rows)} rows</summary>"
                state = " open" if len(rows) <= MOST_ROWS_SHOWN else ""
                table = _table([_flat(x) for x in rows])
                parts.append(f"<details{state}>{summary}{table}</details>")
    return "\n".join(parts)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose values can be cells: of a list of dictionaries the first stands for all."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            flat.update(_flat(value[0]))
        elif isinstance(value, dict):
            flat[name] = ", ".join(f"{_cell(y)} {x}" for x, y in value.items())
        else:
            flat[name] = value
    return flat


def _how(run: Run) -> str:
    kinds = {group.case.kind: KINDS[group.case.kind] for group in run.groups}
    return _list(
        [
            f"{run.rounds} rounds a case; in each, every side takes its turn, and every other "
            "round goes backwards, so that what slows the machine slows all sides alike",
            f"{run.limits}; the share is of the roofline, what multiply-adds or memory allow",
            "operations are those of the pairs that nothing hides: 4 D a pair and head forward, "
            "10 D backward; bytes are each input and output once",
            "errors are against PyTorch's own operations in float64; memory is that of a call in a "
            "process beside the timing, at its highest",
            "a backend that would be interpreted or emulated here is left out",
            *(f"{kind}: {text}" for kind, text in kinds.items()),
            f"made by: {run.command}",
        ]
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of any dictionaries; a column for every name that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(_cell(row.get(name)))}</td>" for name in names) + "</tr>"
        for row in rows
    )
    return _scrolled(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)


def _scrolled(table: str) -> str:
    return f'<div class="scroll"><table>{table}</table></div>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _text(value: str) -> str:
    return html.escape(value)
