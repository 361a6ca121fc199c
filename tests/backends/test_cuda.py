"""The CUDA backend without a GPU: what it refuses and says, how it is built, what a call is given."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import emulated
import pytest
import torch

import attn_ext
from attn_ext import cli, dispatch
from attn_ext.backends import cuda
from attn_ext.problem import Problem

ROOT = pathlib.Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
assert spec is not None
assert spec.loader is not None
setup_cuda = importlib.util.module_from_spec(spec)
sys.modules["setup_cuda"] = setup_cuda
spec.loader.exec_module(setup_cuda)

NVCC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
needs_module = pytest.mark.skipif(cuda._cuda is None, reason="built without nvcc")
needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here")


def problem(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 8,
    value_dim: int = 8,
    device: str = "cpu",
) -> Problem:
    query, value = (
        torch.zeros(1, 2, 3, d, dtype=dtype, device=device) for d in (head_dim, value_dim)
    )
    return Problem.build(query, query, value)


class FakeModule:
    """attn_ext._cuda for CPU tensors, on a device of the tests' choice."""

    device_type = "cpu"

    def __init__(
        self,
        capability: tuple[int, int] = (8, 0),
        compiled: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90"),
        limit: int = 166912,
        missing: str = "",
    ) -> None:
        self.capability, self.compiled = capability, compiled
        self.limit, self.missing = limit, missing
        self.calls: list[tuple[object, ...]] = []

    def no_device_reason(self) -> str:
        return self.missing

    def compute_capability(self, device: int) -> tuple[int, int]:
        assert not self.missing, "it would raise"
        return self.capability

    def architectures(self) -> list[str]:
        return list(self.compiled)

    def shared_bytes(
        self, dtype: torch.dtype, head_dim: int, value_dim: int, tf32: bool, limit: int
    ) -> int:
        assert limit == self.limit
        return 400 * max(head_dim, value_dim) * dtype.itemsize // (2 if tf32 else 1)

    def shared_bytes_limit(self, device: int) -> int:
        return self.limit

    def forward(self, *arguments: object) -> None:
        self.calls.append(arguments)

    backward = weights = forward


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend's module, once more, so that nothing that it keeps is seen elsewhere."""
    return emulated._imported("attn_ext.backends.cuda_under_test", pathlib.Path(cuda.__file__))


def reasons(module: ModuleType, native: FakeModule, asked: Problem) -> list[str]:
    module._reasons.cache_clear()
    module._has_tf32.cache_clear()
    module._cuda = native
    return module.not_supported_reasons(asked)


def test_a_usual_problem_is_not_refused(fresh: ModuleType) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert reasons(fresh, FakeModule(), problem(dtype)) == []


@pytest.mark.parametrize(
    ("asked", "native", "expected"),
    [
        ({"dtype": torch.float64}, {}, "query is float64; float32, float16 or bfloat16 would do"),
        (
            {"dtype": torch.bfloat16},
            {"capability": (7, 5)},
            "query is bfloat16, which takes compute capability 8.0, and cpu has 7.5; float16 or float32 would do",
        ),
        ({"head_dim": 257}, {}, "query has a head_dim of 257; at most 256 would do"),
        ({"value_dim": 300}, {}, "value has one of 300; at most 256 would do"),
        (
            {"head_dim": 64},
            {"limit": 65536},
            "query and value have a head_dim of 64 and 8 in float32, which takes 102400 bytes of shared memory a block, and cpu has 65536; a smaller one, or 16 bits, would do",
        ),
        (
            {},
            {"capability": (7, 0)},
            "cpu has compute capability 7.0, and attn_ext._cuda is compiled for sm_75, sm_80, sm_90, compute_90; TORCH_CUDA_ARCH_LIST=7.0 would do",
        ),
        (
            {},
            {"missing": "no NVIDIA driver is installed"},
            "the CUDA runtime can't use cpu: no NVIDIA driver is installed",
        ),
    ],
)
def test_reasons(
    asked: dict[str, object], native: dict[str, object], expected: str, fresh: ModuleType
) -> None:
    assert reasons(fresh, FakeModule(**native), problem(**asked)) == [expected]


def test_bounds_that_are_not_refused(fresh: ModuleType) -> None:
    assert reasons(fresh, FakeModule(limit=10**6), problem(head_dim=256, value_dim=256)) == []
    assert reasons(fresh, FakeModule((7, 5)), problem(torch.float16)) == []


@pytest.fixture
def set_precision(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stands in for torch.set_float32_matmul_precision, which oneDNN's setting does not come back from."""
    return lambda precision: monkeypatch.setattr(
        torch, "get_float32_matmul_precision", lambda: precision
    )


def test_allowing_tf32_changes_what_is_needed(
    fresh: ModuleType, set_precision: Callable[[str], None]
) -> None:
    native, asked = FakeModule(limit=65536), problem(head_dim=64)
    assert len(reasons(fresh, native, asked)) == 1
    set_precision("high")
    assert fresh.not_supported_reasons(asked) == []
    assert len(reasons(fresh, FakeModule((7, 5), limit=65536), asked)) == 1
    (why,) = reasons(fresh, FakeModule(missing="the driver is too old"), asked)
    assert why == "the CUDA runtime can't use cpu: the driver is too old"


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 9), False),
        (["sm_75", "sm_100"], (10, 3), True),
        (["sm_120", "compute_120"], (12, 1), True),
        (["sm_120"], (10, 0), False),
        ([], (8, 0), False),
    ],
)
def test_which_code_runs_where(
    compiled: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert cuda.runs_on(compiled, *capability) is runs


def test_a_module_that_was_not_built_is_a_reason(fresh: ModuleType) -> None:
    fresh._cuda, fresh._import_error = None, "No module named _cuda"
    fresh._reasons_elsewhere.cache_clear()
    first, second = fresh.not_supported_reasons(problem())
    assert "attn_ext._cuda is not built (No module named _cuda)" in first
    assert second == "query is on cpu, and this backend takes CUDA tensors"
    assert fresh.architectures() == []
    assert fresh.no_device_reason() == "attn_ext._cuda is not built"


def test_tensors_elsewhere_are_refused() -> None:
    for device in ("cpu", "meta"):
        assert cuda.not_supported_reasons(problem(device=device))[-1] == (
            f"query is on {device}, and this backend takes CUDA tensors"
        )
    with pytest.raises(NotImplementedError, match=r"'cuda' can't run this: .*query is on"):
        attn_ext.attention(*(torch.zeros(1, 2, 3, 4) for _ in range(3)), backend="cuda")


def test_it_is_explained_where_it_is_preferred(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh._cuda = FakeModule()
    monkeypatch.setattr(dispatch, "preferred", lambda device: ("cuda", "cpu", "reference"))
    monkeypatch.setitem(dispatch._modules, "cuda", fresh)
    tensors = [torch.zeros(1, 2, 3, 4) for _ in range(3)]
    explanation = attn_ext.explain(*tensors)
    assert explanation.backend == "cuda"
    for name in ("cpu", "reference"):
        assert explanation.reasons[name] == ["'cuda' is preferred"]
    explanation = attn_ext.explain(*(x.double() for x in tensors))
    assert explanation.backend == "cpu"
    assert "query is float64" in explanation.reasons["cuda"][0]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_kernel_is_given(
    dtype: torch.dtype,
    precision: str,
    fresh: ModuleType,
    set_precision: Callable[[str], None],
) -> None:
    """TF32 where the user allows it, the float32 workspace, a mask's gradient in float32."""
    native = fresh._cuda = FakeModule()
    query = torch.zeros(1, 2, 3, 4, dtype=dtype)
    mask = torch.zeros(3, 1, dtype=dtype)
    asked = Problem.build(query, query, query, attn_mask=mask)
    set_precision(precision)
    out, lse = fresh.forward(asked)
    fresh.backward(asked, out, lse, out, None, True)
    for call in native.calls:
        assert call[:3] == (0, 0, dtype is torch.float32 and precision != "highest")
    dmask, row_term = native.calls[1][-2:]
    assert isinstance(dmask, torch.Tensor)
    assert isinstance(row_term, torch.Tensor)
    assert (dmask.dtype, dmask.shape) == (torch.float32, (1, 1, 3, 1))
    assert (row_term.dtype, row_term.shape) == (torch.float32, (1, 2, 3))


def test_architectures_by_default() -> None:
    for listed in ("", " ;"):
        chosen = setup_cuda.choose_architectures(listed, NVCC_13)
        assert (chosen.machine_code, chosen.ptx) == ((75, 80), True)


@pytest.mark.parametrize(
    ("present", "machine_code"),
    [
        ((86,), (86,)),
        ((90, 75, 90), (75, 90)),
        ((70, 80), (80,)),  # the older one is left to other backends
        ((70,), (75, 80)),
        ((130,), (75, 80)),  # newer than nvcc: by PTX
    ],
)
def test_architectures_of_the_gpus_present(
    present: tuple[int, ...], machine_code: tuple[int, ...]
) -> None:
    chosen = setup_cuda.choose_architectures("", NVCC_13, lambda: present)
    assert (chosen.machine_code, chosen.ptx) == (machine_code, True)


def test_a_list_needs_no_driver() -> None:
    chosen = setup_cuda.choose_architectures("8.9", NVCC_13, lambda: pytest.fail("was asked"))
    assert chosen.machine_code == (89,)


def test_which_gpus_are_present(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "nvidia-smi"
    for output, found in [
        ("9.0\n7.5\n9.0", (75, 90)),
        ("12.0", (120,)),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", ()),
        ("[N/A]", ()),
    ]:
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "{output}"\nexit 9\n')
        program.chmod(0o755)
        assert setup_cuda.present_architectures({"PATH": str(tmp_path)}) == found
    assert setup_cuda.present_architectures({"PATH": "/nowhere"}) == ()
    program.write_text("no program")
    assert setup_cuda.present_architectures({"PATH": str(tmp_path)}) == ()


@pytest.mark.parametrize(
    ("listed", "machine_code", "ptx"),
    [
        ("8.0", (80,), False),
        ("8.0;9.0+PTX", (80, 90), True),
        ("9.0a 7.5,10.0", (75, 90, 100), False),
        ("8.0+PTX; 12.0+PTX;", (80, 120), True),
        ("7.5+PTX", (75,), True),
    ],
)
def test_torch_cuda_arch_list(listed: str, machine_code: tuple[int, ...], ptx: bool) -> None:
    """From 8.0 on all are made of one PTX, which is also what newer devices are given."""
    chosen = setup_cuda.choose_architectures(listed, NVCC_13)
    assert (chosen.machine_code, chosen.ptx) == (machine_code, ptx)
    expected = [
        f"-gencode=arch=compute_{75 if number == 75 else 80},code=sm_{number}"
        for number in machine_code
    ]
    if ptx:
        expected.append("-gencode=arch=compute_80,code=compute_80")
    *flags, code, kept = chosen.flags()
    assert flags == expected
    assert code == "-DATTN_EXT_CUDA_CODE=" + r"\,".join(map(str, machine_code))
    assert kept == f"-DATTN_EXT_CUDA_PTX={80 if ptx else 0}"


@pytest.mark.parametrize("listed", ["Ampere", "80", "8.0+ptx", "8.0:9.0"])
def test_an_unreadable_list(listed: str) -> None:
    with pytest.raises(ValueError, match=r'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0\+PTX", got'):
        setup_cuda.choose_architectures(listed, NVCC_13)


@pytest.mark.parametrize(("listed", "entry"), [("7.0", "7.0"), ("8.0;13.0", "13.0")])
def test_an_unsupported_architecture(listed: str, entry: str) -> None:
    with pytest.raises(ValueError, match=rf"\(7.5, 8.0, .* 12.1\), got {entry}$"):
        setup_cuda.choose_architectures(listed, NVCC_13)


def test_whether_it_is_built(tmp_path: pathlib.Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    found = {"PATH": str(nvcc.parent)}
    absent = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
    by_home = {"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}
    wanted = setup_cuda.wanted_nvcc
    assert wanted(found) == wanted({**found, "ATTN_EXT_CUDA": "auto"}) == str(nvcc)
    assert wanted({**found, "ATTN_EXT_CUDA": "1"}) == wanted(by_home) == str(nvcc)
    assert wanted({**found, "ATTN_EXT_CUDA": "0"}) is None
    assert wanted(absent) is None
    with pytest.raises(RuntimeError, match="ATTN_EXT_CUDA is 1 and no nvcc was found: set CUDA_H"):
        wanted({**absent, "ATTN_EXT_CUDA": "1"})
    with pytest.raises(ValueError, match="ATTN_EXT_CUDA must be 0, 1 or auto, got 'yes'"):
        wanted({**found, "ATTN_EXT_CUDA": "yes"})


@needs_module
@needs_no_device
def test_without_a_device_it_imports_and_says_so() -> None:
    module = cuda._cuda
    assert module.device_type == "cuda"
    assert module.device_count() == 0
    why = module.no_device_reason()
    assert why in ("no NVIDIA driver is installed", "the NVIDIA driver finds no CUDA device") or (
        "the NVIDIA driver supports CUDA" in why
    )
    for call in (module.compute_capability, module.shared_bytes_limit):
        with pytest.raises(RuntimeError, match=why.replace("(", r"\(")):
            call(0)
    tensors = [torch.zeros(1, 2, 3, 8) for _ in range(2)]
    asked = Problem.build(tensors[0], tensors[0], tensors[0])
    with pytest.raises(RuntimeError, match=why.replace("(", r"\(")):
        module.forward(0, 0, False, asked, None, tensors[1], None)
    assert f"none ({why})" in cli.info()


@needs_module
def test_what_it_was_compiled_for() -> None:
    assert all(name.split("_")[0] in ("sm", "compute") for name in cuda.architectures())
    assert f"cuda kernels  {', '.join(cuda.architectures())}" in cli.info()
    for head_dim in (64, 128):  # it runs on a T4
        needed = cuda._cuda.shared_bytes(torch.float16, head_dim, head_dim, False, 64 << 10)
        assert needed <= 64 << 10


@needs_module
def test_it_needs_no_cuda_library() -> None:
    """Its runtime is linked in, and its symbols are not for others to find."""
    linked = subprocess.run(
        ["ldd", cuda._cuda.__file__], capture_output=True, text=True, check=True
    )
    assert "libcuda" not in linked.stdout
    code = "from attn_ext import _cuda; print(_cuda.device_count())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert result.stdout == "0\n", result.stderr


@pytest.mark.parametrize("architecture", emulated.ARCHITECTURES)
def test_emulated_facts(architecture: int) -> None:
    module = emulated.backend(architecture)._cuda
    assert module.device_type == "cpu"
    assert module.compute_capability(0) == divmod(architecture // 10, 10)
    assert module.architectures() == [f"sm_{architecture // 10}"]
    assert module.shared_bytes_limit(0) == {750: 64, 800: 163}[architecture] * 1024


def test_the_emulated_backend_is_in_the_tests_alone() -> None:
    emulated.backend(emulated.ARCHITECTURES[0])
    assert "cuda_emulated" not in attn_ext.BACKENDS
    with pytest.raises(ValueError, match="backend must be one of"):
        attn_ext.attention(*(torch.zeros(1, 2, 3, 4) for _ in range(3)), backend="cuda_emulated")
