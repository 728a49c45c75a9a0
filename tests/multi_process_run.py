"""What tests/test_multi_process.py runs alone and under torchrun: twenty steps in float64, then a run that fails."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import tiny_run
import torch
from tiny_run import quiet, tiny_config
from torch.utils.data import Dataset

from transkd_fast import models
from transkd_fast.data import make_loader
from transkd_fast.train import TrainingError, build, run
from transkd_fast.train.distributed import ALONE, Processes, joined
from transkd_fast.train.loop import Trainer
from transkd_fast.train.tasks import DistillationTask

FRAMES, EPOCHS = 16, 5  # four steps of four frames per epoch
WEIGHTS = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)


class Frames(Dataset):
    """Float64 frames that differ in how many of their pixels are labelled."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        self.images = torch.rand(length, 3, 64, 64, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(10, (length, 64, 64), generator=generator)
        for index, labels in enumerate(self.labels):
            labels[: 6 * (index % 10)] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def twenty_steps(folder: Path, batch_size: int, processes: Processes = ALONE) -> None:
    """Trains a tiny student, and saves what came of it: weights, metrics, scores."""
    config = tiny_config(folder, fit__epochs=EPOCHS, fit__batch_size=batch_size, distill__logits="true")
    torch.manual_seed(0)
    student, teacher = tiny_run.TinyNet(10).double(), tiny_run.TinyTeacher(10).double()
    # The batch norm takes this bias away again: its gradient is rounding alone, which Adam makes as large as any other.
    student.stages[0].bias.requires_grad_(False)
    model = build.build_transkd(config, student, teacher).double()
    task = DistillationTask(model, teacher, class_weights=WEIGHTS)
    share = {"rank": processes.rank, "replicas": processes.count}
    loader = make_loader(Frames(FRAMES), batch_size, True, 1, drop_last=True, **share)
    val_loader = make_loader(Frames(3), 1, **share)
    classes = [str(number) for number in range(10)]
    trainer = Trainer(
        config, "student", task, config.fit, loader, val_loader, classes, folder, {}, quiet, (), processes
    )
    result = trainer.fit()
    outcome = {"model": model.state_dict(), "scores": result.scores._asdict(), "rows": trainer.progress.rows}
    torch.save(outcome, folder / f"outcome-{processes.rank}.pt")


def main(folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    models.MODELS.update(tiny_run.MODELS)
    make_step = Trainer._step

    def failing(self: Trainer, batches: list, number: int, *rest: bool) -> object:
        if self.name == "student" and self.folder.parent.name == "run" and (self.processes.rank, number) == (1, 1):
            raise TrainingError("rank 1 fails")
        return make_step(self, batches, number, *rest)

    Trainer._step = failing  # type: ignore[method-assign]
    # One group for both: torchrun's store does not reliably serve a second one.
    with joined(tiny_config(folder)) as processes:
        twenty_steps(folder / "steps", FRAMES // 4 // processes.count, processes)
        config = tiny_config(folder / "run", fit__batch_size=1, teacher__fit__batch_size=2, fit__epochs=3)
        log = partial(print, flush=True) if processes.first else quiet
        run._train(config, log, (), processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
