"""Options of `pytest bench/`, the fixtures that measure, and what a run ends with: table, rows, verdicts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from harness import targets
from harness.cases import DTYPES, Case
from harness.measure import measure as measure_cases
from harness.report import report
from harness.rows import Row, read, write

from transkd_fast import backends
from transkd_fast.train.memory import keep_freed_memory

OUT = Path(__file__).resolve().parent / "out"
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
ROWS = pytest.StashKey[list[Row]]()
TARGETS = pytest.StashKey[list[targets.Target]]()
VERDICTS = pytest.StashKey[list[targets.Verdict]]()


def pytest_addoption(parser):
    group = parser.getgroup("transkd_fast benches")
    group.addoption("--rounds", type=int, help="interleaved rounds per comparison (default: each bench's own number)")
    group.addoption(
        "--dtype", choices=list(DTYPES), help="storage dtype of the ops (default: fp32 on CPU, bf16 on CUDA)"
    )
    group.addoption("--out", type=Path, default=OUT, help="folder of rows.json, rows.csv, verdicts.json (bench/out)")
    group.addoption(
        "--malloc",
        choices=["tuned", targets.DEFAULT_MALLOC],
        default="tuned",
        help="on CPU keep freed memory, as the trainer does, or leave malloc as it is by default (tuned)",
    )
    group.addoption("--check", action="store_true", help="judge this run by the targets; a missed one fails it")
    group.addoption("--targets", type=Path, default=targets.TARGETS, help="file of targets (bench/targets.toml)")


def pytest_configure(config):
    config.stash[ROWS], config.stash[VERDICTS], config.stash[TARGETS] = [], [], []
    config.option.benchmark_quiet = True  # its table would show rounds, of all cases together
    if config.getoption("--rounds") is not None and config.getoption("--rounds") < 1:
        raise pytest.UsageError(f"--rounds: expected at least 1, got {config.getoption('--rounds')}")
    try:
        read(config.getoption("--out"))  # new rows are put beside those that are there
        if config.getoption("--check"):
            config.stash[TARGETS] = targets.load(config.getoption("--targets"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def why_not_run(target: targets.Target, rows: Sequence[Row]) -> str:
    """Why this run has no row for a target."""
    if target.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if all(row.op != target.op for row in rows):
        return "bench not selected"
    if not any(target.covers(row) for row in rows):
        return "case not selected"
    if target.op not in backends.table():
        return "the package knows no such op"
    return backends.why_not(target.op, target.backend[0]) or "the backend did not take these tensors"


def pytest_sessionfinish(session):
    config = session.config
    if config.option.collectonly:
        return
    rows, cold = config.stash[ROWS], config.option.benchmark_disable
    for target in config.stash[TARGETS]:
        verdicts = targets.judge(target, rows, lambda single: why_not_run(single, rows), cold)
        config.stash[VERDICTS] += targets.merged(target, verdicts)
    if session.exitstatus == 0 and any(v.verdict == targets.MISS for v in config.stash[VERDICTS]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    rows, verdicts, out = config.stash[ROWS], config.stash[VERDICTS], config.getoption("--out")
    if rows:
        terminalreporter.section("benches")
        terminalreporter.write_line(report(rows))
    if verdicts:
        terminalreporter.section("targets")
        for verdict in verdicts:
            terminalreporter.write_line(str(verdict))
        counts = [
            f"{sum(v.verdict == name for v in verdicts)} {name}"
            for name in (targets.PASS, targets.MISS, targets.NOT_RUN)
        ]
        terminalreporter.write_line(", ".join(counts))
        out.mkdir(parents=True, exist_ok=True)
        (out / "verdicts.json").write_text(json.dumps([v.as_dict() for v in verdicts], indent=1) + "\n")


@pytest.fixture(scope="session")
def malloc(request) -> str:
    """How freed memory is treated: unless told otherwise, as the trainer does."""
    if request.config.getoption("--malloc") == targets.DEFAULT_MALLOC:
        return targets.DEFAULT_MALLOC
    reason = keep_freed_memory()
    return "tuned" if reason is None else f"default ({reason})"


@pytest.fixture
def dtype(request, device) -> str:
    return request.config.getoption("--dtype") or DEFAULT_DTYPE[device]


@pytest.fixture
def measure(request, benchmark, malloc) -> Callable[[Sequence[Case], int, int], None]:
    """Measures cases, keeps their rows for the table, and fails if one of them is wrong."""

    def run(cases: Sequence[Case], rounds: int, warmup: int) -> None:
        rows = measure_cases(benchmark, cases, request.config.getoption("--rounds") or rounds, warmup, malloc)
        benchmark.extra_info["rows"] = [row.as_dict() for row in rows]
        request.config.stash[ROWS].extend(rows)
        if not request.config.option.benchmark_disable:  # one cold round is no measurement to keep
            write(rows, request.config.getoption("--out"))  # now: a later case may take the process down
        wrong = [f"{row.backend}: {row.error}" for row in rows if row.error is not None]
        assert not wrong, "; ".join(wrong)

    return run


@pytest.fixture
def measure_with_default_malloc(request, tmp_path) -> Callable[[str], None]:
    """Measures one of this file's tests with malloc as it is by default.

    In a process of its own: what this one has told malloc cannot be taken back.
    """

    def run(test: str) -> None:
        config = request.config
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{request.path}::{test}"]
        command += ["--malloc", targets.DEFAULT_MALLOC, "--out", str(tmp_path)]
        command += [
            f"{option}={config.getoption(option)}"
            for option in ("--rounds", "--dtype")
            if config.getoption(option) is not None
        ]
        command += ["--benchmark-disable"] * config.option.benchmark_disable
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
        done = subprocess.run(command, env=environ, cwd=config.rootpath, capture_output=True, text=True)
        rows = read(tmp_path)
        config.stash[ROWS].extend(rows)
        if rows:
            write(rows, config.getoption("--out"))
        if done.returncode != 0:
            pytest.fail(
                f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}", pytrace=False
            )

    return run
