"""`make gpu` without a GPU: what its steps do, and what they read off the programs they run."""

import json

import pytest
from gpu_runs import ROOT, a_run

# isort: split
from gpu_run import exercise, machine, place, processes, runner, steps
from gpu_run.runner import Step


def test_the_steps_fit_into_the_time_and_are_made_ready_for():
    assert sum(step.seconds for step in steps.STEPS) <= 60 * steps.MINUTES < 60 * 9
    assert [step.name for step in steps.STEPS[:3]] == ["environment", "build", "GPU tests"]
    assert [step.needs for step in steps.STEPS[:2]] == [None, "environment"]
    assert {step.needs for step in steps.STEPS[2:]} == {steps.PACKAGE}


def test_every_op_has_its_tests_among_the_gpu_tests_and_its_kernels_among_the_exercises():
    ops = steps.ops_of(ROOT)
    assert {"csf", "hcl"} <= set(ops)
    assert [op for op in ops if not (ROOT / "tests" / f"test_{op}.py").exists()] == []
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    kernels |= {path.stem.removesuffix("_kernel") for path in (ROOT / "csrc" / "cuda").glob("*_kernel.cuh")}
    assert set(exercise.CALLS) == kernels & set(ops)


def test_the_exercise_agrees_here(capsys, monkeypatch):
    monkeypatch.setattr(exercise, "DTYPES", exercise.DTYPES[1:])  # the interpreter is slow
    monkeypatch.setattr(exercise, "LAYOUTS", exercise.LAYOUTS[1:])
    if any(exercise.backends.why_not("hcl", backend) is None for backend in ("triton", "cuda")):
        assert exercise.main() == 0
        assert "0 of them wrong" in capsys.readouterr().out
    else:
        assert exercise.main() == 1  # that nothing ran is no success


def test_the_exercise_sees_a_wrong_kernel(monkeypatch, capsys):
    def wrong(maps, backend):
        value = exercise.functional.hcl_loss(maps[:3], maps[3:], backend="eager")
        return value if backend == "eager" else value * 1.001

    def calls():
        maps = [exercise.torch.randn(shape) for shape in exercise.MAPS * 2]
        yield exercise.Call(maps, 3, wrong, 1e-5)

    def why_not(op, backend, tensors=()):
        return None if backend == "eager" or (op, backend) == ("hcl", "triton") else "no"

    monkeypatch.setattr(exercise, "CALLS", {"hcl": calls})
    monkeypatch.setattr(exercise.backends, "why_not", why_not)
    monkeypatch.setattr(exercise.backends, "interpreting_triton", lambda: True)
    assert exercise.main() == 1
    assert "off by 1.0e-03, DISAGREES" in capsys.readouterr().out


def test_configurations_of_the_steps_are_valid():
    from transkd_fast.train.config import load_config

    for arguments in (
        *map(steps.verify_arguments, ("fp32", "bf16")),
        *map(steps.distil_arguments, ("camvid", "street")),
    ):
        assert arguments[0] == "--config"
        assert load_config(ROOT / arguments[1], arguments[2:]).device == "cuda"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_hcl" name="good" /><testcase classname="tests.test_hcl" name="too" />
<testcase classname="tests.test_hcl" name="bad[cuda]"><failure message="off">...</failure></testcase>
<testcase classname="tests.test_hcl" name="setup"><error message="broke">...</error></testcase>
<testcase classname="tests.test_hcl" name="no"><skipped type="pytest.skip" message="why">...</skipped></testcase>
</testsuite></testsuites>"""


def test_junit_is_counted(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert steps.junit_counts(tmp_path / "junit.xml") == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.test_hcl::bad[cuda]", "tests.test_hcl::setup"],
        "skip_reasons": {"why": 1},
    }


def test_verdicts_are_counted():
    from bench_rows import target
    from harness.targets import MISS, NOT_RUN, PASS, Verdict

    cuda = {"device": "cuda", "dtype": ("bf16",)}
    verdicts = [Verdict(target(**cuda), PASS, 9.0), Verdict(target(**cuda), MISS, 1.0), Verdict(target(), NOT_RUN)]
    written = json.loads(json.dumps([verdict.as_dict() for verdict in verdicts]))
    assert steps.verdict_counts(written, "bf16") == {"counts": {"PASS": 1, "MISS": 1}, "verdicts": written[:2]}
    assert steps.verdict_counts(written, "fp32") == {"counts": {}, "verdicts": []}


CLEAN = "========= COMPUTE-SANITIZER\nhcl cuda: agrees\n========= ERROR SUMMARY: 0 errors\n"
FOUND = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n"
FORBIDDEN = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"
UNWATCHED = "========= Target application terminated before first instrumented API call\n"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, CLEAN, "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (97, FOUND, "found: ERROR SUMMARY: 3 errors"),
        (1, "off\n16 calls, 1 of them wrong\n" + CLEAN, "found: the exercise ended with status 1: "),
        (1, FORBIDDEN + "CUDA error 999\n", "unavailable: Error: Device not supported. Please refer"),
        (0, UNWATCHED, "unavailable: it watched nothing"),
    ],
)
def test_what_compute_sanitizer_says(status, output, expected):
    assert steps.sanitizer_outcome(status, output).startswith(expected)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (f"printf '{CLEAN}'", "passed", "memcheck: clean; racecheck: clean; initcheck: clean; synccheck: clean"),
        (f"printf '{FORBIDDEN}'; exit 1", "unavailable", "Error: Device not supported"),
        (f"printf '{FOUND}'; exit 97", "failed", "memcheck: found: ERROR SUMMARY: 3 errors"),
        ("sleep 60", "timed out", "memcheck did not end in its time"),
        (f"[ \"$2\" = memcheck ] && printf '{CLEAN}' || sleep 60", "passed", "memcheck: clean; racecheck: out of time"),
        (None, "unavailable", "compute-sanitizer is not installed"),
    ],
)
def test_sanitizers_on_machines_of_all_kinds(script, status, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine, "find_tool", lambda name, environ: str(program) if script else None)
    run, _ = a_run(tmp_path, seconds=2)
    result = run.run([Step("sanitizers", 2, steps.sanitizers)]).results[0]
    assert result.status == status and result.reason.startswith(reason)


def test_what_verify_prints_is_read(capsys):
    from transkd_fast import cli
    from transkd_fast.train.verify import Measurement, Row, VerifyReport

    runs = {("hcl", "cuda"): 4, ("gl_mixer", "eager"): 2}
    losses = [Row("loss/hcl", 1e-7, 1e-7, 1e-4)]
    cli._print_report(VerifyReport("fp32", losses, runs, Measurement(123.456, 2**20), Measurement(100.0, 2**21)), 4)
    output = capsys.readouterr().out
    assert steps.verify_numbers(output) == {
        "calls": {"hcl cuda": 4, "gl_mixer eager": 2},
        "checked": {"images_per_second": 123.46, "peak_mib": 1.0},
        "eager": {"images_per_second": 100.0, "peak_mib": 2.0},
    }
    assert place.last_line(output) == "verify: agree (1 tensors)"


def test_what_a_distillation_leaves_is_read(tmp_path):
    from transkd_fast.train.loop import FitResult
    from transkd_fast.train.metrics import Scores
    from transkd_fast.train.run import RunResult, _write_summary

    before, after, teacher = (Scores(miou, [miou], 0.5, 9, 0) for miou in (0.1, 0.4, 0.6))
    _write_summary(RunResult(tmp_path, before, FitResult(after, 0.4, 50.0, tmp_path, tmp_path), teacher, ("sky",)))
    assert steps.distil_numbers(json.loads((tmp_path / "summary.json").read_text())) == {
        "miou_before": 0.1,
        "miou_after": 0.4,
        "miou_teacher": 0.6,
        "images_per_second": 50.0,
    }


def test_the_toolkit_is_looked_for_where_the_build_looks(tmp_path):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "transkd-tool").touch(mode=0o755)
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    assert machine.find_tool("transkd-tool", environ) == str(tmp_path / "home/bin/transkd-tool")
    assert machine.find_tool("transkd-tool", {"PATH": environ["PATH"]}) == str(tmp_path / "path/transkd-tool")
    assert machine.find_tool("transkd-tool", {"PATH": ""}) is None
