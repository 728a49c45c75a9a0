"""`make gpu` without a GPU: its refusals, and the bookkeeping of its steps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from gpu_runs import BENCH, H200, ROOT, a_run, ends, files_below, python, run_one

# isort: split
import gpu
from gpu_run import machine, processes, report, runner
from gpu_run.machine import Machine
from gpu_run.report import Result
from gpu_run.runner import Failed, Step, TimedOut, Unavailable
from harness import rows

# refusals


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Machine(), ["found no torch (torch is not installed)", "install torch"]),
        (Machine(error="ImportError: libx"), ["found no torch (ImportError: libx)"]),
        (Machine("2.10.3+cu130", "13.0", devices=("G",), capabilities=("9.0",)), ["found torch 2.10.3", ">= 2.11"]),
        (Machine("2.11.0+cpu"), ["2.11.0+cpu, built without CUDA"]),
        (Machine("2.11.0", "13.0", error="no driver"), ["without a GPU that works (no driver)", "nvidia-smi"]),
    ],
)
def test_a_machine_that_cannot_is_told_what_was_expected_found_and_to_do(found, words):
    message = machine.refusal(found)
    for part in ["expected an NVIDIA GPU and a Python with torch >= 2.11", *words, "PYTHON=...", sys.executable]:
        assert part in message


def test_a_machine_that_can_is_not_refused():
    assert machine.refusal(H200) is None
    assert machine.refusal(Machine("3.0.0a0", "14.0", devices=("G",), capabilities=("12.0",))) is None


def test_make_gpu_without_a_gpu_stops_with_status_2_and_leaves_nothing(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(BENCH, tree / "bench", ignore=shutil.ignore_patterns("__pycache__", "out", "results"))
    shutil.copy(ROOT / "Makefile", tree)
    for name in ("tools", "csrc"):  # which the Makefile lists
        (tree / name).mkdir()
    before = files_below(tree)
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"],
        cwd=tree,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "make gpu: expected an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
    assert files_below(tree) == before and not out.exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "nan", "inf"])
def test_bad_minutes_are_refused(minutes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPU_MINUTES", minutes)
    assert gpu.main(["run"], tmp_path, lambda: H200, []) == 2
    assert f"GPU_MINUTES: expected a positive number of minutes, got '{minutes}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_crashes_or_hangs_says_so(monkeypatch):
    monkeypatch.setattr(machine, "PROBE", "import os; os._exit(5)")
    assert machine.probe().error == "asking torch ended with status 5: no output"
    monkeypatch.setattr(machine, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.3)
    assert "did not answer" in machine.probe().error


def test_the_probe_reads_what_torch_says(monkeypatch):
    answer = {"torch": "2.11.0", "cuda": "13.0", "devices": ["A", "B"], "capabilities": ["9.0", "8.0"]}
    monkeypatch.setattr(machine, "PROBE", f"print('noise'); print('''{json.dumps(answer)}''')")
    assert machine.probe() == Machine("2.11.0", "13.0", None, ("A", "B"), ("9.0", "8.0"))


# the runner


def test_every_outcome_is_recorded_and_nothing_stops_the_steps_after_it(tmp_path):
    def raising(error):
        def run(work):
            work.numbers["seen"] = 1
            raise error

        return run

    these = [
        Step("good", 5, lambda work: work.numbers.update(found=3)),
        Step("remark", 5, lambda work: "with a remark"),
        Step("bad", 5, raising(Failed("two are wrong"))),
        Step("lacking", 5, raising(Unavailable("no tool"))),
        Step("broken", 5, raising(ZeroDivisionError("oh"))),
        Step("no such program", 5, lambda work: work.call("transkd-no-such-program")),
        Step("needing", 5, lambda work: None, needs="package"),
        Step("last", 5, lambda work: None),
    ]
    run, said = a_run(tmp_path)
    finished = run.run(these)
    content = json.loads((tmp_path / "gpu.json").read_text())
    report.check(content)
    got = {step["name"]: (step["status"], step["reason"], step["numbers"]) for step in content["steps"]}
    missing = got.pop("no such program")
    assert missing[0] == "failed" and "transkd-no-such-program" in missing[1]
    assert got == {
        "good": ("passed", "", {"found": 3}),
        "remark": ("passed", "with a remark", {}),
        "bad": ("failed", "two are wrong", {"seen": 1}),
        "lacking": ("unavailable", "no tool", {"seen": 1}),
        "broken": ("failed", "the step itself broke: ZeroDivisionError: oh", {"seen": 1}),
        "needing": ("not run", "an earlier step did not make the package", {}),
        "last": ("passed", "", {}),
    }
    assert not finished.clean
    assert "bad: failed: two are wrong" in said
    for name, (status, reason, _) in got.items():
        assert any(
            line.startswith(name) and status in line and reason in line for line in finished.table().splitlines()
        )


def test_a_run_is_clean_without_failures():
    def clean(*statuses):
        return report.Report({}, [Result("a", status) for status in statuses]).clean

    assert clean("passed", "unavailable", "not run")
    assert not clean("passed", "failed") and not clean("timed out", "passed")


def test_commands_leave_status_output_and_log(tmp_path):
    def step(work):
        work.numbers["one"] = vars(work.call(*python("import sys; print('to out'); sys.exit('to err')")))
        work.numbers["two"] = work.call(*python("import os; print(os.environ['EXTRA'])"), EXTRA="given").output

    result = run_one(step, tmp_path)
    assert result.numbers == {"one": {"status": 1, "output": "to out\nto err\n"}, "two": "given\n"}
    log = (tmp_path / "log.txt").read_text()
    assert 0 < log.index("= one") < log.index("to out") < log.index("EXTRA=given") < log.index("one: passed")


def test_the_middle_of_very_much_output_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MOST_OUTPUT", 1000)
    result = run_one(lambda work: work.call(*python("print('first' + 'x' * 9000 + 'last')")).output, tmp_path)
    assert result.reason.startswith("firstx") and result.reason.endswith("last\n") and "bytes left out" in result.reason
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 2500 and log.rstrip().endswith("last")


CHILDREN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
open("pids", "w").write(" ".join(str(child.pid) for child in children))
"""


def test_a_hanging_command_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    run, _ = a_run(tmp_path, seconds=4)
    result = run.run([Step("one", 4, lambda work: work.call(*python(CHILDREN + "time.sleep(300)")))]).results[0]
    assert (result.status, result.reason) == ("timed out", "stopped after 4 s")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and ends(pids, 1.0)


def test_what_a_command_leaves_running_is_killed(tmp_path):
    assert run_one(lambda work: str(work.call(*python(CHILDREN)).status), tmp_path).reason == "0"
    assert ends([int(pid) for pid in (tmp_path / "pids").read_text().split()], 1.0)


def test_a_command_out_of_time_may_first_write_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    source = """
import time
try:
    time.sleep(300)
except KeyboardInterrupt:
    open("partial", "w").write("half")
"""
    run, _ = a_run(tmp_path, seconds=3)
    assert run.run([Step("one", 3, lambda work: work.call(*python(source)))]).results[0].status == "timed out"
    assert (tmp_path / "partial").read_text() == "half"


def test_a_command_is_interrupted_even_if_the_run_ignores_interrupts(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        source = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        assert run_one(lambda work: work.call(*python(source)).output, tmp_path).reason == "True\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_may_get_less_than_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)

    def step(work):
        with pytest.raises(TimedOut):
            work.call(*python("import time; time.sleep(300)"), seconds=0.5)
        with pytest.raises(TimedOut):
            work.call("transkd-no-such-program", seconds=0)
        return work.call(*python("print('next')")).output

    assert run_one(step, tmp_path).reason == "next\n"


def test_steps_get_their_seconds_and_what_earlier_ones_left(tmp_path):
    got = []

    def step(work):
        got.append(work.seconds_left)

    run, _ = a_run(tmp_path, seconds=100)
    run.run([Step("a", 10, step), Step("b", 20, step), Step("c", 30, step)])
    assert got == pytest.approx([50, 70, 100], abs=2)  # 100 - (20 + 30); 100 - 30; all


def test_after_the_deadline_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_SECONDS", 1.0)
    run, _ = a_run(tmp_path, seconds=1.5)
    results = run.run([Step("a", 1, lambda work: time.sleep(0.7)), Step("b", 1, lambda work: None)]).results
    assert [(r.status, r.reason) for r in results] == [("passed", ""), ("not run", "out of time")]


STOPPED = """
import os, sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
import gpu
from gpu_run.machine import Machine
from gpu_run.runner import Step
hang = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(300)"
steps = [
    Step("first", 9, lambda work: work.numbers.update(found=1)),
    Step("second", 60, lambda work: work.call(sys.executable, "-c", hang)),
    Step("third", 9, lambda work: None),
]
machine = Machine("2.11.0+cu130", "13.0", "3.6.0", ("NVIDIA H200",), ("9.0",))
sys.exit(gpu.main(["run"], Path.cwd(), lambda: machine, steps))
"""


def a_tree(folder):
    """The least that a run needs of a tree."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "op.py").write_text("a kernel\n")
    return folder


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path, sent, status):
    tree = a_tree(tmp_path)
    environ = {**os.environ, "OUT": str(tmp_path / "out")}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(bench=str(BENCH))], cwd=tree, env=environ, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not (tree / "pid").exists() or not (tree / "pid").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(30) == status
    finally:
        process.kill()
        process.wait()
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    report.check(content)
    assert [(step["name"], step["status"], step["reason"]) for step in content["steps"]] == [
        ("first", "passed", ""),
        ("second", "not run", "the run was stopped while it ran"),
        ("third", "not run", "the run was stopped before it"),
    ]
    assert content["steps"][0]["numbers"] == {"found": 1}
    assert ends([int((tree / "pid").read_text())])


def test_a_whole_run_with_other_steps(tmp_path, monkeypatch, capsys):
    tree, out = a_tree(tmp_path / "tree"), tmp_path / "deep" / "out"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(machine, "find_tool", lambda name, environ: None)
    out.mkdir(parents=True)
    for name in ("rows.json", "junit-cuda.xml", "notes"):
        (out / name).write_text("old")
    assert gpu.main(["run"], tree, lambda: H200, [Step("good", 9, lambda work: "well")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt", "notes"]
    content = json.loads((out / "gpu.json").read_text())
    report.check(content)
    expected = {
        "device": "NVIDIA H200",
        "capability": "9.0",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "triton": "3.6.0",
    }
    assert expected.items() <= content.items()
    assert content["nvcc"] is None and content["commit"] is None
    assert content["sources"] == rows.digest(["kernels/*"], tree)
    text = capsys.readouterr().out
    assert "good  passed" in text and str(out) in text

    def bad(work):
        raise Failed("wrong")

    assert gpu.main(["run"], tree, lambda: H200, [Step("bad", 9, bad)]) == 1
    monkeypatch.delenv("OUT")
    assert gpu.main(["run"], tree, lambda: H200, [Step("good", 9, lambda work: None)]) == 0
    assert (tree / ".gpu" / "out" / "gpu.json").exists()
