"""Who passes a bench: the targets, their verdicts, and what `pytest bench/ --check` makes of them."""

import importlib.util
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_rows import BENCH, row, target
from harness import rows, targets
from harness.rows import Figures

from transkd_fast import backends

pytest_plugins = ["pytester"]


def judged(promised, *these, cold=False):
    return [(v.verdict, v.value, v.reason) for v in targets.judge(promised, these, lambda single: "why", cold)]


def test_a_target_passes_and_misses_by_its_bound():
    eager = row("eager", 10.0)
    assert judged(target(), eager, row(ms=2.0)) == [("PASS", 5.0, "")]
    assert judged(target(), eager, row(ms=2.5)) == [("MISS", 4.0, "")]
    most = {"measure": "saved_new_maps", "against": "", "at_least": None, "at_most": 1.0}
    assert judged(target(**most), row(saved_new_bytes=10, leaf_bytes=10)) == [("PASS", 1.0, "")]
    assert judged(target(**most), row(saved_new_bytes=11, leaf_bytes=10)) == [("MISS", 1.1, "")]


def test_a_wrong_result_is_a_miss():
    assert judged(target(), row("eager"), row(error="off")) == [("MISS", None, "wrong result: off")]


def test_what_did_not_run_says_why():
    assert judged(target(), row("eager")) == [("NOT RUN", None, "why")]
    assert judged(target(), row()) == [("NOT RUN", None, "eager was not measured")]
    assert judged(target(layout=("channels_last",)), row("eager"), row()) == [("NOT RUN", None, "why")]
    no_value = target(measure="launches_forward", against="")
    assert judged(no_value, row()) == [("NOT RUN", None, "launches_forward could not be measured")]


def test_one_cold_round_gives_no_verdict_on_times_but_on_bytes():
    assert judged(target(), row("eager", 10.0), row(), cold=True)[0][::2] == (
        "NOT RUN",
        "one cold round is no measurement",
    )
    kept = target(measure="kept_no_grad_bytes", against="", at_least=None, at_most=0.0)
    assert judged(kept, row(kept_no_grad_bytes=8), cold=True) == [("MISS", 8, "")]


@pytest.mark.parametrize(
    ("measure_name", "figure"),
    [
        ("copy_share_forward", {"forward": Figures(copy_share=0.9)}),
        ("gemm_share_total", {"total": Figures(gemm_share=0.9)}),
        ("launches_backward", {"backward": Figures(launches=0.9)}),
    ],
)
def test_a_measure_reads_its_own_figure(measure_name, figure):
    assert judged(target(measure=measure_name, against="", at_least=0.8), row(**figure)) == [("PASS", 0.9, "")]


def test_what_is_saved_beyond_the_gradients_that_are_returned():
    promised = target(measure="saved_beyond_gradients", against="", at_least=None, at_most=8.0)
    assert judged(promised, row(saved_new_bytes=108, leaf_bytes=100)) == [("PASS", 8, "")]
    assert judged(promised, row(saved_new_bytes=109, leaf_bytes=100)) == [("MISS", 9, "")]
    assert judged(promised, row(saved_new_bytes=0, leaf_bytes=100)) == [("PASS", -100, "")]
    assert judged(promised, row())[0][0] == "NOT RUN"


def test_speed_by_the_clock_and_as_a_graph_are_measures_of_their_own():
    eager, ours = row("eager", wall_ms=6.0, graph_ms=2.0), row(wall_ms=2.0, graph_ms=1.0)
    assert judged(target(measure="speedup_wall", at_least=3), eager, ours) == [("PASS", 3.0, "")]
    assert judged(target(measure="speedup_graph", at_least=3), eager, ours) == [("MISS", 2.0, "")]
    # One of them could not be captured.
    assert judged(target(measure="speedup_graph"), row("eager"), ours) == [("NOT RUN", None, "eager was not measured")]
    unmeasured = ("NOT RUN", None, "speedup_graph could not be measured")
    assert judged(target(measure="speedup_graph"), eager, row()) == [unmeasured]


def test_a_share_of_anothers_memory_is_a_measure_that_compares():
    promised = target(measure="peak_share", at_least=None, at_most=0.125)
    rows = [row("eager", peak_bytes=400), row(peak_bytes=50)]
    (verdict,) = targets.judge(promised, rows, lambda _: "")
    assert (verdict.verdict, verdict.value) == ("PASS", 0.125)
    assert promised.bound == "peak memory beyond the inputs <= 0.125x eager"
    (verdict,) = targets.judge(promised, [row("eager", peak_bytes=400), row(peak_bytes=51)], lambda _: "", cold=True)
    assert verdict.verdict == "MISS"
    (verdict,) = targets.judge(promised, rows[1:], lambda _: "")
    assert (verdict.verdict, verdict.reason) == ("NOT RUN", "eager was not measured")


def test_a_share_of_a_copys_speed_is_judged_and_written_in_hundredths():
    promised = target(against="copy", at_least=0.8)
    (verdict,) = targets.judge(promised, [row("eager", 9.0), row(ms=1.3), row("copy", 1.0)], lambda single: "why")
    assert str(verdict).endswith("forward + backward >= 0.80x a copy of as many bytes: 0.77x, 3 rounds")
    assert verdict.verdict == "MISS"


def test_a_limit_in_hundredths_is_written_with_them():
    assert target(at_least=1.55).bound.endswith(">= 1.55x eager")
    assert target(at_least=5).bound.endswith(">= 5.0x eager")


def test_rows_with_default_malloc_are_judged_by_their_own_targets_only():
    tuned = [row("eager", 10.0, malloc="tuned"), row(ms=5.0, malloc="tuned")]
    default = [row("eager", 30.0, malloc="default"), row(ms=5.0, malloc="default")]
    promised = target(malloc="default")
    assert judged(promised, *tuned, *default) == [("PASS", 6.0, "")]
    assert judged(target(), *default, *tuned) == [("MISS", 2.0, "")]
    assert judged(promised, *tuned) == [("NOT RUN", None, "why")]
    assert promised.case == "hcl cpu, stages 1-4, batch 2, fp32, nchw, default malloc"
    # Where freed memory could not be kept the row says why; it is judged like one where it was.
    assert judged(target(), *(replace(r, malloc="default (needs glibc)") for r in tuned)) == [("MISS", 2.0, "")]


def test_a_target_with_lists_holds_for_each_value():
    promised = target(backend=("cpu", "cuda"), layout=("nchw", "channels_last"))
    assert [verdict for verdict, *_ in judged(promised, row("eager", 10.0), row())] == ["PASS", *["NOT RUN"] * 3]


def test_the_worst_verdict_stands_for_all():
    promised = target()

    def verdict(kind, value=None):
        return targets.Verdict(promised, kind, value)

    passes, misses = [verdict("PASS", 7.0), verdict("PASS", 6.0)], [verdict("MISS", 3.0), verdict("MISS", 2.0)]
    assert targets.worst(passes).value == 6.0
    assert targets.worst([*passes, verdict("NOT RUN")]).verdict == "NOT RUN"
    assert targets.worst([*passes, verdict("NOT RUN"), *misses]).value == 2.0
    assert targets.worst([*misses, verdict("MISS")]).value is None
    most = target(at_least=None, at_most=1.0)
    assert targets.worst([targets.Verdict(most, "MISS", 2.0), targets.Verdict(most, "MISS", 3.0)]).value == 3.0


def test_verdicts_that_did_not_run_for_one_reason_are_one_line():
    promised = target(layout=("nchw", "channels_last"))
    (only,) = targets.merged(promised, targets.judge(promised, [], lambda single: "no CUDA device"))
    assert str(only) == (
        "NOT RUN hcl cpu, stages 1-4, batch 2, fp32, nchw / channels_last: "
        "forward + backward >= 5.0x eager: no CUDA device"
    )
    assert len(targets.merged(promised, targets.judge(promised, [row("eager"), row()], lambda single: "why"))) == 2


GOOD = """
[[case]]
op = "hcl"
backend = "cpu"
device = "cpu"
size = "s"
batch = 2
dtype = "fp32"
layout = ["nchw", "channels_last"]
[[case.target]]
measure = "launches_forward"
at_most = 2
source = "here"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "here"', "", r"case 1, target 1: missing \['source'\]"),
        ('size = "s"', 'size = "s"\nsizes = 1', r"unknown \['sizes'\]"),
        ("launches_forward", "launches", "measure: expected one of .* got 'launches'"),
        ('device = "cpu"', 'device = "gpu"', "device: expected one of"),
        (
            'device = "cpu"',
            'device = "cpu"\nmalloc = "tuned"',
            r"malloc: expected one of \['', 'default'\], got 'tuned'",
        ),
        ('backend = "cpu"', 'backend = "eager"', "backend: expected some of"),
        ("at_most = 2", "", "expected one of at_least and at_most, got none"),
        ("at_most = 2", "at_most = 2\nat_least = 1", "expected one of at_least and at_most, got both"),
        ("launches_forward", "speedup_total", "against: expected with speedup_wall, speedup_graph,"),
        (
            "at_most = 2",
            'at_most = 2\nagainst = "eager"',
            "against: expected with speedup_wall, speedup_graph,",
        ),
    ],
)
def test_a_bad_target_is_named(tmp_path, old, new, message):
    path = tmp_path / "targets.toml"
    path.write_text(GOOD)
    assert [t.layout for t in targets.load(path)] == [("nchw", "channels_last")]
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        targets.load(path)


FAKE_BENCH = """
import torch
from harness import rates, rows
from harness.cases import Problem, gradient_case

rows.SOURCES = {backend: ["README.md"] for backend in rows.SOURCES}
rates.copy_rate, rates.gemm_rate = lambda device: 1e9, lambda device, dtype: 1e9

def test_fake(measure):
    x = torch.ones(4, requires_grad=True)
    truth = torch.tensor(4.0), [2 * 0.5 * torch.ones(4)]
    problem = Problem("fake", "small", 2, "4", "fp32", "nchw", x.device)
    factors = {"eager": 1.0, "cpu": FACTOR}
    measure(
        [
            gradient_case(problem, name, lambda f=f: f * x.square().sum(), [x], [], truth, torch.tensor(0.5))
            for name, f in factors.items()
        ],
        rounds=2,
        warmup=0,
    )
"""
CRASH = """
def test_that_takes_the_process_down():
    import os
    os._exit(3)
"""
ELSEWHERE = """
import os, sys
assert ("MALLOC_MMAP_MAX_" in os.environ) != ("--malloc" in sys.argv)

def test_elsewhere(measure_with_default_malloc):
    measure_with_default_malloc("test_fake")
"""
FAKE_TARGETS = """
[[case]]
op = "fake"
backend = "cpu"
device = "cpu"
size = "small"
batch = 2
dtype = "fp32"
layout = "nchw"
[[case.target]]
measure = "kept_no_grad_bytes"
at_most = BOUND
source = "here"
[[case]]
op = "fake"
backend = ["triton", "cuda"]
device = "cuda"
size = "small"
batch = 2
dtype = "fp32"
layout = "nchw"
[[case.target]]
measure = "launches_forward"
at_most = 1
source = "here"
[[case]]
op = "hcl"
backend = "cpu"
device = "cpu"
size = "small"
batch = 2
dtype = "fp32"
layout = "nchw"
[[case.target]]
measure = "saved_new_maps"
at_most = 1
source = "here"
"""


@pytest.fixture
def run_bench(pytester, monkeypatch):
    """Runs pytest in a process of its own: in this one, extension modules would be imported twice."""
    monkeypatch.setenv("PYTHONPATH", str(BENCH))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments, bound=0, factor=1.0, more=""):
        shutil.copy(BENCH / "conftest.py", pytester.path)
        (pytester.path / "bench_fake.py").write_text(FAKE_BENCH.replace("FACTOR", str(factor)) + more)
        (pytester.path / "targets.toml").write_text(FAKE_TARGETS.replace("BOUND", str(bound)))
        return pytester.runpytest_subprocess("--out=out", "--targets=targets.toml", *arguments, "bench_fake.py")

    return run


def test_a_run_without_a_miss_passes_and_keeps_its_rows(run_bench, pytester):
    result = run_bench("--check")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "PASS    fake cpu, small, batch 2, fp32, nchw: bytes kept under `no_grad` <= 0: 0, 2 rounds",
            "NOT RUN fake triton / cuda, small*: no CUDA device",
            "NOT RUN hcl cpu, small*: bench not selected",
            "1 PASS, 0 MISS, 2 NOT RUN",
        ]
    )
    assert [r.backend for r in rows.read(pytester.path / "out")] == ["eager", "cpu"]
    verdicts = json.loads((pytester.path / "out" / "verdicts.json").read_text())
    assert [v["verdict"] for v in verdicts] == ["PASS", "NOT RUN", "NOT RUN"]


def test_a_miss_fails_a_run_whose_tests_pass(run_bench):
    result = run_bench("--check", bound=-1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["MISS    fake cpu*"])


def test_without_check_nothing_is_judged_and_one_cold_round_is_not_kept(run_bench, pytester):
    result = run_bench("--benchmark-disable", bound=-1)
    assert result.ret == 0 and "MISS" not in result.stdout.str()
    assert not (pytester.path / "out" / "rows.json").exists()


def test_a_crash_leaves_the_rows_of_finished_comparisons(run_bench, pytester):
    result = run_bench("--check", more=CRASH)
    assert result.ret == 3
    assert [r.backend for r in rows.read(pytester.path / "out")] == ["eager", "cpu"]
    assert sorted(path.name for path in (pytester.path / "out").iterdir()) == ["rows.csv", "rows.json"]


def test_a_wrong_case_fails_its_bench_and_shows_no_time(run_bench, pytester):
    result = run_bench("--check", factor=1.5)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*cpu       WRONG, no time: value is off by 5.0e-01*"])
    result.stdout.fnmatch_lines(["MISS    fake cpu*wrong result: value is off by 5.0e-01*"])
    wrong = rows.read(pytester.path / "out")[1]
    assert wrong.backend == "cpu" and wrong.total.p50_ms is None


def test_a_bench_with_default_malloc_runs_in_a_process_of_its_own(run_bench, pytester, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    result = run_bench("--check", "--rounds=3", "-k", "elsewhere", factor=1.5, more=ELSEWHERE)
    result.assert_outcomes(failed=1)
    eager, wrong = rows.read(pytester.path / "out")
    assert (eager.malloc, wrong.malloc, eager.rounds, eager.error) == ("default", "default", 3, None)
    # It is shown here too, and this target speaks of rows with freed memory kept.
    result.stdout.fnmatch_lines(
        [
            "*pytest ended with status 1*",
            f"*cpu       WRONG, no time: {wrong.error}",
            "NOT RUN fake cpu*case not selected",
        ]
    )


@pytest.fixture
def conftest():
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "name", "text", "message"),
    [
        ({"--check": True}, "targets.toml", GOOD.replace("at_most", "at_best"), r"unknown \['at_best'\]"),
        ({}, "rows.json", '[{"op": "hcl"}]', "move the file away"),
        ({"--rounds": 0}, "none", "", "--rounds: expected at least 1, got 0"),
    ],
)
def test_bad_input_stops_a_run_before_any_work(conftest, tmp_path, options, name, text, message):
    (tmp_path / name).write_text(text)
    options = {"--rounds": None, "--check": False, "--out": tmp_path, "--targets": tmp_path / "targets.toml"} | options
    config = SimpleNamespace(stash={}, option=SimpleNamespace(), getoption=options.get)
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_why_a_target_did_not_run(conftest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    eager = row("eager")
    assert conftest.why_not_run(target(op="cwd"), [eager]) == "bench not selected"
    assert conftest.why_not_run(target(batch=(8,)), [eager]) == "case not selected"
    monkeypatch.setattr(backends, "why_not", lambda op, backend: f"no {backend} here")
    assert conftest.why_not_run(target(), [eager]) == "no cpu here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conftest.why_not_run(target(device="cuda"), []) == "no CUDA device"
