"""Trainings in TensorBoard: losses, rates, scores, and the same few validation frames after every evaluation."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from transkd_fast import functional
from transkd_fast.data import SegmentationDataset, pictures
from transkd_fast.train.build import autocast
from transkd_fast.train.config import ConfigError
from transkd_fast.train.metrics import Scores, nearest_labels
from transkd_fast.train.observers import Observer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from transkd_fast.train.loop import Trainer

FRAMES = 3
WIDTH = 512  # of a picture at most: they are kept after every evaluation
_NOT_LOSSES = ("lr", "images_per_second")


class Board(Observer):
    """Writes every training's event files into its folder, so that ``tensorboard --logdir runs`` compares runs.

    The step is that of the training throughout. A resumed training goes on in the same folder: what was written after
    its checkpoint is made void, and nothing stands twice.

    Raises:
        ConfigError: if the package tensorboard is missing.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tensorboard: the package is missing; install it with `pip install 'transkd_fast[train]'`, or set"
                " tensorboard=false"
            )
        self._writer: SummaryWriter | None = None

    @property
    def _open(self) -> SummaryWriter:
        assert self._writer is not None, "start comes first"
        return self._writer

    def start(self, trainer: Trainer) -> None:
        """Open the training's event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        step, rows = trainer.step, trainer.progress.rows
        # Between the checkpoint at an epoch's end and the events after it a run may have been killed.
        again = rows[-1] if rows and rows[-1]["step"] == step else None
        self._writer = SummaryWriter(str(trainer.folder), purge_step=step + (again is None))
        if again is not None:
            values = {key.removeprefix("train/"): value for key, value in again.items() if key.startswith("train/")}
            self.step(trainer, step, values | {key: again[key] for key in _NOT_LOSSES})
            self.epoch(trainer, trainer.epoch, again, trainer.progress.scores if again["val/miou"] != "" else None)

    def step(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        """Write the values that the loop has read back."""
        for name, value in values.items():
            self._open.add_scalar(name if name in _NOT_LOSSES or "/" in name else f"train/{name}", value, step)
        self._open.flush()

    def epoch(self, trainer: Trainer, epoch: int, row: dict[str, Any], scores: Scores | None) -> None:
        """Write an evaluation's scores, and pictures of some frames."""
        if scores is None:
            return
        step = row["step"]
        self._open.add_scalar("val/miou", scores.miou, step)
        self._open.add_scalar("val/pixel_accuracy", scores.pixel_accuracy, step)
        for name, iou in zip(trainer.classes, scores.iou, strict=True):
            if not math.isnan(iou):
                self._open.add_scalar(f"iou/{name}", iou, step)
        for name, picture in frames_of(trainer).items():
            self._open.add_image(f"frames/{name}", picture, step, dataformats="HWC")
        self._open.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


@torch.no_grad()
def frames_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Some validation frames, spread over the split: image, label and prediction of the network that is evaluated.

    Args:
        trainer: the training; nothing of it changes, its random numbers neither.

    Returns:
        uint8 [h, w, 3] by the frame's name.
    """
    dataset = cast(SegmentationDataset, cast(Any, trainer.val_loader.dataset).dataset)
    palette = dataset.palette.numpy()
    network, classes = trainer.scored, len(trainer.classes)
    training = network.training
    network.eval()
    found = {}
    try:
        for index in sorted({len(dataset) * (2 * k + 1) // (2 * FRAMES) for k in range(FRAMES)}):
            image, label = dataset[index]
            batch = image.as_subclass(Tensor)[None].to(trainer.device)
            with autocast(trainer.device, trainer.config.precision):
                logits = network(batch).logits[:, :classes]
            height, width = image.shape[1:]
            size = (max(1, round(height * min(1.0, WIDTH / width))), min(WIDTH, width))
            small = torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True)[0]
            pixels = (255 * small).round().byte().permute(1, 2, 0).cpu().numpy()
            predicted = functional.seg_predict(logits, size)[0].byte().cpu().numpy()
            labelled = nearest_labels(label.as_subclass(Tensor)[None], size)[0].numpy()
            views = [pixels, *(pictures.overlaid(pixels, shown, palette) for shown in (labelled, predicted))]
            found[dataset.name(index)] = pictures.side_by_side(views, ("image", "label", "prediction"))
    finally:
        network.train(training)
    return found
