"""Peak memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

_STATUS = "/proc/self/status"
_RESET = "/proc/self/clear_refs"
_RESET_PEAK = "5"


def can_reset_peak() -> bool:
    """Whether Linux lets this process start its record of peak memory anew."""
    try:
        with open(_RESET, "w") as file:
            file.write(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes(call: Callable[[], object]) -> int:
    """How far a call raises this process's memory at its highest, in bytes, results included.

    What the C library kept of memory that was freed is returned to the system first, since a call
    could use it unseen. Where the record of the peak can't be reset, it must not have been higher
    before, as in a new process.
    """
    ctypes.CDLL(None).malloc_trim(0)
    can_reset_peak()
    before = _kibibytes("VmRSS")
    result = call()
    peak = _kibibytes("VmHWM")
    del result
    return max(0, peak - before) * 1024


def device_peak_bytes(call: Callable[[], object], device: str) -> int:
    """The same on a CUDA device, of what PyTorch allocates there."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _kibibytes(name: str) -> int:
    with open(_STATUS) as status:
        return int(next(line for line in status if line.startswith(name)).split()[1])
