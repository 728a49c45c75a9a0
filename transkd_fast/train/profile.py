"""Time and memory of a training step by its parts: data, networks, losses, their backward passes, optimiser."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from transkd_fast import backends
from transkd_fast.data import EpochSampler
from transkd_fast.train import build
from transkd_fast.train.build import Log
from transkd_fast.train.run import prepare_process
from transkd_fast.train.settings import Config
from transkd_fast.train.step import Batch, Stepper, steps_per_epoch
from transkd_fast.train.tasks import DistillationTask, LabelLoss, SegmentationTask, Task
from transkd_fast.train.trace import OPTIMISER, PREFIX, STEP, UNATTRIBUTED, Cost, read_steps


@dataclass
class ProfileReport:
    """A step by its parts, over several steps.

    Args:
        parts: costs per step, by part; `UNATTRIBUTED` is the last one.
        steps: seconds of every profiled step.
        plain: seconds of every step without the profiler.
        about: what was measured, where.
    """

    parts: dict[str, list[Cost]]
    steps: list[float]
    plain: list[float]
    about: dict[str, Any] = field(default_factory=dict)

    def share(self, part: str) -> float:
        """A part's share of all steps' time."""
        return sum(cost.seconds for cost in self.parts[part]) / sum(self.steps)

    def quantiles(self, part: str) -> list[float]:
        """Seconds of a part at p20, p50 and p80."""
        return quantiles([cost.seconds for cost in self.parts[part]])

    def memory(self, part: str) -> tuple[float, float]:
        """Median bytes that a part kept, and its median peak."""
        costs = self.parts[part]
        return float(np.median([cost.kept for cost in costs])), float(np.median([cost.peak for cost in costs]))

    def as_json(self) -> str:
        """All of it as JSON."""
        parts = {
            part: {
                **dict(zip(("p20_s", "p50_s", "p80_s"), self.quantiles(part), strict=True)),
                "share": self.share(part),
                **dict(zip(("kept_bytes", "peak_bytes"), self.memory(part), strict=True)),
                "seconds": [cost.seconds for cost in self.parts[part]],
            }
            for part in self.parts
        }
        whole = {"parts": parts, "step_seconds": self.steps, "plain_step_seconds": self.plain}
        return json.dumps(self.about | whole, indent=2) + "\n"


def quantiles(seconds: list[float]) -> list[float]:
    """The values at p20, p50 and p80."""
    return [float(value) for value in np.quantile(seconds, (0.2, 0.5, 0.8))]


class _RangedLabelLoss(LabelLoss):
    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        with record_function(f"{PREFIX}ce forward"):
            return super().__call__(logits, labels)


def _put_range(owner: Any, method: str, part: str) -> None:
    function: Callable[..., Any] = getattr(owner, method)

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    object.__setattr__(owner, method, ranged)  # past nn.Module's, which keeps parameters and modules


def put_ranges(task: Task, stepper: Stepper) -> None:
    """Give the parts of a step their ranges, for good.

    Args:
        task: gets ranges around networks and losses.
        stepper: gets them around the optimiser.
    """
    if isinstance(task, DistillationTask):
        model = task.model
        _put_range(task, "teach", "teacher forward")
        _put_range(model.student, "forward", "student forward")
        for fusion in (model.skfs, model.review):
            if fusion is not None:
                name = "csf" if fusion is model.skfs else "review"
                _put_range(fusion, "forward", f"{name} forward")
                if fusion is model.skfs:
                    _put_range(fusion, "branches", f"{name} forward")
        if model.review is not None:
            _put_range(model.criterion, "forward", f"{model.feature_loss} forward")
        _put_range(model, "_feature_loss", f"{model.feature_loss} forward")
        _put_range(model, "_pea_loss", "pea forward")
        _put_range(model, "_logit_loss", f"{model.logit_loss} forward")
    else:
        _put_range(task.model, "forward", "student forward")
    task.cross_entropy = _RangedLabelLoss(task.cross_entropy.class_weights, task.cross_entropy.quarter_labels)
    _put_range(stepper.optimizer, "step", OPTIMISER)
    _put_range(stepper.optimizer, "zero_grad", OPTIMISER)
    if stepper.average is not None:
        _put_range(stepper.average, "update_parameters", "average of weights")


def profile_config(config: Config, steps: int = 10, warmup: int = 3, log: Log = tqdm.write) -> ProfileReport:
    """Profile the student's training step on training batches.

    Args:
        config: the run's configuration; without weights files, student and teacher are freshly initialised.
        steps: number of steps to profile, and to time without the profiler; default 10.
        warmup: steps before; default 3.
        log: receives what was loaded and changed.

    Returns:
        The report.

    Raises:
        ConfigError: if the configuration does not fit data or machine.
        DataError: if frames cannot be read.
    """
    prepare_process(config, log)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of every start and stop
    if config.compile:
        log("compile: not in effect here, since the parts of compiled code cannot be told apart")
        config = replace(config, compile=False)
    dataset = build.build_dataset(config, "train")
    build.resolve_class_weights(config, dataset, log)
    student = build.build_model(config, config.student, dataset.num_classes, "student", log)
    task: Task
    if config.distill.enabled:
        teacher = build.build_model(config, config.teacher, dataset.num_classes, "teacher", log)
        model = build.build_transkd(config, student, teacher)
        task = build.distillation_task(config, model, teacher, student.num_classes)
    else:
        weights = build.class_weights(config.fit, student.num_classes, "fit", build.select_device(config.device))
        task = SegmentationTask(student, weights, config.legacy.quarter_labels)
    loader = build.build_loader(config, dataset, config.fit, "student", train=True)
    steps_per_epoch("student", config.fit, loader, config.legacy.quarter_labels)
    stepper = Stepper(config, "student", task, config.fit, warmup + 2 * steps + 1)
    put_ranges(task, stepper)
    task.model.train()
    with backends.use_backend(config.backend):
        return _measure(config, stepper, _endless(loader, config.fit.accumulate), steps, warmup)


def _endless(loader: Any, accumulate: int) -> Iterator[list[Batch]]:
    epoch = 0
    while True:
        cast(EpochSampler, loader.sampler).set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader) // accumulate):
            yield [next(batches) for _ in range(accumulate)]
        epoch += 1


def _measure(
    config: Config, stepper: Stepper, batches: Iterator[list[Batch]], steps: int, warmup: int
) -> ProfileReport:
    device, number = stepper.device, 0

    def step() -> None:
        nonlocal number
        with record_function(PREFIX + STEP):
            with record_function(f"{PREFIX}data"):
                batch = next(batches)
            stepper.step(batch, number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        number += 1

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plain = []
    bar = tqdm(total=warmup + 2 * steps + 1, desc="profile", unit="step", leave=False, disable=None)
    with bar, tempfile.TemporaryDirectory() as folder:
        for _ in range(warmup + steps):
            start = time.perf_counter()
            step()
            plain.append(time.perf_counter() - start)
            bar.update()
        with profile(activities=activities, profile_memory=True) as profiler:
            for _ in range(steps + 1):
                step()
                bar.update()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        # The profiler's own first step is left out too.
        found = read_steps(json.loads(path.read_text())["traceEvents"], device.type)[1:]
    names = dict.fromkeys(part for _, costs in found for part in costs if part != UNATTRIBUTED)
    parts = {part: [costs.get(part, Cost()) for _, costs in found] for part in (*names, UNATTRIBUTED)}
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": config.precision,
        "student": config.student.model,
        "teacher": config.teacher.model if config.distill.enabled else None,
        "size": list(config.data.size),
        "images_per_step": config.fit.batch_size * config.fit.accumulate,
    }
    return ProfileReport(parts, [seconds for seconds, _ in found], plain[warmup:], about)


def draw_chart(report: ProfileReport, path: Path) -> None:
    """Draw the parts' times and memory as bars.

    Args:
        report: what to draw.
        path: PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(report.parts)
    at = np.arange(len(parts))
    times = 1e3 * np.array([report.quantiles(part) for part in parts])
    memory = np.array([report.memory(part) for part in parts]) / 2**20
    colours = {"forward": "tab:blue", "backward": "tab:orange"}
    of_part = [colours.get(part.split()[-1], "tab:gray") for part in parts]
    figure = Figure(figsize=(12, 1.6 + 0.32 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    spread = np.stack([times[:, 1] - times[:, 0], times[:, 2] - times[:, 1]])
    left.barh(at, times[:, 1], xerr=spread, color=of_part, ecolor="black", capsize=2)
    for y, part in enumerate(parts):
        share = f"{100 * report.share(part):.1f} %"
        left.annotate(share, (times[y, 2], y), (6, 0), textcoords="offset points", va="center")
    left.margins(x=0.12)
    left.set_yticks(at, parts)
    left.invert_yaxis()
    left.set_xlabel("ms at p50, whiskers p20 and p80; share of the step")
    right.barh(at - 0.2, memory[:, 1], 0.4, label="peak in the step so far", color="tab:green")
    right.barh(at + 0.2, memory[:, 0], 0.4, label="kept (less than 0: freed)", color="tab:olive")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("tensors, MiB")
    right.legend(loc="upper left")
    about = report.about
    networks = " <- ".join(name for name in (about["student"], about["teacher"]) if name)
    height, width = about["size"]
    step, plain = (1e3 * quantiles(seconds)[1] for seconds in (report.steps, report.plain))
    figure.suptitle(
        f"{networks}, {about['images_per_step']} x {height} x {width}, {about['precision']}, {about['device']}:"
        f" step {step:.1f} ms, {plain:.1f} ms without the profiler"
    )
    figure.savefig(path, dpi=120)
