"""Pascal VOC 2012: everyday photographs with twenty kinds of objects and background."""

from __future__ import annotations

from pathlib import Path

import torch

from transkd_fast.data.base import DataError, Transforms
from transkd_fast.data.files import FileDataset, listed, read_list


def _colour_map(count: int) -> torch.Tensor:
    """The colours of VOC's own label files: the bits of an index, three at a time, from the highest bit on."""
    index = torch.arange(count)
    colours = torch.zeros(count, 3, dtype=torch.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (index >> (3 * shift + channel)) & 1
            colours[:, channel] |= (bit << (7 - shift)).to(torch.uint8)
    return colours


class VOC2012(FileDataset):
    """Pascal VOC 2012 for segmentation: background and 20 classes; the outlines' value 255 is ignored.

    Expects the official layout: `JPEGImages/*.jpg`, `SegmentationClass/*.png` and
    `ImageSets/Segmentation/<split>.txt` in `root`, `root/VOC2012` or `root/VOCdevkit/VOC2012`. Split "trainaug" (10 582
    frames) takes its labels from `SegmentationClassAug`.

    Args:
        root: folder of VOC 2012, or one that holds it.
        split: "train", "val", "trainval" or "trainaug".
        transforms: joint transform of image and mask; None for none.
        allow_orphans: leave out listed frames that lack image or label, see `FileDataset`.

    Raises:
        ValueError: unknown split.
        DataError: missing folders or lists, or listed frames without image or label.

    Source: Everingham et al., "The Pascal visual object classes challenge: a retrospective", IJCV 2015; trainaug:
        Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011.
    """

    splits = ("train", "val", "trainval", "trainaug")
    classes = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )
    palette = _colour_map(len(classes))

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transforms: Transforms | None = None,
        allow_orphans: bool = False,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"VOC2012: expected split out of {', '.join(self.splits)}, got {split!r}")
        places = [Path(root), Path(root) / "VOC2012", Path(root) / "VOCdevkit" / "VOC2012"]
        folder = next((place for place in places if (place / "ImageSets" / "Segmentation").is_dir()), None)
        if folder is None:
            raise DataError(
                f"{root}: expected ImageSets/Segmentation in it, in VOC2012 or in VOCdevkit/VOC2012, found none of them"
            )
        names = read_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt")
        kind = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
        for part in ("JPEGImages", kind):
            if not (folder / part).is_dir():
                raise DataError(f"{folder / part}: expected a folder of VOC 2012, but it does not exist")
        images, labels = listed(names, folder / "JPEGImages", ".jpg"), listed(names, folder / kind, ".png")
        if not allow_orphans and len(images.keys() & labels.keys()) < len(names):
            lacking = [name for name in names if name not in images or name not in labels]
            raise DataError(
                f"{folder}: expected an image and a label of every frame in {split}.txt, but {len(lacking)} of"
                f" {len(names)} lack one: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}; add the files,"
                " or leave these frames out with data.allow_orphans=true"
            )
        super().__init__(images, labels, transforms, allow_orphans=allow_orphans)
        self.root, self.split = folder, split
