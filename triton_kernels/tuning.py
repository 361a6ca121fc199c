"""Configurations timed on the GPU at hand, where ATTN_EXT_TRITON_AUTOTUNE=1 asks for it.

A kernel's first call with a new kind of problem then compiles and times every candidate (up to a
minute) and keeps the fastest for the rest of the process. TRITON_PRINT_AUTOTUNING=1 prints them.
triton.autotune itself would not do: sizes of blocks are parts of tuples here, from which grids and
descriptors follow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable

import torch
import triton
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from attn_ext.problem import UNLIMITED, Problem
from attn_ext.triton_kernels.arguments import masks_of
from attn_ext.triton_kernels.configurations import (
    Configuration,
    block_of,
    candidates_of,
    configuration_of,
)

ENABLED = os.environ.get("ATTN_EXT_TRITON_AUTOTUNE", "0") == "1"

_fastest: dict[Hashable, Configuration] = {}


def configuration(
    kernel: str,
    architecture: str,
    problem: Problem,
    kind: Hashable,
    run: Callable[[Configuration], None],
) -> Configuration:
    """The configuration for a kernel's call; `run` makes the call, as often as it takes.

    `kind`: what makes it another kind of work than `problem` says.

    While a CUDA graph is captured nothing can be timed, and the table's is what a problem gets that
    was not run before.
    """
    size = size_of(architecture, problem)
    if not ENABLED:
        return configuration_of(kernel, *size)
    key = (kernel, architecture, kind, *_kind_of(problem))
    if key not in _fastest:
        if problem.query.is_cuda and torch.cuda.is_current_stream_capturing():
            return configuration_of(kernel, *size)
        times = {config: _time(run, config) for config in candidates_of(kernel, *size)}
        _fastest[key] = min(times, key=times.__getitem__)
        if triton.knobs.autotuning.print:
            print(f"attn_ext {key}: {_fastest[key]}")
            for config, time in times.items():
                print(f"  {time:9.4f} ms {config}")
    return _fastest[key]


def size_of(architecture: str, problem: Problem) -> tuple[str, int, int, str | None]:
    """What `configuration_of` takes of a problem."""
    width = block_of(max(problem.query.shape[3], problem.value.shape[3]))
    mask, key_mask = masks_of(problem)
    laden = None
    if mask is not None:
        laden = "mask"
    elif problem.dropout_p > 0:
        laden = "dropout"
    elif key_mask is not None:
        laden = "padding"
    return architecture, problem.query.element_size() * 8, width, laden


def _time(run: Callable[[Configuration], None], config: Configuration) -> float:
    """Milliseconds; infinitely many where it does not fit the GPU."""
    try:
        return do_bench(lambda: run(config), return_mode="median")
    except (CompileTimeAssertionFailure, OutOfResources, PTXASError):
        return math.inf


def _kind_of(problem: Problem) -> tuple[Hashable, ...]:
    """What makes one configuration faster than another: sizes, roughly, and what a score takes."""
    query, key = problem.query, problem.key
    sizes = (
        query.shape[0] * query.shape[1],
        query.shape[1] // max(key.shape[1], 1),
        query.shape[2],
        key.shape[2],
    )
    masks = masks_of(problem)
    return (
        query.dtype,
        query.shape[3],
        problem.value.shape[3],
        *(triton.next_power_of_2(max(n, 1)) for n in sizes),
        *(
            side if side == UNLIMITED else triton.next_power_of_2(max(side, 1))
            for side in problem.reach
        ),
        *(None if mask is None else (mask.ptr.dtype, mask.stride_n == 0) for mask in masks),
        problem.dropout_p > 0,
        problem.softcap > 0,
        problem.alibi_slopes is not None,
        problem.sinks is not None,
        torch.get_float32_matmul_precision(),
    )
