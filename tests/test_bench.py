"""bench/ counts work right, selects rows, judges targets and draws them; no timing is tested."""

from __future__ import annotations

import io
import json
import math
import pathlib
import shutil

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from attn_ext.backends import cpu
from attn_ext.benchmark import peak
from attn_ext.benchmark.cases import flops, key_value_bytes, padding_mask
from attn_ext.benchmark.measure import alternate, timed
from bench import cpu as bench_cpu
from bench.cpu import QUANTITIES, Outcome, Result, Round
from bench.cpu_rows import Row, Work, all_rows

ROWS = all_rows()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMITS = peak.Peaks(threads=2, float32=480.0, float32_avx2=240.0, bfloat16=None, memory=47.0)


@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_every_pair_that_is_needed(causal: bool) -> None:
    batch, heads, length, head_dim = shape = (2, 3, 5, 7)
    pairs = sum(1 for i in range(length) for j in range(length) if j <= i or not causal)
    multiply_adds = batch * heads * pairs * head_dim
    assert flops(shape, 2, causal) == 2 * 2 * multiply_adds
    assert flops(shape, 5, causal) == 5 * 2 * multiply_adds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_keys_and_values(dtype: torch.dtype) -> None:
    key, value = torch.empty(2, 3, 5, 7, dtype=dtype)
    assert key_value_bytes(3, 5, 7, dtype) == key.nbytes + value.nbytes


def test_padding_mask_hides_keys_at_the_end() -> None:
    assert padding_mask(2, 20, 0.1)[:, 0, 0].tolist() == [[True] * 18 + [False] * 2] * 2
    assert padding_mask(3, 7, 0.0).all()


def test_rows_have_names_of_their_own_and_known_targets() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.targets
        assert row.targets.keys() <= QUANTITIES.keys()
        assert (row.peak is not None) >= ("percent of peak" in row.targets), row.name


def test_selection() -> None:
    def names(*patterns: str) -> list[str]:
        return [row.name for row in bench_cpu.selected(ROWS, patterns)]

    assert names() == [row.name for row in ROWS]
    assert {row.group for row in bench_cpu.selected(ROWS, ["decode"])} == {"decode"}
    assert names(ROWS[-1].name) == [ROWS[-1].name]
    assert names("overhead", "bfloat16, causal") == [
        row.name for row in ROWS if row.group == "overhead" or "bfloat16, causal" in row.name
    ]
    assert names("no such row") == []


def test_list_prints_names(capsys: pytest.CaptureFixture[str]) -> None:
    bench_cpu.main(["--list", "--only", "overhead"])
    assert capsys.readouterr().out.splitlines() == [
        f"overhead: {row.name}" for row in ROWS if row.group == "overhead"
    ]


def test_no_row_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no such row"):
        bench_cpu.main(["--only", "no such row"])


def test_sides_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    sides = [lambda: side("a"), lambda: side("b"), lambda: side("c")]
    assert alternate(sides, 3, rest=0) == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert "".join(order) == "abccbaabc"


def test_timed_calls_and_gives_seconds() -> None:
    calls: list[int] = []
    seconds = timed(lambda: calls.append(0), burst=0.0)
    before = len(calls)
    assert seconds() > 0
    assert len(calls) == before + 1


def row_of(work: Work, **targets: float) -> Row:
    names = {name.replace("_", " "): bound for name, bound in targets.items()}
    return Row("group", "some work", names, lambda: work, peak="float32")


def test_a_figure_is_the_median_of_the_rounds_figures() -> None:
    row = row_of(
        Work(lambda: None, lambda: None),
        speedup=2.5,
        percent_of_peak=50,
        relative_time=1.0,
        extra_microseconds=5,
    )
    # Seconds and rates: what slows a round as a whole changes no figure.
    rounds = [Round(1e-6 * x, 2e-6 * x, 3e9 / x, 4e9 / x) for x in (1, 10, 2)]
    result = bench_cpu.summary(row, rounds)
    measured = {x.quantity: x.measured for x in result.outcomes}
    assert measured == {
        "speedup": 2.0,
        "percent of peak": 75.0,
        "relative time": 0.5,
        "extra microseconds": -2.0,
    }
    assert [x.met for x in result.outcomes] == [False, True, True, True]
    assert (result.ours_ms, result.theirs_ms, result.peak) == (0.002, 0.004, 2.0)


def test_no_peak_is_no_verdict() -> None:
    row = row_of(Work(lambda: None, lambda: None), percent_of_peak=50)
    (outcome,) = bench_cpu.summary(row, [Round(1.0, 1.0, 1.0, math.nan)]).outcomes
    assert outcome.measured is None
    assert outcome.met is None


def test_an_instruction_set_that_is_not_there_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "capabilities", lambda: {"avx2": False})
    result = bench_cpu.measure_in_subprocess(ROWS[-1], 1)
    assert [x.met for x in result.outcomes] == [None]


def test_table_and_report() -> None:
    results = [
        Result("a", "some work", 1.0, 2.0, 480.0, [Outcome("speedup", 2.5, 2.0)]),
        Result("b", "other work", 1.0, 1.0, None, [Outcome("relative time", 1.1, 1.0)]),
        Result("b", "work elsewhere", None, None, None, [Outcome("percent of peak", 85.0, None)]),
    ]
    output = io.StringIO()
    Console(file=output, width=120).print(bench_cpu.table_of(results))
    lines = [line.split("│") for line in output.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in line[1:-1]] for line in lines] == [
        ["some work", "1.000", "2.000", "≥ 2.50x", "2.00x", "missed"],
        ["other work", "1.000", "1.000", "≤ 1.10 of the time", "1.00 of the time", "met"],
        ["work elsewhere", "-", "-", "≥ 85.0 % of peak", "-", "not here"],
    ]
    written = json.loads(json.dumps(bench_cpu.report(results, LIMITS, 15, ["--only", "a b"])))
    assert written["command"] == "python -m bench.cpu --only 'a b'"
    assert [bench_cpu.as_result(row) for row in written["rows"]] == results
    assert written["threads"] == 2
    assert written["torch"] == torch.__version__
    assert written["rows"][0]["outcomes"][0]["met"] is False


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_positive(threads: int) -> None:
    for name in peak.FUNCTIONS:
        rate = peak.multiply_add_rate(name, threads, iterations=10, bursts=1)
        sustained = peak.sustained_rate(name, threads, seconds=0)
        assert (rate is None) == (sustained is None)
        assert rate is None or rate > 0
    assert peak.read_rate(threads, read_bytes=2**16, reads=1) > 0


@needs_compiler
def test_measured_from_end_to_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    row = row_of(Work(lambda: x + x, lambda: x * x, 3.0), speedup=1.0, percent_of_peak=0.0)
    monkeypatch.setattr(bench_cpu, "all_rows", lambda: [row])
    monkeypatch.setattr(bench_cpu, "peaks", lambda threads: LIMITS)
    output = tmp_path / "new folder" / "targets.json"
    bench_cpu.main(["--rounds", "1", "--output", str(output)])
    (found,) = json.loads(output.read_text())["rows"]
    assert found["work"] == "some work"
    assert found["ours_ms"] > 0
    assert found["outcomes"][0]["measured"] > 0
