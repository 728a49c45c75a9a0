"""Memory on CPU: keeping what was freed, and measuring the peak of what is allocated."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> str | None:
    """Tell glibc to keep freed memory in the process instead of giving it back to the system.

    A training step allocates and frees the same large tensors again and again; by default glibc maps each anew, and the
    page faults cost more than much of the arithmetic. The process then keeps its peak memory until it ends.

    Returns:
        None if it took effect, else the reason why not.
    """
    if not sys.platform.startswith("linux"):
        return f"needs glibc; this is {sys.platform}"
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return "needs glibc; this C library has no mallopt"
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _INT_MAX) != 1:
        return "glibc refused the settings"
    return None


def peak_memory(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Run a function and measure the most memory that tensors took at once, beyond what they took before.

    Args:
        function: what to run.
        device: where its tensors live.

    Returns:
        The function's result and the peak, bytes. On CPU it comes from the profiler's allocation records, so the run
        itself is slower than usual.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "5"
    )  # read at the profiler's first use: it reports its own start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    return result, _peak_of(profiler)


def _peak_of(profiler: Any) -> int:
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = level = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        level += record.nbytes()
        peak = max(peak, level)
    return peak
