"""The training loop: one task, epoch by epoch, with evaluation, metrics file and checkpoints."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from transkd_fast import backends
from transkd_fast.data import IGNORE_INDEX, EpochSampler
from transkd_fast.models import load_weights
from transkd_fast.train.build import Log, autocast, derived_seed
from transkd_fast.train.checkpoint import KEYS, CheckpointError, load_checkpoint, save_checkpoint, write_text
from transkd_fast.train.metrics import Scores, SegmentationMeter
from transkd_fast.train.observers import Observer
from transkd_fast.train.settings import Config, FitConfig
from transkd_fast.train.tasks import DistillationTask, Task, TrainingError

NAMED = 3  # of the weights that are not finite, in the message


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
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device, precision: str
) -> Scores:
    """Score a network at label size.

    Args:
        model: returns StageOutputs with logits; its mode is put back afterwards.
        loader: yields images [B, 3, h, w] and labels [B, H, W].
        num_classes: number of classes of the dataset.
        device: where to run.
        precision: "fp32" or "bf16".

    Returns:
        The scores over the whole loader.
    """
    training = model.training
    model.eval()
    meter = SegmentationMeter(num_classes, device)
    try:
        for images, labels in loader:
            with autocast(device, precision):
                logits = model(images.to(device, non_blocking=True)).logits
            meter.update(logits, labels.to(device, torch.int64, non_blocking=True))
    finally:
        model.train(training)
    return meter.compute()


def learning_rate(fit: FitConfig, step: int, total: int) -> float:
    """The rate of one step: linear warm-up, then polynomial decay that reaches 0 at the end.

    Args:
        fit: the training's settings.
        step: number of steps already made.
        total: number of steps of the whole training.

    Returns:
        The learning rate.
    """
    if step < fit.warmup_steps:
        return fit.lr * (step + 1) / fit.warmup_steps
    progress = (step - fit.warmup_steps) / max(1, total - fit.warmup_steps)
    return fit.lr * (1 - min(progress, 1.0)) ** fit.power


class Trainer:
    """Trains one task of a run.

    Args:
        config: the run's configuration.
        name: "teacher" or "student"; also the folder's name and the seed's purpose.
        task: gives the losses.
        fit: epochs, batch size, optimiser.
        train_loader: training batches.
        val_loader: validation batches.
        classes: class names of the dataset.
        folder: where metrics.csv, last.pt and best.pt go; made when training starts.
        meta: facts kept in the checkpoint, from which `transkd eval` builds the network again.
        log: receives one line per epoch.
        observers: watch the training.
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
    ) -> None:
        self.config, self.name, self.task, self.fit_config = config, name, task, fit
        self.train_loader, self.val_loader, self.classes = train_loader, val_loader, tuple(classes)
        self.folder, self.meta, self.log, self.observers = folder, meta, log, tuple(observers)
        self.device = next(task.model.parameters()).device
        self.total_steps = fit.epochs * len(train_loader)
        betas = (fit.betas[0], fit.betas[1])
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=fit.lr, betas=betas, weight_decay=fit.weight_decay)
        self.epoch = 0
        self.best_miou = -math.inf
        self.last_scores: Scores | None = None
        self.rows: list[dict[str, Any]] = []

    @property
    def last(self) -> Path:
        """Checkpoint after the last finished epoch."""
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        """Checkpoint of the best mIoU."""
        return self.folder / "best.pt"

    def fit(self) -> FitResult:
        """Train to the last epoch, from the last checkpoint if the run resumes.

        Returns:
            The result.

        Raises:
            TrainingError: if a loss, the gradient's norm, a weight or a running statistic is not finite, or a label is
                out of range.
            CheckpointError: if the checkpoint to resume from is broken or of another run.
            WeightsError: if its weights do not fit.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.resume:
            if self.last.exists():
                self._resume()
            self._read_metrics()
        for observer in self.observers:
            observer.start(self)
        seconds = images = 0.0
        with backends.use_backend(self.config.backend):
            while self.epoch < self.fit_config.epochs:
                train_row, epoch_images, epoch_seconds = self._train_epoch()
                images, seconds = images + epoch_images, seconds + epoch_seconds
                self.epoch += 1
                due = self.epoch % self.fit_config.eval_every == 0 or self.epoch == self.fit_config.epochs
                scores = self.evaluate() if due else None
                self._finish_epoch(train_row, scores)
        if self.last_scores is None:
            self.last_scores = self.evaluate()
        return FitResult(self.last_scores, self.best_miou, images / seconds if seconds else 0.0, self.last, self.best)

    def evaluate(self) -> Scores:
        """Score the deployed network on the validation frames.

        Returns:
            The scores.
        """
        return evaluate(self.task.deployed, self.val_loader, len(self.classes), self.device, self.config.precision)

    def _train_epoch(self) -> tuple[dict[str, float], int, float]:
        # Everything random in an epoch follows from its number, so that a resumed run goes the same way. The loader
        # draws a number only when it starts worker processes, so it starts before the seed is set.
        cast(EpochSampler, self.train_loader.sampler).set_epoch(self.epoch)
        batches = iter(self.train_loader)
        torch.manual_seed(derived_seed(self.config.seed, self.name, self.epoch))
        self.task.model.train()
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(4, dtype=torch.int64)
        self.task.cross_entropy.take_counts()
        state = _floating(self.task.model)
        broken = torch.zeros(len(state), dtype=torch.bool, device=self.device)
        images_seen = 0
        start = time.perf_counter()
        label = f"{self.name} {self.epoch + 1}/{self.fit_config.epochs}"
        with tqdm(total=len(self.train_loader), desc=label, unit="step", leave=False) as bar:
            for index, (images, labels) in enumerate(batches):
                broken |= _broken_first(state, sums)
                terms = self._step(images, labels, self.epoch * len(self.train_loader) + index)
                for key, value in terms.items():
                    sums[key] = sums.get(key, 0) + value.detach()
                images_seen += len(images)
                bar.update()
                if (index + 1) % self.config.log_every == 0 or index + 1 == len(self.train_loader):
                    names = [name for name, is_broken in zip(state, broken.tolist(), strict=True) if is_broken]
                    counts += self.task.cross_entropy.take_counts().cpu()
                    self._check_labels(int(counts[3]), index + 1)
                    means = self._finite_means(sums, names, index + 1) | _shares(counts)
                    rate = images_seen / (time.perf_counter() - start)
                    self._tell_observers(index + 1, means | {"images_per_second": rate})
                    bar.set_postfix_str(f"{rate:.1f} img/s " + " ".join(f"{k} {v:.3f}" for k, v in means.items()))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        row = {"lr": self.optimizer.param_groups[0]["lr"], "images_per_second": images_seen / seconds}
        return row | {f"train/{key}": value for key, value in means.items()}, images_seen, seconds

    def _step(self, images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.fit_config, step, self.total_steps)
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, torch.int64, non_blocking=True)
        with autocast(self.device, self.config.precision):
            terms = self.task.losses(images, labels)
        terms = {"loss": torch.stack(list(terms.values())).sum(), **terms}
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        limit = math.inf if self.fit_config.clip_norm is None else self.fit_config.clip_norm
        terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), limit)
        self.optimizer.step()
        return terms

    def _tell_observers(self, steps: int, values: dict[str, float]) -> None:
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        for observer in self.observers:
            observer.step(self, self.epoch * len(self.train_loader) + steps, values)

    def _check_labels(self, out_of_range: int, steps: int) -> None:
        if out_of_range:
            classes = self.meta.get("num_classes", len(self.classes))
            raise TrainingError(
                f"{self.name}: expected labels from 0 to {classes - 1} or {IGNORE_INDEX}, got"
                f" {out_of_range} pixels with others in epoch {self.epoch + 1} within the last"
                f" {self.config.log_every} steps up to step {steps}; set data.check=true to find the file, or map these"
                f" labels to {IGNORE_INDEX}"
            )

    def _finite_means(self, sums: dict[str, Tensor], weights: list[str], steps: int) -> dict[str, float]:
        means = {key: value.item() / steps for key, value in sums.items()}
        broken = [key for key, value in means.items() if not math.isfinite(value)]
        if not broken and not weights:
            return means
        if not weights and isinstance(self.task, DistillationTask):
            state = _floating(self.task.teacher)  # which no step changes
            flags = _not_finite(state).tolist()
            weights = [f"the teacher's {name}" for name, is_broken in zip(state, flags, strict=True) if is_broken]
        more = f" and {len(weights) - NAMED} more" if len(weights) > NAMED else ""
        named = f"{', '.join(weights[:NAMED])}{more}"
        advice = "check the weights that it started from, or " if weights else ""
        raise TrainingError(
            f"{self.name}: {', '.join(broken) or named} not finite in epoch {self.epoch + 1} within "
            f"the last {self.config.log_every} steps up to step {steps}"
            f"{f'; not finite before: {named}' if broken and weights else ''}; the last whole checkpoint is "
            f"{self.last if self.last.exists() else 'none'}; {advice}try a lower learning rate or precision=fp32"
        )

    def _finish_epoch(self, train_row: dict[str, float], scores: Scores | None) -> None:
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.epoch * len(self.train_loader), **train_row}
        row |= {"val/miou": "", "val/pixel_accuracy": "", "val/miou_stride4": ""}
        row |= {f"val/iou/{name}": "" for name in self.classes}
        improved = False
        if scores is not None:
            self.last_scores = scores
            improved = scores.miou > self.best_miou
            self.best_miou = max(self.best_miou, scores.miou)
            row |= {"val/miou": scores.miou, "val/pixel_accuracy": scores.pixel_accuracy}
            row["val/miou_stride4"] = scores.miou_stride4
            row |= {f"val/iou/{name}": iou for name, iou in zip(self.classes, scores.iou, strict=True)}
        self._append_metrics(row)
        # last.pt comes last: a run that is interrupted before it repeats the epoch, and the other files with it.
        if improved:
            save_checkpoint(self._state(), self.best)
        save_checkpoint(self._state(), self.last)
        miou = f"mIoU {100 * scores.miou:.2f} %" if scores is not None else "not evaluated"
        losses = " ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in train_row.items() if k.startswith("train/"))
        rate = f"{train_row['images_per_second']:.1f} img/s"
        self.log(f"{self.name} epoch {self.epoch}/{self.fit_config.epochs}: {losses}, {miou}, {rate}")
        for observer in self.observers:
            observer.epoch(self, self.epoch, row, scores)

    def _append_metrics(self, row: dict[str, Any]) -> None:
        """Write all rows anew: the file is whole at any time, and its header fits its rows."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(text.getvalue(), self.folder / "metrics.csv")

    def _state(self) -> dict[str, Any]:
        return {
            **self.meta,
            "classes": list(self.classes),
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.epoch * len(self.train_loader),
            "best_miou": self.best_miou,
            "scores": self.last_scores._asdict() if self.last_scores is not None else None,
        }

    def _resume(self) -> None:
        state = load_checkpoint(self.last, KEYS)
        for key, value in self.meta.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{self.last}: expected a checkpoint with {key}={value!r}, got {state.get(key)!r}; "
                    "resume with the run's own configuration or choose another run_dir"
                )
        load_weights(self.task.model, self.last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_miou = state["epoch"], state["best_miou"]
        self.last_scores = Scores(**state["scores"]) if state["scores"] is not None else None
        self.log(f"{self.name}: resumed from {self.last} after epoch {self.epoch}/{self.fit_config.epochs}")

    def _read_metrics(self) -> None:
        """Take over the rows up to the checkpoint; later epochs are run again."""
        path = self.folder / "metrics.csv"
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= self.epoch]


def _shares(counts: Tensor) -> dict[str, float]:
    """What the logs say of the pixels that :class:`transkd_fast.functional.SegCE` counts."""
    labelled, right, ignored, _ = counts.tolist()
    return {
        "pixel_accuracy": right / labelled if labelled else math.nan,
        "ignored": ignored / (labelled + ignored) if labelled or ignored else math.nan,
    }


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """The weights and running statistics of a network; an empty one is finite, and has no norm."""
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}


def _not_finite(state: dict[str, Tensor]) -> Tensor:
    return ~torch.stack(torch._foreach_norm(list(state.values()), math.inf)).isfinite()


def _broken_first(state: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
    """Says what is not finite while every loss and gradient still was, without waiting for the device.

    Afterwards it is too late to tell: one gradient that is not finite reaches every weight through the clipped norm.
    """
    broken = _not_finite(state)
    return broken & torch.stack(list(sums.values())).isfinite().all() if sums else broken
