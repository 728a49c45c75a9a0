"""README's tables of state and speed, generated from what lies in bench/results/ and bench/targets.toml.

`python bench/tables.py` prints them, `--write` puts them into README between their markers. They say only what files
prove: a kernel ran on a GPU if rows measured there are committed, and a row is today's only while its sources are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import targets
from harness.rows import KERNELS, ROOT, Row, latest, read
from harness.targets import TITLES, Target

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
STALE = "measured on an earlier version of the kernels"

OPS = {
    "csf": "batch norm, nearest upsampling, two-branch attention, fusion",
    "pea": "projection and mean-squared error of patch embeddings",
    "gl_mixer": "gated token convolutions mixed with attention",
    "hcl": "pyramid mean-squared error",
    "hcl_bn": "batch norm and pyramid mean-squared error",
    "cwd": "KL divergence of softmaxes over pixels or classes",
    "seg_ce": "bilinear upsampling and cross-entropy, classes at label size",
}
KERNEL_FILE = {"cpu": "csrc/cpu/{}_cpu.cpp", "triton": "kernels/{}.py", "cuda": "csrc/cuda/{}_cuda.cu"}
# Without a result from a GPU: what tests a kernel on CPU, and what it shows.
TESTED_BY = {
    "cpu": "tests/test_{}.py",
    "triton": "tests/test_kernels_triton_{}.py",
    "cuda": "tests/cuda_on_cpu/{}.cpp",
}
WITHOUT_GPU = {
    "cpu": "tested on CPU",
    "triton": "interpreter only, not yet run on a GPU",
    "cuda": "CPU shim only, not yet run on a GPU",
}


@dataclass(frozen=True)
class Results:
    """What a folder of bench/results/ holds: the newest comparisons, and the steps of `make gpu` that failed."""

    name: str
    comparisons: list[list[Row]]
    failed_steps: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for members in self.comparisons for row in members]


def load(folder: Path = RESULTS) -> list[Results]:
    """Everything in a folder of results, one entry per device."""
    return [_results(path) for path in sorted(folder.glob("*")) if path.is_dir()]


def _results(folder: Path) -> Results:
    gpu = folder / "gpu.json"
    steps = json.loads(gpu.read_text())["steps"] if gpu.exists() else []
    failed = [f"{step['name']} {step['status']}" for step in steps if step["status"] in ("failed", "timed out")]
    return Results(folder.name, latest(read(folder)), failed)


def stale(results: Sequence[Results]) -> list[str]:
    """The rows whose sources have changed since they were measured, in words."""
    return [
        f"{device.name}: {row.op} {row.backend}, {row.size}, batch {row.batch}, {row.dtype}, {row.layout}"
        for device in results
        for row in device.rows
        if row.stale
    ]


def status_table(results: Sequence[Results], root: Path = ROOT) -> str:
    """Per op and backend what has been shown of it."""
    body = [
        [f"`{op}`", words, "tested on CPU", *(_status(op, b, results, root) for b in KERNELS)]
        for op, words in OPS.items()
    ]
    return _table(["Op", "Computes", "eager", *(TITLES[backend] for backend in KERNELS)], body)


def _status(op: str, backend: str, results: Sequence[Results], root: Path) -> str:
    if not (root / KERNEL_FILE[backend].format(op)).exists():
        return ""
    ran = []
    for device in results if backend != "cpu" else []:
        rows = [row for row in device.rows if (row.op, row.backend, row.error) == (op, backend, None)]
        if rows:
            last = max(rows, key=lambda row: row.measured_at)
            failed = f" (but: {', '.join(device.failed_steps)})" if device.failed_steps else ""
            which = "an earlier version ran" if last.stale else "ran"
            ran.append(f"{which} on {last.device}, {last.measured_at[:10]}{failed}")
    tested = (root / TESTED_BY[backend].format(op)).exists()
    return "; ".join(ran) or (WITHOUT_GPU[backend] if tested else "not yet run")


def speed_tables(results: Sequence[Results], promised: Sequence[Target]) -> str:
    """Per device the times of the cases that targets speak of, and the training step."""
    parts = []
    for device in results:
        ops = [c for c in device.comparisons if any(target.covers(row) for target in promised for row in c)]
        steps = [c for c in device.comparisons if c[0].op.startswith("step ")]
        if ops or steps:
            parts.append(_heading([*ops, *steps][0][0]))
        if ops:
            header = ["Case", "Backend", "eager", TITLES["compiled"], "kernel"]
            header += ["against eager", "against compiled", "of a copy's bytes/s"]
            parts.append(_table(header, [line for members in ops for line in _op_lines(members)]))
        if steps:
            header = ["Training step", "published, peak memory", "ours, peak memory", "against published"]
            parts.append(_table(header, [_step_line(members) for members in steps]))
        if any(row.stale for members in (*ops, *steps) for row in members):
            parts.append(f"\\* {STALE}")
    return "\n\n".join(parts)


def _heading(row: Row) -> str:
    parts = [row.device, f"{row.threads} threads" if row.device_type == "cpu" else f"driver {row.driver}"]
    parts += [f"torch {row.torch}", row.measured_at[:10]]
    return f"{', '.join(parts)}; forward + backward, medians of interleaved rounds:"


def _op_lines(members: Sequence[Row]) -> list[list[str]]:
    by_backend = {row.backend: row for row in members}
    eager, compiled = by_backend.get("eager"), by_backend.get("compiled")
    lines = []
    for row in members:
        if row.backend not in KERNELS:
            continue
        ratios = [targets.speedup(row, other, "total") for other in (eager, compiled)]
        share = row.total.copy_share
        malloc = f", {row.malloc} malloc" if row.malloc == targets.DEFAULT_MALLOC else ""
        lines.append(
            [
                f"`{row.op}`, {row.size}, batch {row.batch}, {row.dtype}, {row.layout}{malloc}",
                TITLES[row.backend],
                *(_time(other) for other in (eager, compiled, row)),
                *("" if ratio is None else f"{ratio:.1f}x" for ratio in ratios),
                "" if share is None else f"{share:.0%}",
            ]
        )
    return lines


def _step_line(members: Sequence[Row]) -> list[str]:
    by_backend = {row.backend: row for row in members}
    published, ours = by_backend["published"], by_backend["ours"]
    ratio = targets.speedup(ours, published, "total")
    cells = [
        f"{_time(row)}, {row.peak_bytes / 1e9:.1f} GB" if row.peak_bytes else _time(row) for row in (published, ours)
    ]
    title = f"SegFormer-{ours.op.removeprefix('step ').upper()}, {ours.size}, batch {ours.batch}, {ours.dtype}"
    return [title, *cells, "" if ratio is None else f"{ratio:.1f}x"]


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    ms = row.total.p50_ms
    if ms is None:
        return "wrong result"
    return (f"{ms / 1e3:.1f} s" if ms >= 1e3 else f"{ms:.3g} ms") + ("\\*" if row.stale else "")


def target_table(results: Sequence[Results], promised: Sequence[Target]) -> str:
    """Per target what the committed results say; of a target for several cases, the worst one."""
    body = [
        [
            _case(target),
            target.bound,
            "; ".join(_measured(target, d) for d in _devices(target, results)) or targets.NOT_RUN,
        ]
        for target in promised
    ]
    return _table(["Case", "Target", "Committed results"], body)


def _case(target: Target) -> str:
    return target.case.replace(target.op, f"`{target.op}`", 1)


def _devices(target: Target, results: Sequence[Results]) -> list[Results]:
    return [device for device in results if any(target.covers(row) for row in device.rows)]


def _measured(target: Target, device: Results) -> str:
    verdict = targets.worst(targets.judge(target, device.rows, lambda single: "no row"))
    name = device.rows[0].device
    if verdict.value is None:
        return f"{verdict.verdict} on {name} ({verdict.reason})"
    mark = f" ({STALE})" if verdict.row.stale else ""
    return f"{verdict.verdict}, {target.written(verdict.value)} on {name}{mark}"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def blocks(results: Sequence[Results], promised: Sequence[Target]) -> dict[str, str]:
    """The generated parts of README by the name in their marker."""
    return {
        "status": status_table(results),
        "speed": speed_tables(results, promised),
        "targets": target_table(results, promised),
    }


def filled(text: str, parts: dict[str, Any]) -> str:
    """The text with the parts between their markers.

    Raises:
        ValueError: if a marker is missing or there twice.
    """
    for name, part in parts.items():
        start, end = f"<!-- generated: bench/tables.py {name} -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), flags=re.DOTALL)
        text, count = pattern.subn(lambda _, s=start, p=part, e=end: f"{s}\n{p}\n\n{e}", text)
        if count != 1:
            raise ValueError(f"expected once {start.strip()} with {end} behind it, got it {count} times")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    results = load()
    parts = blocks(results, targets.load())
    if parser.parse_args().write:
        README.write_text(filled(README.read_text(), parts))
    else:
        print("\n\n".join(parts.values()))
    for line in stale(results):
        print(f"{STALE}: {line}")


if __name__ == "__main__":
    main()
