"""From cases to rows: gate, interleaved times, memory, launches, shares of the copy and GEMM rates."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import cpuinfo
import numpy as np
import torch

from harness import launches, memory, rates, rows, timing
from harness.cases import DTYPES, Case
from harness.rows import MODES, Figures, Row
from transkd_fast import environment


def measure(benchmark: Any, cases: Sequence[Case], rounds: int, warmup: int, malloc: str) -> list[Row]:
    """Check, time and weigh cases that compute the same thing.

    Args:
        benchmark: pytest-benchmark's fixture; with `--benchmark-disable` there is one round.
        cases: the cases of one problem; the first is what the others' ratios refer to.
        rounds: number of rounds that count.
        warmup: number of rounds before them.
        malloc: state of the allocator, for the rows.

    Returns:
        One row per case; a wrong case has only its error.
    """
    load = os.getloadavg()[0]
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    results = [_row(case, cases[0].backend, malloc, load, now) for case in cases]
    for case, row in zip(cases, results, strict=True):
        row.error = _error(case)
    right = [(case, row) for case, row in zip(cases, results, strict=True) if row.error is None]
    if right:
        measured = timing.interleaved(benchmark, [case for case, _ in right], rounds, warmup)
        for (case, row), times in zip(right, measured, strict=True):
            _fill(row, case, times, results[0])
    return results


def _error(case: Case) -> str | None:
    try:
        return case.check()
    except Exception as error:  # a case that raises is as wrong as one that is off, and must not stop the others
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _fill(row: Row, case: Case, times: timing.Times, baseline: Row) -> None:
    problem = case.problem
    row.rounds = len(times.total)
    row.copy_bytes_per_s = rates.copy_rate(problem.device)
    row.gemm_flops_per_s = rates.gemm_rate(problem.device, DTYPES[problem.dtype])
    launched = dict(zip(MODES, launches.launches(case), strict=False))
    if None not in launched.values():
        launched["total"] = sum(launched.values())
    for mode in MODES:
        first = getattr(baseline, mode).p50_ms
        figures = _figures(
            getattr(times, mode), row, _least(problem.least_bytes, mode), _least(problem.least_flops, mode)
        )
        figures.ratio = first / figures.p50_ms if first else (1.0 if row is baseline else None)
        figures.launches = launched.get(mode)
        setattr(row, mode, figures)
    row.wall_ms = None if times.wall is None else round(float(np.median(times.wall)), 4)
    row.graph_ms = None if times.graph is None else round(float(np.median(times.graph)), 4)
    row.queued = times.queued
    row.peak_bytes = memory.peak_bytes(case)
    row.leaf_bytes = sum(leaf.nbytes for leaf in case.leaves)
    row.saved_bytes, row.saved_new_bytes = memory.saved_for_backward(case)
    if not case.backend.endswith("compiled"):  # it would compile a second graph
        row.kept_no_grad_bytes = memory.kept_without_gradient(case)


def _least(work: Any, mode: str) -> int | None:
    parts = MODES[:2] if mode == "total" else (mode,)
    return sum(work[part] for part in parts) if work else None


def _figures(samples: np.ndarray, row: Row, least_bytes: int | None, least_flops: int | None) -> Figures:
    p20, p50, p80 = np.percentile(samples, [20, 50, 80]).round(4).tolist()
    figures = Figures(p20, p50, p80, least_bytes=least_bytes, least_flops=least_flops)
    if least_bytes is not None:
        figures.bytes_per_s = least_bytes / (p50 / 1e3)
        figures.copy_share = figures.bytes_per_s / row.copy_bytes_per_s
    if least_flops is not None:
        figures.flops_per_s = least_flops / (p50 / 1e3)
        figures.gemm_share = figures.flops_per_s / row.gemm_flops_per_s
    return figures


def _row(case: Case, baseline: str, malloc: str, load: float, now: str) -> Row:
    problem, device = case.problem, case.problem.device
    return Row(
        op=problem.op,
        backend=case.backend,
        size=problem.size,
        batch=problem.batch,
        shape=problem.shape,
        dtype=problem.dtype,
        layout=problem.layout,
        device_type=device.type,
        device=_device_name(device),
        threads=torch.get_num_threads(),
        malloc=malloc,
        **_versions(),
        sources=rows.digest(rows.sources_of(problem.op, case.backend, device.type)),
        baseline=baseline,
        measured_at=now,
        load_before=round(load, 2),
    )


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Virtual machines hide the processor's model, so what it can do stands beside its brand.
    return f"{cpuinfo.get_cpu_info()['brand_raw']}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _versions() -> dict[str, str]:
    report = environment.collect()
    toolkit = report["build"].get("cuda_build", {}).get("cuda_toolkit")
    return {
        "transkd_fast": report["transkd_fast"],
        "torch": torch.__version__,
        "triton": report["packages"]["triton"] or "",
        "cuda_toolkit": f"{toolkit // 1000}.{toolkit % 1000 // 10}" if toolkit else "",
        "driver": _driver(),
        "python": report["python"],
    }


def _driver() -> str:
    if not torch.cuda.is_available():
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0].strip() if lines else "unknown"
