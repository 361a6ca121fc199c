"""The host's emulator of CUDA (tests/cuda_emulator) on a right kernel and on planted faults.

Each fault is caught by what is meant to catch it; tests/cuda/faults holds the programs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
EMULATOR = TESTS / "cuda_emulator" / "emulator.cpp"
FAULTS = TESTS / "cuda" / "faults"
COMPILE = [*os.environ.get("CXX", "g++").split(), "-std=c++17", "-g", "-fno-strict-aliasing"]
COMPILE += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]

# A build's flags, and what starts its programs: ThreadSanitizer needs addresses that are not random.
BUILDS = {
    "plain": (["-O2"], []),
    "address": (["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], []),
    "thread": (["-O1", "-fsanitize=thread"], ["setarch", "-R"]),
}
RIGHT, WRONG_SUM, EMULATOR_ERROR, ADDRESS_ERROR, DATA_RACE = 0, 1, 2, 99, 66
ORDERS = ["forward", "reverse", "1", "2", "3"]


class Programs:
    """Compiles a program of tests/cuda/faults once for each build, and runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Without sanitizers in every build, as emulator.h asks.
        self.emulator = folder / "emulator.o"
        self.compile("plain", "-c", EMULATOR, "-o", self.emulator).check_returncode()

    def compile(self, build: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*COMPILE, *BUILDS[build][0], *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def skip_without(self, build: str) -> None:
        """Skips where this build of an empty program does not link or does not start."""
        source, program = self.folder / "empty.cpp", self.folder / f"empty_{build}"
        if not program.exists():
            source.write_text("int main() {}\n")
            self.compile(build, source, "-o", program)
        try:
            subprocess.run([*BUILDS[build][1], program], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"{build} build: an empty program does not run here ({error})")

    def run(
        self,
        name: str,
        build: str = "plain",
        order: str = "forward",
        *arguments: str,
        sources: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`sources`: the csrc that the program includes kernels of."""
        self.skip_without(build)
        program = self.folder / f"{name}_{build}"
        includes: list[str | Path] = []
        if sources is not None:
            program = self.folder / f"{name}_{build}_{zlib.crc32(bytes(sources)):x}"
            includes = [f"-I{sources}", f"-I{TESTS / 'cuda_emulator'}"]
        if not program.exists():
            files = [FAULTS / f"{name}.cpp", self.emulator, "-o", program]
            compiled = self.compile(build, *includes, *files)
            assert compiled.returncode == 0, compiled.stderr
        environment = dict(
            os.environ,
            ATTN_EXT_EMULATOR_ORDER=order,
            ASAN_OPTIONS=f"exitcode={ADDRESS_ERROR}:detect_leaks=0",
            TSAN_OPTIONS=f"exitcode={DATA_RACE}",
        )
        return subprocess.run(
            [*BUILDS[build][1], program, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("cuda_emulator"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", BUILDS)
def test_right_kernel(programs: Programs, build: str, order: str) -> None:
    result = programs.run("reduction", build, order, "none", "none")
    assert (result.returncode, result.stdout) == (RIGHT, "")


@pytest.mark.parametrize(
    ("fault", "build", "status", "says"),
    [
        # What is read too early is NaN, whichever warp is first.
        ("missing_barrier_before_read", "plain", WRONG_SUM, "nan, expected"),
        ("missing_barrier_after_read", "plain", WRONG_SUM, "nan, expected"),
        ("missing_wait", "plain", WRONG_SUM, "nan, expected"),
        # Any missing barrier is a race, whatever the order.
        ("missing_barrier_before_read", "thread", DATA_RACE, "data race"),
        ("missing_barrier_after_read", "thread", DATA_RACE, "data race"),
        ("missing_barrier_before_partial_sums", "thread", DATA_RACE, "data race"),
        # The sums are right here and wrong on a GPU, where blocks run at the same time.
        ("racing_blocks", "thread", DATA_RACE, "data race"),
        # A cp.async destination is poisoned until its wait.
        ("missing_wait", "address", ADDRESS_ERROR, "use-after-poison"),
        ("missing_commit", "address", ADDRESS_ERROR, "use-after-poison"),
        ("copy_into_copy", "address", ADDRESS_ERROR, "use-after-poison"),
        # One past the end.
        ("past_shared", "address", ADDRESS_ERROR, "use-after-poison"),
        ("past_shared_by_copy", "plain", EMULATOR_ERROR, "cp.async to byte 4112 of 4112"),
        ("past_global", "address", ADDRESS_ERROR, "heap-buffer-overflow"),
        ("past_global_by_copy", "address", ADDRESS_ERROR, "copy_tile"),  # where it is issued
        # The emulator's own checks.
        ("missing_commit", "plain", EMULATOR_ERROR, "before it has waited for its cp.async copies"),
        ("never_waited", "plain", EMULATOR_ERROR, "before it has waited for its cp.async copies"),
        ("divergent_barrier", "plain", EMULATOR_ERROR, "96 of 128 threads wait in sync_threads"),
        ("missing_lane", "plain", EMULATOR_ERROR, "31 lanes of warp 0 wait in"),
        ("different_operations", "plain", EMULATOR_ERROR, "while another lane of its warp is in"),
        ("odd_threads", "plain", EMULATOR_ERROR, "threads is 129: expected a multiple of 32"),
        ("too_much_shared_memory", "plain", EMULATOR_ERROR, "shared_bytes is 1048576: expected"),
    ],
)
def test_planted_fault(programs: Programs, fault: str, build: str, status: int, says: str) -> None:
    result = programs.run("reduction", build, "forward", fault)
    assert result.returncode == status, result.stdout
    assert says in result.stdout


def test_a_missing_barrier_shows_in_another_order(programs: Programs) -> None:
    """The last warp reads what the others wrote: right as long as it is last."""
    fault = "missing_barrier_before_partial_sums"
    assert programs.run("reduction", "plain", "forward", fault).returncode == RIGHT
    for order in ORDERS[1:]:
        result = programs.run("reduction", "plain", order, fault)
        assert result.returncode == WRONG_SUM, order
        assert "nan, expected" in result.stdout  # not the last block's sums


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("fault", ["past_shared_by_copy", "missing_lane", "different_operations"])
def test_an_error_leaves_the_process_usable(programs: Programs, fault: str, build: str) -> None:
    """Threads that never go on are no error of their own to a sanitizer, nor to the next launch."""
    result = programs.run("reduction", build, "forward", fault, "none")
    assert result.returncode == RIGHT, result.stdout
    assert result.stdout.startswith("block (0, 0, 0), ")


@pytest.mark.parametrize("order", ["sideways", "-1", "0"])
def test_unknown_order(programs: Programs, order: str) -> None:
    result = programs.run("reduction", "plain", order, "none")
    assert (result.returncode, "order: expected" in result.stdout) == (EMULATOR_ERROR, True)


def test_bank_conflicts(programs: Programs) -> None:
    """Extra wavefronts and phases of an ldmatrix of four matrices."""
    assert programs.run("bank_conflicts").stdout.splitlines() == [
        "rows of 128 bytes 28/4",
        "swizzled rows of 128 bytes 0/4",
        "rows of 64 bytes 12/4",
        "rows of 144 bytes 0/4",
        "one row for all lanes 0/4",
    ]


RIGHT_PRODUCTS = [
    "float16 64: right, no bank conflicts",
    "float16 32: right, no bank conflicts",
    "bfloat16 96: right, no bank conflicts",
    "TF32 32: right, no bank conflicts",
    "float32 96: right, no bank conflicts",
]


@pytest.mark.parametrize("order", ORDERS)
def test_products(programs: Programs, order: str) -> None:
    result = programs.run("product", "plain", order, sources=TESTS.parent / "csrc")
    assert result.stdout.splitlines() == RIGHT_PRODUCTS


@pytest.mark.parametrize(
    ("file", "right", "wrong", "says"),
    [
        # The swizzle of tiles in shared memory: the results are right without it.
        ("tile.cuh", "chunk ^ (", "chunk + 0 * (", "right, bank conflicts"),
        # Which rows and chunks the four matrices of a fragment are.
        ("tile.cuh", "row + lane % 16, lane / 16)", "row + lane / 16 * 8 + lane % 8, lane / 8 % 2)", "wrong"),
        ("tile.cuh", "lane % 8 + lane / 16 * 8, lane / 8 % 2)", "lane % 16, lane / 16)", "wrong"),
        # Where float32 is, whose rows the swizzle turns as it does halves'.
        ("tile.cuh", "(chunk % 8 ^ i % 2) * 16", "(chunk % 8) * 16", "wrong"),
        ("tile.cuh", "make(2 * t, g / 4)", "make(2 * t, 0)", "wrong"),
        # Which accumulators become which words of the next product's operand.
        ("tile.cuh", "c[2 * step + i / 2] + i % 2 * 2", "c[2 * step + i % 2] + i / 2 * 2", "wrong"),
        ("tile.cuh", "c[step][i % 2 * 2 + i / 2]", "c[step][i]", "wrong"),
        # Where mma has the elements of C, and ldmatrix the halves of a transposed matrix.
        ("primitives.cuh", "out[first_lane + i].c", "out[first_lane + 3 - i].c", "wrong"),
        ("primitives.cuh", "column = kTransposed ? g", "column = kTransposed ? 7 - g", "wrong"),
    ],
)  # fmt: skip
def test_fault_planted_in_the_kernels(
    programs: Programs, tmp_path: Path, file: str, right: str, wrong: str, says: str
) -> None:
    """A lost swizzle, and fragments that lie otherwise than the PTX ISA has them."""
    sources = tmp_path / "csrc"
    shutil.copytree(TESTS.parent / "csrc", sources)
    text = (sources / "cuda" / file).read_text()
    assert text.count(right) == 1
    (sources / "cuda" / file).write_text(text.replace(right, wrong))
    lines = programs.run("product", sources=sources).stdout.splitlines()
    assert len(lines) == len(RIGHT_PRODUCTS)
    assert any(line.split(": ")[1].startswith(says) for line in lines), lines
