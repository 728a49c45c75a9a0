"""`make gpu` without a GPU: what its steps do, and what they read off the programs they run."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
from gpu_runs import ROOT, a_run, python

# isort: split
from gpu_run import exercise, machine, place, processes, runner, steps
from gpu_run.runner import Failed, Step


def test_the_steps_fit_into_the_time_and_are_made_ready_for():
    assert sum(step.seconds for step in steps.STEPS) <= 60 * steps.MINUTES < 60 * 9
    assert [step.name for step in steps.STEPS[:3]] == ["environment", "build", "GPU tests"]
    assert [step.needs for step in steps.STEPS[:2]] == [None, "environment"]
    assert {step.needs for step in steps.STEPS[2:]} == {steps.PACKAGE}
    seconds = {step.name: step.seconds for step in steps.STEPS}
    assert seconds["build"] >= 150 and seconds["GPU tests"] >= 120 and seconds["bench bf16"] >= 75
    assert seconds["sanitizers"] >= 40


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
    assert exercise.main(["--backend", "cuda"]) == 1
    only = capsys.readouterr().out
    assert "hcl cuda: no\n" in only and "triton" not in only


@pytest.mark.parametrize("wrong", [None, *range(18)])
def test_the_exercise_compares_maps_all_gradients_and_what_is_updated_in_place(wrong):
    call = next(exercise.csf())
    assert call.leaves == 11 and call.changed == 6
    right = call.function
    before = [tensor.clone() for tensor in call.inputs]

    def function(inputs, backend):
        result = right(inputs, "eager")
        if wrong is not None and inputs[0].dtype == exercise.torch.float32:
            if wrong < 6:
                inputs[wrong - 6].data.add_(1)
            elif wrong < 17:
                inputs[wrong - 6].register_hook(lambda gradient: 1.01 * gradient)
            else:
                result = result + 0.1
        return result

    difference = replace(call, function=function).difference("cpu", "cpu")
    assert (difference > 5e-3) == (wrong is not None)
    assert (difference < call.tolerance) == (wrong is None)
    assert all(exercise.torch.equal(*pair) for pair in zip(call.inputs, before, strict=True))


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
<testcase time="0.000" />
<testcase classname="tests.test_hcl" name="no"><skipped type="pytest.skip" message="why">...</skipped></testcase>
</testsuite></testsuites>"""


def test_junit_is_counted(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert steps.junit_counts(tmp_path / "junit.xml") == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.test_hcl::bad[cuda]: off", "tests.test_hcl::setup: broke"],
        "skip_reasons": {"why": 1},
    }
    many = '<testcase name="a"><failure /></testcase>' * 50
    (tmp_path / "junit.xml").write_text(f"<testsuites>{many}</testsuites>")
    counts = steps.junit_counts(tmp_path / "junit.xml")
    assert counts["failed"] == 50 and len(counts["failures"]) == steps.FAILURES_KEPT


PIP = """
import os, pathlib, sys, time
cuda, fails = os.environ.get("TRANSKD_FAST_CUDA") != "0", sys.argv[1]
if cuda and fails == "hangs":
    pathlib.Path("transkd_fast/_C_cuda.half.so").touch()
    time.sleep(300)
if (cuda and fails == "cuda") or fails == "all":
    sys.exit("transkd_fast: no, cuda" if cuda else "transkd_fast: no, cpu")
"""
PYTHON = """#!/bin/sh
[ "$1" = -I ] && echo "$PWD/kernels/__init__.py" || cat env.json
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Runs the build on a tree where pip fails in one way or another."""

    def run(fails, loaded=True, seconds=steps.CPU_BUILD_SECONDS + 20.0):
        def pip(work, command, *arguments, seconds=float("inf"), **environ):
            done = work.call(*python(PIP), fails, seconds=seconds, **environ)
            if done.status:
                raise Failed(done.output.strip())

        monkeypatch.setattr(place, "pip", pip)
        monkeypatch.setattr(place, "python", lambda root: root / "python")
        monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
        monkeypatch.setattr(machine, "find_tool", lambda name, environ: "nvcc")
        (tmp_path / "transkd_fast").mkdir()
        (tmp_path / "python").write_text(PYTHON)
        (tmp_path / "python").chmod(0o755)
        extension = {"loaded": loaded, "reason": "switched off"}
        found = {
            "build": {"extensions": {"_C_cuda": extension}, "cuda_build": {"archs": "9.0"}},
            "cuda": {"devices": []},
        }
        (tmp_path / "env.json").write_text(json.dumps(found))
        going, _ = a_run(tmp_path, seconds=seconds)
        return going.run([Step("build", seconds, steps.build)]).results[0], going.ready

    return run


def test_a_build_makes_the_package_and_the_cuda_kernels(build):
    result, ready = build("never")
    assert (result.status, result.reason) == ("passed", "_C_cuda for 9.0")
    assert ready == {steps.PACKAGE, steps.CUDA}


@pytest.mark.parametrize(
    ("fails", "reason"), [("cuda", "transkd_fast: no, cuda"), ("hangs", "the build did not end in 4 s")]
)
def test_without_the_cuda_part_the_run_goes_on_with_triton(build, fails, reason, tmp_path):
    result, ready = build(fails, loaded=False, seconds=steps.CPU_BUILD_SECONDS + 4.0)
    assert (result.status, result.reason) == ("failed", f"went on without the CUDA C++ kernels: {reason}")
    assert result.numbers["first_build"] == reason and ready == {steps.PACKAGE}
    assert list((tmp_path / "transkd_fast").glob("_C*.so")) == []


def test_without_any_build_the_run_has_no_package(build):
    result, ready = build("all")
    assert (result.status, result.reason, ready) == ("failed", "transkd_fast: no, cpu", set())


FINE = """
import pytest
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_value(backend):
    pass
"""
OF_THE_PROCESS = "import os, time\n" + FINE


@pytest.fixture
def gpu_tests(tmp_path, monkeypatch):
    """Runs the GPU tests of a tree; what "cuda" does in test_hcl.py, and what test_on_gpu.py does, is given."""

    def run(cuda="pass", on_gpu="pass", made=(steps.CUDA,), seconds=60.0):
        for folder in ("tests", "transkd_fast/ops"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "transkd_fast" / "ops" / "hcl.py").touch()
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for name, action in (("test_hcl", cuda), ("test_on_gpu", on_gpu), ("test_kernels_triton_hcl", "pass")):
            text = OF_THE_PROCESS.replace("    pass", f"    if backend == 'cuda':\n        {action}")
            (tmp_path / "tests" / f"{name}.py").write_text(text)
        monkeypatch.setattr(place, "python", lambda root: sys.executable)
        going, _ = a_run(tmp_path, seconds=seconds, ready=set(made))
        return going.run([Step("GPU tests", seconds, steps.gpu_tests)]).results[0]

    return run


def counts_of(result):
    return {name: (found.get("passed"), found.get("failed")) for name, found in result.numbers.items()}


def test_gpu_tests_run_apart_and_those_that_need_a_gpu_come_first(gpu_tests, tmp_path):
    result = gpu_tests()
    assert result.status == "passed"
    assert list(counts_of(result).items()) == [("on_gpu", (3, 0)), ("cuda", (1, 0)), ("triton", (4, 0))]
    assert result.reason == "; ".join(
        f"{name}: {n} passed, 0 failed, 0 skipped" for name, n in (("on_gpu", 3), ("cuda", 1), ("triton", 4))
    )
    assert {path.name for path in tmp_path.glob("junit*.xml")} == set(steps.JUNIT)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("assert 0, 'off'", "cuda: 0 passed, 1 failed, 0 skipped, first: tests.test_hcl::test_value[cuda]: "),
        ("os.abort()", "cuda: 0 passed, 0 failed, 0 skipped, pytest ended with status -6: "),
    ],
    ids=["fails", "crashes"],
)
def test_a_cuda_fault_leaves_the_other_gpu_tests_their_result(gpu_tests, action, words):
    result = gpu_tests(cuda=action)
    assert result.status == "failed" and words in result.reason
    assert counts_of(result)["on_gpu"] == (3, 0) and counts_of(result)["triton"] == (4, 0)


def test_gpu_tests_that_hang_leave_time_to_the_others(gpu_tests):
    result = gpu_tests(on_gpu="time.sleep(300)", seconds=15.0)
    assert result.status == "timed out" and "on_gpu: 2 passed, 0 failed, 0 skipped, out of time" in result.reason
    assert counts_of(result)["cuda"] == (1, 0) and counts_of(result)["triton"] == (4, 0)


def test_without_the_cuda_kernels_only_tritons_are_tested(gpu_tests):
    result = gpu_tests(cuda="os.abort()", on_gpu="os.abort()", made=())
    assert result.status == "passed" and counts_of(result) == {"on_gpu": (1, 0), "triton": (4, 0)}
    assert "cuda: not run without the CUDA C++ kernels" in result.reason


def test_the_gpu_tests_that_are_named_exist():
    """Of every op with a Triton kernel the tests of that kernel too."""
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    names = ["test_on_gpu.py", *(f"test_kernels_triton_{op}.py" for op in kernels & set(steps.ops_of(ROOT)))]
    assert len(names) > 1 and [name for name in names if not (ROOT / "tests" / name).exists()] == []


def test_the_short_bench_has_one_case_of_every_op_and_both_layouts():
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")} - {"step"}
    assert set(steps.SHORT_BENCH) == benches
    for op, case in steps.SHORT_BENCH.items():
        bench = importlib.import_module(f"bench_{op}")
        chosen = [p.id for p in bench.parameters(["cuda"]) if case in p.id]
        assert chosen == [f"cuda-{case}-{layout}" for layout in bench.LAYOUTS]
    words = " or ".join(f"({op} and {case})" for op, case in steps.SHORT_BENCH.items())
    assert steps.short_bench() == f"cuda and ({words})" and "(csf and stage_1-batch_8) or (cwd and" in words


def test_benches_in_fp32_are_few_and_short(tmp_path, monkeypatch):
    asked = []

    def call(work, *command, **options):
        asked.append(" ".join(map(str, command)))
        return processes.Done(0, "1 passed")

    monkeypatch.setattr(runner.Work, "call", call)
    going, _ = a_run(tmp_path, seconds=600.0)
    going.ready.add(steps.PACKAGE)
    going.run([step for step in steps.STEPS if step.name in ("bench bf16", "bench fp32")])
    assert [("--dtype bf16" in words, "-k cuda -q" in words, "--rounds" in words) for words in asked] == [
        (True, True, False),
        (False, False, True),
    ]
    assert f"-k {steps.short_bench()} -q" in asked[1]


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
        (f"printf '{CLEAN}'", "passed", "memcheck: clean; racecheck: clean; synccheck: clean; initcheck: clean"),
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
    run, _ = a_run(tmp_path, seconds=2, ready={steps.CUDA})
    result = run.run([Step("sanitizers", 2, steps.sanitizers)]).results[0]
    assert result.status == status and result.reason.startswith(reason)


@pytest.mark.parametrize("made", [True, False], ids=["cuda", "triton only"])
def test_memcheck_comes_first_and_the_other_sanitizers_watch_cuda_only(made, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> asked\nprintf '{CLEAN}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine, "find_tool", lambda name, environ: str(program))
    run, _ = a_run(tmp_path, seconds=20, ready={steps.CUDA} if made else set())
    result = run.run([Step("sanitizers", 20, steps.sanitizers)]).results[0]
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    cuda_only = ["racecheck", "synccheck", "initcheck"] if made else []
    assert [words[1] for words in asked] == ["memcheck", *cuda_only]
    assert [words[-2:] == ["--backend", "cuda"] for words in asked] == [False, *[True] * len(cuda_only)]
    assert result.status == "passed"
    assert ("racecheck: not run without the CUDA C++ kernels" in result.reason) != made


def test_what_verify_prints_is_read(capsys):
    from transkd_fast import cli
    from transkd_fast.train.verify import Measurement, Row, VerifyReport

    runs = {("hcl", "cuda"): 4, ("gl_mixer", "eager"): 2}
    losses = [Row("loss/hcl", 1e-7, 1e-7, 1e-4)]
    cli._tables.print_report(
        VerifyReport("fp32", losses, runs, Measurement(123.456, 2**20), Measurement(100.0, 2**21)), 4
    )
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
