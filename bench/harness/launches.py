"""How many times a case makes the GPU start something: kernels, copies and fills, forward and backward apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from harness.cases import Case


def launches(case: Case) -> tuple[int | None, int | None]:
    """Launches of forward and backward; None on CPU, and where the profiler is not allowed to see the GPU."""
    if case.problem.device.type != "cuda":
        return None, None
    loss, forward = _counted(case.forward, case.problem.device)
    _, backward = _counted(lambda: case.backward(loss), case.problem.device)
    return forward, backward


def _counted(function: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = function()
        torch.cuda.synchronize(device)
    return result, count(profiler.profiler.kineto_results.events())


def count(events: Iterable[Any]) -> int | None:
    """The number of activities on a GPU among the profiler's events, or None if there is none at all.

    Every measured direction launches something: none means that the machine hides its GPU from profilers.
    """
    found = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    return len(found) or None
