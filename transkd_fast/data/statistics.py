"""Numbers of pixels per class, and the weights of classes that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from transkd_fast.data.base import DataError, SegmentationDataset

OFFSET = 1.02


def count_pixels(
    dataset: SegmentationDataset, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> tuple[Tensor, int]:
    """Counts the pixels of every class by reading all labels.

    Args:
        dataset: the dataset; its transforms do not count.
        progress: goes over the frames' numbers, e.g. tqdm.

    Returns:
        int64 [K], pixels per class, and the number of pixels that are ignored.

    Raises:
        DataError: a frame that cannot be read or is inconsistent.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for index in progress(range(len(dataset))):
        labels = torch.from_numpy(dataset.load_label(index))
        counts += torch.bincount(labels.flatten(), minlength=256)
    return counts[: dataset.num_classes], int(counts[dataset.ignore_index])


def class_weights_of(counts: Tensor) -> list[float]:
    """Weights of classes by their share p of the labelled pixels: 1 / ln(1.02 + p), from 1.4 to 50.

    Args:
        counts: int64 [K], pixels per class.

    Returns:
        K factors for the cross-entropy; a class that does not occur has the largest.

    Raises:
        DataError: no pixel is labelled.

    Source: Paszke et al., ENet (arXiv 1606.02147), section 5.2.
    """
    if not int(counts.sum()):
        raise DataError("class weights: expected labelled pixels, got none; check the labels of the training frames")
    share = counts.double() / counts.sum()
    return [float(weight) for weight in 1 / (OFFSET + share).log()]
