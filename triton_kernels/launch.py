"""From a `Problem` to kernel calls: what `attn_ext.backends.native` takes for a native module.

Every function plans its calls (`*_plan`, `*_plans`), which bench/compile_report.py compiles for
other machines, and runs them on the current stream of the tensors' device. Nothing waits for the
device, unless `tuning` is asked for: a seed on it is read there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_ext.problem import UNLIMITED, Problem, resolved
from attn_ext.triton_kernels import tuning
from attn_ext.triton_kernels.arguments import (
    Dropout,
    Reach,
    Rows,
    Scoring,
    Shape,
    Sizes,
    masks_of,
    pairs_of,
)
from attn_ext.triton_kernels.backward_keys import backward_keys
from attn_ext.triton_kernels.backward_queries import backward_queries
from attn_ext.triton_kernels.configurations import Configuration, block_of
from attn_ext.triton_kernels.forward import forward as forward_kernel
from attn_ext.triton_kernels.mask_gradient import mask_gradient
from attn_ext.triton_kernels.row_terms import row_terms
from attn_ext.triton_kernels.weights import weights as weights_kernel

INTERPRETED = triton.knobs.runtime.interpret
"""Whether this process interprets the kernels; it is settled when they are defined."""

ATOMIC = os.environ.get("ATTN_EXT_TRITON_ATOMIC", "0") == "1"
"""Whether the backward pass sums dQ by atomic additions, unless torch is told to be deterministic:
five products a tile instead of seven, and float32 sums in memory whose order is chance."""

LOG2_E = 1.4426950408889634


class RowValues(NamedTuple):
    """What `row_terms` writes for the other kernels, in float32."""

    terms: Rows
    scored_lse: Rows


class Call(NamedTuple):
    """A kernel with its grid, its arguments and the compiler's options."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    sums: Tensor | None = None  # what it adds to, from 0 on

    def run(self) -> None:
        if self.sums is not None:
            self.sums.zero_()
        if self.grid > 0:
            self.kernel[(self.grid,)](**self.arguments, **self.options)


class Plan(NamedTuple):
    """A kernel's name, what makes its call for a configuration, and what else makes it another
    kind of work than the problem says."""

    name: str
    call: Callable[[Configuration], Call]
    kind: Hashable = None

    def run(self, architecture: str, problem: Problem) -> None:
        config = tuning.configuration(
            self.name, architecture, problem, self.kind, lambda config: self.call(config).run()
        )
        self.call(config).run()


def forward(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Writes out and lse."""
    with _device_of(problem):
        forward_plan(architecture, seed, problem, dropout, out, lse).run(architecture, problem)


def forward_plan(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    out: Tensor,
    lse: Tensor | None,
) -> Plan:
    """One program for each block of rows."""

    def call(config: Configuration) -> Call:
        arguments = {
            "q": rows_of(problem.query),
            "k": tiles_of(problem.key, config.BLOCK_N, config),
            "v": tiles_of(problem.value, config.BLOCK_N, config),
            "out": rows_of(out),
            "lse": None if lse is None else rows_of(lse),
            "sinks_ptr": None if problem.sinks is None else problem.sinks.contiguous(),
            **_settings(architecture, seed, problem, dropout, config),
        }
        blocks = triton.cdiv(problem.query_length, config.BLOCK_M)
        grid = problem.batch * problem.query_heads * blocks
        return Call(forward_kernel, grid, arguments, _options(config))

    return Plan("forward", call)


def backward(architecture: str, seed: int | Tensor, problem: Problem, *tensors: Any) -> None:
    """Writes dquery and dkey, and dvalue, dmask and row_term where given: what `backward_plans`
    takes."""
    atomic = ATOMIC and not torch.are_deterministic_algorithms_enabled()
    plans = backward_plans(architecture, seed, problem, *tensors, atomic=atomic)
    with _device_of(problem):
        for plan in plans:
            plan.run(architecture, problem)


def backward_plans(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    out: Tensor | None,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    share: float,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor | None,
    dmask: Tensor | None,
    row_term: Tensor | None,
    atomic: bool = False,
) -> list[Plan]:
    """To be run in this order.

    row_term is sum(dO * O) - dlse, for the gradient of sinks. With dweights, times share, in place
    of out, dout and dlse: of weights, never atomic; row_term is then dlse.
    """
    for_weights = dweights is not None
    row_values = None
    if not for_weights:
        row_values = RowValues(*map(rows_of, lse.new_empty((2, *lse.shape))))
    common = {
        "q": rows_of(problem.query),
        "k": rows_of(problem.key),
        "v": rows_of(problem.value),
        "dout": None if dout is None else rows_of(dout),
        "lse": rows_of(lse) if row_values is None else row_values.scored_lse,
        "terms": None if row_values is None else row_values.terms,
        "dweights": None if dweights is None else pairs_of(dweights),
        "share": share,
    }
    batch, heads, key_heads = problem.batch, problem.query_heads, problem.key.shape[1]
    sums = None
    if atomic and not for_weights:
        sums = torch.empty_like(
            problem.query, dtype=torch.float32, memory_format=torch.contiguous_format
        )
    dq_sums = None if sums is None else rows_of(sums)

    def made(kernel: Any, config: Configuration, grid: int, **own: Any) -> Call:
        settings = _settings(architecture, seed, problem, dropout, config)
        return Call(kernel, grid, {**common, **own, **settings}, _options(config))

    def queries_call(config: Configuration) -> Call:
        return made(
            backward_queries,
            config,
            batch * heads * triton.cdiv(problem.query_length, config.BLOCK_M),
            k=tiles_of(problem.key, config.BLOCK_N, config),
            v=tiles_of(problem.value, config.BLOCK_N, config),
            dq=rows_of(dquery),
            dlse=rows_of(row_term) if for_weights and row_term is not None else None,
            dq_sums=dq_sums,
        )

    def keys_call(config: Configuration) -> Call:
        return made(
            backward_keys,
            config,
            batch * key_heads * triton.cdiv(problem.key_length, config.BLOCK_N),
            q=tiles_of(problem.query, config.BLOCK_M, config),
            dout=None if dout is None else tiles_of(dout, config.BLOCK_M, config),
            dk=rows_of(dkey),
            dv=None if dvalue is None else rows_of(dvalue),
            dq_sums=dq_sums,
        )._replace(sums=sums)

    def mask_call(config: Configuration) -> Call:
        assert dmask is not None
        batches, mask_heads, rows, keys = dmask.shape
        tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(keys, config.BLOCK_N)
        return made(
            mask_gradient,
            config,
            batches * mask_heads * tiles,
            dmask=pairs_of(dmask),
            batches=batch,
            OVER_BATCHES=batches == 1,
            OVER_HEADS=mask_heads == 1,
            OVER_ROWS=rows == 1,
            OVER_KEYS=keys == 1,
        )

    plans = [
        Plan("backward_atomic" if sums is not None else "backward_keys", keys_call, for_weights),
        Plan("backward_queries", queries_call, (for_weights, sums is not None)),
    ]
    if dmask is not None:
        plans.append(
            Plan("mask_gradient", mask_call, (for_weights, *(n == 1 for n in dmask.shape)))
        )
    if row_values is not None and out is not None and dout is not None:
        plans.insert(0, _row_terms_plan(problem, out, dout, dlse, lse, row_values, row_term))
    return plans


def weights(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    lse: Tensor,
    result: Tensor,
    average: bool,
) -> None:
    """Writes the weights, (B, Hq, Lq, Lk), or (B, 1, Lq, Lk) for their mean over heads."""
    with _device_of(problem):
        plan = weights_plan(architecture, seed, problem, dropout, lse, result, average)
        plan.run(architecture, problem)


def weights_plan(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    lse: Tensor,
    result: Tensor,
    average: bool,
) -> Plan:
    """One program for each tile of the result."""

    def call(config: Configuration) -> Call:
        arguments = {
            "q": rows_of(problem.query),
            "k": rows_of(problem.key),
            "lse": rows_of(lse),
            "out": pairs_of(result),
            "AVERAGE": average,
            **_settings(architecture, seed, problem, dropout, config),
        }
        row_blocks = triton.cdiv(problem.query_length, config.BLOCK_M)
        key_blocks = triton.cdiv(problem.key_length, config.BLOCK_N)
        heads = min(problem.query_heads, 1) if average else problem.query_heads
        grid = problem.batch * heads * row_blocks * key_blocks
        return Call(weights_kernel, grid, arguments, _options(config))

    return Plan("weights", call, average)


def _row_terms_plan(
    problem: Problem,
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    row_values: RowValues,
    row_term: Tensor | None,
) -> Plan:
    def call(config: Configuration) -> Call:
        arguments = {
            "out": rows_of(out),
            "dout": rows_of(dout),
            "dlse": None if dlse is None else rows_of(dlse),
            "lse": rows_of(lse),
            **row_values._asdict(),
            "negated_terms": None if row_term is None else rows_of(row_term),
            "sizes": _sizes(problem),
            "UNIT": _unit(problem),
            "VALUE_DIM": problem.value.shape[3],
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_DV": block_of(problem.value.shape[3]),
        }
        blocks = triton.cdiv(problem.query_length, config.BLOCK_M)
        grid = problem.batch * problem.query_heads * blocks
        return Call(row_terms, grid, arguments, _options(config))

    return Plan("row_terms", call)


def rows_of(tensor: Tensor) -> Rows:
    """A tensor (B, H, L, D), copied if its rows are not contiguous, or (B, H, L)."""
    tensor = resolved(tensor)
    if tensor.dim() == 4 and tensor.stride(3) != 1 and tensor.shape[3] > 1:
        tensor = tensor.contiguous()
    return Rows(tensor, *tensor.stride()[:3])


def tiles_of(tensor: Tensor, length: int, config: Configuration) -> Rows:
    """A tensor (B, H, L, D) that passes by in tiles of `length` rows."""
    rows = rows_of(tensor)
    tensor = rows.ptr
    if not config.descriptors or not has_descriptor(tensor):
        return rows
    # A dimension of size 1 has any stride that is a multiple of 16 bytes.
    strides = [16 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    block = [1, 1, length, block_of(tensor.shape[3])]
    descriptor = TensorDescriptor(tensor, [*tensor.shape], [*strides[:3], 1], block)
    return rows._replace(descriptor=descriptor)


def has_descriptor(tensor: Tensor) -> bool:
    """Whether hardware that copies tiles can address a tensor."""
    size = tensor.element_size()
    strides = (s * size for n, s in zip(tensor.shape[:3], tensor.stride(), strict=False) if n > 1)
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 16 == 0 for stride in strides)
    )


def _settings(
    architecture: str,
    seed: int | Tensor,
    problem: Problem,
    dropout: tuple[int, int] | None,
    config: Configuration,
) -> dict[str, Any]:
    """What all kernels take."""
    reach = _reach(problem)
    mask, key_mask = masks_of(problem)
    slopes = problem.alibi_slopes
    floats = any(m is not None and m.ptr.is_floating_point() for m in (mask, key_mask))
    scoring = Scoring(
        scale=problem.scale,
        softcap=problem.softcap or None,
        alibi_slopes=None if slopes is None else _slopes(slopes),
        diagonal=None if slopes is None else problem.diagonal,
        mask=mask,
        key_mask=key_mask,
    )
    single = problem.query.dtype is torch.float32
    folds = problem.scale > 0 and not (problem.softcap or floats or slopes is not None)
    masked = mask is not None or key_mask is not None
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    return {
        "scoring": scoring,
        "reach": reach,
        "dropout": None if dropout is None else _dropout(problem, seed, dropout[0]),
        "sizes": _sizes(problem),
        "shape": Shape(
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=block_of(head_dim),
            BLOCK_DV=block_of(value_dim),
            UNIT=_unit(problem),
            FOLD=folds,
            HIDES=masked or reach != Reach(None, None),
            MASKED=masked,
            WHOLE_CALLS=_has_whole_calls(problem.q_start, problem.query_length, 16)
            and _has_whole_calls(problem.k_start, problem.key_length, 32),
            PRECISION=precision(architecture) if single else None,
        ),
    }


def _unit(problem: Problem) -> float:
    """What takes a natural score to the kernels' units."""
    return 1.0 if problem.query.dtype is torch.float32 else LOG2_E


def _has_whole_calls(start: int, length: int, step: int) -> bool:
    """Whether dropout's calls serve tiles as they lie, see `dropout`; positions have 32 bits."""
    return start % step == 0 and start % 2**32 + length <= 2**32


def _sizes(problem: Problem) -> Sizes:
    group = problem.query_heads // max(problem.key.shape[1], 1)
    return Sizes(problem.query_heads, group, problem.query_length, problem.key_length)


def precision(architecture: str) -> str:
    """How float32 is multiplied, after torch.get_float32_matmul_precision().

    "highest" is the sum of three TF32 products on NVIDIA, which is about as exact as float32, and
    float32 itself on AMD.
    """
    highest = torch.get_float32_matmul_precision() == "highest"
    if architecture.startswith("gfx"):
        return "ieee"
    return "tf32x3" if highest else "tf32"


def _reach(problem: Problem) -> Reach:
    """The problem's reach, less what hides nothing; within what 32 bits hold."""
    left, right = problem.reach
    rows, keys = problem.query_length, problem.key_length
    low = high = None
    if left != UNLIMITED and problem.diagonal - left > 1 - rows:
        low = min(problem.diagonal - left, keys)
    if right != UNLIMITED and problem.diagonal + right < keys - 1:
        high = max(problem.diagonal + right, -rows)
    return Reach(low, high)


def _slopes(slopes: Tensor) -> Rows:
    stride_b, stride_h = (0, *slopes.stride()) if slopes.dim() == 1 else slopes.stride()
    return Rows(slopes, stride_b, stride_h, 0)


def _dropout(problem: Problem, seed: int | Tensor, threshold: int) -> Dropout:
    on_device = isinstance(seed, Tensor) and seed.device == problem.query.device
    number = 0 if on_device else int(seed)
    return Dropout(
        threshold=as_word(threshold),
        factor=1 / (1 - problem.dropout_p),
        seed_low=as_word(number),
        seed_high=as_word(number >> 32),
        seed_ptr=seed if on_device else None,
        offset=as_word(problem.offset),
        q_start=as_word(problem.q_start),
        k_start=as_word(problem.k_start),
    )


def as_word(number: int) -> int:
    """The low 32 bits, as a signed number: one type of argument whatever the value."""
    return (number + 2**31) % 2**32 - 2**31


def _options(config: Configuration) -> dict[str, Any]:
    # Fused multiply-adds are what the kernels count on; Triton is about to change its default.
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if config.waves_per_eu:  # which only AMD's compiler knows
        options["waves_per_eu"] = config.waves_per_eu
    return options


def _device_of(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    query = problem.query
    return torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext()
