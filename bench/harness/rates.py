"""What the device can do, measured in the same run: bytes per second of a copy, FLOPs per second of a GEMM."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

LEAST_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
ROUNDS = {"cpu": 5, "cuda": 20}
LARGEST_GEMM = {"cpu": 4096, "cuda": 8192}
LONG_ENOUGH = 0.05  # seconds of one product on CPU


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written counted, of copying a tensor that no cache holds."""
    count = max(LEAST_COPY_BYTES[device.type], 4 * last_level_cache() if device.type == "cpu" else 0)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * count / _seconds(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product, with torch's present settings (TF32 is off by default)."""
    n = 256
    while True:
        a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(functools.partial(torch.mm, a, b), device)
        if n == LARGEST_GEMM[device.type] or (device.type == "cpu" and seconds > LONG_ENOUGH):
            return 2 * n**3 / seconds
        n *= 2


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the CPU's largest cache as Linux states it; 0 where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call after two that do not count."""
    times = [_once(function, device) for _ in range(2 + ROUNDS[device.type])]
    return statistics.median(times[2:])


def _once(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3
