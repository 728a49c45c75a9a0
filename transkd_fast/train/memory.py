"""Memory on CPU: keeping what was freed, and measuring the peak of what is allocated."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER_TRIM = -1  # mallopt takes an int, so no threshold above 2 GiB can be named; -1 switches trimming off
_PROFILER_CHATTER = (b"ActivityProfiler", b"CPUAllocator.cpp", b"gpuGetDeviceCount failed")


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
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) != 1:
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
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _without_profiler_chatter(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = function()
    return result, _peak_of(profiler)


@contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Hold back what the profiler's C++ side prints about itself on stderr, and pass everything else on."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if not any(chatter in line for chatter in _PROFILER_CHATTER):
                    os.write(2, line)


def _peak_of(profiler: Any) -> int:
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = level = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        level += record.nbytes()
        peak = max(peak, level)
    return peak
