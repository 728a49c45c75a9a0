"""Measures the ways to compute one thing beside one another: gate, interleaved times, memory, table and rows.

Times are compared within rounds: in each one every case runs once, and the order rotates, so that a change in the
machine's pace meets all of them. pytest-benchmark times one function after the other; here it drives the rounds and
saves what was measured in them (`--benchmark-json`).
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
import torch
from torch import Tensor

from transkd_fast import environment
from transkd_fast.train.memory import peak_memory

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Largest max-norm relative difference to fp64 that a case may have. The value is computed in fp32 whatever the dtype;
# gradients are rounded to the dtype of their input.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}

SOURCES = {
    "eager": ["transkd_fast/reference/{op}.py", "transkd_fast/reference/_common.py"],
    "compiled": ["transkd_fast/reference/{op}.py", "transkd_fast/reference/_common.py"],
    "published": ["transkd_fast/reference/legacy.py"],
    "cpu": ["transkd_fast/ops/{op}.py", "csrc/cpu/{op}*", "csrc/cpu/common/*"],
    "triton": ["transkd_fast/ops/{op}.py", "kernels/{op}.py", "kernels/_common.py"],
    "cuda": ["transkd_fast/ops/{op}.py", "csrc/cuda/{op}*", "csrc/cuda/common/*"],
}


@dataclass(frozen=True)
class Case:
    """One way to compute something.

    Args:
        op: what is computed; with shape, dtype, layout and device the same for all cases that are compared.
        backend: how.
        shape: sizes of the inputs, as text.
        dtype: one of `DTYPES`.
        layout: memory layout of the maps, "nchw" or "channels_last".
        device: where it runs.
        forward: computes the loss, 0-d, and keeps what the backward needs.
        backward: takes the loss through the backward and whatever follows it.
        check: gives None if the results are right, else what is wrong; called first, a wrong case is not timed.
        inputs: tensors that exist before the call; storages saved for backward beyond these are the call's own.
        sources: glob patterns of the files whose contents the times depend on, relative to the repository.
    """

    op: str
    backend: str
    shape: str
    dtype: str
    layout: str
    device: torch.device
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]
    check: Callable[[], str | None]
    inputs: Sequence[Tensor]
    sources: Sequence[str]

    def run(self) -> None:
        self.backward(self.forward())


@dataclass
class Row:
    """What was measured of a case; the fields up to `sources` identify it. Times in ms, memory in bytes."""

    op: str
    backend: str
    shape: str
    dtype: str
    layout: str
    device: str
    threads: int
    malloc: str
    transkd_fast: str
    torch: str
    triton: str
    python: str
    sources: str
    baseline: str
    measured_at: str
    load_before: float
    rounds: int = 0
    forward_ms: float | None = None
    forward_p20_ms: float | None = None
    forward_p80_ms: float | None = None
    forward_ratio: float | None = None
    total_ms: float | None = None
    total_p20_ms: float | None = None
    total_p80_ms: float | None = None
    total_ratio: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    saved_new_bytes: int | None = None
    error: str | None = None

    @property
    def group(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.layout, self.device


KEY = [field.name for field in fields(Row)][: [field.name for field in fields(Row)].index("sources") + 1]


def op_sources(op: str, backend: str) -> list[str]:
    """The files that an op's times with a backend depend on, as `Case.sources`."""
    return [pattern.format(op=op) for pattern in SOURCES[backend]]


def gradient_case(
    op: str,
    backend: str,
    shape: str,
    layout: str,
    function: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    others: Sequence[Tensor],
    truth: tuple[Tensor, Sequence[Tensor]],
    upstream: Tensor,
) -> Case:
    """A case of an op that returns a loss, checked against fp64.

    Args:
        op: the op's name.
        backend: a key of `SOURCES`.
        shape: sizes of the inputs, as text.
        layout: "nchw" or "channels_last".
        function: computes the loss from `leaves` and `others`.
        leaves: inputs whose gradients are taken; the first gives dtype and device.
        others: the other inputs.
        truth: fp64 loss and, for the upstream gradient, fp64 gradients of the leaves.
        upstream: upstream gradient, 0-d.
    """
    dtype = next(name for name, value in DTYPES.items() if value == leaves[0].dtype)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))

    def check() -> str | None:
        loss = function()
        results = {"value": (loss, truth[0], VALUE_TOLERANCE)}
        for i, pair in enumerate(zip(backward(loss), truth[1], strict=True)):
            results[f"gradient {i}"] = (*pair, GRADIENT_TOLERANCE[dtype])
        differences = {name: relative_difference(*pair[:2]) for name, pair in results.items()}
        wrong = [f"{name} is off by {d:.1e}" for name, d in differences.items() if not d <= results[name][2]]
        return ", ".join(wrong) or None

    device, inputs = leaves[0].device, [*leaves, *others]
    return Case(op, backend, shape, dtype, layout, device, function, backward, check, inputs, op_sources(op, backend))


def relative_difference(value: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest true value; NaN if either has one."""
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).abs().max() / truth.abs().max()).item()


def measure(benchmark: Any, cases: Sequence[Case], rounds: int, warmup: int, malloc: str) -> list[Row]:
    """Check, time and weigh cases that compute the same thing.

    Args:
        benchmark: pytest-benchmark's fixture; with `--benchmark-disable` there is one round.
        cases: the cases; the first is what the others' ratios refer to.
        rounds: number of rounds that count.
        warmup: number of rounds before them.
        malloc: state of the allocator, for the rows.

    Returns:
        One row per case; a wrong case has only its error.
    """
    load = os.getloadavg()[0]
    rows = [_row(case, cases[0].backend, malloc, load) for case in cases]
    for case, row in zip(cases, rows, strict=True):
        try:
            row.error = case.check()
        except Exception as error:  # a case that raises is as wrong as one that is off, and must not stop the others
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    right = [(case, row) for case, row in zip(cases, rows, strict=True) if row.error is None]
    if right:
        times = _interleaved(benchmark, [case for case, _ in right], rounds, warmup)
        for (case, row), samples in zip(right, times, strict=True):
            _fill(row, case, samples)
    for row in rows:
        if row.total_ms and rows[0].total_ms:
            row.forward_ratio = rows[0].forward_ms / row.forward_ms
            row.total_ratio = rows[0].total_ms / row.total_ms
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
    return rows


def _row(case: Case, baseline: str, malloc: str, load: float) -> Row:
    report = environment.collect()
    cuda = case.device.type == "cuda"
    return Row(
        op=case.op,
        backend=case.backend,
        shape=case.shape,
        dtype=case.dtype,
        layout=case.layout,
        device=torch.cuda.get_device_name(case.device) if cuda else cpuinfo.get_cpu_info()["brand_raw"],
        threads=torch.get_num_threads(),
        malloc=malloc,
        transkd_fast=report["transkd_fast"],
        torch=torch.__version__,
        triton=report["packages"]["triton"] or "",
        python=report["python"],
        sources=_digest(case.sources),
        baseline=baseline,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load_before=round(load, 2),
    )


def _digest(patterns: Iterable[str]) -> str:
    files = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    if not files:
        raise ValueError(f"sources: expected files in {ROOT}, got none for {list(patterns)}")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _interleaved(benchmark: Any, cases: Sequence[Case], rounds: int, warmup: int) -> list[np.ndarray]:
    """Times of every case, each an array [rounds, 2] of forward and whole call in ms."""
    samples: list[list[tuple[float, float]]] = [[] for _ in cases]
    first = 0

    def one_round() -> None:
        nonlocal first
        for i in range(first, first + len(cases)):
            samples[i % len(cases)].append(_timed(cases[i % len(cases)]))
        first += 1

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
    return [np.array(times[-rounds:]) for times in samples]


def _timed(case: Case) -> tuple[float, float]:
    if case.device.type != "cuda":
        start = time.perf_counter()
        loss = case.forward()
        middle = time.perf_counter()
        case.backward(loss)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - start)
    # Events mark the forward's end on the device, so that the host can queue the backward meanwhile as in training.
    begin, middle_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize(case.device)
    begin.record()
    loss = case.forward()
    middle_event.record()
    case.backward(loss)
    end.record()
    torch.cuda.synchronize(case.device)
    return begin.elapsed_time(middle_event), begin.elapsed_time(end)


def _fill(row: Row, case: Case, samples: np.ndarray) -> None:
    row.rounds = len(samples)
    (
        (row.forward_p20_ms, row.total_p20_ms),
        (row.forward_ms, row.total_ms),
        (row.forward_p80_ms, row.total_p80_ms),
    ) = np.percentile(samples, [20, 50, 80], axis=0).round(4).tolist()
    _, row.peak_bytes = peak_memory(case.run, case.device)
    row.saved_bytes, row.saved_new_bytes = saved_for_backward(case)


def saved_for_backward(case: Case) -> tuple[int, int]:
    """Bytes that autograd keeps alive between forward and backward, and those of them that are not in `case.inputs`."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.forward()
    inputs = {tensor.untyped_storage().data_ptr() for tensor in case.inputs}
    total, new = sum(saved.values()), sum(size for address, size in saved.items() if address not in inputs)
    case.backward(loss)
    return total, new


def report(rows: Sequence[Row]) -> str:
    """One table of all rows; the ratios say how many times faster than the group's first backend each one is."""
    lines = []
    for group, members in groupby(rows, key=lambda row: row.group):
        members = list(members)
        first = members[0]
        lines.append(f"{' '.join(group)}, {first.threads} threads, malloc {first.malloc}, load {first.load_before}")
        lines.append(
            f"  {'':<10} {'forward ms':>10} {'p20..p80':>17} {'ratio':>6} {'whole ms':>10} {'p20..p80':>17}"
            f" {'ratio':>6} {'peak MB':>9} {'saved MB':>9} {'of it new':>9}"
        )
        lines += [_line(row) for row in members]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.total_ms is None:
        return f"  {row.backend:<10} WRONG, no time: {row.error}"

    def times(name: str) -> str:
        median, low, high = (getattr(row, f"{name}{part}_ms") for part in ("", "_p20", "_p80"))
        ratio = getattr(row, f"{name}_ratio")
        spread = f"{low:.2f}..{high:.2f}"
        return f"{median:>10.2f} {spread:>17} {'' if ratio is None else f'{ratio:.2f}':>6}"

    memory = " ".join(f"{size / 1e6:>9.2f}" for size in (row.peak_bytes, row.saved_bytes, row.saved_new_bytes))
    return f"  {row.backend:<10} {times('forward')} {times('total')} {memory}"


def write(rows: Sequence[Row], folder: Path = OUT) -> None:
    """Put rows into rows.json and rows.csv of a folder; a row there with the same key is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    by_key = {tuple(row[name] for name in KEY): row for row in [*kept, *map(asdict, rows)]}
    path.write_text(json.dumps(list(by_key.values()), indent=1) + "\n")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(by_key.values())
