"""What every segmentation dataset offers, and the error that bad data raises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

IGNORE_INDEX = 255

Sample = tuple[tv_tensors.Image, tv_tensors.Mask]
Transforms = Callable[..., Any]


class DataError(ValueError):
    """A data set on disk is not what it should be: the message names the file, what was expected and what to do."""


class CheckReport(NamedTuple):
    """What a dataset's check saw.

    Attributes:
        label_sizes: every (height, width) that occurs among the labels.
        labelled_pixels: number of pixels whose label is not the ignored one.
    """

    label_sizes: set[tuple[int, int]]
    labelled_pixels: int


class SegmentationDataset(Dataset[Sample], ABC):
    """Map-style dataset of images with one class index per pixel.

    A subclass sets `classes` and `palette` and implements `__len__`, `name` and `load`.

    Attributes:
        classes: class names; a label value is an index into them.
        palette: uint8 [K, 3], one RGB colour per class for pictures of label maps.
        ignore_index: label value of pixels that neither loss nor metric may count (255).
        orphans: numbers of images without a label and of labels without an image that were left out.
        published_class_weights: factor per class in the cross-entropy of the published training, where it has any.

    Args:
        transforms: joint transform `(image, mask) -> (image, mask)` applied to each sample; None for none.
    """

    classes: tuple[str, ...]
    palette: Tensor
    ignore_index: int = IGNORE_INDEX
    published_class_weights: tuple[float, ...] | None = None
    orphans: tuple[int, int] = (0, 0)

    def __init__(self, transforms: Transforms | None = None) -> None:
        self.transforms = transforms

    @property
    def num_classes(self) -> int:
        """Number of classes K, the ignored label not counted."""
        return len(self.classes)

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of frame `index`, unique within the dataset."""

    def group(self, index: int) -> str | None:
        """Group of frame `index` that scores are also taken of, e.g. its weather; None where there are no groups."""
        return None

    @abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame `index` before any transform.

        Args:
            index: frame number in [0, len).

        Returns:
            RGB image, uint8 [H, W, 3], and label map, uint8 [H, W] with values in [0, K) or 255.

        Raises:
            DataError: the frame cannot be read or is inconsistent.
        """

    def load_label(self, index: int) -> np.ndarray:
        """Label map of frame `index` alone, as `load` gives it."""
        return self.load(index)[1]

    def __getitem__(self, index: int) -> Sample:
        """Image uint8 [3, H, W] and mask uint8 [H, W], after `transforms`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{type(self).__name__}: index {index} is out of range for {len(self)} frames")
        pixels, labels = self.load(index % len(self))
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        mask = tv_tensors.Mask(torch.from_numpy(labels))
        return (image, mask) if self.transforms is None else self.transforms(image, mask)

    def check(self, full: bool = True, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> CheckReport:
        """Reads the data once, so that a bad file is found before training starts.

        Args:
            full: read every frame; False reads only the first (a quick look at format and label values).
            progress: goes over the frames' numbers, e.g. tqdm.

        Returns:
            What was seen.

        Raises:
            DataError: the first frame that cannot be read or is inconsistent.
        """
        sizes: set[tuple[int, int]] = set()
        labelled = 0
        for index in progress(range(len(self) if full else min(1, len(self)))):
            _, labels = self.load(index)
            sizes.add((labels.shape[0], labels.shape[1]))
            labelled += int((labels != self.ignore_index).sum())
        return CheckReport(sizes, labelled)
