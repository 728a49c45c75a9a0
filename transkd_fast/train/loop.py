"""The training loop: one task, epoch by epoch, with evaluation, metrics file and checkpoints."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from transkd_fast import backends
from transkd_fast.data import EpochSampler
from transkd_fast.train import guards, messages
from transkd_fast.train.build import Log, autocast
from transkd_fast.train.checkpoint import remove_leftovers, save_checkpoint, write_text
from transkd_fast.train.distributed import ALONE, Processes
from transkd_fast.train.metrics import Scores, SegmentationMeter
from transkd_fast.train.observers import Observer
from transkd_fast.train.progress import Progress, checkpoint_of, restore
from transkd_fast.train.settings import Config, FitConfig
from transkd_fast.train.signals import SigtermNote, Terminated
from transkd_fast.train.step import Stepper, StepResult, steps_per_epoch
from transkd_fast.train.tasks import Task, TrainingError


@dataclass
class FitResult:
    """What a training came to.

    Args:
        scores: evaluation after the last epoch.
        best_miou: best mIoU of any evaluation.
        images_per_second: of the training steps, data loading included, over all epochs run in this process.
        last: checkpoint after the last epoch.
        best: checkpoint of the best mIoU.
    """

    scores: Scores
    best_miou: float
    images_per_second: float
    last: Path
    best: Path


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    precision: str,
    processes: Processes = ALONE,
    groups: Sequence[str] = (),
) -> Scores:
    """Score a network at label size.

    Args:
        model: returns StageOutputs with logits; its mode is put back afterwards.
        loader: yields images [B, 3, h, w] and labels [B, H, W].
        num_classes: number of classes of the dataset.
        device: where to run.
        precision: "fp32", "bf16" or "fp16".
        processes: each has a loader of its own share of the frames.
        groups: the group of every frame in the loader's order, for scores of each of them too, of this process alone;
            empty for none.

    Returns:
        The scores over the whole loader, of all processes together.
    """
    training = model.training
    model.eval()
    meter = SegmentationMeter(num_classes, device)
    of_groups = {name: SegmentationMeter(num_classes, device) for name in dict.fromkeys(groups)}
    seen = 0
    try:
        for images, labels in loader:
            with autocast(device, precision):
                logits = model(images.to(device, non_blocking=True)).logits
            labels = labels.to(device, torch.int64, non_blocking=True)
            meter.update(logits, labels)
            names = groups[seen : seen + len(images)]
            for name in dict.fromkeys(names):
                rows = [row for row, other in enumerate(names) if other == name]
                of_groups[name].update(logits[rows], labels[rows])
            seen += len(images)
    finally:
        model.train(training)
    return meter.compute(processes.sum)._replace(groups={name: part.compute() for name, part in of_groups.items()})


class Trainer:
    """Trains one task of a run.

    Args:
        config: the run's configuration.
        name: "teacher" or "student"; also the folder's name and the seed's purpose.
        task: gives the losses.
        fit: epochs, batch size, optimiser.
        train_loader: training batches; this process's share of them.
        val_loader: validation batches; this process's share of them.
        classes: class names of the dataset.
        folder: where metrics.csv, last.pt, last.previous.pt and best.pt go; made when training starts.
        meta: facts kept in the checkpoint, from which `transkd eval` builds the network again.
        log: receives one line per epoch.
        observers: watch the training.
        processes: those that train together; the first one writes.

    Raises:
        ConfigError: if an epoch has no step, or published rules do not go with accumulated gradients.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        task: Task,
        fit: FitConfig,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any],
        classes: Sequence[str],
        folder: Path,
        meta: dict[str, Any],
        log: Log = tqdm.write,
        observers: Sequence[Observer] = (),
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.name, self.task, self.fit_config = config, name, task, fit
        self.train_loader, self.val_loader, self.classes = train_loader, val_loader, tuple(classes)
        self.folder, self.meta, self.log, self.observers = folder, meta, log, tuple(observers)
        self.processes = processes
        self.steps_per_epoch = steps_per_epoch(name, fit, train_loader, task.cross_entropy.quarter_labels)
        self.stepper = Stepper(config, name, task, fit, fit.epochs * self.steps_per_epoch, processes)
        self.device, self.optimizer = self.stepper.device, self.stepper.optimizer
        self.progress = Progress()
        self._sigterm = SigtermNote()
        self._gradients: dict[str, float] = {}
        self._saved_at = (time.monotonic(), 0)  # and the step

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Number of steps made since the training's very start."""
        return self.epoch * self.steps_per_epoch + self.progress.steps

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        """Checkpoint of the best mIoU."""
        return self.folder / "best.pt"

    @property
    def scored(self) -> nn.Module:
        """The network that is evaluated: the average of the weights where one is kept."""
        average = self.stepper.average
        return self.task.deployed if average is None else average.module

    def fit(self) -> FitResult:
        """Train to the last epoch, from the last checkpoint if the run resumes.

        Returns:
            The result.

        Raises:
            TrainingError: if a loss, the gradient's norm, a weight or a running statistic is not finite, a label is
                out of range, or memory does not suffice.
            CheckpointError: if the checkpoint to resume from is broken or of another run, or none can be written.
            WeightsError: if its weights do not fit.
            Terminated: if SIGTERM came; the checkpoint is written.
        """
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        self.processes.wait()
        if self.config.resume:
            restore(self)
        self.processes.wait()  # before the first one writes another
        for observer in self.observers:
            observer.start(self)
        self._saved_at = (time.monotonic(), self.step)
        progress = self.progress
        seconds = images = 0.0
        try:
            with backends.use_backend(self.config.backend), self._sigterm:
                while self.epoch < self.fit_config.epochs:
                    train_row, epoch_images, epoch_seconds = self._train_epoch()
                    images, seconds = images + epoch_images, seconds + epoch_seconds
                    ended = self.epoch + 1
                    due = ended % self.fit_config.eval_every == 0 or ended == self.fit_config.epochs
                    self._finish_epoch(train_row, self.evaluate() if due else None)
                    if self.processes.any(self._sigterm.came, self.device):
                        self._end_on_sigterm()
                if progress.scores is None:
                    progress.scores = self.evaluate()
        except (RuntimeError, MemoryError) as error:
            if not guards.is_out_of_memory(error):
                raise
            raise TrainingError(messages.out_of_memory(self, error)) from error
        speed = images / seconds if seconds else 0.0
        return FitResult(progress.scores, progress.best_miou, speed, self.last, self.best)

    def evaluate(self) -> Scores:
        """Score the deployed network, or the average of its weights, on the validation frames.

        Returns:
            The scores.
        """
        precision, count = self.config.precision, len(self.classes)
        return evaluate(self.scored, self._until_sigterm(), count, self.device, precision, self.processes)

    def _until_sigterm(self) -> Iterator[tuple[Tensor, Tensor]]:
        quiet = None if self.processes.first else True
        for batch in tqdm(self.val_loader, f"{self.name} evaluation", leave=False, disable=quiet):
            yield batch
            if self._sigterm.came and self.processes.count == 1:  # several would have to agree on a batch
                self._save()
                self._end_on_sigterm()

    def _train_epoch(self) -> tuple[dict[str, float], int, float]:
        # Everything random in an epoch follows from its number and the step's, so a resumed run goes the same way.
        progress, log_every = self.progress, self.config.log_every
        images_per_step = self.fit_config.batch_size * self.fit_config.accumulate * self.processes.count
        sampler = cast(EpochSampler, self.train_loader.sampler)
        sampler.set_epoch(self.epoch, skip=progress.steps * images_per_step)
        batches = iter(self.train_loader)
        self.task.model.train()
        self.task.cross_entropy.take_counts()
        state = guards.floating(self.task.model)
        broken = torch.zeros(len(state), dtype=torch.bool, device=self.device)
        images_seen = 0
        start = time.perf_counter()
        means = progress.means() | progress.shares()  # of an epoch that was interrupted after its last step
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.steps,
            desc=f"{self.name} {self.epoch + 1}/{self.fit_config.epochs}",
            unit="step",
            leave=False,
            disable=None if self.processes.first else True,
        )
        with bar:
            while progress.steps < self.steps_per_epoch:
                batch = [next(batches) for _ in range(self.fit_config.accumulate)]
                broken |= guards.broken_first(state, progress.sums)
                measure = self.config.log_gradients and (progress.steps + 1) % log_every == 0
                self._take(self._step(batch, self.step, measure), state, broken)
                images_seen += sum(len(images) for images, _ in batch) * self.processes.count
                bar.update()
                at_end = progress.steps == self.steps_per_epoch
                if at_end or progress.steps % log_every == 0 or (self.processes.count == 1 and self._save_due()):
                    means = self._look(state, broken)
                    rate = images_seen / (time.perf_counter() - start)
                    self._tell_observers(means | {"images_per_second": rate})
                    bar.set_postfix_str(f"{rate:.1f} img/s " + " ".join(f"{k} {v:.3f}" for k, v in means.items()))
                    self._save_within_epoch(at_end)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        row = {"lr": self.optimizer.param_groups[0]["lr"], "images_per_second": images_seen / seconds}
        return row | {f"train/{key}": value for key, value in means.items()}, images_seen, seconds

    def _step(self, batches: list[tuple[Tensor, Tensor]], number: int, measure: bool = False) -> StepResult:
        return self.stepper.step(batches, number, measure)

    def _take(self, result: StepResult, state: dict[str, Tensor], broken: Tensor) -> None:
        """Count a step's terms, or that it was skipped."""
        progress = self.progress
        progress.steps += 1
        self._gradients = {key: value.item() for key, value in result.gradients.items()}
        if result.made:
            progress.in_a_row = 0
            for key, value in result.terms.items():
                progress.sums[key] = progress.sums.get(key, 0) + value
            return
        rescaled = result.finite_loss and self.stepper.scaler.is_enabled()
        if not rescaled and self.config.on_nonfinite != "skip":
            bad = [key for key, value in result.terms.items() if not value.isfinite()]
            weights, where = guards.names_of(state, broken), f"at step {progress.steps}"
            raise messages.not_finite(self, bad, weights, where, result.first)
        progress.skipped += 1
        progress.in_a_row += 1
        for key, value in result.terms.items():
            progress.sums.setdefault(key, torch.zeros_like(value))
        if not rescaled:
            place = f"step {progress.steps} of epoch {self.epoch + 1}"
            self.log(f"{self.name}: {place} skipped: {result.first} is not finite; {progress.skipped} skipped so far")
        if progress.in_a_row > self.config.skip_limit:
            raise TrainingError(messages.too_many_skipped(self, result.first))

    def _look(self, state: dict[str, Tensor], broken: Tensor) -> dict[str, float]:
        """Read back what the steps since the last look came to."""
        progress, processes = self.progress, self.processes
        progress.counts += processes.sum(self.task.cross_entropy.take_counts().to(self.device)).cpu()
        if out_of_range := int(progress.counts[3]):
            raise TrainingError(messages.labels_out_of_range(self, out_of_range))
        if processes.count > 1:
            progress.sums = {key: processes.sum(value) / processes.count for key, value in progress.sums.items()}
        means, names = progress.means(), guards.names_of(state, broken)
        bad = [key for key, value in means.items() if not math.isfinite(value)]
        if (bad and progress.skipped < progress.steps) or names:
            where = f"within the last {self.config.log_every} steps up to step {progress.steps}"
            raise messages.not_finite(self, bad, names or guards.broken_in_teacher(self.task), where)
        means |= progress.shares()
        skips = self.config.on_nonfinite == "skip" or self.stepper.scaler.is_enabled()
        return means | {"skipped": float(progress.skipped)} if skips else means

    def _tell_observers(self, values: dict[str, float]) -> None:
        values |= {"lr": self.optimizer.param_groups[0]["lr"], **self._gradients}
        if self._gradients:
            norms = " ".join(f"{key.removeprefix('gradient/')} {norm:.3g}" for key, norm in self._gradients.items())
            self.log(f"{self.name} step {self.step}: gradient norms {norms}")
        for observer in self.observers:
            observer.step(self, self.step, values)

    def _save_due(self) -> bool:
        seconds, step = time.monotonic() - self._saved_at[0], self.step - self._saved_at[1]
        every = self.config.checkpoint_every
        return self._sigterm.came or seconds >= 60 * self.config.checkpoint_minutes or (every or math.inf) <= step

    def _save_within_epoch(self, at_end: bool) -> None:
        sigterm = self.processes.any(self._sigterm.came, self.device)
        if sigterm or (self.processes.any(self._save_due(), self.device) and not at_end):
            self._save()
        if sigterm:
            self._end_on_sigterm()

    def _save(self, best: bool = False) -> None:
        if names := guards.broken_names(guards.floating(self.task.model)):
            raise messages.not_finite(self, [], names, f"after step {self.progress.steps}")
        if moments := guards.broken_optimizer(self.optimizer, self.task.model):
            raise messages.not_finite(self, [], moments, f"after step {self.progress.steps}")
        if self.processes.first:
            # last.pt comes last: a run that is interrupted before it repeats the epoch, and the other files with it.
            if best:
                save_checkpoint(checkpoint_of(self), self.best)
            save_checkpoint(checkpoint_of(self), self.last, keep_previous=True)
        self._saved_at = (time.monotonic(), self.step)

    def _end_on_sigterm(self) -> None:
        self.log(f"{self.name}: SIGTERM: stopped after step {self.step}; resume=true goes on from {self.last}")
        raise Terminated

    def _finish_epoch(self, train_row: dict[str, float], scores: Scores | None) -> None:
        progress, step = self.progress, self.step
        progress.end_epoch()
        row: dict[str, Any] = {"epoch": self.epoch, "step": step, **train_row}
        row |= {"val/miou": "", "val/pixel_accuracy": "", "val/miou_stride4": ""}
        row |= {f"val/iou/{name}": "" for name in self.classes}
        improved = False
        if scores is not None:
            progress.scores = scores
            improved = scores.miou > progress.best_miou
            progress.best_miou = max(progress.best_miou, scores.miou)
            row |= {"val/miou": scores.miou, "val/pixel_accuracy": scores.pixel_accuracy}
            row["val/miou_stride4"] = scores.miou_stride4
            row |= {f"val/iou/{name}": iou for name, iou in zip(self.classes, scores.iou, strict=True)}
        progress.rows.append(row)
        if self.processes.first:
            self._write_metrics()
        self._save(improved)
        miou = f"mIoU {100 * scores.miou:.2f} %" if scores is not None else "not evaluated"
        losses = " ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in train_row.items() if k.startswith("train/"))
        rate = f"{train_row['images_per_second']:.1f} img/s"
        self.log(f"{self.name} epoch {self.epoch}/{self.fit_config.epochs}: {losses}, {miou}, {rate}")
        for observer in self.observers:
            observer.epoch(self, self.epoch, row, scores)

    def _write_metrics(self) -> None:
        """Write all rows anew: the file is whole at any time, and its header fits its rows."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.progress.rows[-1]), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.progress.rows)
        write_text(text.getvalue(), self.folder / "metrics.csv")
