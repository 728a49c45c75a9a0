"""How far a training has come, as a checkpoint keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transkd_fast.models import load_weights
from transkd_fast.train.checkpoint import TO_RESUME, CheckpointError, load_newest
from transkd_fast.train.metrics import Scores

if TYPE_CHECKING:
    from transkd_fast.train.loop import Trainer


@dataclass
class Progress:
    """How far a training has come.

    Args:
        epoch: number of finished epochs.
        steps: number of steps made in the epoch after them.
        sums: of the loss terms and gradient norms over the epoch's steps that were not skipped, 0-d each.
        counts: of the epoch's pixels, int64 [4], see :class:`transkd_fast.functional.SegCE`.
        skipped: number of the epoch's steps that were skipped.
        in_a_row: number of steps skipped since the last that was made.
        rows: lines of metrics.csv.
        best_miou: best mIoU of any evaluation.
        scores: the last evaluation.
    """

    epoch: int = 0
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    skipped: int = 0
    in_a_row: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_miou: float = -math.inf
    scores: Scores | None = None

    def means(self) -> dict[str, float]:
        """Means of the epoch so far; NaN where every step was skipped."""
        made = self.steps - self.skipped
        return {key: value.item() / made if made else math.nan for key, value in self.sums.items()}

    def shares(self) -> dict[str, float]:
        """What the logs say of the counted pixels."""
        labelled, right, ignored, _ = self.counts.tolist()
        return {
            "pixel_accuracy": right / labelled if labelled else math.nan,
            "ignored": ignored / (labelled + ignored) if labelled or ignored else math.nan,
        }

    def end_epoch(self) -> None:
        """Count the epoch, and start the next one's sums."""
        self.epoch, self.steps, self.skipped = self.epoch + 1, 0, 0
        self.sums, self.counts = {}, torch.zeros_like(self.counts)


def checkpoint_of(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds: all from which the training goes on as if it had not been interrupted.

    No state of a random generator is among it: what is drawn follows from the seed and the position.
    """
    progress, stepper = trainer.progress, trainer.stepper
    average = stepper.average
    return {
        **trainer.meta,
        "classes": list(trainer.classes),
        "model": trainer.task.model.state_dict(),
        "optimizer": stepper.optimizer.state_dict(),
        "scaler": stepper.scaler.state_dict(),
        "ema": average.module.state_dict() if average is not None else None,
        "epoch": progress.epoch,
        "step": trainer.step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "sums": dict(progress.sums),
        "counts": progress.counts,
        "skipped": [progress.skipped, progress.in_a_row],
        "rows": progress.rows,
        "best_miou": progress.best_miou,
        "scores": progress.scores._asdict() if progress.scores is not None else None,
    }


def restore(trainer: Trainer) -> None:
    """Put a training where its newest whole checkpoint left it; without a checkpoint it starts anew.

    Args:
        trainer: before its first step.

    Raises:
        CheckpointError: if no checkpoint is whole, or it is of another run.
        WeightsError: if its weights do not fit.
    """
    found = load_newest(trainer.last, TO_RESUME, trainer.log)
    if found is None:
        return
    state, path = found
    expected = trainer.meta | {"steps_per_epoch": trainer.steps_per_epoch}
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"{path}: expected a checkpoint with {key}={value!r}, got {state.get(key)!r}; "
                "resume with the run's own configuration, data and number of processes, or choose another run_dir"
            )
    load_weights(trainer.task.model, path)
    stepper, device = trainer.stepper, trainer.device
    stepper.optimizer.load_state_dict(state["optimizer"])
    stepper.scaler.load_state_dict(state["scaler"])
    if stepper.average is not None:
        load_weights(stepper.average.module, state["ema"])
        stepper.average.n_averaged.fill_(state["step"])
    trainer.progress = Progress(
        epoch=state["epoch"],
        steps=state["step"] - state["epoch"] * trainer.steps_per_epoch,
        sums={key: value.to(device) for key, value in state["sums"].items()},
        counts=state["counts"],
        skipped=state["skipped"][0],
        in_a_row=state["skipped"][1],
        rows=state["rows"],
        best_miou=state["best_miou"],
        scores=Scores(**state["scores"]) if state["scores"] is not None else None,
    )
    steps = trainer.progress.steps
    within = f" and {steps} steps of the next" if steps else ""
    trainer.log(f"{trainer.name}: resumed from {path} after epoch {trainer.epoch}/{trainer.fit_config.epochs}{within}")
