"""What the tests of `make gpu` share."""

import os
import sys
import time
import zipfile
from pathlib import Path

from bench_rows import BENCH, ROOT  # makes gpu_run importable

# isort: split
from gpu_run import report
from gpu_run.machine import Machine
from gpu_run.runner import Run, Step

__all__ = ["BENCH", "ROOT"]

H200 = Machine("2.11.0+cu130", "13.0", "3.6.0", ("NVIDIA H200",), ("9.0",))
HEAD = dict.fromkeys(report.HEAD, "x")


def python(source):
    return sys.executable, "-c", source


def a_run(folder, seconds=60.0, **changes):
    said = []
    run = Run(folder, folder, dict(os.environ), dict(HEAD), time.monotonic() + seconds, said.append, **changes)
    return run, said


def run_one(function, folder, seconds=20.0):
    """What becomes of a step."""
    run, _ = a_run(folder)
    return run.run([Step("one", seconds, function)]).results[0]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pids, seconds=10.0):
    """Whether all processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def a_wheel(folder, name, modules, requires=(), tag="py3-none-any"):
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + "".join(
        f"Requires-Dist: {r}\n" for r in requires
    )
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for module in modules:
            archive.writestr(f"{module}.py", "WHERE = 'wheel'\n")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def files_below(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
