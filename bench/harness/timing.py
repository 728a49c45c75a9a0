"""Interleaved times: in each round every case runs once, and the order rotates.

A change in the machine's pace then meets all cases. pytest-benchmark times one function after the other; here it drives
the rounds and saves what was measured in them (`--benchmark-json`).

On CPU a call is timed by the clock, with whatever the caches hold after the other cases.

On CUDA events time what the device does. The device is kept busy until the host has queued the whole call, so that the
times hold the kernels and the gaps between them, not Python; the L2 cache is overwritten before the forward and again
before the backward, since in a training step other work lies between the two. `wall` is a second call by the clock, the
host's work included, without either. `graph` is the device's time for a replay of a CUDA graph of the whole call, with
the cache overwritten before it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.cases import Case

FLUSH_BYTES = 256 << 20  # more than twice the L2 cache of any GPU there is
HIGHEST_CLOCK = 3e9  # of a GPU, in cycles a second: a wait counted in cycles is then never too short
LONGEST_WAIT = 0.02  # seconds
GRAPH_WAIT = 2e-4  # seconds: more than the host needs to launch a graph
WARM_CALLS = 3  # before a capture, on its stream: whatever is made at the first call must not be captured


@dataclass(frozen=True)
class Sample:
    """One call: times in ms; on CPU `wall`, `graph` and `queued` are None."""

    forward: float
    backward: float
    wall: float | None = None
    queued: bool | None = None
    issue: float = 0.0
    graph: float | None = None


@dataclass(frozen=True)
class Times:
    """All rounds of one case: per direction an array of times in ms."""

    forward: np.ndarray
    backward: np.ndarray
    total: np.ndarray
    wall: np.ndarray | None
    queued: bool | None
    graph: np.ndarray | None


def interleaved(benchmark: Any, cases: Sequence[Case], rounds: int, warmup: int) -> list[Times]:
    """Time cases round by round.

    Args:
        benchmark: pytest-benchmark's fixture; with `--benchmark-disable` there is one round.
        cases: what to time.
        rounds: number of rounds that count.
        warmup: number of rounds before them.

    Returns:
        Times of every case.
    """
    samples: list[list[Sample]] = [[] for _ in cases]
    graphs = [graph_of(case) for case in cases]
    first = 0

    def one_round() -> None:
        nonlocal first
        for k in range(first, first + len(cases)):
            i = k % len(cases)
            samples[i].append(timed(cases[i], samples[i][-1].issue if samples[i] else LONGEST_WAIT, graphs[i]))
        first += 1

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
    return [_times(mine[-rounds:]) for mine in samples]


def _times(samples: Sequence[Sample]) -> Times:
    forward, backward = (np.array([getattr(s, name) for s in samples]) for name in ("forward", "backward"))
    cuda = samples[0].wall is not None
    wall, graph = (
        None if getattr(samples[0], name) is None else np.array([getattr(sample, name) for sample in samples])
        for name in ("wall", "graph")
    )
    # One round in ten may have been disturbed; more, and the times hold the host's work.
    queued = float(np.mean([bool(sample.queued) for sample in samples])) >= 0.9 if cuda else None
    return Times(forward, backward, forward + backward, wall, queued, graph)


def graph_of(case: Case) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of the whole call; None where the problem asks for none, or the call cannot be captured."""
    device = case.problem.device
    if not case.problem.graph or device.type != "cuda":
        return None
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_CALLS):
                case.run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                case.run()
        except RuntimeError:
            return None
    return graph


def timed(case: Case, issue: float, graph: torch.cuda.CUDAGraph | None = None) -> Sample:
    """Time one call.

    Args:
        case: what to call.
        issue: on CUDA, the seconds for which the host is expected to queue the call.
        graph: on CUDA, a graph of the call that is to be timed too.
    """
    if case.problem.device.type == "cuda":
        return _timed_on_cuda(case, issue, graph)
    start = time.perf_counter()
    loss = case.forward()
    middle = time.perf_counter()
    case.backward(loss)
    return Sample(1e3 * (middle - start), 1e3 * (time.perf_counter() - middle))


def _timed_on_cuda(case: Case, issue: float, graph: torch.cuda.CUDAGraph | None) -> Sample:
    device = case.problem.device
    with torch.cuda.device(device):
        flush = _flush_buffer(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4 if graph is None else 6)]
        torch.cuda.synchronize(device)
        flush.zero_()
        torch.cuda._sleep(int(min(1.5 * issue, LONGEST_WAIT) * HIGHEST_CLOCK))
        start = time.perf_counter()
        events[0].record()
        loss = case.forward()
        events[1].record()
        flush.zero_()
        events[2].record()
        case.backward(loss)
        events[3].record()
        issue = time.perf_counter() - start
        queued = not events[0].query()
        torch.cuda.synchronize(device)
        del loss
        start = time.perf_counter()
        case.run()
        torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - start)
        if graph is not None:
            flush.zero_()
            torch.cuda._sleep(int(GRAPH_WAIT * HIGHEST_CLOCK))
            events[4].record()
            graph.replay()
            events[5].record()
            torch.cuda.synchronize(device)
    forward, backward, *replay = [a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)]
    return Sample(forward, backward, wall, queued, issue, *replay)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
