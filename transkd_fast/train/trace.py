"""A profiler's trace of one training step, read as costs of the step's parts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

PREFIX = "transkd::"  # of the names of ranges
STEP = "step"
NORM = "gradient norm"
OPTIMISER = "optimiser"
UNATTRIBUTED = "unattributed"
_NODE = "autograd::engine::evaluate_function: "
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass
class Cost:
    """What a part of one step cost.

    Args:
        seconds: time; on a GPU that of its kernels and copies, but of "data" the host's.
        kept: bytes of tensors that it allocated less those that it freed.
        peak: bytes of tensors allocated in the step so far, at the most while it ran.
    """

    seconds: float = 0.0
    kept: int = 0
    peak: int = 0


class _Segment(NamedTuple):
    start: float
    end: float
    part: str | None  # None where time belongs to no part


def read_steps(events: list[dict[str, Any]], device: str = "cpu") -> list[tuple[float, dict[str, Cost]]]:
    """Attribute the time and memory of steps to their parts.

    The time of a part is that of its range without the ranges within it. A node of the backward pass belongs to the
    part whose forward pass made it, which its sequence number tells; gradients are added up by nodes without one, right
    after those that made the gradient.

    Args:
        events: "traceEvents" of the profiler's Chrome trace of steps, each a range `STEP` with ranges in it.
        device: "cpu" or "cuda"; every step ends when the GPU's work has.

    Returns:
        Per step its seconds, and its costs by part in order of time, which add up to it with `UNATTRIBUTED`.
    """
    events = sorted((e for e in events if "ts" in e), key=lambda e: e["ts"])
    moments = [e["ts"] for e in events]
    found = []
    for step in events:
        if step["name"] == PREFIX + STEP and step.get("cat") == "user_annotation":
            first, last = bisect_left(moments, step["ts"]), bisect_right(moments, step["ts"] + step["dur"])
            found.append(_read_step(events[first:last], device))
    return found


def _read_step(events: list[dict[str, Any]], device: str) -> tuple[float, dict[str, Cost]]:
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
    step = next(e for e in ranges if e["name"] == PREFIX + STEP)
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    nodes = [e for e in ops if e["name"].startswith(_NODE)]
    intervals = [(e["tid"], e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PREFIX)) for e in ranges if e != step]
    intervals += _norm_interval(step, intervals, nodes)
    makers = _makers(ops, _segments(intervals), step["tid"])
    segments = _segments(intervals + _backward_intervals(nodes, makers))

    costs: dict[str, Cost] = {}
    for segment in sorted((s for of_thread in segments.values() for s in of_thread), key=lambda s: s.start):
        if segment.part is not None:
            cost = costs[segment.part] = costs.pop(segment.part, Cost())  # in the order in which they end
            if device == "cpu" or segment.part == "data":
                cost.seconds += (segment.end - segment.start) / 1e6
    if device != "cpu":
        _add_gpu_time(costs, events, segments)
    _add_memory(costs, events, segments, device)
    seconds = step["dur"] / 1e6
    rest = costs.pop(UNATTRIBUTED, Cost())
    rest.seconds = seconds - sum(cost.seconds for cost in costs.values())
    return seconds, costs | {UNATTRIBUTED: rest}


def _segments(intervals: list[tuple[Any, float, float, str | None]]) -> dict[Any, list[_Segment]]:
    """Nested intervals per thread, cut into pieces that each belong to the innermost one."""
    found: dict[Any, list[_Segment]] = {}
    for thread in {interval[0] for interval in intervals}:
        pieces: list[_Segment] = []
        open_: list[tuple[float, str | None]] = []  # ends and parts
        now = 0.0

        def close_until(moment: float, pieces: list[_Segment] = pieces, open_: list[Any] = open_) -> None:
            nonlocal now
            while open_ and open_[-1][0] <= moment:
                end, part = open_.pop()
                if end > now:
                    pieces.append(_Segment(now, end, part))
                    now = end

        for _, start, end, part in sorted((i for i in intervals if i[0] == thread), key=lambda i: (i[1], -i[2])):
            close_until(start)
            if open_ and start > now:
                pieces.append(_Segment(now, start, open_[-1][1]))
            now = start
            open_.append((min(end, open_[-1][0]) if open_ else end, part))
        close_until(float("inf"))
        found[thread] = pieces
    return found


def _part_at(segments: dict[Any, list[_Segment]], thread: Any, moment: float) -> str | None:
    pieces = segments.get(thread, [])
    index = bisect_right(pieces, moment, key=lambda segment: segment.start) - 1
    return pieces[index].part if index >= 0 and moment <= pieces[index].end else None


def _norm_interval(
    step: dict[str, Any], intervals: list[tuple[Any, float, float, str]], nodes: list[dict[str, Any]]
) -> list[tuple[Any, float, float, str]]:
    """From the end of the backward pass to the optimiser: the gradients' norm, clipping, and looks for NaN."""
    end = max((e["ts"] + e["dur"] for e in nodes), default=None)
    starts = [start for _, start, _, part in intervals if part == OPTIMISER and end is not None and start >= end]
    return [(step["tid"], end, min(starts), NORM)] if end is not None and starts else []


def _makers(ops: list[dict[str, Any]], forward: dict[Any, list[_Segment]], thread: Any) -> dict[int, str | None]:
    """The part that made the node with a sequence number: that of the last operator that saw this number come next."""
    makers = {}
    # What runs within a node has the number of that node, or of one that would be made if gradients were wanted.
    within = _segments([(e["tid"], e["ts"], e["ts"] + e["dur"], _NODE) for e in ops if e["name"].startswith(_NODE)])
    for op in ops:
        number = op.get("args", {}).get("Sequence number")
        if number is not None and op["tid"] == thread and _part_at(within, thread, op["ts"]) is None:
            part = _part_at(forward, thread, op["ts"])
            if part not in (NORM, OPTIMISER):
                makers[number] = part
    return makers


def _backward_intervals(
    nodes: list[dict[str, Any]], makers: dict[int, str | None]
) -> list[tuple[Any, float, float, str | None]]:
    known = sorted(makers)
    intervals = []
    last: dict[Any, str | None] = {}
    for node in nodes:
        number, thread = node.get("args", {}).get("Sequence number"), node["tid"]
        adds_up = node["name"].endswith("AccumulateGrad")
        if not adds_up:
            index = bisect_right(known, number) - 1 if number is not None else -1
            part = makers[known[index]] if index >= 0 else None
            last[thread] = None if part is None else f"{part.removesuffix(' forward')} backward"
        intervals.append((thread, node["ts"], node["ts"] + node["dur"], last.get(thread)))
    return intervals


def _add_gpu_time(costs: dict[str, Cost], events: list[dict[str, Any]], segments: dict[Any, list[_Segment]]) -> None:
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in _LAUNCHES and "args" in e}
    for event in (e for e in events if e.get("cat") in _GPU_WORK):
        launch = launches.get(event["args"].get("correlation"))
        part = None if launch is None else _part_at(segments, launch["tid"], launch["ts"])
        if part is not None and part != "data":
            costs[part].seconds += event["dur"] / 1e6


def _add_memory(
    costs: dict[str, Cost], events: list[dict[str, Any]], segments: dict[Any, list[_Segment]], device: str
) -> None:
    number = 0 if device == "cpu" else 1
    total = 0
    for event in (e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == number):
        size = int(event["args"]["Bytes"])
        part = _part_at(segments, event["tid"], event["ts"]) or UNATTRIBUTED
        cost = costs.setdefault(part, Cost())
        cost.kept += size
        cost.peak = max(cost.peak, total, total + size)
        total += size
