"""How the benches take times: in which order, what is queued on a GPU, graphs and launches."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_rows import OneRound, problem, square_case
from harness import cases, launches, timing


def test_every_round_runs_every_case_and_the_order_rotates():
    calls = []

    def named(name):
        def function(x):
            calls.append(name)
            return x.square().sum()

        return square_case(name, function)

    times = timing.interleaved(OneRound(), [named("a"), named("b"), named("c")], rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [len(t.total) for t in times] == [3, 3, 3]


def test_total_is_forward_plus_backward_per_round():
    samples = [timing.Sample(1.0, 10.0), timing.Sample(2.0, 30.0)]
    times = timing._times(samples)
    assert times.total.tolist() == [11.0, 32.0] and times.wall is None and times.queued is None


@pytest.mark.parametrize(("late", "queued"), [(1, True), (2, False)])
def test_times_that_hold_the_hosts_work_are_marked(late, queued):
    samples = [timing.Sample(1.0, 1.0, 3.0, i >= late) for i in range(10)]
    assert timing._times(samples).queued is queued


class FakeCuda:
    """Stands in for torch.cuda: writes down what is queued, and gives events one ms per entry between them."""

    def __init__(self):
        self.queue = []

    def install(self, monkeypatch, flush):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                fake.queue.append("event")
                self.at = len(fake.queue)

            def query(self):
                return False

            def elapsed_time(self, other):
                return float(other.at - self.at - 1)

        class Device:
            def __init__(self, device):
                assert device.type == "cuda"

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.queue.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue.append("sleep" if cycles > 0 else "none"))
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: flush)


def test_on_cuda_the_queue_is_filled_and_the_cache_overwritten_before_each_direction(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch, SimpleNamespace(zero_=lambda: cuda.queue.append("flush")))
    case = cases.Case(
        problem(device=torch.device("cuda")),
        "cuda",
        lambda: cuda.queue.append("forward"),
        lambda loss: cuda.queue.extend(["backward"] * 2),
        lambda: None,
        [],
        [],
    )
    sample = timing.timed(case, 1e-3)
    timed_part = ["synchronize", "flush", "sleep", "event", "forward", "event", "flush", "event", *["backward"] * 2]
    assert cuda.queue == [*timed_part, "event", "synchronize", "forward", *["backward"] * 2, "synchronize"]
    assert (sample.forward, sample.backward, sample.queued) == (1.0, 2.0, True)
    assert sample.wall > 0 and sample.issue > 0


def test_a_graph_is_replayed_after_the_call_on_an_overwritten_cache(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch, SimpleNamespace(zero_=lambda: cuda.queue.append("flush")))
    case = cases.Case(
        problem(device=torch.device("cuda")), "cuda", lambda: None, lambda loss: None, lambda: None, [], []
    )
    graph = SimpleNamespace(replay=lambda: cuda.queue.extend(["replay"] * 3))
    sample = timing.timed(case, 1e-3, graph)
    assert cuda.queue[-8:] == ["flush", "sleep", "event", *["replay"] * 3, "event", "synchronize"]
    assert (sample.forward, sample.backward, sample.graph) == (0.0, 0.0, 3.0)
    assert timing._times([sample, replace(sample, graph=5.0)]).graph.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("captured", [True, False])
def test_a_graph_is_made_where_the_problem_asks_for_one_and_the_call_can_be_captured(captured, monkeypatch):
    calls, capturing = [], []

    class Capture:
        def __init__(self, *arguments, **options):
            capturing.append(0)

        def __enter__(self):
            capturing.append(1)

        def __exit__(self, *error):
            capturing.append(0)

    def forward():
        calls.append(capturing[-1] if capturing else 0)
        if calls[-1] and not captured:
            raise RuntimeError("operation not permitted when stream is capturing")

    FakeCuda().install(monkeypatch, None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    on_gpu = problem(device=torch.device("cuda"))
    case = cases.Case(replace(on_gpu, graph=True), "cuda", forward, lambda loss: None, lambda: None, [], [])
    assert timing.graph_of(case) == ("graph" if captured else None)
    assert calls == [0] * timing.WARM_CALLS + [1]
    assert timing.graph_of(replace(case, problem=on_gpu)) is None
    assert timing.graph_of(replace(case, problem=problem(graph=True))) is None
    assert len(calls) == timing.WARM_CALLS + 1


def test_launches_are_the_activities_on_the_device():
    def event(device, annotation=False):
        return SimpleNamespace(device_type=lambda: device, is_user_annotation=lambda: annotation)

    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    assert launches.count([event(on_gpu), event(on_cpu), event(on_gpu), event(on_gpu, annotation=True)]) == 2
    assert launches.count([event(on_cpu)]) is None
    assert launches.launches(square_case()) == (None, None)
