"""What a run does, most important first. The seconds sum up to `MINUTES`."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_run import machine, place
from gpu_run.runner import Failed, Step, TimedOut, Unavailable, Work

MINUTES = 8.75
PACKAGE = "package"  # what the build makes and the steps after it need
SMI_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.max.sm", "clocks.max.memory"),
    *("power.limit", "temperature.gpu", "compute_mode", "ecc.mode.current", "mig.mode.current"),
)
CUDA = "CUDA C++ kernels"  # what the build makes where it can; without them there is still Triton
CPU_BUILD_SECONDS = 40  # what a build without them needs, kept back from the one with them
JUNIT = ("junit-on_gpu.xml", "junit-cuda.xml", "junit-triton.xml")
FAILURES_KEPT = 10
OUT_OF_TIME = "out of time"
# The first one watches both GPU backends, the others the CUDA C++ kernels only: they are slow, and Triton's compiler
# places the barriers itself.
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Per op the case that a short bench measures.
SHORT_BENCH = {
    "csf": "stage_1-batch_8",
    "cwd": "stages_1-4-batch_8",
    "gl_mixer": "stage_4-batch_8",
    "hcl": "stages_1-4-batch_8",
    "hcl_bn": "stages_1-4-batch_8",
    "head": "base-batch_8",
    "pea": "stages_1-4-batch_8",
    "seg_ce": "19_classes-batch_8",
}
FRAMES = place.CARRY / "camvid"
DISTILLED = Path(".gpu", "runs", "distil")
NOTHING_SELECTED = 5  # pytest's exit status
EXERCISE = "bench.gpu_run.exercise"
SANITIZER_FOUND = 97  # a status that neither Python nor the exercise ends with
# What compute-sanitizer says where the machine does not let it work.
FORBIDDEN = re.compile(r"Device not supported|Unable to find injection library|insufficient permissions", re.IGNORECASE)


def environment(work: Work) -> str | None:
    """The machine as it is, and the environment of all steps to come."""
    place.make(work)
    smi = [line.strip() for line in (machine.output_of(["nvidia-smi", *_smi_query()]) or "").splitlines()]
    if smi:
        work.numbers["nvidia_smi"] = [
            dict(zip(SMI_FIELDS, next(csv.reader([line], skipinitialspace=True)), strict=True)) for line in smi
        ]
        work.call("nvidia-smi", "-q")
    work.ready.add("environment")
    remarks = [] if smi else ["nvidia-smi says nothing"]
    if work.numbers.get("missing_packages"):
        remarks.append(f"missing packages: {', '.join(work.numbers['missing_packages'])}")
    return "; ".join(remarks)


def _smi_query() -> list[str]:
    return [f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]


def build(work: Work) -> str | None:
    """Install the tree in editable mode.

    First with TRANSKD_FAST_CUDA=auto: where the CUDA part does not compile it keeps the first complaint and goes on
    without, where 1 would stop. If that comes to no end, once more without the CUDA part, for the Triton kernels' sake.
    """
    nvcc = machine.find_tool("nvcc", work.environ)
    limit, without = work.seconds_left - CPU_BUILD_SECONDS, None
    try:
        _install(work, seconds=limit)
    except (Failed, TimedOut) as reason:
        without = str(reason) or f"the build did not end in {limit:.0f} s"
        work.numbers["first_build"] = without
        _install(work, TRANSKD_FAST_CUDA="0")
    # -I: what counts is the installation, not the folder that the command runs in.
    where = work.call(place.python(work.root), "-I", "-c", "from transkd_fast import kernels; print(kernels.__file__)")
    found = Path(place.last_line(where.output))
    if where.status != 0 or not found.is_relative_to(work.root):
        raise Failed(f"expected transkd_fast to be imported from the tree, got {found}")
    work.ready.add(PACKAGE)
    asked = work.call(place.python(work.root), "-m", "transkd_fast", "env", "--json")
    if asked.status != 0:
        raise Failed(f"transkd env failed: {place.last_line(asked.output)}")
    report = json.loads(asked.output[asked.output.index("{") : asked.output.rindex("}") + 1])
    work.numbers["transkd_env"] = report
    if report["build"]["extensions"]["_C_cuda"]["loaded"]:
        work.ready.add(CUDA)
    if without is not None:
        raise Failed(f"went on without the CUDA C++ kernels: {without}")
    if nvcc is None:
        return "no nvcc (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH): without the CUDA C++ kernels, Triton only"
    extension = report["build"]["extensions"]["_C_cuda"]
    if not extension["loaded"]:
        raise Failed(f"without the CUDA C++ kernels: {extension['reason']}")
    bad = [device for device in report["cuda"]["devices"] if device["selftest"] != "passed"]
    if bad:
        raise Failed(f"the self-test on {bad[0]['name']} {bad[0]['selftest']}")
    return f"_C_cuda for {report['build']['cuda_build']['archs']}"


def _install(work: Work, seconds: float = math.inf, **environ: str) -> None:
    # A failed build must not leave an older file in its place.
    for old in (work.root / "transkd_fast").glob("_C*.so"):
        old.unlink()
    options = ("--no-build-isolation", "--no-deps", "--editable", ".")
    place.pip(work, "install", *options, seconds=seconds, **environ)


def ops_of(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "transkd_fast" / "ops").glob("[!_]*.py"))


def gpu_tests(work: Work) -> str | None:
    """The tests that need a GPU, then the ops' tests on each GPU backend.

    Each in a process of its own, which has only a part of the time: after an illegal access or a hang the others still
    tell what they find.
    """
    cuda = CUDA in work.ready
    ops = ops_of(work.root)
    calls = {
        "on_gpu": (0.4, ["test_on_gpu.py"], None if cuda else "triton"),
        "cuda": (0.6, [f"test_{op}.py" for op in ops], "cuda"),
        "triton": (1.0, [f"{name}_{op}.py" for name in ("test", "test_kernels_triton") for op in ops], "triton"),
    }
    words, complaints = [], []
    for name, (share, names, selected) in calls.items():
        if name == "cuda" and not cuda:
            words.append(f"cuda: not run without the {CUDA}")
            continue
        files = [Path("tests", file) for file in names if (work.root / "tests" / file).exists()]
        numbers = work.numbers[name] = {}
        complaint = _pytest(work, numbers, work.out / f"junit-{name}.xml", share, files, selected)
        counts = ", ".join(f"{numbers.get(key, 0)} {key}" for key in ("passed", "failed", "skipped"))
        words.append(f"{name}: {counts}{'' if complaint is None else f', {complaint}'}")
        complaints += [] if complaint is None else [complaint]
    if any(complaint != OUT_OF_TIME for complaint in complaints):
        raise Failed("; ".join(words))
    if complaints:
        raise TimedOut("; ".join(words))
    return "; ".join(words)


def _pytest(
    work: Work, numbers: dict[str, Any], junit: Path, share: float, files: Sequence[Path], selected: str | None
) -> str | None:
    """Run tests within a share of the time that is left; returns what went wrong."""
    if not files:  # without any pytest would run whatever it finds
        return "there are no such tests"
    options = ["-q", "--tb=short", "--durations=10", f"--junitxml={junit}", *(["-k", selected] if selected else [])]
    command = (place.python(work.root), "-m", "pytest", *files, *options)
    try:
        done = work.call(*command, seconds=share * work.seconds_left)
    except TimedOut:
        done = None
    with contextlib.suppress(FileNotFoundError, ET.ParseError):  # pytest was killed before or while it wrote
        numbers |= junit_counts(junit)
    if numbers.get("failures"):
        return f"first: {numbers['failures'][0]}"
    if done is None:
        return OUT_OF_TIME
    if done.status != 0:
        return f"pytest ended with status {done.status}: {place.last_line(done.output)}"
    return None if numbers.get("passed") else "not one test ran"


def junit_counts(path: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit file, the first failures and how often each skip reason came."""
    failures: list[str] = []
    skips: Counter[str] = Counter()
    total = 0
    for case in ET.parse(path).getroot().iterfind(".//testcase[@name]"):  # one that was interrupted has no name
        total += 1
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        if bad is not None:
            message = (bad.get("message") or "").partition("\n")[0][:200]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message}")
        elif (skipped := case.find("skipped")) is not None:
            skips[skipped.get("message") or ""] += 1
    skipped_tests = sum(skips.values())
    return {
        "passed": total - len(failures) - skipped_tests,
        "failed": len(failures),
        "skipped": skipped_tests,
        "failures": failures[:FAILURES_KEPT],
        "skip_reasons": dict(skips),
    }


def bench_ops(dtype: str, selected: str = "cuda", *options: str) -> Callable[[Work], str | None]:
    """The ops' benches in one dtype, all that run on a GPU or a selection, judged by the targets."""

    def run(work: Work) -> str | None:
        files = [path.relative_to(work.root) for path in sorted((work.root / "bench").glob("bench_*.py"))]
        ops = [path for path in files if path.name != "bench_step.py"]
        return _bench(work, dtype, selected, *ops, "--dtype", dtype, "--check", *options)

    return run


def short_bench() -> str:
    """What pytest selects for a short bench on a GPU."""
    cases = " or ".join(f"({op} and {case})" for op, case in SHORT_BENCH.items())
    return f"cuda and ({cases})"


def bench_step(work: Work) -> str | None:
    """A whole training step beside the published one."""
    return _bench(work, "fp32", "cuda", Path("bench", "bench_step.py"))


def _bench(work: Work, dtype: str, selected: str, *arguments: str | Path) -> str | None:
    verdicts = work.out / "verdicts.json"
    verdicts.unlink(missing_ok=True)
    try:
        done = work.call(place.python(work.root), "-m", "pytest", *arguments, "-k", selected, "-q", "--out", work.out)
    finally:
        if verdicts.exists():
            work.numbers |= verdict_counts(json.loads(verdicts.read_text()), dtype)
            verdicts.unlink()  # its contents stand in gpu.json now; the next bench writes its own
    counts = work.numbers.get("counts", {})
    words = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    if done.status == NOTHING_SELECTED:
        raise Failed(f"no bench for a GPU was found: {place.last_line(done.output)}")
    if done.status != 0:
        missed = f"targets: {words}" if counts.get("MISS") else place.last_line(done.output)
        raise Failed(missed)
    return f"targets: {words}" if words else None


def verdict_counts(verdicts: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The verdicts of targets on a GPU in a dtype, and how many of each."""
    ours = [verdict for verdict in verdicts if verdict["device"] == "cuda" and dtype in verdict["dtype"]]
    return {"counts": dict(Counter(verdict["verdict"] for verdict in ours)), "verdicts": ours}


def sanitizers(work: Work) -> str | None:
    """compute-sanitizer's tools on small calls of every op."""
    program = machine.find_tool("compute-sanitizer", work.environ)
    if program is None:
        raise Unavailable("compute-sanitizer is not installed (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)")
    tools: dict[str, str] = {}
    work.numbers["tools"] = tools
    for tool in SANITIZERS:
        if tool != SANITIZERS[0] and CUDA not in work.ready:
            tools[tool] = f"not run without the {CUDA}"
            continue
        # Every error is one of a kernel: torch checks what the runtime's functions return by itself. Each tensor gets
        # an allocation of its own, so that a step beyond its end is seen.
        options = ["--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "20"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        try:
            exercise = [place.python(work.root), "-m", EXERCISE]
            exercise += [] if tool == SANITIZERS[0] else ["--backend", "cuda"]
            done = work.call(program, *options, *exercise, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except TimedOut:
            tools[tool] = OUT_OF_TIME
            break
        tools[tool] = sanitizer_outcome(done.status, done.output)
        if tools[tool].startswith("unavailable"):
            break
    words = "; ".join(f"{tool}: {outcome}" for tool, outcome in tools.items())
    if any(outcome.startswith("found") for outcome in tools.values()):
        raise Failed(words)
    first = tools[SANITIZERS[0]]
    if first.startswith("unavailable"):
        raise Unavailable(first.partition(": ")[2])
    if first == OUT_OF_TIME:
        raise TimedOut(f"{SANITIZERS[0]} did not end in its time")
    return words


def sanitizer_outcome(status: int | None, output: str) -> str:
    """ "clean", "unavailable: why" or "found: what"."""
    lines = [line.strip("= \t") for line in output.splitlines()]
    forbidden = next((line for line in lines if FORBIDDEN.search(line)), None)
    if forbidden is not None:
        return f"unavailable: {forbidden}"
    summary = next((line for line in reversed(lines) if "SUMMARY:" in line), None)
    if status == SANITIZER_FOUND:
        return f"found: {summary or 'errors'}"
    if status != 0:
        return f"found: the exercise ended with status {status}: {place.last_line(output)}"
    return "clean" if summary else f"unavailable: it watched nothing: {place.last_line(output)}"


def verify_arguments(precision: str) -> list[str]:
    """`transkd verify` with the demo's configuration on the GPU."""
    return ["--config", "configs/demo.yaml", "device=cuda", f"precision={precision}", f"verify.precision={precision}"]


def verify(precision: str) -> Callable[[Work], str | None]:
    """The configured backend beside eager fp64 in one precision."""

    def run(work: Work) -> str | None:
        done = work.call(place.python(work.root), "-m", "transkd_fast", "verify", *verify_arguments(precision))
        work.numbers |= verify_numbers(done.output)
        verdict = place.last_line(done.output)
        if done.status != 0:
            raise Failed(f"exit status {done.status}: {verdict}")
        return verdict.removeprefix("verify: ")

    return run


def verify_numbers(output: str) -> dict[str, Any]:
    """What `transkd verify` prints at its end: calls per op and backend, speed and peak memory."""
    numbers: dict[str, Any] = {"calls": {}}
    for op, backend, calls in re.findall(r"^(\w+) +(eager|cpu|triton|cuda) +(\d+) calls$", output, re.MULTILINE):
        numbers["calls"][f"{op} {backend}"] = int(calls)
    pattern = r"^(checked|eager) +([\d.]+) images/s +([\d.]+) MiB peak$"
    for name, speed, peak in re.findall(pattern, output, re.MULTILINE):
        numbers[name] = {"images_per_second": float(speed), "peak_mib": float(peak)}
    return numbers


def distil_arguments(data: str) -> list[str]:
    """`transkd train` for a few epochs: of carried frames or of procedural ones."""
    if data == "camvid":
        chosen = ["--config", "configs/camvid_tiny.yaml", f"data.root={FRAMES}"]
        chosen += ["teacher.fit.epochs=12", "fit.epochs=12", "teacher.fit.warmup_steps=8", "fit.warmup_steps=8"]
    else:
        chosen = ["--config", "configs/demo.yaml", "data.train_length=120", "data.val_length=30"]
        chosen += ["teacher.fit.epochs=6", "fit.epochs=6"]
    return [*chosen, "device=cuda", f"run_dir={DISTILLED}", "teacher.fit.eval_every=12", "fit.eval_every=12"]


def distil(work: Work) -> str | None:
    """A short distillation: of real frames where some were carried along, of procedural ones elsewhere."""
    data = "camvid" if (work.root / FRAMES).is_dir() else "street_scenes"
    work.numbers["data"] = data
    shutil.rmtree(work.root / DISTILLED, ignore_errors=True)
    done = work.call(place.python(work.root), "-m", "transkd_fast", "train", *distil_arguments(data))
    if done.status != 0:
        raise Failed(f"exit status {done.status}: {place.last_line(done.output)}")
    work.numbers |= distil_numbers(json.loads((work.root / DISTILLED / "summary.json").read_text()))
    before, after = work.numbers["miou_before"], work.numbers["miou_after"]
    words = f"{data}: student's mIoU {100 * before:.1f} -> {100 * after:.1f} %"
    words += f", {work.numbers['images_per_second']:.0f} images/s"
    if not after > before:
        raise Failed(f"the student learnt nothing; {words}")
    return words


def distil_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "miou_before": summary["student_before"]["miou"],
        "miou_after": summary["student"]["miou"],
        "miou_teacher": summary["teacher"]["miou"] if summary["teacher"] else None,
        "images_per_second": summary["images_per_second"],
    }


STEPS = (
    Step("environment", 20, environment),
    Step("build", 150, build, needs="environment"),
    Step("GPU tests", 120, gpu_tests, needs=PACKAGE),
    Step("bench bf16", 85, bench_ops("bf16"), needs=PACKAGE),
    Step("sanitizers", 40, sanitizers, needs=PACKAGE),
    Step("verify fp32", 15, verify("fp32"), needs=PACKAGE),
    Step("verify bf16", 15, verify("bf16"), needs=PACKAGE),
    Step("bench step", 25, bench_step, needs=PACKAGE),
    Step("bench fp32", 25, bench_ops("fp32", short_bench(), "--rounds", "20"), needs=PACKAGE),
    Step("distillation", 30, distil, needs=PACKAGE),
)
