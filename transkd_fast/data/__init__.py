"""Datasets, transforms and loaders for semantic segmentation."""

from __future__ import annotations

from pathlib import Path

from transkd_fast.data.base import IGNORE_INDEX, DataError, SegmentationDataset, Transforms
from transkd_fast.data.camvid import CamVid
from transkd_fast.data.loader import EpochSampler, make_loader
from transkd_fast.data.procedural import StreetScenes, write_folder
from transkd_fast.data.transforms import collate, eval_transforms, published_transforms, train_transforms

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "CamVid",
    "DataError",
    "EpochSampler",
    "SegmentationDataset",
    "StreetScenes",
    "collate",
    "create",
    "eval_transforms",
    "make_loader",
    "published_transforms",
    "train_transforms",
    "write_folder",
]

DATASETS = ("camvid", "street_scenes")
_SCENES_LENGTH = {"train": 400, "val": 100}


def create(
    name: str,
    split: str,
    root: str | Path | None = None,
    size: tuple[int, int] = (96, 192),
    transforms: Transforms | None = None,
    length: int | None = None,
    seed: int = 0,
    cache: bool = False,
) -> SegmentationDataset:
    """Creates a dataset by name.

    Args:
        name: one of `DATASETS`.
        split: "train" or "val".
        root: folder of a dataset of files; required by "camvid".
        size: (height, width) in which "street_scenes" are drawn; files have their own.
        transforms: joint transform of image and mask; None for none.
        length: number of "street_scenes" (400 for train, 100 for val); files are all taken.
        seed: seed of "street_scenes".
        cache: keep drawn "street_scenes" in memory; files are always read anew.

    Returns:
        The dataset.

    Raises:
        ValueError: unknown name or split, or an option that the dataset does not have.
        DataError: the files are not as they should be.
    """
    if name == "camvid":
        if root is None:
            raise ValueError("camvid: expected root, the folder that holds images and labels, got none")
        if length is not None:
            raise ValueError(f"camvid: expected no length (all files of a split are taken), got {length}")
        return CamVid(root, split, transforms)
    if name == "street_scenes":
        if root is not None:
            raise ValueError(f"street_scenes: expected no root (the scenes are drawn, not read), got {root}")
        if length is None:
            length = _SCENES_LENGTH.get(split, 1)
        return StreetScenes(length, size, seed, split, transforms, cache)
    raise ValueError(f"expected a dataset out of {', '.join(DATASETS)}, got {name!r}")
