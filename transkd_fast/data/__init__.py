"""Datasets, transforms and loaders for semantic segmentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from transkd_fast.data.base import IGNORE_INDEX, DataError, SegmentationDataset, Transforms
from transkd_fast.data.camvid import CamVid
from transkd_fast.data.cityscapes import ACDC, Cityscapes
from transkd_fast.data.folder import Folder, read_classes
from transkd_fast.data.loader import EpochSampler, make_loader
from transkd_fast.data.nyuv2 import NYUv2, NYUv2Folder
from transkd_fast.data.procedural import StreetScenes, write_folder
from transkd_fast.data.statistics import class_weights_of, count_pixels
from transkd_fast.data.transforms import (
    collate,
    eval_transforms,
    network_input,
    published_transforms,
    train_transforms,
)
from transkd_fast.data.voc import VOC2012

__all__ = [
    "ACDC",
    "DATASETS",
    "IGNORE_INDEX",
    "VOC2012",
    "CamVid",
    "Cityscapes",
    "DataError",
    "EpochSampler",
    "Folder",
    "NYUv2",
    "NYUv2Folder",
    "SegmentationDataset",
    "StreetScenes",
    "class_weights_of",
    "collate",
    "count_pixels",
    "create",
    "eval_transforms",
    "make_loader",
    "network_input",
    "palette_of",
    "published_transforms",
    "train_transforms",
    "void_of",
    "write_folder",
]

_FILES: dict[str, type[SegmentationDataset]] = {
    "acdc": ACDC,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "folder": Folder,
    "nyuv2": NYUv2,
    "nyuv2_folder": NYUv2Folder,
    "voc2012": VOC2012,
}
DATASETS = (*_FILES, "street_scenes")
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
    **options: Any,
) -> SegmentationDataset:
    """Creates a dataset by name.

    Args:
        name: one of `DATASETS`.
        split: "train" or "val"; datasets of files may have more.
        root: folder of a dataset of files, which needs one.
        size: (height, width) in which "street_scenes" are drawn; files have their own.
        transforms: joint transform of image and mask; None for none.
        length: number of "street_scenes" (400 for train, 100 for val); files are all taken.
        seed: seed of "street_scenes".
        cache: keep drawn "street_scenes" in memory; files are always read anew.
        **options: what the dataset's class takes besides, e.g. coarse of "cityscapes".

    Returns:
        The dataset.

    Raises:
        ValueError: unknown name or split, or an option that the dataset does not have.
        DataError: the files are not as they should be.
    """
    if name == "street_scenes":
        if root is not None:
            raise ValueError(f"street_scenes: expected no root (the scenes are drawn, not read), got {root}")
        if options:
            raise ValueError(f"street_scenes: expected no options of files, got {', '.join(options)}")
        if length is None:
            length = _SCENES_LENGTH.get(split, 1)
        return StreetScenes(length, size, seed, split, transforms, cache)
    if name not in _FILES:
        raise ValueError(f"expected a dataset out of {', '.join(DATASETS)}, got {name!r}")
    if root is None:
        raise ValueError(f"{name}: expected root, the folder that holds the data, got none")
    if length is not None:
        raise ValueError(f"{name}: expected no length (all files of a split are taken), got {length}")
    known = inspect.signature(_FILES[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        takes = ", ".join(sorted(known.keys() - {"root", "split", "transforms"})) or "none"
        raise ValueError(f"{name}: expected options out of {takes}, got {', '.join(unknown)}")
    make: Callable[..., SegmentationDataset] = _FILES[name]
    return make(root, split, transforms=transforms, **options)


def palette_of(name: str, root: str | Path | None = None) -> Tensor:
    """Colours of a dataset's classes, for which its frames need not be there.

    Args:
        name: one of `DATASETS`.
        root: folder of "folder", which holds its class file; no other dataset is asked for one.

    Returns:
        uint8 [K, 3], RGB.

    Raises:
        DataError: the class file of "folder" is missing or of another form.
    """
    if name == "folder":
        return read_classes(Path(root or "."))[1]
    return (StreetScenes if name == "street_scenes" else _FILES[name]).palette


def void_of(name: str, root: str | Path | None = None) -> tuple[int, ...]:
    """Values beside 255 that mark ignored pixels in a dataset's label files of class indices.

    Args:
        name: one of `DATASETS`.
        root: as in `palette_of`.

    Returns:
        The values.

    Raises:
        DataError: the class file of "folder" is missing or of another form.
    """
    if name == "folder":
        return read_classes(Path(root or "."))[2]
    return getattr(_FILES.get(name), "void_values", ())
