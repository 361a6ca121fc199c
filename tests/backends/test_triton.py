"""The Triton backend: where it runs, what it refuses, and how it is launched."""

from __future__ import annotations

import itertools
import math
import pathlib
import subprocess
import sys

import interpreted
import pytest
import test_contract
import torch
from cases import CASES, Case, make_inputs
from torch import Tensor

import attn_ext
from attn_ext import dispatch
from attn_ext.backends import triton as backend
from attn_ext.problem import Problem
from attn_ext.triton_kernels import arguments, configurations, launch, tuning

on_the_interpreter = pytest.mark.skipif(
    not interpreted.INTERPRETS, reason="with a GPU the kernels are not interpreted"
)


def tensors(**changes: object) -> list[Tensor]:
    shape = {"head_dim": 8, "length": 5, "dtype": torch.float32, **changes}
    return [
        torch.zeros(1, 2, shape["length"], shape["head_dim"], dtype=shape["dtype"])
        for _ in range(3)
    ]


def in_a_process_of_its_own(code: str) -> str:
    """What a process prints whose kernels are not interpreted."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_automatic_choice_on_cpu_tensors_does_not_even_import_it() -> None:
    code = (
        "import sys, torch, attn_ext; x = torch.zeros(1, 1, 3, 4); attn_ext.attention(x, x, x);"
        "print('attn_ext.backends.triton' in sys.modules, 'attn_ext.triton_kernels' in sys.modules)"
    )
    assert in_a_process_of_its_own(code).split() == ["False", "False"]


def test_without_triton_that_is_only_a_reason() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, attn_ext;"
        "x = torch.zeros(1, 1, 3, 4); print(attn_ext.explain(x, x, x))"
    )
    printed = in_a_process_of_its_own(code)
    assert printed.startswith("cpu would run")
    assert "not triton: triton can't be imported" in printed
    assert "`pip install triton` would do" in printed


def test_cpu_tensors_outside_the_interpreter() -> None:
    code = (
        "import torch, attn_ext; x = torch.zeros(1, 1, 3, 4);\n"
        "try: attn_ext.attention(x, x, x, backend='triton')\n"
        "except NotImplementedError as error: print(error)"
    )
    assert "in Triton's interpreter, TRITON_INTERPRET=1, it takes CPU" in in_a_process_of_its_own(
        code
    )


def test_with_a_gpu_the_test_suite_leaves_the_compiler_as_it_is(tmp_path: pathlib.Path) -> None:
    tests = pathlib.Path(interpreted.__file__).parent
    code = (
        f"import os, sys; os.environ['TRITON_CACHE_DIR'] = {str(tmp_path)!r};"
        f"sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}];"
        "import torch; torch.cuda.is_available = lambda: True;"
        "import interpreted; from bench.triton_kernels import Name, compiled;"
        "kernel = compiled(Name('sm_80', 'weights', 'float16', 64, 'plain'));"
        "print(interpreted.INTERPRETS, sorted(kernel.asm))"
    )
    printed = in_a_process_of_its_own(code)
    assert printed.startswith("False")
    assert "cubin" in printed


@on_the_interpreter
def test_interpreted_it_runs_on_request_and_is_never_chosen() -> None:
    query, key, value = tensors()
    with attn_ext.use_backend("triton"):
        assert attn_ext.explain(query, key, value).backend == "triton"
    explanation = attn_ext.explain(query, key, value)
    assert explanation.backend == "cpu"
    assert explanation.reasons["triton"] == ["'cpu' is preferred"]


@on_the_interpreter
@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"dtype": torch.float64}, {}, "query is float64; float32, float16 or bfloat16 would do"),
        ({"head_dim": 257}, {}, "query has a head_dim of 257; at most 256 would do"),
        (
            {},
            {"alibi_slopes": torch.ones(2), "q_start": 2**31},
            "q_start and k_start are 2147483648 and 0 with alibi_slopes",
        ),
    ],
)
def test_refusals(changes: dict[str, object], options: dict[str, object], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        attn_ext.attention(*tensors(**changes), backend="triton", **options)


@on_the_interpreter
@pytest.mark.parametrize(
    ("name", "shape", "strides"),
    [("attn_mask", (4, 5), (2**24, 1)), ("key_padding_mask", (1, 5), (1, 2**24))],
)
def test_offsets_that_32_bits_would_not_hold_are_refused(
    name: str, shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    mask = torch.empty_strided(shape, strides, device="meta", dtype=torch.bool)
    query = torch.empty(1, 2, 4, 8, device="meta")
    key = torch.empty(1, 2, 5, 8, device="meta")
    reasons = backend.not_supported_reasons(Problem.build(query, key, key, **{name: mask}))
    assert reasons[-1].startswith(f"{name} has strides of (")
    assert reasons[-1].endswith("at most 8388608 between rows and columns would do")


@pytest.mark.parametrize(
    ("capability", "hip", "first"),
    [((7, 5), None, "cuda"), ((8, 9), None, "cuda"), ((9, 0), None, "triton"),
     ((12, 0), None, "triton"), ((9, 4), "6.4", "triton")],
)  # fmt: skip
def test_newer_gpus_prefer_it(
    capability: tuple[int, int], hip: str | None, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    dispatch.preferred.cache_clear()
    assert dispatch.preferred(torch.device("cuda", 0))[0] == first
    dispatch.preferred.cache_clear()


def test_views_that_negate_are_resolved() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(launch.rows_of(x._neg_view()).ptr, -x)
    assert not launch.rows_of(x._neg_view()).ptr.is_neg()


def test_every_architecture_has_a_configuration_of_every_width() -> None:
    for architecture in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx90a",
                         "gfx942", "gfx1100", "gfx1201"):  # fmt: skip
        for kernel in (*KERNELS, "backward_atomic"):
            for bits in (16, 32):
                for width, laden in itertools.product(
                    (16, 32, 64, 128, 256), (None, "mask", "dropout", "padding")
                ):
                    found = configurations.configuration_of(
                        kernel, architecture, bits, width, laden
                    )
                    assert found.BLOCK_M % 16 == 0
                    assert found.BLOCK_N % 16 == 0
                    plain = configurations.configuration_of(kernel, architecture, bits, width)
                    if kernel == "weights":  # a mask's entries take registers
                        pairs, most = (x.BLOCK_M * x.BLOCK_N / x.num_warps for x in (found, plain))
                        assert pairs <= most
                    elif bits == 32:
                        assert found == plain


@pytest.mark.parametrize(
    ("setting", "wanted"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]
)
def test_precision_of_float32(setting: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.set_float32_matmul_precision would leave oneDNN's setting behind.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    assert launch.precision("sm_90") == wanted
    assert launch.precision("gfx942") == "ieee"


@pytest.mark.parametrize(
    ("number", "word"), [(0, 0), (2**31, -(2**31)), (2**32 - 1, -1), (2**63 + 11, 11), (-1, -1)]
)
def test_words_are_signed(number: int, word: int) -> None:
    assert launch.as_word(number) == word


@on_the_interpreter
def test_a_seed_on_the_device_is_not_read_by_the_host() -> None:
    """Its address goes to the kernel: on a meta tensor, which has no value, nothing else works."""
    query = torch.empty(1, 1, 4, 8, device="meta")
    problem = Problem.build(query, query, query, dropout_p=0.5)
    problem.seed = torch.empty((), dtype=torch.int64, device="meta")
    settings, passed = backend._settings(problem)
    plan = launch.forward_plan("sm_90", settings[1], passed, (1, 0), query, None)
    call = plan.call(configurations.INTERPRETED)
    assert call.arguments["dropout"].seed_ptr is problem.seed


@on_the_interpreter
def test_a_seed_tensor_drops_the_same_weights() -> None:
    query = torch.randn(1, 2, 9, 8)
    seed = torch.tensor(-5)
    problem = Problem.build(query, query, query, dropout_p=0.5)
    lse = torch.zeros(1, 2, 9)
    results = []
    for given in (seed, int(seed)):
        problem.seed = given
        results.append(backend.weights(problem, lse, False))
    assert torch.equal(*results)


def test_what_hides_nothing_is_not_passed() -> None:
    """A limit that is beyond every key costs no code."""
    query, key = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 9, 8)
    decoding = Problem.build(query, key, key, causal="lower_right", window=(20, None))
    assert launch._reach(decoding) == (None, None)
    assert launch._reach(decoding.replace(window=(3, -1))) == (5, None)
    far = Problem.build(query, key, key, causal=True, q_start=2**40)
    assert launch._reach(far) == (None, None)
    nothing = Problem.build(query, key, key, causal=True, k_start=2**40)
    assert launch._reach(nothing) == (None, -1)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(2, 3, 5, 8), True),
        (torch.empty(2, 3, 5, 7), False),
        (torch.empty(2, 5, 3, 8).transpose(1, 2), True),
        (torch.empty(1, 3, 5, 8).expand(2, -1, -1, -1), False),
        (torch.empty(2, 3, 5, 9)[..., 1:], False),
    ],
)
def test_what_hardware_can_copy(tensor: Tensor, expected: bool) -> None:
    assert launch.has_descriptor(tensor) is expected


SHARED = torch.ones(2, 1, 1, 5, dtype=torch.bool)
PADDING = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("attn_mask", "key_padding_mask", "expected"),
    [
        (None, None, (None, None)),
        (None, PADDING, (None, (5, 1))),
        (SHARED, None, (None, (5, 1))),
        (SHARED.expand(2, 4, 3, 5), None, (None, (5, 1))),
        (SHARED[:1], None, (None, (0, 1))),
        (SHARED.to(torch.float32)[..., :1], None, (None, (5, 0))),
        (SHARED, PADDING, ((5, 0, 0, 1), (5, 1))),
        (torch.ones(3, 5, dtype=torch.bool), None, ((0, 0, 5, 1), None)),
        (torch.ones(4, 1, 5, dtype=torch.bool), None, ((0, 5, 0, 1), None)),
    ],
)
def test_a_mask_that_heads_and_rows_share_is_one_of_keys(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    expected: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
) -> None:
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
    problem = Problem.build(query, key, key, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    found = arguments.masks_of(problem)
    assert tuple(None if mask is None else tuple(mask[1:]) for mask in found) == expected


KERNELS = ("forward", "row_terms", "backward_queries", "backward_keys", "mask_gradient", "weights")


@pytest.mark.parametrize("kernel", [*KERNELS, "backward_atomic"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("laden", [None, "mask", "dropout", "padding"])
@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
)
def test_candidates(architecture: str, laden: str | None, bits: int, kernel: str) -> None:
    for width in (16, 32, 64, 128, 256):
        size = (architecture, bits, width, laden)
        found = configurations.candidates_of(kernel, *size)
        assert found[0] == configurations.configuration_of(kernel, *size)
        assert 4 <= len(set(found)) == len(found) <= 26
        copies = architecture in ("sm_90", "sm_100", "sm_120")
        passing = kernel == "forward" or kernel.startswith("backward_")
        assert any(x.descriptors for x in found) == (copies and passing)
        planned = architecture.startswith("gfx") and kernel != "row_terms"
        assert {x.waves_per_eu for x in found} == ({0, 1, 2} if planned else {0})


def test_only_a_configuration_for_amd_has_waves_to_plan_for() -> None:
    """NVIDIA's compiler does not know the option."""
    for architecture, waves in (("gfx1100", {"waves_per_eu": 1}), ("gfx942", {}), ("sm_90", {})):
        config = configurations.configuration_of("forward", architecture, 16, 64)
        options = launch._options(config)
        assert options == {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
            **waves,
        }


class Timer:
    """In place of do_bench: the nth candidate takes the nth of `times`, once it has run."""

    def __init__(self, *times: float | Exception) -> None:
        self.times = list(times)

    def __call__(self, run: object, return_mode: str) -> float:
        assert return_mode == "median"
        run()
        time = self.times.pop(0)
        if isinstance(time, Exception):
            raise time
        return time


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_fastest", {})


@on_the_interpreter
def test_the_fastest_configuration_is_kept(tuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = configurations.candidates_of("forward", "interpreter", 32, 16)
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    expected = attn_ext.attention(query, key, value, backend="reference")
    timer = Timer(3.0, 1.0, tuning.OutOfResources(2, 1, "shared memory"))
    monkeypatch.setattr(tuning, "do_bench", timer)
    for length in (40, 39):  # of one kind
        out = attn_ext.attention(query[:, :, :length], key, value, backend="triton")
        torch.testing.assert_close(out, expected[:, :, :length])
    assert timer.times == []
    assert list(tuning._fastest.values()) == [candidates[1]]
    timer.times = [3.0, 1.0, 0.5]
    out = attn_ext.attention(query, key, value, causal=True, backend="triton")
    assert list(tuning._fastest.values()) == candidates[1:]
    reference = attn_ext.attention(query, key, value, causal=True, backend="reference")
    torch.testing.assert_close(out, reference)


@on_the_interpreter
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_gradients_and_weights_by_every_candidate(
    fastest: int, atomic: bool, tuned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ATOMIC", atomic)
    kernels = {*KERNELS, *(["backward_atomic"] if atomic else [])}

    def results(backend: str) -> list[Tensor]:
        torch.manual_seed(1)
        mask = torch.randn(1, 1, 34, 37, requires_grad=True)
        query = torch.randn(1, 2, 34, 8, requires_grad=True)
        key, value = (torch.randn(1, 1, 37, 8, requires_grad=True) for _ in range(2))
        out = attn_ext.attention(query, key, value, attn_mask=mask, backend=backend)
        weights = attn_ext.attention_weights(query, key, attn_mask=mask, backend=backend)
        loss = out.square().sum() + weights.square().sum()
        gradients = torch.autograd.grad(loss, (query, key, value, mask))
        return [out, weights, *gradients]

    times = [3.0 if i != fastest else 1.0 for i in range(3)]
    monkeypatch.setattr(tuning, "do_bench", Timer(*times * 3 * len(kernels)))
    for ours, exact in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, exact)
    assert {key[0] for key in tuning._fastest} == kernels
    for (kernel, *_), chosen in tuning._fastest.items():
        assert chosen == configurations.candidates_of(kernel, "interpreter", 32, 16)[fastest]


@on_the_interpreter
def test_what_was_timed_is_printed(
    tuned: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "do_bench", Timer(3.0, 1.0, tuning.PTXASError("ptxas failed")))
    monkeypatch.setattr(tuning.triton.knobs.autotuning, "print", True)
    query, key, value = tensors()
    attn_ext.attention(query, key, value, backend="triton")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("attn_ext ('forward', 'interpreter', None, torch.float32, 8, 8,")
    assert [float(line.split()[0]) for line in lines[1:]] == [3.0, 1.0, math.inf]


@pytest.fixture
def atomic_plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of backward passes, where ATTN_EXT_TRITON_ATOMIC is asked for."""
    seen: list[str] = []

    def run(self: launch.Plan, *arguments: object) -> None:
        seen.append(self.name)
        original(self, *arguments)

    original = launch.Plan.run
    monkeypatch.setattr(launch, "ATOMIC", True)
    monkeypatch.setattr(launch.Plan, "run", run)
    return seen


ATOMIC_CASES = [
    pytest.param(
        case,
        id=case.name,
        marks=[] if case.name in ("grouped_heads", "everything") else pytest.mark.exhaustive,
    )
    for case in CASES
    if case.name in ("plain", "grouped_heads", "window", "float_mask_keys", "dropout_shifted",
                     "everything", "length_65")
]  # fmt: skip


@on_the_interpreter
@pytest.mark.parametrize("case", ATOMIC_CASES)
def test_atomic_sums_keep_the_contract(case: Case, atomic_plans: list[str]) -> None:
    test_contract.assert_contract(
        make_inputs(case, torch.float32), torch.float32, "triton", average=True
    )
    # Of the output, and of the LSE that the weights come from; their own gradient takes none.
    assert atomic_plans.count("backward_atomic") == 2
    assert atomic_plans.count("backward_keys") == 1


@on_the_interpreter
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)]
)
def test_atomic_sums_of_halves_are_float32(dtype: torch.dtype, atomic_plans: list[str]) -> None:
    case = next(x for x in CASES if x.name == "everything")
    test_contract.assert_contract(make_inputs(case, dtype), dtype, "triton", average=False)
    assert "backward_atomic" in atomic_plans


@on_the_interpreter
@pytest.mark.parametrize("where", ["key", pytest.param("value", marks=pytest.mark.exhaustive)])
def test_atomic_sums_and_garbage(where: str, atomic_plans: list[str]) -> None:
    test_contract.test_garbage_reaches_only_rows_that_see_it(math.nan, where, "causal", "triton")
    assert atomic_plans.count("backward_atomic") == 2


@on_the_interpreter
def test_nothing_is_atomic_where_torch_is_deterministic(atomic_plans: list[str]) -> None:
    query, key, value = (x.requires_grad_() for x in tensors())
    torch.use_deterministic_algorithms(True)
    try:
        attn_ext.attention(query, key, value, backend="triton").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "backward_keys" in atomic_plans
    assert "backward_atomic" not in atomic_plans


def test_without_the_option_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tuning.ENABLED
    monkeypatch.setattr(tuning, "do_bench", None)
    query = torch.empty(1, 1, 4, 64, dtype=torch.float16)
    problem = Problem.build(query, query, query)
    chosen = tuning.configuration("forward", "sm_80", problem, None, Timer())
    assert chosen == configurations.configuration_of("forward", "sm_80", 16, 64)
