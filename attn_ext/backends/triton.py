"""The Triton kernels of triton_kernels/, for GPUs of NVIDIA and AMD.

They run on the current stream of the tensors' device, and nothing waits for it, unless block sizes
are timed (triton_kernels/tuning.py). In Triton's
interpreter (TRITON_INTERPRET=1 when the process starts) they take CPU tensors instead, slowly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attn_ext.backends import Gradients, WeightsGradients, native
from attn_ext.problem import Problem

try:
    from attn_ext.triton_kernels import launch
except ImportError as error:  # triton is an optional dependency
    launch = None
    _import_error = str(error)

MAX_LENGTH = 2**30
"""Positions are 32-bit numbers in the kernels, and sums of two of them must be, too."""

MAX_STRIDE = 2**23
"""Offsets inside a tile, of up to 128 rows, are 32-bit numbers, too."""


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't run a problem."""
    if launch is None:
        return [f"triton can't be imported ({_import_error}); `pip install triton` would do"]
    query = problem.query
    reasons = list(_reasons_of_device(query.device))
    reasons += native.reasons_of_inputs(query.dtype, query.shape[3], problem.value.shape[3])
    padding = problem.key_padding_mask
    for name, tensor in (
        ("query", query),
        ("key", problem.key),
        ("value", problem.value),
        ("attn_mask", problem.attn_mask),
        ("key_padding_mask", None if padding is None else padding[:, None, None]),
    ):
        if tensor is not None and _is_far_apart(tensor):
            reasons.append(
                f"{name} has strides of {tensor.stride()}; at most {MAX_STRIDE} between rows and "
                "columns would do"
            )
    lengths = (("query", problem.query_length), ("key", problem.key_length))
    for name, length in lengths:
        if length > MAX_LENGTH:
            reasons.append(f"{name} is {length} long; at most {MAX_LENGTH} would do")
    if problem.alibi_slopes is not None and abs(problem.diagonal) > MAX_LENGTH:
        reasons.append(
            f"q_start and k_start are {problem.q_start} and {problem.k_start} with alibi_slopes; "
            f"at most {MAX_LENGTH} apart would do"
        )
    return reasons


def forward(problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns out (B, Hq, Lq, Dv) in query's dtype and memory order, and lse (B, Hq, Lq)."""
    settings, problem = _settings(problem)
    return native.forward(launch, settings, problem, with_lse)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask_gradient: bool,
) -> Gradients:
    """Gradients for a given out and LSE, recomputing the weights tile by tile."""
    dmask = native.mask_gradient_of(problem) if mask_gradient else None
    row_term = None
    if problem.sinks is not None:
        row_term = torch.empty_like(lse, memory_format=torch.contiguous_format)
    settings, problem = _settings(problem)
    return native.backward(launch, settings, problem, out, lse, dout, dlse, dmask, row_term)


def weights(problem: Problem, lse: Tensor, average: bool) -> Tensor:
    """The weights after dropout, (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk)."""
    settings, problem = _settings(problem)
    return native.weights(launch, settings, problem, lse, average)


def weights_backward(
    problem: Problem, lse: Tensor, dweights: Tensor, average: bool, mask_gradient: bool
) -> WeightsGradients:
    """Gradients of `weights`, LSE being an input of its own."""
    dmask = native.mask_gradient_of(problem) if mask_gradient else None
    settings, problem = _settings(problem)
    return native.weights_backward(launch, settings, problem, lse, dweights, average, dmask)


def _is_far_apart(tensor: Tensor) -> bool:
    sizes, strides = tensor.shape[2:], tensor.stride()[2:]
    return any(n > 1 and s > MAX_STRIDE for n, s in zip(sizes, strides, strict=True))


def _settings(problem: Problem) -> tuple[tuple[str, int | Tensor], Problem]:
    """The arguments that every function of `launch` starts with, and the problem.

    A seed is one of them, so that nobody asks for the value of one that lies on the device.
    """
    seed = problem.seed
    return (architecture(problem.query.device), seed), problem.replace(seed=0)


@functools.cache
def architecture(device: torch.device) -> str:
    """What the kernels are compiled for: "sm_90", "gfx942" and the like, or "interpreter"."""
    if launch.INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _reasons_of_device(device: torch.device) -> tuple[str, ...]:
    if launch.INTERPRETED:
        if device.type == "cpu":
            return ()
        return (f"query is on {device}, and in Triton's interpreter this takes CPU tensors",)
    if device.type != "cuda":
        hint = "; in Triton's interpreter, TRITON_INTERPRET=1, it takes CPU tensors"
        return (
            f"query is on {device}, and this backend takes CUDA and ROCm tensors"
            f"{hint if device.type == 'cpu' else ''}",
        )
    if torch.version.hip:
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return (f"{device} has compute capability {major}.{minor}; 8.0 or more would do",)
    return ()
