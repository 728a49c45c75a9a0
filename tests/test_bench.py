"""The benches' harness: what stands before a time, what is made of times, how rows are kept."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_rows import ROOT, row
from harness import cases, launches, measure, memory, rates, report, rows, timing
from harness.rows import Figures

CPU = torch.device("cpu")


class OneRound:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            function()


def problem(**changes):
    values = {"op": "hcl", "size": "stages 1-4", "batch": 2, "shape": "2x3", "dtype": "fp32", "layout": "nchw"}
    return cases.Problem(**{**values, "device": CPU, **changes})


def square_case(backend="eager", function=None, **changes):
    """A case whose truth is sum x^2; `function` computes something else."""
    x = torch.arange(1.0, 7.0).reshape(2, 3).requires_grad_()
    upstream = torch.tensor(0.37, dtype=torch.float64)
    exact = x.detach().double()
    truth = exact.square().sum(), [2 * 0.37 * exact]
    function = function or (lambda x: x.square().sum())
    return cases.gradient_case(problem(**changes), backend, lambda: function(x), [x], [], truth, upstream)


def measured(*these, rounds=3):
    return measure.measure(OneRound(), these, rounds, 1, "tuned")


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch):
    monkeypatch.setattr(rates, "copy_rate", lambda device: 100e9)
    monkeypatch.setattr(rates, "gemm_rate", lambda device, dtype: 400e9)


# The gate


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.001 * ctx.saved_tensors[0]


def raises(x):
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: x.square().sum() * 1.001, "value is off by 1.0e-03, gradient 0 is off by 1.0e-03"),
        (WrongGradient.apply, "gradient 0 is off by 5.0e-04"),
        (lambda x: x.square().sum() * float("nan"), "value is off by nan, gradient 0 is off by nan"),
        (raises, "RuntimeError: first line"),
    ],
    ids=["value", "gradient", "nan", "raises"],
)
def test_a_wrong_case_has_no_time_and_does_not_stop_the_others(function, error):
    right, wrong = measured(square_case(), square_case("cpu", function))
    assert (wrong.error, wrong.total, wrong.rounds, wrong.peak_bytes) == (error, Figures(), 0, None)
    assert right.error is None and right.total.p50_ms > 0 and right.total.ratio == 1
    assert f"WRONG, no time: {error}" in report.report([right, wrong])


def test_without_a_right_baseline_there_are_no_ratios():
    wrong, right = measured(square_case("eager", raises), square_case("cpu"))
    assert wrong.error and right.total.p50_ms > 0 and right.total.ratio is None


def test_upstream_gradient_is_cast_before_the_timed_part():
    case = square_case(function=lambda x: x.sum())
    loss = case.forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        case.backward(loss)
    assert not {event.name for event in profiler.events()} & {"aten::to", "aten::_to_copy"}


# Times


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


def test_launches_are_the_activities_on_the_device():
    def event(device, annotation=False):
        return SimpleNamespace(device_type=lambda: device, is_user_annotation=lambda: annotation)

    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    assert launches.count([event(on_gpu), event(on_cpu), event(on_gpu), event(on_gpu, annotation=True)]) == 2
    assert launches.count([event(on_cpu)]) is None
    assert launches.launches(square_case()) == (None, None)


# Shares of the copy and GEMM rates


def test_shares_are_of_the_rates_of_the_run():
    this = row(copy_bytes_per_s=100e9, gemm_flops_per_s=400e9)
    figures = measure._figures(np.array([1.0, 2.0, 4.0]), this, 100_000_000, 40_000_000)
    assert (figures.bytes_per_s, figures.copy_share) == (50e9, 0.5)
    assert (figures.flops_per_s, figures.gemm_share) == (20e9, 0.05)
    assert measure._figures(np.array([2.0]), this, None, None).copy_share is None


def test_forward_and_backward_add_up_to_the_total():
    work = {"forward": 48, "backward": 72}
    (only,) = measured(square_case(least_bytes=work, least_flops=work))
    assert [getattr(only, mode).least_bytes for mode in rows.MODES] == [48, 72, 120]
    assert only.total.copy_share == pytest.approx(120 / (only.total.p50_ms / 1e3) / 100e9)
    assert only.total.gemm_share == pytest.approx(120 / (only.total.p50_ms / 1e3) / 400e9)


def test_a_copy_counts_read_and_written_bytes_and_exceeds_the_caches(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(rates.LEAST_COPY_BYTES, "cpu", 1000)
    monkeypatch.setattr(rates, "last_level_cache", lambda: 500)
    monkeypatch.setattr(rates, "_seconds", lambda function, device: function().numel() / 1e6)
    assert rates.copy_rate.__wrapped__(CPU) == 2e6
    monkeypatch.setattr(rates, "_seconds", lambda function, device: 1.0)
    assert rates.copy_rate.__wrapped__(CPU) == 2 * 4 * 500


def test_a_gemm_grows_until_it_is_long_enough(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(rates, "_seconds", lambda function, device: function().shape[0] / 512 * 0.05)
    assert rates.gemm_rate.__wrapped__(CPU, torch.float32) == 2 * 1024**3 / 0.1


def test_the_largest_cache_is_found(tmp_path):
    for index, size in enumerate(["32K", "1024K", "32768K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert rates.last_level_cache(tmp_path) == 32 << 20
    assert rates.last_level_cache(tmp_path / "none") == 0


# Memory


class Saves(torch.autograd.Function):
    """Keeps the input and one new tensor of its size, where autograd sees it or hidden from its hooks."""

    @staticmethod
    def forward(ctx, x, hidden):
        new = x.clone()
        if hidden:
            ctx.save_for_backward(x)
            ctx.new = new
        else:
            ctx.save_for_backward(x, new)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0], None


@pytest.mark.parametrize("hidden", [False, True])
def test_saved_bytes_are_inputs_and_what_the_forward_allocated(hidden):
    case = square_case(function=lambda x: Saves.apply(x, hidden))
    size = case.leaves[0].nbytes
    assert memory.saved_for_backward(case) == (2 * size, size)


def test_saving_inputs_only_is_nothing_new():
    case = square_case()
    assert memory.saved_for_backward(case) == (case.leaves[0].nbytes, 0)


def test_what_stays_under_no_grad_is_seen():
    kept = []

    def leaky(x):
        kept.append(x.detach().clone())
        return x.square().sum()

    assert memory.kept_without_gradient(square_case()) == 0
    assert memory.kept_without_gradient(square_case(function=leaky)) == 24


def test_a_row_has_all_its_numbers():
    (only,) = measured(square_case())
    assert (only.rounds, only.leaf_bytes, only.saved_bytes, only.saved_new_bytes) == (3, 24, 24, 0)
    assert only.kept_no_grad_bytes == 0 and only.peak_bytes > 0
    assert only.forward.p20_ms <= only.forward.p50_ms <= only.forward.p80_ms
    assert (only.torch, only.device_type, only.driver) == (torch.__version__, "cpu", only.driver)
    assert re.fullmatch(r"[0-9a-f]{12}", only.sources) and not only.stale


# Rows


def test_rows_come_back_as_written_and_an_equal_key_replaces(tmp_path):
    first, other = row(ms=1.0), row(ms=2.0, sources="0123")
    rows.write([first, other], tmp_path)
    rows.write([replace(first, total=Figures(3.0, 3.0, 3.0))], tmp_path)
    back = rows.read(tmp_path)
    assert [r.total.p50_ms for r in back] == [3.0, 2.0] and back[1] == other
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["total_p50_ms"] for line in lines] == ["3.0", "2.0"]
    assert {"forward_p20_ms", "backward_copy_share", "total_gemm_share", "forward_launches", "driver"} <= set(lines[0])


def test_rows_are_replaced_as_a_whole(tmp_path, monkeypatch):
    rows.write([row(ms=1.0)], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["rows.csv", "rows.json"]

    def killed(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        rows.write([row(ms=2.0, sources="0123")], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", ["op", "backend", "shape", "dtype", "layout", "device", "torch", "triton", "sources"])
def test_rows_are_keyed_by_what_their_times_depend_on(name):
    assert replace(row(), **{name: "other"}).key != row().key


def test_rows_of_another_layout_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"op": "hcl"}]')
    with pytest.raises(ValueError, match=r"expected rows of today's layout, got KeyError\('forward'\); move the file"):
        rows.read(tmp_path)


def test_only_the_newest_comparison_of_a_group_counts():
    old = [row("eager", measured_at="1"), row("cpu", measured_at="1"), row("triton", measured_at="1")]
    new = [row("eager", measured_at="2"), row("cpu", measured_at="2")]
    other = [row("eager", layout="channels_last", measured_at="1")]
    assert rows.latest([*old, *other, *new]) == [new, other]


def test_a_digest_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a.h").write_text("1")
    first = rows.digest(["*.h"], tmp_path)
    (tmp_path / "a.h").write_text("2")
    second = rows.digest(["*.h"], tmp_path)
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    assert len({first, second, rows.digest(["*.h"], tmp_path)}) == 3
    with pytest.raises(ValueError, match="expected files in"):
        rows.digest(["*.none"], tmp_path)


@pytest.mark.parametrize("backend", rows.KERNELS)
def test_a_kernels_sources_hold_what_all_ops_share_and_the_flags_it_is_compiled_with(backend):
    files = {
        path.relative_to(ROOT).as_posix()
        for pattern in rows.sources_of("hcl", backend, "cpu" if backend == "cpu" else "cuda")
        for path in ROOT.glob(pattern)
    }
    shared = {path.relative_to(ROOT).as_posix() for path in (ROOT / "transkd_fast" / "ops").glob("_*.py")}
    assert {"transkd_fast/ops/_checks.py", "transkd_fast/ops/_autograd.py"} <= shared <= files
    assert ("setup.py" in files) == (backend != "triton")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_steps_sources_hold_the_flags_its_kernels_are_compiled_with(device):
    assert "setup.py" in rows.sources_of("step b2-b0", "ours", device)


@pytest.mark.parametrize(("backend", "folder"), [("cpu", "cpu"), ("cuda", "cuda")])
def test_a_kernels_sources_hold_its_own_folder_and_what_is_shared(backend, folder):
    patterns = rows.sources_of("hcl", backend, folder)
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert {"csrc/common/hcl_pyramid.h", "transkd_fast/ops/hcl.py"} <= files
    assert any(name.startswith(f"csrc/{folder}/hcl") for name in files)


# The step


def test_both_sides_of_the_step_compute_in_full_fp32(monkeypatch):
    import bench_step

    def settings():
        return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.enabled]

    seen = []

    def watched(losses, model, images, labels):
        seen.append(settings())
        return computed(losses, model, images, labels)

    computed = bench_step.losses_and_gradient
    monkeypatch.setattr(bench_step, "losses_and_gradient", watched)
    monkeypatch.setattr(bench_step, "HEIGHT", 64)
    monkeypatch.setattr(bench_step, "WIDTH", 128)
    monkeypatch.setattr(bench_step.models, "segformer_b2", bench_step.models.segformer_b0)

    def measure_cases(these, rounds, warmup):
        for case in these:
            assert case.check() is None
            seen.append(settings())

    torch.backends.cuda.matmul.allow_tf32 = True  # monkeypatch would delete it, which this module does not allow
    try:
        bench_step.test_step("cpu", measure_cases)
        assert settings() == [True, True, True]  # as before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == [[False, False, True]] * 5
