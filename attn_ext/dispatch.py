"""Which backend runs a problem, and why the others do not.

To add a backend: write `attn_ext/backends/<name>.py` with the functions that `attn_ext.backends`
describes and add its name to `BACKENDS`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from attn_ext.problem import Problem

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend; `preferred` puts them in order."""

_ON_CPU = ("cpu", "reference")

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_modules: dict[str, ModuleType] = {}


class ReferenceFallbackWarning(UserWarning):
    """No kernel can run a problem here, so the slow reference does."""


@dataclass(frozen=True)
class Explanation:
    """What `attn_ext.explain` returns.

    Attributes:
        backend: the backend that would run, or None if the requested one can't.
        reasons: for every other backend, why it would not run.
    """

    backend: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.backend or 'nothing'} would run"]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run everything inside the `with` block on one backend; it never falls back to another.

    The choice belongs to the current thread and asyncio task. A `backend` argument of a call wins
    over it. Compiled and exported programs look at it when they run, not when they are traced.

    Args:
        name: one of `attn_ext.BACKENDS`, or None to choose automatically again.

    Raises:
        ValueError: there is no such backend.
    """
    token = _forced.set(_checked_name(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """What `use_backend` chose here; None for an automatic choice."""
    return _forced.get()


def load(name: str) -> ModuleType:
    """The module of a backend, imported when it is first asked for."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f"attn_ext.backends.{name}")
    return module


def select(problem: Problem, requested: str | None = None) -> ModuleType:
    """The backend that runs a problem.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: the requested backend can't run the problem.
    """
    name = _wanted(requested)
    if name is not None:
        backend = load(name)
        reasons = backend.not_supported_reasons(problem)
        if reasons:
            raise NotImplementedError(f"backend {name!r} can't run this: {'; '.join(reasons)}")
        return backend
    query = problem.query
    for name in _ON_CPU if query.is_cpu else preferred(query.device):
        backend = load(name)
        if not backend.not_supported_reasons(problem):
            if name == "reference":
                _warn_of_reference(problem)
            return backend
    raise AssertionError("the reference runs everything")


def explain_problem(problem: Problem, requested: str | None = None) -> Explanation:
    """Which backend `select` would choose, and why each other would not run."""
    name = _wanted(requested)
    reasons = {other: load(other).not_supported_reasons(problem) for other in BACKENDS}
    if name is None:
        order = preferred(problem.query.device)
        chosen = next((other for other in order if not reasons[other]), None)
        note = f"{chosen!r} is preferred"
    else:
        chosen = None if reasons[name] else name
        note = f"{name!r} was requested"
    others = {other: why or [note] for other, why in reasons.items() if other != chosen}
    return Explanation(chosen, others)


@functools.cache
def preferred(device: torch.device) -> tuple[str, ...]:
    """The backends that an automatic choice tries on a device, in this order.

    Triton's compiler reaches the tensor cores of Hopper, Blackwell and AMD, and the hand-written
    kernels are for what came before.
    """
    if device.type != "cuda":
        return _ON_CPU
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (9, 0):
        return ("triton", "cuda", "reference")
    return ("cuda", "triton", "reference")


def _wanted(requested: str | None) -> str | None:
    """What the call's own argument says, else what `use_backend` does."""
    return forced() if requested is None else _checked_name(requested)


def _checked_name(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {name!r}")
    return name


def _warn_of_reference(problem: Problem) -> None:
    warnings.warn(
        f"no attn_ext kernel can run this on {problem.query.device}, so the slow reference does; "
        "attn_ext.explain(...) says why, and use_backend('reference') silences this",
        ReferenceFallbackWarning,
        stacklevel=2,
    )
