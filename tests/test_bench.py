"""The benches' harness: what stands before a time, what is made of times, how rows are kept."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_rows import ROOT, OneRound, problem, row, square_case
from harness import cases, measure, memory, rates, report, rows
from harness.rows import Figures

from transkd_fast import backends

CPU = torch.device("cpu")


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


def map_case(scale=1.0, upstream_scale=1.0, moved=1.0, parameters=1):
    """A case of a map, weight * x^2, that counts its calls and moves a running value."""
    x, weight = torch.arange(1.0, 7.0).reshape(2, 3).requires_grad_(), torch.tensor([2.0], requires_grad=True)
    running, count = torch.tensor([0.5]), torch.tensor(3)
    upstream = torch.linspace(-1, 2, 6).reshape(2, 3)
    exact, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = exact_weight * exact.square()
    gradients = torch.autograd.grad(value, [exact, exact_weight], upstream.double())

    def function():
        running.add_(moved)
        count.add_(1)
        return scale * weight * x.square()

    return cases.gradient_case(
        problem(),
        "eager",
        function,
        [x, weight],
        [running],
        (value.detach(), gradients),
        upstream_scale * upstream,
        parameters,
        [(running, torch.tensor([1.5], dtype=torch.float64)), (count, torch.tensor(4))],
    )


def test_a_map_is_checked_with_its_upstream_gradient_and_with_what_it_changes_from_the_same_start():
    case = map_case()
    assert [case.check() for _ in range(2)] == [None, None]
    assert map_case(upstream_scale=1.01).check() == "gradient 0 is off by 1.0e-02, gradient 1 is off by 1.0e-02"
    assert map_case(moved=1.1).check() == "changed tensor 0 is off by 6.7e-02"
    # Between the tolerances of maps and of parameters.
    assert map_case(scale=1 + 5e-5).check() == "value is off by 5.0e-05, gradient 0 is off by 5.0e-05"
    assert "gradient 1" in map_case(scale=1 + 5e-5, parameters=0).check()


@pytest.mark.parametrize(
    ("dtype", "off", "right"), [("bf16", 1e-3, True), ("bf16", 1e-2, False), ("fp32", 1e-3, False)]
)
def test_products_of_rounded_operands_may_be_off_by_their_rounding(dtype, off, right):
    case = square_case(function=lambda x: (1 + off) * x.square().sum(), dtype=dtype, products=True)
    assert (case.check() is None) == right
    assert square_case(function=lambda x: (1 + off) * x.square().sum(), dtype=dtype).check() is not None


@pytest.mark.parametrize(("backend", "right"), [("eager", True), ("published", True), ("cpu", False)])
def test_only_kernels_are_held_to_what_a_batch_norms_sums_cost_the_others(backend, right):
    def gradient_off(x):
        return x.square().sum() * (1 + 5e-5) - 5e-5 * x.detach().square().sum()

    error = square_case(backend, gradient_off, statistics=True).check()
    assert (error is None) == right
    assert square_case("eager", gradient_off).check() is not None


def test_maps_of_another_shape_are_no_match():
    (wrong,) = measured(square_case(function=lambda x: x.square().sum().expand(3)))
    assert wrong.error is not None
    with pytest.raises(ValueError, match=r"expected shape \[2, 3\], got \[3\]"):
        cases.relative_difference(torch.ones(3), torch.ones(2, 3))


def test_a_copy_moves_as_many_bytes_as_the_problem_must_in_each_direction():
    case = cases.copy_case(problem(least_bytes={"forward": 48, "backward": 80}))
    (source,), (target,) = case.leaves, case.others
    assert source.nbytes == target.nbytes == 40
    case.backward(target.zero_())
    assert target.sum() == 40
    target.zero_()
    assert case.forward().nbytes == 0 and target.sum() == 24 and target[:24].all()
    row = measured(square_case(least_bytes={"forward": 48, "backward": 80}), case)[1]
    assert (row.backend, row.error, row.saved_bytes, row.kept_no_grad_bytes) == ("copy", None, 0, 0)


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


def test_sources_hold_the_op_that_another_one_is_made_of():
    for backend in ("eager", "cpu", "triton", "cuda"):
        assert set(rows.sources_of("hcl", backend, "cpu")) <= set(rows.sources_of("hcl_bn", backend, "cpu"))
    assert "transkd_fast/reference/hcl_bn.py" not in rows.sources_of("hcl", "eager", "cpu")


def test_sources_of_the_whole_head_hold_its_modules_and_where_kernels_run_all_of_them():
    assert "transkd_fast/nn/*.py" in rows.sources_of("head", "published", "cpu")
    assert "csrc/cpu/**/*" in rows.sources_of("head", "cpu", "cpu")
    assert "csrc/cpu/**/*" not in rows.sources_of("head", "published", "cpu")


def test_what_a_bench_writes_itself_is_its_own_source():
    assert rows.sources_of("seg_ce", "compiled", "cpu") == ["bench/bench_seg_ce.py"]


def test_sources_hold_the_module_that_is_measured_beside_its_op():
    assert "transkd_fast/nn/gl_mixer.py" in rows.sources_of("gl_mixer", "cpu", "cpu")
    assert "transkd_fast/nn/gl_mixer.py" not in rows.sources_of("gl_mixer", "copy", "cpu")
    assert "transkd_fast/nn/csf.py" not in rows.sources_of("csf", "cpu", "cpu")


def test_a_cpu_kernels_sources_hold_all_that_is_compiled_for_several_ops():
    ops = backends.table()
    shared = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.stem.removesuffix("_cpu") not in ops]
    assert shared and {path.relative_to(ROOT).as_posix() for path in shared} <= set(
        rows.sources_of("pea", "cpu", "cpu")
    )


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
