"""CamVid: driving scenes of Cambridge with eleven classes."""

from __future__ import annotations

from pathlib import Path

import torch

from transkd_fast.data.base import DataError, Transforms
from transkd_fast.data.files import IMAGE_SUFFIXES, LABEL_SUFFIXES, FileDataset, list_files


class CamVid(FileDataset):
    """CamVid in its 480 x 360, 11-class form; label value 11 (void) becomes 255.

    Expects `root/images/<split>/*.{jpg,jpeg,png}` (RGB) and `root/labels/<split>/*.png` (8 bits, one class index per
    pixel), paired by file name.

    Args:
        root: folder that holds `images` and `labels`.
        split: "train" or "val".
        transforms: joint transform of image and mask; None for none.

    Raises:
        ValueError: unknown split.
        DataError: missing or empty folders, or images and labels that do not pair up.

    Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video: a high-definition ground truth database",
        Pattern Recognition Letters 2009.
    """

    splits = ("train", "val")
    classes = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = torch.tensor(
        [
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
        dtype=torch.uint8,
    )
    void_values = (11,)

    def __init__(self, root: str | Path, split: str = "train", transforms: Transforms | None = None) -> None:
        if split not in self.splits:
            raise ValueError(f"CamVid: expected split out of {', '.join(self.splits)}, got {split!r}")
        root = Path(root)
        if not root.is_dir():
            raise DataError(
                f"{root}: expected a folder with images/{split} and labels/{split}, but it does not exist; "
                "set root to where CamVid lies"
            )
        images = list_files(root / "images" / split, IMAGE_SUFFIXES)
        labels = list_files(root / "labels" / split, LABEL_SUFFIXES)
        super().__init__(images, labels, transforms)
        self.root = root
        self.split = split
