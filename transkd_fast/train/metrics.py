"""Segmentation scores at label size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from transkd_fast import functional
from transkd_fast.data import IGNORE_INDEX, DataError


class Scores(NamedTuple):
    """Scores of one evaluation.

    Args:
        miou: mean intersection over union of the classes that occur in labels or predictions, in [0, 1].
        iou: IoU per class; NaN for a class that does not occur.
        pixel_accuracy: share of the counted pixels that are right.
        pixels: number of counted pixels.
        ignored: number of pixels left out because their label is the ignore index.
        miou_stride4: mIoU by the published protocol: class scores at their own size, a quarter of the images', against
            labels at that size; absent classes left out. Only a second number, the first one decides.
        groups: scores of the dataset's groups of frames, e.g. weathers, by name; empty where they were not asked for.
    """

    miou: float
    iou: list[float]
    pixel_accuracy: float
    pixels: int
    ignored: int
    miou_stride4: float = math.nan
    groups: dict[str, Any] = {}


class SegmentationMeter:
    """Collects confusion matrices over batches: at the size of the labels, and at that of the class scores.

    Args:
        num_classes: number of classes.
        device: where logits and labels are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._matrix, self._at_scores = (
            MulticlassConfusionMatrix(
                num_classes, ignore_index=IGNORE_INDEX, validate_args=False, sync_on_compute=False
            ).to(device)
            for _ in range(2)
        )
        self._ignored = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B, K, h, w]; compared as if resized bilinearly to the labels' size, which would be the largest
                tensor of an evaluation. Logits beyond ``num_classes`` (a void class that some published models have)
                take no part.
            labels: int64 [B, H, W], the ignore index where nothing is to be learnt.
        """
        logits = logits[:, : self._matrix.num_classes]
        self._matrix.update(functional.seg_predict(logits, (labels.shape[1], labels.shape[2])), labels)
        self._at_scores.update(logits.argmax(dim=1), nearest_labels(labels, (logits.shape[2], logits.shape[3])))
        self._ignored += (labels == IGNORE_INDEX).sum()

    def compute(self, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Scores:
        """The scores over everything added so far.

        Args:
            total: adds up counts over the processes that each had a share of the frames; default alone.

        Returns:
            The scores.

        Raises:
            DataError: if no pixel was counted.
        """
        matrix = total(self._matrix.compute()).double()
        if matrix.sum() == 0:
            raise DataError(
                "evaluation: expected at least one labelled pixel, got only ignored ones; check the validation labels"
            )
        iou = _iou(matrix)
        return Scores(
            miou=iou.nanmean().item(),
            iou=iou.tolist(),
            pixel_accuracy=(matrix.diag().sum() / matrix.sum()).item(),
            pixels=int(matrix.sum().item()),
            ignored=int(total(self._ignored).item()),
            miou_stride4=_iou(total(self._at_scores.compute()).double()).nanmean().item(),
        )


def _iou(matrix: Tensor) -> Tensor:
    """Per class; NaN for one that does not occur."""
    hits = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - hits
    return torch.where(union > 0, hits / union, torch.nan)


def nearest_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels at another size, each that of the pixel whose centre is nearest.

    Args:
        labels: [B, H, W].
        size: height and width of the result in pixels.

    Returns:
        [B, *size], labels' dtype.
    """
    for dim, (wanted, given) in enumerate(zip(size, labels.shape[1:], strict=True), start=1):
        index = (2 * torch.arange(wanted, device=labels.device) + 1) * given // (2 * wanted)
        labels = labels.index_select(dim, index)
    return labels
