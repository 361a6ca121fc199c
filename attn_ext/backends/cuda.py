"""The tensor-core kernels of csrc/cuda, for NVIDIA GPUs from Turing (compute capability 7.5) on.

They run on the current stream of the tensors' device. Nothing waits for the device, with one
exception: with dropout, a seed that is a CUDA tensor is read by the host in either pass. Seeds that
are ints or CPU tensors cost nothing; a captured graph repeats theirs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attn_ext.backends import Gradients, WeightsGradients, native
from attn_ext.problem import Problem

try:
    from attn_ext import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)

if _cuda is not None:
    _cuda.set_dtypes(native.DTYPES)


def architectures() -> list[str]:
    """What the kernels were compiled for, as torch.cuda.get_arch_list() says it."""
    return [] if _cuda is None else _cuda.architectures()


def no_device_reason() -> str:
    """Why the kernels find no device; empty where there is one."""
    return "attn_ext._cuda is not built" if _cuda is None else _cuda.no_device_reason()


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the CUDA kernels can't run a problem."""
    query = problem.query
    if not (query.is_cuda if _takes_cuda() else query.is_cpu):
        return list(_reasons_elsewhere(query.device))
    if _cuda is None:
        return [_not_built()]
    head_dim, value_dim = query.shape[3], problem.value.shape[3]
    return list(_reasons(query.device, query.dtype, head_dim, value_dim, _allow_tf32(query)))


def forward(problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns out (B, Hq, Lq, Dv) in query's dtype and memory order, and lse (B, Hq, Lq)."""
    return native.forward(_cuda, _settings(problem), problem, with_lse)


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
    row_term = torch.empty_like(lse, memory_format=torch.contiguous_format)
    settings = _settings(problem)
    return native.backward(_cuda, settings, problem, out, lse, dout, dlse, dmask, row_term)


def weights(problem: Problem, lse: Tensor, average: bool) -> Tensor:
    """The weights after dropout, (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk)."""
    return native.weights(_cuda, _settings(problem), problem, lse, average)


def weights_backward(
    problem: Problem, lse: Tensor, dweights: Tensor, average: bool, mask_gradient: bool
) -> WeightsGradients:
    """Gradients of `weights`, LSE being an input of its own."""
    dmask = native.mask_gradient_of(problem) if mask_gradient else None
    settings = _settings(problem)
    return native.weights_backward(_cuda, settings, problem, lse, dweights, average, dmask)


def _takes_cuda() -> bool:
    """Whether the kernels run on a GPU, not on the host as in tests."""
    return _cuda is None or _cuda.device_type == "cuda"


def _settings(problem: Problem) -> tuple[int, int, bool]:
    """The arguments that every native function starts with: device, stream, whether TF32 may be."""
    query = problem.query
    if not query.is_cuda:
        return 0, 0, _allow_tf32(query)
    stream = torch.cuda.current_stream(query.device).cuda_stream
    return query.device.index, stream, _allow_tf32(query)


def _allow_tf32(query: Tensor) -> bool:
    """Torch's setting for float32 products; before compute capability 8.0 there is no TF32."""
    return (
        query.dtype is torch.float32
        and torch.get_float32_matmul_precision() != "highest"
        and _has_tf32(query.device.index or 0)
    )


@functools.cache
def _has_tf32(device: int) -> bool:
    return not _cuda.no_device_reason() and _cuda.compute_capability(device)[0] >= 8


def _not_built() -> str:
    return f"attn_ext._cuda is not built ({_import_error}); run `pip install -e .` where nvcc is"


@functools.cache
def _reasons_elsewhere(device: torch.device) -> tuple[str, ...]:
    """The reasons for tensors on a device of another kind: kept, for CPU calls ask each time."""
    wanted = "CUDA" if _takes_cuda() else "CPU"
    reason = f"query is on {device}, and this backend takes {wanted} tensors"
    return (_not_built(), reason) if _cuda is None else (reason,)


@functools.cache
def _reasons(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, allow_tf32: bool
) -> tuple[str, ...]:
    """The reasons for tensors on a device of the right kind: all that the kernels depend on."""
    if missing := _cuda.no_device_reason():
        return (f"the CUDA runtime can't use {device}: {missing}",)
    index = device.index or 0
    major, minor = _cuda.compute_capability(index)
    reasons = []
    if not runs_on(_cuda.architectures(), major, minor):
        reasons.append(
            f"{device} has compute capability {major}.{minor}, and attn_ext._cuda is compiled for "
            f"{', '.join(_cuda.architectures())}; TORCH_CUDA_ARCH_LIST={major}.{minor} would do"
        )
    if dtype is torch.bfloat16 and major < 8:
        reasons.append(
            f"query is bfloat16, which takes compute capability 8.0, and {device} has "
            f"{major}.{minor}; float16 or float32 would do"
        )
    reasons += native.reasons_of_inputs(dtype, head_dim, value_dim)
    if not reasons:
        limit = _cuda.shared_bytes_limit(index)
        needed = _cuda.shared_bytes(dtype, head_dim, value_dim, allow_tf32, limit)
        if needed > limit:
            reasons.append(
                f"query and value have a head_dim of {head_dim} and {value_dim} in "
                f"{str(dtype).removeprefix('torch.')}, which takes {needed} bytes of shared memory "
                f"a block, and {device} has {limit}; a smaller one, or 16 bits, would do"
            )
    return tuple(reasons)


def runs_on(compiled: list[str], major: int, minor: int) -> bool:
    """Whether code for such architectures runs on a device of this compute capability."""
    for name in compiled:
        kind, number = name.split("_")
        for_major, for_minor = divmod(int(number), 10)
        if kind == "compute" and (for_major, for_minor) <= (major, minor):
            return True
        if kind == "sm" and for_major == major and for_minor <= minor:
            return True
    return False
