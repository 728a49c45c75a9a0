"""Fused against eager: the same weights and batches through both, compared term by term and tensor by tensor.

The truth is eager in fp64, teacher and student included. Checked is the configured backend in the configured precision,
and beside it eager in that precision, which shows what the precision itself costs. Compared are every loss term, the
gradient of every parameter and every buffer (running statistics and their counters), by the largest difference over the
largest true value of the tensor (max norm).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from transkd_fast import backends
from transkd_fast.train import build
from transkd_fast.train.memory import peak_memory
from transkd_fast.train.settings import Config
from transkd_fast.train.tasks import DistillationTask, TrainingError

VANISHING = 1e-10  # of the largest gradient: what fp64 rounding leaves of a gradient that cancels exactly

TIMED_ROUNDS = 5

Batch = tuple[Tensor, Tensor]


@dataclass
class Row:
    """One compared tensor.

    Args:
        name: "loss/<term>", "grad/<parameter>" or "buffer/<name>".
        difference: max-norm relative difference to eager fp64, worst of all batches.
        eager: the same for eager in the checked precision: what the precision itself costs.
        limit: largest difference allowed.
    """

    name: str
    difference: float
    eager: float
    limit: float

    @property
    def bound(self) -> float:
        """The limit, or twice what eager itself is off in this precision where that is more.

        Some gradients are ill-conditioned: the squeeze batch norm sees one value per image, and in bf16 most sums over
        pixels lose digits. No kernel can be closer to fp64 there than the storage precision allows.
        """
        return max(self.limit, 2 * self.eager) if math.isfinite(self.eager) else self.limit

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the bound (a NaN is not)."""
        return self.difference <= self.bound


@dataclass
class Measurement:
    """Speed and memory of one way to run the step.

    Args:
        images_per_second: of forward and backward.
        peak_bytes: most memory that tensors took at once beyond weights and inputs.
    """

    images_per_second: float
    peak_bytes: int


@dataclass
class VerifyReport:
    """The comparison.

    Args:
        precision: of the checked run.
        rows: losses first, then buffers and gradients.
        runs: how often each backend ran each op in the checked run.
        checked: speed and memory with the configured backend.
        eager: the same with the eager backend in the same precision.
    """

    precision: str
    rows: list[Row]
    runs: Counter[tuple[str, str]]
    checked: Measurement
    eager: Measurement
    fused_runs: int = field(init=False)

    def __post_init__(self) -> None:
        self.fused_runs = sum(count for (_, backend), count in self.runs.items() if backend != "eager")

    @property
    def disagreements(self) -> list[Row]:
        """The rows beyond their limit."""
        return [row for row in self.rows if not row.agrees]

    @property
    def exit_code(self) -> int:
        """0 when everything agrees, 1 when something disagrees, 2 when no fused kernel ran."""
        if self.disagreements:
            return 1
        return 0 if self.fused_runs else 2

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.disagreements:
            return f"DISAGREE ({len(self.disagreements)} of {len(self.rows)} tensors)"
        return f"agree ({len(self.rows)} tensors)" if self.fused_runs else "NOTHING FUSED RAN"


def verify(task: DistillationTask, batches: list[Batch], config: Config) -> VerifyReport:
    """Compare the configured backend and precision with eager fp64.

    Args:
        task: the student with its modules and the teacher, fp32; left as it was.
        batches: images [B, 3, H, W] and labels int64 [B, H, W], on the task's device.
        config: gives backend, precision and limits.

    Returns:
        The comparison.

    Raises:
        TrainingError: if a label is out of range.
    """
    precision = config.verify.precision or config.precision
    limit = config.verify.limit_fp32 if precision == "fp32" else config.verify.limit_bf16
    truth, checked, eager = (_copy_without_randomness(task) for _ in range(3))
    truth.model.double()
    truth.teacher.double()
    worst: dict[str, tuple[float, float]] = {}
    with _full_fp32():
        with backends.count_runs() as runs, backends.use_backend(config.backend):
            results = [_results(checked, batch, precision) for batch in _bar(batches, "verify: backend")]
        for batch, result in zip(_bar(batches, "verify: fp64"), results, strict=True):
            with backends.use_backend("eager"):
                plain = _results(eager, batch, precision)
                true = _results(truth, (batch[0].double(), batch[1]), "fp32")
            largest = max(value.abs().max().item() for name, value in true.items() if name.startswith("grad/"))
            for name in true.keys() | result.keys():
                old = worst.get(name, (0.0, 0.0))
                worst[name] = (
                    _larger(old[0], _difference(result.get(name), true.get(name), largest)),
                    _larger(old[1], _difference(plain.get(name), true.get(name), largest)),
                )
        measured = _measure([(checked, config.backend), (eager, "eager")], batches[0], precision)
    if wrong := int(checked.cross_entropy.take_counts()[3]):  # which a GPU only counts
        raise TrainingError(f"verify: expected labels that are classes or ignored, got {wrong} pixels out of range")
    rows = [Row(name, ours, theirs, limit) for name, (ours, theirs) in sorted(worst.items(), key=_losses_first)]
    return VerifyReport(precision, rows, runs, *measured)


def _bar(items: Sequence[Any], text: str) -> Iterable[Any]:
    return tqdm(items, text, leave=False, disable=None)


def _losses_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return not item[0].startswith("loss/"), item[0]


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Switch TF32 off, by default on for cuDNN's convolutions: its 10 bits would hide what a kernel does."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _copy_without_randomness(task: DistillationTask) -> DistillationTask:
    """A copy without dropout and stochastic depth, whose masks cannot be the same in two precisions.

    A term with weight 0 gets weight 1: times 0, every kernel would agree.
    """
    copied = copy.deepcopy(task)
    for module in copied.model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif "DropPath" in type(module).__name__:
            for rate in ("rate", "drop_prob"):
                if hasattr(module, rate):
                    setattr(module, rate, 0.0)
    copied.weights = {name: weight or 1.0 for name, weight in copied.weights.items()}
    copied.model.train()
    return copied


def _results(task: DistillationTask, batch: Batch, precision: str) -> dict[str, Tensor]:
    task.model.zero_grad(set_to_none=True)
    terms = _forward_backward(task, batch, precision)
    results = {f"loss/{name}": value.detach().double() for name, value in terms.items()}
    for name, parameter in task.model.named_parameters():
        if parameter.grad is not None:
            results[f"grad/{name}"] = parameter.grad.double()
    for name, buffer in task.model.named_buffers():
        results[f"buffer/{name}"] = buffer.detach().double().clone()
    return results


def _forward_backward(task: DistillationTask, batch: Batch, precision: str) -> dict[str, Tensor]:
    with build.autocast(batch[0].device, precision):
        terms = task.losses(*batch)
    torch.stack(list(terms.values())).sum().backward()
    return terms


def _difference(value: Tensor | None, truth: Tensor | None, largest: float) -> float:
    """Max-norm relative difference; a gradient that is zero but for rounding is measured by the largest gradient.

    Such gradients exist by construction (a bias before a batch norm); relative to themselves, rounding is all they are.
    A gradient that only one side has is infinitely far from none.
    """
    if value is None or truth is None:
        return math.inf
    scale = truth.abs().max().item()
    if scale < VANISHING * largest:
        scale = largest
    return (value - truth).abs().max().item() / scale


def _larger(a: float, b: float) -> float:
    return b if b != b or b > a else a  # a NaN stays


def _measure(ways: list[tuple[DistillationTask, str | None]], batch: Batch, precision: str) -> list[Measurement]:
    """Times the ways in turn, so that a change in the machine's pace meets all of them, then their memory."""
    device = batch[0].device

    def step(task: DistillationTask) -> None:
        task.model.zero_grad(set_to_none=True)
        _forward_backward(task, batch, precision)

    seconds: list[list[float]] = [[] for _ in ways]
    for _ in _bar(range(TIMED_ROUNDS), "verify: timing"):
        for (task, backend), times in zip(ways, seconds, strict=True):
            with backends.use_backend(backend):
                times.append(_timed(partial(step, task), device))
    measurements = []
    for (task, backend), times in zip(ways, seconds, strict=True):
        with backends.use_backend(backend):
            _, peak = peak_memory(partial(step, task), device)
        measurements.append(Measurement(len(batch[0]) / statistics.median(times), peak))
    return measurements


def _timed(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
