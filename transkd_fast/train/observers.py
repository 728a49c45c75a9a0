"""What watches a training: told of the values that the loop reads back anyway, of every epoch, and of the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transkd_fast.train.loop import Trainer
    from transkd_fast.train.metrics import Scores


class Observer:
    """Watches the trainings of a run and does nothing; a subclass takes over the methods that it needs.

    One observer sees all trainings of a run, one after the other: `start` once for each, `close` once at the end, also
    where the run ends with an error. What it raises ends the training.
    """

    def start(self, trainer: Trainer) -> None:
        """A training begins, or goes on from its checkpoint.

        Args:
            trainer: its name, folder, task and settings.
        """

    def step(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        """The loop has read values back from the device, as it does every `log_every` steps.

        Args:
            trainer: the training.
            step: number of steps made since the training's very start.
            values: numbers by name: means of the epoch so far ("loss", the loss terms, "grad_norm",
                "pixel_accuracy", "ignored"), the "lr" of the last step, and "images_per_second".
        """

    def epoch(self, trainer: Trainer, epoch: int, row: dict[str, Any], scores: Scores | None) -> None:
        """An epoch has ended, and its checkpoint is written.

        Args:
            trainer: the training.
            epoch: number of epochs made.
            row: its line of metrics.csv, by column.
            scores: evaluation after it, None where none was due.
        """

    def close(self) -> None:
        """The run has ended."""
