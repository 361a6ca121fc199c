"""The CPU backend as a citizen of its process: OpenMP, threads, the GIL, forks, instruction sets."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, Sizes, make_inputs
from test_contract import assert_contract

import attn_ext
from attn_ext import processor
from attn_ext.backends import cpu, native, reference
from attn_ext.problem import Problem


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


LARGE = (1, 4, 700, 64)
PRESENT = [name for name, there in cpu.capabilities().items() if there]
AMX = next((name for name in PRESENT if name.startswith("amx")), None)
needs_amx = pytest.mark.skipif(AMX is None, reason="this processor has no AMX")


def test_one_openmp_library_and_pool() -> None:
    code = f"""
import os, torch, attn_ext
torch.set_num_threads(2)
def threads():
    return len(os.listdir("/proc/self/task"))
a = torch.randn(1000, 1000)
(a @ a).exp().sum()
before = threads()
x = torch.randn{LARGE}
attn_ext.attention(x, x, x)
assert threads() == before, (before, threads())
libraries = {{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}}
assert len(libraries) == 1, libraries
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_thread_count_follows_torch_and_the_work() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cpu.num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [cpu._cpu.threads_for(8, flops) for flops in (0.0, 1e4, 1e7, 1e9)] == [1, 1, 5, 8]


def test_set_num_threads_is_honoured_by_the_next_call() -> None:
    """With one thread, no other thread of the process gains processor time."""
    code = f"""
import os, torch, attn_ext
x = torch.randn{LARGE}
def others():
    own = str(os.getpid())
    times = {{}}
    for task in os.listdir("/proc/self/task"):
        if task != own:
            fields = open(f"/proc/self/task/{{task}}/stat").read().rsplit(")", 1)[1].split()
            times[task] = int(fields[11]) + int(fields[12])
    return sum(times.values())
attn_ext.attention(x, x, x)
torch.set_num_threads(1)
import time; time.sleep(0.3)
before = others()
for _ in range(20):
    attn_ext.attention(x, x, x)
assert others() - before <= 1, (before, others())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_results_do_not_depend_on_the_thread_count() -> None:
    x = torch.randn(1, 3, 300, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attn_ext.attention(x, x, x, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_from_several_threads() -> None:
    inputs = [torch.randn(1, 4, 200 + 7 * i, 32, requires_grad=True) for i in range(12)]

    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = attn_ext.attention(x, x, x, causal=True)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for actual, (out, grad) in zip(pool.map(work, inputs), expected, strict=True):
            torch.testing.assert_close(actual[0], out)
            torch.testing.assert_close(actual[1], grad)


def test_the_gil_is_released_while_a_kernel_runs() -> None:
    x = torch.randn(1, 8, 3000, 64)
    attn_ext.attention(x, x, x)
    stop, ticks = threading.Event(), []

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    attn_ext.attention(x, x, x)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < tick < end for tick in ticks) >= 3


def test_a_forked_child_works() -> None:
    """With a second thread it would hang in GNU OpenMP."""
    code = f"""
import os, sys, torch, attn_ext
from attn_ext.backends import cpu
torch.set_num_threads(2)
x = torch.randn{LARGE}
expected = attn_ext.attention(x, x, x)
child = os.fork()
if child == 0:
    assert cpu.num_threads() == 1
    out = attn_ext.attention(x, x, x)
    torch.set_num_threads(1)  # torch's own operations would hang
    os._exit(0 if bool((out - expected).abs().max() < 1e-6) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", list(cpu.capabilities()))
def test_environment_variable(name: str) -> None:
    code = "import torch, attn_ext; from attn_ext.backends import cpu; print(cpu.capability); attn_ext.attention(*[torch.zeros(1, 1, 2, 3)] * 3)"
    result = run_python(code, ATTN_EXT_CPU_CAPABILITY=name)
    if cpu.capabilities()[name]:
        assert result.stdout.strip() == name
    else:
        assert "which this machine does not have" in result.stderr


def test_unknown_instruction_set() -> None:
    result = run_python("import attn_ext.backends.cpu", ATTN_EXT_CPU_CAPABILITY="avx1024")
    assert "ATTN_EXT_CPU_CAPABILITY must be one of" in result.stderr
    assert "'avx1024'" in result.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has AMX")
@pytest.mark.skipif("amx_emulated" in cpu.capabilities(), reason="AMX is emulated in this build")
def test_the_module_contains_amx() -> None:
    """All that can be seen of its instructions on a processor without them."""
    listing = subprocess.run(
        ["objdump", "--disassemble", cpu._cpu.__file__], capture_output=True, text=True, check=True
    ).stdout
    for name in ("ldtilecfg", "tilezero", "tileloadd", "tilestored", "tdpbf16ps", "tilerelease"):
        assert re.search(rf"\t{name}\b", listing), name
    # Of two by two tiles: B in registers 6 and 7, A in 4 and 5, and the four sums.
    products = re.findall(r"tdpbf16ps +%tmm(\d),%tmm(\d),%tmm(\d)", listing)
    assert {tuple("640"), tuple("741"), tuple("652"), tuple("753")} <= set(products)
    # B of two by two tiles in 4 to 7, A in 3, and two sums.
    assert {tuple("430"), tuple("531"), tuple("630"), tuple("731")} <= set(products)


def guarded(values: torch.Tensor) -> tuple[torch.Tensor, object]:
    """The same numbers at the very end of a page, before one that must not be read."""
    page = mmap.PAGESIZE
    size = values.numel() * values.element_size()
    pages = (size + page - 1) // page
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    flat = torch.frombuffer(
        memory, dtype=values.dtype, count=values.numel(), offset=pages * page - size
    )
    return flat.copy_(values.flatten()).view(values.shape), (memory, libc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 5, 16, 17, 40, 64])
@pytest.mark.parametrize("length", [1, 3, 13])
@pytest.mark.parametrize(
    "capability", [name for name, there in cpu.capabilities().items() if there]
)
def test_nothing_is_read_past_the_end(
    capability: str,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read beyond any input would end the process."""
    monkeypatch.setattr(cpu, "capability", capability)
    kept = []

    def make(*shape: int) -> torch.Tensor:
        tensor, memory = guarded(torch.randn(shape).to(dtype))
        kept.append(memory)
        return tensor

    query, key, value = make(1, 2, length, head_dim), make(1, 2, 70, head_dim), make(1, 2, 70, 3)
    mask, padding = make(length, 70), make(1, 70)
    out, lse = attn_ext.attention(query, key, value, attn_mask=mask, key_padding_mask=padding, return_lse=True)  # fmt: skip
    problem = Problem.build(query, key, value, attn_mask=mask, key_padding_mask=padding)
    dout, weights = make(1, 2, length, 3), make(1, length, 70)
    out = guarded(out)[0]
    grads = cpu.backward(problem, out, lse, dout, None, True)
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)
    more = cpu.weights_backward(problem, lse, weights, True, True)
    assert all(torch.isfinite(grad).all() for grad in more if grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 17, 31, 33])
@pytest.mark.parametrize(
    "capability", [name for name, there in cpu.capabilities().items() if there]
)
def test_nothing_is_written_beside_a_row(
    capability: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are columns of wider tensors, whose others keep what they hold."""
    monkeypatch.setattr(cpu, "capability", capability)
    made = []

    def wider(like: torch.Tensor, columns: int | None = None) -> torch.Tensor:
        shape = (*like.shape[:3], (columns or like.shape[3]) + 40)
        made.append(torch.full(shape, 7.0, dtype=like.dtype))
        return made[-1][..., : shape[3] - 40]

    monkeypatch.setattr(native, "empty_in_layout_of", wider)
    for length in (3, 20):
        query, key, value, dout = (torch.randn(1, 2, length, width).to(dtype) for _ in range(4))
        problem = Problem.build(query, key, value)
        out, lse = cpu.forward(problem)
        grads = cpu.backward(problem, out, lse, dout, None, False)
        assert len(made) == 4
        expected = reference.forward(Problem.build(*(x.double() for x in (query, key, value))))[0]
        torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
        assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)
        assert all((x[..., width:] == 7).all() for x in made)
        made.clear()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_beyond_inputs_and_outputs(dtype: str) -> None:
    """Forward and backward at 4096 keys: an (L, L) float tensor alone would be 64 MiB."""
    code = f"""
import torch, attn_ext
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def run(length):
    x = [torch.randn(1, 1, length, 64, dtype=torch.{dtype}, requires_grad=True) for _ in range(3)]
    attn_ext.attention(*x, causal=True).sum().backward()
    attn_ext.attention(*(each.detach() for each in x))
run(256)
before = peak()
run(4096)
print(peak() - before)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    inputs_and_outputs = 9 * 4096 * 64 * 4 // 1024
    assert int(result.stdout) < inputs_and_outputs + 32 * 1024


@pytest.mark.parametrize("query_length", [1, 40, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_split_where_there_are_fewer_blocks_than_threads(
    query_length: int, dtype: torch.dtype
) -> None:
    query = torch.randn(1, 1, query_length, 64, dtype=dtype)
    key, value = (torch.randn(1, 1, 20000, 64, dtype=dtype) for _ in range(2))
    sinks = torch.ones(1)
    options = {"sinks": sinks, "window": (19000, None), "causal": "lower_right"}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 12):
            torch.set_num_threads(threads)
            out, lse = attn_ext.attention(query, key, value, return_lse=True, **options)
            results.append((out, attn_ext.attention(query, key, value, **options), lse))
    finally:
        torch.set_num_threads(before)
    for one, *split in zip(*results, strict=True):
        tolerance = 1e-4 if one.dtype is torch.float32 and dtype is not torch.bfloat16 else 1e-2
        for other in split:
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance / 10)


FLOAT16_OPTIONS = {
    "plain": lambda s: {},
    "causal": lambda s: {"causal": True},
    "steep": lambda s: {"scale": 2.0},
    "window, sinks": lambda s: {"window": (100, 30), "sinks": torch.randn(s.query_heads)},
    "padding": lambda s: {"key_padding_mask": torch.rand(s.batch, s.key_length) < 0.7},
    "mask": lambda s: {
        "attn_mask": torch.randn(s.query_length, s.key_length).masked_fill(
            torch.rand(s.query_length, s.key_length) < 0.2, -torch.inf
        )
    },
    "dropout": lambda s: {"dropout_p": 0.3, "seed": 7},
}
FLOAT16_SIZES = {
    "whole tiles": Sizes(1, 2, 2, 256, 128, 64, 64),
    "rests": Sizes(2, 2, 1, 131, 77, 33, 17),
    "wide": Sizes(1, 1, 1, 300, 200, 128, 96),
    "few keys": Sizes(1, 1, 1, 300, 33, 24, 3),
    "no value_dim": Sizes(1, 1, 1, 300, 70, 24, 0),
}


def is_in_planes(
    monkeypatch: pytest.MonkeyPatch, *tensors: torch.Tensor, **options: object
) -> bool:
    """Whether AMX multiplies float16: without it the output has other last bits."""
    results = []
    for name in (AMX, "avx512"):
        monkeypatch.setattr(cpu, "capability", name)
        with torch.no_grad():  # a gradient would need LSE
            results.append(attn_ext.attention(*tensors, **options))
    return not torch.allclose(*results, 0, 0, equal_nan=True)


@needs_amx
@pytest.mark.parametrize("sizes", FLOAT16_SIZES.values(), ids=FLOAT16_SIZES)
@pytest.mark.parametrize("options", FLOAT16_OPTIONS.values(), ids=FLOAT16_OPTIONS)
def test_float16_in_planes(
    options: Callable[[Sizes], dict[str, object]], sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "capability", AMX)
    inputs = make_inputs(Case("", options, sizes), torch.float16)
    assert_contract(inputs, torch.float16, "cpu", average=False)
    if sizes.value_dim > 0:
        assert is_in_planes(monkeypatch, inputs.query, inputs.key, inputs.value)


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16)


@needs_amx
def test_which_float16_is_in_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What many rows see, of finite numbers, where no LSE is asked for."""

    def used(*tensors: torch.Tensor, **options: object) -> bool:
        return is_in_planes(monkeypatch, *tensors, **options)

    key, value = halves(2, 2, 90, 64), halves(2, 2, 90, 64)
    assert used(halves(2, 2, 256, 64), key, value)
    assert used(halves(2, 8, 64, 64), key, value)
    assert not used(halves(2, 2, 255, 64), key, value)
    assert not used(halves(2, 2, 256, 64), key[:, :, :31], value[:, :, :31])
    assert not used(halves(2, 2, 256, 64), key, value, window=(10, 10))
    assert not used(halves(2, 2, 256, 64), key[:1].expand(2, 2, 90, 64), value)
    assert not used(halves(2, 2, 256, 64), key, value[:, :1].expand(2, 2, 90, 64))
    for place, bad in itertools.product(range(3), (torch.nan, torch.inf, -torch.inf)):
        tensors = [halves(2, 2, length, 64) for length in (256, 90, 90)]
        tensors[place][0, 1, -1, -1] = bad
        assert not used(*tensors)


@needs_amx
def test_weights_of_large_scores_are_of_their_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """LSE and weights sum scores in one order: they would differ by more than a weight's rounding."""
    monkeypatch.setattr(cpu, "capability", AMX)
    query, key = 60 * halves(1, 2, 256, 64), 60 * halves(1, 2, 150, 64)
    weights = attn_ext.attention_weights(query, key, causal=True, average=False)
    torch.testing.assert_close(weights[:, :, 0, 0], torch.ones(1, 2, dtype=torch.float16))
    sums = weights.float().sum(3)
    torch.testing.assert_close(sums, torch.ones(1, 2, 256), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_against_uninitialised_slots(dtype: torch.dtype) -> None:
    query = torch.randn(2, 4, 1, 32, dtype=dtype)
    key, value = (torch.randn(2, 2, 900, 32, dtype=dtype) for _ in range(2))
    padding = torch.arange(900) < torch.tensor([[700], [500]])
    expected = attn_ext.attention(query, key, value, key_padding_mask=padding)
    for tensor in (key, value):
        tensor.transpose(1, 2)[~padding] = float("nan")
    torch.testing.assert_close(
        attn_ext.attention(query, key, value, key_padding_mask=padding), expected
    )


def test_one_kernel_decodes_whatever_else_is_asked() -> None:
    """LSE, a gradient or a traced graph do not lead to another one, whose last bits would differ."""
    query = torch.randn(2, 4, 1, 64)
    key, value = (torch.randn(2, 2, 900, 64) for _ in range(2))
    decoded = attn_ext.attention(query, key, value)
    traced = torch.compile(attn_ext.attention, backend="aot_eager")(query, key, value)
    with_lse, _ = attn_ext.attention(query, key, value, return_lse=True)
    recorded = attn_ext.attention(query.requires_grad_(), key, value)
    for out in (traced, with_lse, recorded):
        torch.testing.assert_close(out, decoded, rtol=0, atol=0)


@pytest.mark.parametrize("query_length", [1, 60])
def test_lse_of_a_row_with_nan(query_length: int) -> None:
    query, key, value = (torch.randn(1, 2, n, 40) for n in (query_length, 70, 70))
    query[0, 1, 0, 3] = float("nan")
    _, lse = attn_ext.attention(query, key, value, return_lse=True)
    assert lse.isnan().nonzero().tolist() == [[0, 1, 0]]
    query[0, 1, 0, 3] = 0
    seen_by_none = torch.zeros(query_length, 70, dtype=torch.bool)
    _, lse = attn_ext.attention(query, key, value, attn_mask=seen_by_none, return_lse=True)
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("query_length", [1, 1000])
def test_without_query_heads(query_length: int) -> None:
    query, key = torch.zeros(1, 0, query_length, 64), torch.zeros(1, 2, 600, 64)
    assert attn_ext.attention(query, key, key).shape == query.shape
    assert attn_ext.attention_weights(query, key, average=True).isnan().all()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("threads", "key_length"), [(1, 700), (40, 700), (1, 8193)])
def test_output_and_weights_in_one_pass_or_two(
    threads: int, key_length: int, average: bool
) -> None:
    """Two where there are blocks for too few threads, which then share keys, and where keys are many."""
    query = torch.randn(1, 4, 100, 32)
    key, value = (torch.randn(1, 4, key_length, 32) for _ in range(2))
    options = {"causal": "lower_right", "average": average}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = attn_ext.attention_and_weights(query, key, value, **options)
    finally:
        torch.set_num_threads(before)
    tensors = (x.double() for x in (query, key, value))
    expected = attn_ext.attention_and_weights(*tensors, **options, backend="reference")
    for one, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_few_rows_from_parts_of_the_keys(dtype: torch.dtype, average: bool) -> None:
    """Of the output, of LSE and of the weights, also with masks that heads or keys share; and the weights."""
    query = torch.randn(2, 4, 2, 40, dtype=dtype)
    key, value = (torch.randn(2, 2, 3000, 40, dtype=dtype) for _ in range(2))
    masks = [torch.randn(1, 1, 2, 3000, dtype=dtype), torch.randn(2, 4, 2, 1, dtype=dtype)]
    leaves = [x.requires_grad_() for x in (query, key, value, *masks)]
    dout, dweights = torch.randn(2, 4, 2, 40), torch.randn(2, 1 if average else 4, 2, 3000)

    def results(attn_mask: torch.Tensor | None) -> list[torch.Tensor]:
        options = {"attn_mask": attn_mask, "window": (2500, None), "causal": "lower_right"}
        out, lse = attn_ext.attention(query, key, value, return_lse=True, **options)
        weights = attn_ext.attention_weights(query, key, average=average, **options)
        weights = weights.unsqueeze(1) if average else weights
        loss = (out * dout).sum() + lse.square().sum() + (weights * dweights).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [out, lse, weights, *(x for x in grads if x is not None)]

    def all_results() -> list[torch.Tensor]:
        return [tensor for mask in (None, *masks) for tensor in results(mask)]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(all_results())
    finally:
        torch.set_num_threads(before)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for one, split in zip(*found, strict=True):
        torch.testing.assert_close(split, one, rtol=tolerance, atol=tolerance / 10)
    with attn_ext.use_backend("reference"):
        expected = all_results()
    for one, exact in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("capability", PRESENT)
def test_every_instruction_set_has_a_linear(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "capability", capability)
    input, weight, bias = torch.randn(5, 80), torch.randn(33, 80), torch.randn(33)
    actual = cpu.linear(input, weight, bias)
    expected = torch.nn.functional.linear(input, weight, bias)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_pairs_of_bfloat16_come_after_floats_on_intel() -> None:
    order = list(cpu.capabilities())
    if "avx512" not in order:
        pytest.skip("x86-64 has these")
    intel = processor.vendor() == "GenuineIntel"
    assert (order.index("avx512") < order.index("avx512_bf16")) == intel
