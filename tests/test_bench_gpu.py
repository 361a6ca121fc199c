"""What `make gpu` measures and writes, without a GPU: the same code, on CPU tensors."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import attn_ext
from bench import gpu, gpu_rows
from bench.gpu_rows import Measured, Row, all_rows, measure, sides

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = (1, 2, 24, 16)


def test_rows_cover_every_dtype_kind_and_pass() -> None:
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    for field, values in {
        "dtype": gpu_rows.DTYPES,
        "kind": gpu_rows.KINDS,
        "direction": gpu_rows.PASSES,
        "shape": (*gpu_rows.SHAPES, gpu_rows.MASKED_SHAPE),
    }.items():
        assert {getattr(row, field) for row in rows} == set(values)


@pytest.mark.parametrize("row", all_rows([TINY], TINY), ids=lambda row: row.name)
def test_sides_compute_the_same(row: Row) -> None:
    """Whatever is compared in time must be the same problem."""
    if row.kind == "dropout 0.1":
        pytest.skip("every side draws its own")
    torch.manual_seed(3)
    functions = {
        name: function
        for name, function in sides(row, CPU)
        if name in ("attn_ext cpu", "SDPA flash", "SDPA math")
    }
    results = {name: function() for name, function in functions.items()}
    assert len(results) == 3
    tolerance = 8 * torch.finfo(row.dtype).eps
    for result in results.values():
        torch.testing.assert_close(result, results["SDPA math"], atol=tolerance, rtol=tolerance)
    if row.direction == "forward":
        assert all(isinstance(x, torch.Tensor) for x in results.values())
    else:
        assert all(len(x) == 3 for x in results.values())


def test_flops() -> None:
    row = Row((2, 3, 5, 7), torch.float16, "full", "forward")
    assert row.flops == 2 * 2 * (2 * 3 * 5 * 5 * 7)
    causal = Row((2, 3, 5, 7), torch.float16, "causal", "forward and backward")
    assert causal.flops == 2 * 7 * (2 * 3 * 15 * 7)


def test_a_row_is_measured_and_what_can_not_run_says_why() -> None:
    row = Row(TINY, torch.float32, "full", "forward")
    found = measure(row, CPU, rounds=2, burst=0.0)
    assert found.milliseconds.keys() >= {"attn_ext cpu", "SDPA math"}
    assert all(x > 0 for x in found.milliseconds.values())
    assert "SDPA cudnn" in found.refusals
    assert found.refusals.keys().isdisjoint(found.milliseconds)
    written = json.loads(json.dumps(found.as_dictionary()))
    assert (written["shape"], written["dtype"]) == (list(TINY), "float32")
    assert written["milliseconds"].keys() == written["teraflops_per_second"].keys()


def test_out_of_memory_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    one: tuple[str, Callable[[], object]] = ("SDPA math", too_large)
    monkeypatch.setattr(gpu_rows, "sides", lambda row, device: iter([one]))
    found = measure(Row(TINY, torch.float32, "full", "forward"), CPU, 1, 0.0)
    assert found.refusals == {"SDPA math": "CUDA out of memory."}
    assert found.milliseconds == {}
    assert found.speedup is None


def test_speedup_is_between_the_fastest() -> None:
    times = {"attn_ext cuda": 2.0, "attn_ext triton": 1.0, "SDPA flash": 1.5, "SDPA math": 9.0}
    row = Row((1, 1, 1000, 1000), torch.float16, "full", "forward")
    found = Measured(row, times, {})
    assert found.speedup == 1.5
    # 4e9 operations in a millisecond.
    assert found.as_dictionary()["teraflops_per_second"]["attn_ext triton"] == 4.0


def test_counts_of_a_report(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_none(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        f"--junitxml={report}",
        str(tmp_path),
    ]
    subprocess.run(command, check=False, capture_output=True, cwd=tmp_path)
    found = gpu.counts_of(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [x.rpartition("::")[2] for x in found["failures"]] == ["test_bad", "test_error"]


def test_failures() -> None:
    fine = {
        "tests": {"exit_code": 0},
        "sanitizers": {"memcheck": {"exit_code": 0}, "racecheck": None},
    }
    assert gpu.failures(fine) == []
    assert gpu.failures({"timings": []}) == []
    bad = {"tests": {"exit_code": 1}, "sanitizers": {"memcheck": {"exit_code": 99}}}
    assert gpu.failures(bad) == ["tests", "memcheck"]


def test_kernels_are_found_by_name() -> None:
    names = gpu.kernel_names()
    assert names[0] == "attn_ext"
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"\w+", name) for name in names)


def test_timings_from_end_to_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(TINY, torch.float32, kind, "forward") for kind in ("full", "causal")]
    monkeypatch.setattr(gpu, "all_rows", lambda: rows)
    output = tmp_path / "new folder" / "result.json"
    gpu.main(["--device", "cpu", "--only", "timings", "--rounds", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [row["kind"] for row in result["timings"]] == ["full", "causal"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["attn_ext"] == attn_ext.__version__
    assert "send this file as a pull request" in " ".join(capsys.readouterr().out.split())


def test_a_name_fit_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3/MIG 1g"
    )
    assert gpu.file_name(torch.device("cuda")) == "NVIDIA_H100_80GB_HBM3_MIG_1g.json"
    assert gpu.file_name(CPU) == "cpu.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_an_error() -> None:
    with pytest.raises(SystemExit, match="finds no GPU"):
        gpu.main([])
