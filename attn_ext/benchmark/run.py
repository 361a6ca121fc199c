"""Measures cases: every side in interleaved rounds, then errors and memory.

In each round every side of a case takes its turn, the machine's limits among them, and every
other round goes backwards. What slows the machine for a while slows all sides alike; ratios and
shares are medians over the rounds of each round's own ratio.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import torch
from torch import Tensor

from attn_ext.benchmark import memory, peak
from attn_ext.benchmark.accuracy import largest_error
from attn_ext.benchmark.cases import DECODE_BYTES, Case, Inputs, key_value_bytes, make_inputs
from attn_ext.benchmark.measure import REST_SECONDS, ROUND_SECONDS, alternate, timed
from attn_ext.benchmark.results import Group, Row
from attn_ext.benchmark.sides import Prepared, Side, UnavailableError, left_out_by_default, sides

NO_KERNEL = "No viable backend for scaled_dot_product_attention"
"""How PyTorch begins to say that a kernel that was asked for can't run something."""
REASON_LENGTH = 160
"""Characters that are shown of what a package raised."""


class Meter:
    """Measures cases; a process beside this one measures memory, undisturbed by the timing.

    Args:
        rounds: how many times each side takes its turn.
        burst: seconds that a turn takes, about.
        with_memory: whether memory is measured, too.
        with_limits: whether the machine's limits are measured beside the sides.
    """

    def __init__(
        self,
        rounds: int,
        burst: float = ROUND_SECONDS,
        with_memory: bool = True,
        with_limits: bool = True,
    ) -> None:
        self.rounds, self.burst, self.with_limits = rounds, burst, with_limits
        self.with_memory = with_memory
        self._memory: ProcessPoolExecutor | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._memory is not None:
            self._memory.shutdown()

    def measure(
        self,
        case: Case,
        wanted: Callable[[Side], bool] | None = None,
        seconds: Callable[..., Callable[[], float]] = timed,
    ) -> Group:
        """Time all sides that can do a case, and say why the others can't.

        Args:
            case: what is done.
            wanted: which sides; by default all but those that `left_out_by_default`.
            seconds: makes the function that measures a turn; tests replace the clock.
        """
        group = Group(case)
        inputs = make_inputs(case)
        truth = exact_results(inputs)
        ready: dict[str, list[Prepared]] = {}
        for side in sides(case):
            if wanted is not None and not wanted(side):
                continue
            reason = left_out_by_default(side, case.device) if wanted is None else ""
            if not reason:
                try:
                    ready[side.name] = prepared_copies(side, inputs)
                    error = _largest_error(ready[side.name][0].results(), truth, inputs)
                    group.rows.append(Row(side.name, side.ours, max_error=error))
                except Exception as raised:  # other packages raise what they like
                    ready.pop(side.name, None)
                    reason = _sentence(raised)
            if reason:
                group.left_out[side.name] = reason
        self._time(group, ready, seconds)
        del ready
        if self.with_memory:
            for row in group.rows:
                row.peak_memory = self._peak_memory(case, row.side)
        return group

    def _time(
        self,
        group: Group,
        ready: dict[str, list[Prepared]],
        seconds: Callable[..., Callable[[], float]],
    ) -> None:
        case = group.case
        wait = peak.waiting_for(case.device)
        turns = [
            _in_context(x[0].context, seconds(_in_turns(x, case.kind), self.burst, wait))
            for x in ready.values()
        ]
        limits: list[Callable[[], float]] = []
        compute = peak.compute_limit(case.dtype, case.device) if self.with_limits else None
        if compute is not None:
            limits = [compute, peak.memory_limit(case.device)]
        measured = alternate([*turns, *limits], self.rounds, REST_SECONDS)
        for row, found in zip(group.rows, measured, strict=False):
            row.seconds = found
        if compute is not None:
            group.compute_limits, group.memory_limits = measured[-2:]

    def _peak_memory(self, case: Case, side: str) -> int | None:
        if case.device != "cpu":
            return memory_of(case, side)
        if not memory.can_reset_peak():
            return None
        if self._memory is None:
            spawn = multiprocessing.get_context("spawn")
            self._memory = ProcessPoolExecutor(max_workers=1, mp_context=spawn)
        threads = torch.get_num_threads()
        try:
            return self._memory.submit(memory_of, case, side, threads).result()
        except BrokenProcessPool:  # such as one that Linux killed for its memory
            self._memory = None
            return None


def memory_of(case: Case, side_name: str, threads: int | None = None) -> int:
    """Bytes that a call takes beyond its inputs, at its highest; its results count."""
    if threads is not None:
        torch.set_num_threads(threads)
    inputs = make_inputs(case)
    side = next(x for x in sides(case) if x.name == side_name)
    prepared = side.prepare(inputs)
    work = prepared.work(case.kind)
    with prepared.context():
        work()  # what libraries load or keep at their first call is not this call's
        if case.device != "cpu":
            return memory.device_peak_bytes(work, case.device)
        return memory.peak_bytes(work)


def prepared_copies(side: Side, inputs: Inputs) -> list[Prepared]:
    """A case made ready; for "decode" with so many caches that all are read from memory."""
    case, shape = inputs.case, inputs.case.shape
    if case.kind != "decode":
        return [side.prepare(inputs)]
    cache = shape.batch * key_value_bytes(
        shape.key_heads, shape.key_length, shape.head_dim, case.torch_dtype
    )
    copies = [inputs]
    for _ in range(DECODE_BYTES // cache):
        copy = Inputs(case, inputs.query, inputs.key.clone(), inputs.value.clone())
        copies.append(copy)
    return [side.prepare(copy) for copy in copies]


def exact_results(inputs: Inputs) -> list[Tensor]:
    """What every side should give, from PyTorch's own operations in float64 on a CPU."""
    exact = inputs.to(torch.float64)
    return next(x for x in sides(inputs.case) if x.name == "PyTorch").prepare(exact).results()


def _largest_error(results: Sequence[Tensor], truth: Sequence[Tensor], inputs: Inputs) -> float:
    """Of the output and all gradients; rows of padding do not count."""
    pairs = [(x.cpu(), y) for x, y in zip(results, truth, strict=True)]
    if inputs.padding is not None:
        there = inputs.padding.cpu()
        pairs = [(x.transpose(1, 2)[there], y.transpose(1, 2)[there]) for x, y in pairs]
    return max(largest_error(x, y) for x, y in pairs)


def _in_turns(prepared: Sequence[Prepared], kind: str) -> Callable[[], object]:
    """Does the work of the first, at the next call that of the second, and so on, around."""
    works = [x.work(kind) for x in prepared]
    if len(works) == 1:
        return works[0]
    state = [0]

    def next_one() -> object:
        state[0] = (state[0] + 1) % len(works)
        return works[state[0]]()

    return next_one


def _in_context(
    context: Callable[[], contextlib.AbstractContextManager[object]], turn: Callable[[], float]
) -> Callable[[], float]:
    def inside() -> float:
        with context():
            return turn()

    return inside


def _sentence(raised: Exception) -> str:
    """The first line of what was raised."""
    if isinstance(raised, UnavailableError):
        return str(raised)
    if str(raised).startswith(NO_KERNEL):
        return "PyTorch has no such kernel for this"
    text = f"{type(raised).__name__}: {str(raised).strip()}".splitlines()[0]
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."
