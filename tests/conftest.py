"""Fixtures: every backend of this machine, the CPU kernels once for each instruction set it has.

The CUDA kernels are run by an emulator, once for each architecture whose code differs, the Triton
kernels by Triton's interpreter; and by the GPU where there is one (`pytest -m gpu`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator

# Read when OpenMP is loaded, with torch. Processes of pytest-xdist have more threads than there are cores,
# and a thread that waits by spinning keeps another from working: tests took six times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreted  # first: kernels are defined as interpreted ones when triton is imported

# isort: split
import emulated
import pytest
import torch
from cases import DEVICE_BACKENDS

from attn_ext import dispatch
from attn_ext.backends import cpu

CPU_CAPABILITIES = [name for name, present in cpu.capabilities().items() if present]
NEWEST, *OTHERS = (f"cuda_emulated-{architecture}" for architecture in emulated.ARCHITECTURES)
BACKEND_IDS = [
    *(f"cpu-{name}" for name in CPU_CAPABILITIES),
    NEWEST,
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS),
    *(["triton"] if interpreted.INTERPRETS else []),
    "reference",
]
if torch.cuda.is_available():
    BACKEND_IDS += [pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in DEVICE_BACKENDS]


_BACKEND = re.compile(
    r"(?<=\[)(" + "|".join(getattr(x, "values", [x])[0] for x in BACKEND_IDS) + r")(-|(?=\]))"
)


def _of_any_backend(nodeid: str) -> str:
    """The same for a test with each of the backends."""
    return _BACKEND.sub("", nodeid)


@pytest.fixture(params=BACKEND_IDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, with one of its instruction sets or architectures in force.

    For a GPU's backend all that a test makes is on the GPU, the reference's part too.
    """
    name, _, variant = request.param.partition("-")
    if name == "cpu":
        monkeypatch.setattr(cpu, "capability", variant)
    if name == "cuda_emulated":
        # Last: it takes CPU tensors, and nothing may choose it by itself.
        monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, name))
        monkeypatch.setitem(dispatch._modules, name, emulated.backend(int(variant)))
    with torch.device("cuda") if variant == "gpu" else contextlib.nullcontext():
        yield name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """What runs emulated or interpreted is too slow for the full sweep itself.

    Of the rest, the interpreter has a part in every run, and all of it with `-m exhaustive`.
    A problem's tests follow each other, for the reference's results are kept (`cases.run_reference`).
    """
    slow = {
        item
        for item in items
        if re.search(r"cuda_emulated|\[triton\b", item.name)
        and any(x.name == "exhaustive" for x in getattr(item.function, "pytestmark", []))
    }
    config.hook.pytest_deselected(items=list(slow))
    items[:] = [item for item in items if item not in slow]
    order: dict[str, int] = {}
    items.sort(key=lambda item: order.setdefault(_of_any_backend(item.nodeid), len(order)))
    for item in items:
        name = item.name.replace("[triton-", "[").replace("[triton]", "")
        if name != item.name and name not in interpreted.BY_DEFAULT:
            item.add_marker(pytest.mark.exhaustive)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Processes of pytest-xdist share out the problems of the contract suite. Other files, whose tests may
    have something compiled in common, stay whole. (Its own xdist_group does nothing with pytest 9.2: version
    3.8 renames tests by an attribute that is gone.)"""
    if config.getvalue("dist") != "load":  # asked for
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return _of_any_backend(nodeid) if path.endswith("test_contract.py") else path

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What was imported and collected, ten thousand tests, stays: it is not looked through for garbage."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Skips a test of a problem that the GPUs' kernels refuse, and are meant to."""
    try:
        return (yield)
    except NotImplementedError as error:
        if re.match(f"{emulated.REFUSALS}|{interpreted.REFUSALS}", str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20_26)
