"""The HTML report in a real browser: every plot is drawn, nothing is fetched, and it prints."""

from __future__ import annotations

import html
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_run import example_run

from attn_ext import cli
from attn_ext.benchmark import page, plots

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
PLOTS = [
    "speedup", "time", "gflops", "memory", "error", "roofline", "scaling-time", "scaling-memory",
]  # fmt: skip
LOOK = """
<pre id="seen"></pre>
<script>
const drawn = shape => { const box = shape.getBoundingClientRect(); return box.width + box.height > 2; };
const seen = {plots: {}, fetched: performance.getEntriesByType("resource").length,
              width: document.documentElement.scrollWidth, window: window.innerWidth};
for (const svg of document.querySelectorAll("section > figure > svg")) {
  const box = svg.getBoundingClientRect();
  const shapes = [...svg.querySelectorAll("path, use, rect")].filter(drawn);
  const words = [...svg.querySelectorAll("text")].filter(drawn);
  const inside = words.every(x => x.getBoundingClientRect().right <= box.right + 2);
  seen.plots[svg.closest("section").id] = {width: box.width, height: box.height,
    shapes: shapes.length, words: words.length, inside: inside,
    ours: [...svg.querySelectorAll("*")].filter(x => x.style.fill == "rgb(209, 73, 91)"
      || x.style.stroke == "rgb(209, 73, 91)").filter(drawn).length};
}
document.getElementById("seen").textContent = JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return plots.plots(example_run())


@pytest.fixture(scope="module")
def report(drawn: dict[str, str]) -> str:
    return page.page(example_run(), drawn=drawn)


def browse(path: pathlib.Path, *options: str) -> str:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={path.parent / 'profile'}", "--window-size=1200,900", *options,
        path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@needs_browser
def test_every_plot_is_drawn(report: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.replace("</body>", f"{LOOK}</body>"))
    text = browse(path, "--dump-dom")
    match = re.search(r'<pre id="seen">(.*?)</pre>', text, re.S)
    assert match is not None
    seen = json.loads(html.unescape(match[1]))
    assert list(seen["plots"]) == PLOTS
    for name, plot in seen["plots"].items():
        assert plot["width"] > 500, name
        assert plot["height"] > 150, name
        assert plot["shapes"] > 15, name
        assert plot["words"] > 8, name
        assert plot["ours"] > 0, name
        assert plot["inside"], name
    assert seen["fetched"] == 0
    assert seen["width"] <= seen["window"]


@needs_browser
def test_it_prints(report: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report)
    browse(path, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) in range(4, 25)


def test_the_browser_test_can_fail(report: str) -> None:
    """What it looks for is in the plots alone: without them it finds nothing."""
    without = re.sub(r"<figure>.*?</figure>", "", report, flags=re.S)
    assert "<svg" in report
    assert "<svg" not in without


def test_no_address_is_fetched(report: str) -> None:
    assert not re.search(r'(?:src|href)\s*=\s*"(?!#)', re.sub(r'xlink:href="#', "", report))
    assert "@import" not in report
    assert "url(http" not in report


def test_text_is_escaped(report: str) -> None:
    assert "attn-ext bench &lt;&amp;&gt;" in report


def test_the_same_run_gives_the_same_page(report: str) -> None:
    assert page.page(example_run()) == report


def test_kernel_reports_become_tables(
    drawn: dict[str, str], report: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "cuda_report.json"
    kernels = [
        {
            "kernel": "forward <64>",
            "registers": 168,
            "main_loops": [{"mix": {"HMMA": 32, "MUFU": 8}}],
        },
        {"kernel": "backward", "registers": 255, "met": True},
    ]
    path.write_text(json.dumps({"nvcc": "13.0", "kernels": kernels, "empty": []}))
    text = page.page(example_run(), [path], drawn)
    section = text[text.index('<section id="kernels">') :]
    for part in (
        "cuda report",
        "nvcc: 13.0",
        "forward &lt;64&gt;",
        "168",
        "32 HMMA, 8 MUFU",
        "yes",
    ):
        assert part in section
    assert "Left out: no report of compiled kernels" not in text
    assert "Left out: no report of compiled kernels" in report


def test_the_command_draws_from_json(
    drawn: dict[str, str],
    report: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, written, svg = (tmp_path / name for name in ("run.json", "page.html", "plot.svg"))
    example_run().write(source)
    arguments = [
        "bench",
        "--from",
        str(source),
        "--report",
        str(written),
        "--svg",
        "gflops",
        str(svg),
    ]
    assert cli.main(arguments) == 0
    assert written.read_text() == report
    assert svg.read_text() == plots.standalone(drawn["gflops"])
    text = capsys.readouterr().out
    assert "time and memory grow with these powers" in text
    assert "flash-attn: it is not installed" in text


def test_an_unknown_plot_is_refused(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "run.json"
    example_run().write(source)
    with pytest.raises(SystemExit, match=r"--svg must name one of speedup, .*, got 'pie'"):
        cli.main(["bench", "--from", str(source), "--svg", "pie", str(tmp_path / "x.svg")])


def test_measured_from_end_to_end(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run.json"
    arguments = [
        "bench",
        "--shapes",
        "1,2,33,16",
        "--rounds",
        "1",
        "--no-memory",
        "--json",
        str(output),
    ]
    arguments += ["--backend", "cpu", "--peer", "PyTorch", "--kind", "forward", "backward"]
    assert cli.main(arguments) == 0
    groups = json.loads(output.read_text())["groups"]
    assert [group["case"]["kind"] for group in groups] == ["forward", "backward"]
    for group in groups:
        assert [row["side"] for row in group["rows"]] == ["attn_ext cpu", "PyTorch"]
        assert all(row["figures"]["max_error"] < 1e-4 for row in group["rows"])
    assert "forward (1, 2, 33, 16) float32" in capsys.readouterr().out


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench"]) == 1
    assert "rich and matplotlib: pip install 'attn-ext[bench]'" in capsys.readouterr().err
