"""What a training says when it cannot go on: what happened, where, and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transkd_fast.data import IGNORE_INDEX
from transkd_fast.train import guards
from transkd_fast.train.tasks import TrainingError

if TYPE_CHECKING:
    from transkd_fast.train.loop import Trainer


def not_finite(trainer: Trainer, terms: list[str], weights: list[str], where: str, first: str = "") -> TrainingError:
    """Losses, gradients or weights that are not finite.

    Args:
        trainer: the training.
        terms: names of the loss terms and of the gradient's norm that are not.
        weights: names of the weights that were not before these were.
        where: in the epoch.
        first: the first tensor that is not, where it is known.

    Returns:
        The error.
    """
    if terms and not weights:
        weights = guards.broken_in_teacher(trainer.task)
    named = guards.listed(weights)
    advice = "check the weights that it started from, or " if weights else ""
    return TrainingError(
        f"{trainer.name}: {', '.join(terms) or named} not finite in epoch {trainer.epoch + 1} {where}"
        f"{f'; first not finite: {first}' if first else ''}"
        f"{f'; not finite before: {named}' if terms and weights else ''}; the last whole checkpoint is "
        f"{whole_checkpoint(trainer)}; {advice}try a lower learning rate or precision=fp32"
    )


def too_many_skipped(trainer: Trainer, first: str) -> str:
    """More steps in a row were skipped than are allowed.

    Args:
        trainer: the training.
        first: the first tensor of the last of them that was not finite.

    Returns:
        The message.
    """
    progress = trainer.progress
    return (
        f"{trainer.name}: {progress.in_a_row} steps skipped in a row up to step {progress.steps} of epoch"
        f" {trainer.epoch + 1}, more than skip_limit={trainer.config.skip_limit}: {first} is not finite; the last whole"
        f" checkpoint is {whole_checkpoint(trainer)}; try a lower learning rate or precision=fp32"
    )


def labels_out_of_range(trainer: Trainer, pixels: int) -> str:
    """Labels that only the counts tell of.

    Args:
        trainer: the training.
        pixels: how many.

    Returns:
        The message.
    """
    classes = trainer.meta.get("num_classes", len(trainer.classes))
    return (
        f"{trainer.name}: expected labels from 0 to {classes - 1} or {IGNORE_INDEX}, got {pixels} pixels with others in"
        f" epoch {trainer.epoch + 1} within the last {trainer.config.log_every} steps up to step"
        f" {trainer.progress.steps}; set data.check=true to find the file, or map these labels to {IGNORE_INDEX}"
    )


def out_of_memory(trainer: Trainer, error: BaseException) -> str:
    """Not enough memory.

    Args:
        trainer: the training.
        error: what torch said.

    Returns:
        The message.
    """
    fit, (height, width) = trainer.fit_config, trainer.config.data.size
    key = "teacher.fit" if trainer.name == "teacher" else "fit"
    advice = [f"data.size below [{height},{width}]"]
    if trainer.config.precision == "fp32":
        advice.insert(0, "precision=bf16")
    if fit.batch_size > 1:
        advice.insert(0, f"{key}.batch_size={fit.batch_size // 2} with {key}.accumulate={2 * fit.accumulate}")
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{trainer.name}: not enough memory on {trainer.device} for batches of {fit.batch_size} images of {height} x"
        f" {width}: {said}; the last whole checkpoint is {whole_checkpoint(trainer)}; try {', or '.join(advice)}"
    )


def whole_checkpoint(trainer: Trainer) -> str:
    """Where the newest checkpoint lies, for a message."""
    return str(trainer.last) if trainer.last.exists() else "none"
