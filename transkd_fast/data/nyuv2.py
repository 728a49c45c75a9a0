"""NYUv2: indoor scenes with forty classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from transkd_fast.data.base import IGNORE_INDEX, DataError, SegmentationDataset, Transforms
from transkd_fast.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    FileDataset,
    list_files,
    lookup_of,
    read_list,
    translate,
)

CLASSES = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter"),
    *(
        "blinds",
        "desk",
        "shelves",
        "curtain",
        "dresser",
        "pillow",
        "mirror",
        "floor mat",
        "clothes",
        "ceiling",
        "books",
    ),
    *("refridgerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person"),
    *("night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop"),
)
# Files count from 1; 0 is unlabelled and stays so.
VALUES = {0: IGNORE_INDEX, **{k + 1: k for k in range(len(CLASSES))}}
SPLITS = {"train": "train", "val": "test"}  # as ours and as NYUv2's files are called
MATLAB = "nyu_depth_v2_labeled.mat"
_FRAMES = ("images", "labels")


def _palette() -> torch.Tensor:
    # NYUv2 has no colours of its own: hues in steps of the golden ratio, so that neighbours differ.
    hue = torch.arange(len(CLASSES)) * 0.618034 % 1 * 6
    part = torch.stack([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], 1).clamp(0, 1)
    return (255 * (0.25 + 0.75 * part)).to(torch.uint8)


class NYUv2Folder(FileDataset):
    """NYUv2 as files: 40 classes, label value 0 is void (255 here), k is class k - 1.

    Expects `root/images/*`, `root/labels40/*.png`, paired by file name, and `root/train.txt`, `root/test.txt` with one
    frame name per line.

    Args:
        root: folder that holds them.
        split: "train" or "val" (NYUv2's test frames).
        transforms: joint transform of image and mask; None for none.
        allow_orphans: leave out frames without a label and labels without a frame, see `FileDataset`.

    Raises:
        ValueError: unknown split.
        DataError: missing folders or lists, images and labels that do not pair up, or listed frames that are not there.

    Source: Silberman et al., "Indoor segmentation and support inference from RGBD images", ECCV 2012; the 40 classes:
        Gupta, Arbelaez, Malik, "Perceptual organization and recognition of indoor scenes", CVPR 2013.
    """

    classes = CLASSES
    palette = _palette()

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transforms: Transforms | None = None,
        allow_orphans: bool = False,
    ) -> None:
        root = Path(root)
        wanted = set(read_list(root / f"{_split(split)}.txt"))
        images, labels = list_files(root / "images", IMAGE_SUFFIXES), list_files(root / "labels40", LABEL_SUFFIXES)
        missing = sorted(wanted - (images.keys() & labels.keys()))
        if missing and not allow_orphans:
            raise DataError(
                f"{root}: expected an image and a label of every frame in {_split(split)}.txt, but {len(missing)} lack"
                f" one: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; add the files, or leave these"
                " frames out with data.allow_orphans=true"
            )
        of_split = [{name: path for name, path in files.items() if name in wanted} for files in (images, labels)]
        super().__init__(of_split[0], of_split[1], transforms, VALUES, allow_orphans)
        self.root, self.split = root, split


class NYUv2(SegmentationDataset):
    """NYUv2 from its official file: 1449 frames of 640 x 480 in nyu_depth_v2_labeled.mat (v7.3); void becomes 255.

    Its labels have 894 classes, which `classMapping40.mat` (variable mapClass) brings to 40, and 0 for unlabelled;
    `splits.mat` says which frames are for training and which for testing. Frames are read one at a time.

    Args:
        root: folder that holds the three files.
        split: "train" or "val" (NYUv2's test frames).
        transforms: joint transform of image and mask; None for none.

    Raises:
        ValueError: unknown split.
        DataError: a file is missing, unreadable or of another form, or the packages h5py and scipy are missing.

    Source: as `NYUv2Folder`.
    """

    classes = CLASSES
    palette = _palette()

    def __init__(self, root: str | Path, split: str = "train", transforms: Transforms | None = None) -> None:
        super().__init__(transforms)
        self.root, self.split = Path(root), split
        numbers = _variable(self.root / "splits.mat", f"{_split(split)}Ndxs")
        mapping = _variable(self.root / "classMapping40.mat", "mapClass")
        if mapping.min(initial=1) < 1 or mapping.max(initial=1) > len(CLASSES):
            raise DataError(
                f"{self.root / 'classMapping40.mat'}: expected mapClass to hold classes from 1 to {len(CLASSES)}, got"
                f" {mapping.min()} to {mapping.max()}"
            )
        self._path = self.root / MATLAB
        self._file: Any = None
        count = len(self._frames()[0])
        if not len(numbers) or numbers.min() < 1 or numbers.max() > count:
            raise DataError(f"{self.root / 'splits.mat'}: expected frame numbers from 1 to {count}, got others or none")
        self.numbers = np.sort(numbers).astype(np.int64)
        to_class = {0: IGNORE_INDEX, **{k + 1: int(c) - 1 for k, c in enumerate(mapping)}}
        self._lookup = lookup_of(to_class, 1 << 16)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        """A loader's worker opens the file itself."""
        return {**self.__dict__, "_file": None}

    def name(self, index: int) -> str:
        """Number of frame `index` in the file, from 1 on, as NYUv2 counts."""
        return f"{self.numbers[index]:04d}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] and label map uint8 [H, W] of frame `index`; raises DataError on any inconsistency."""
        number = self.numbers[index] - 1
        images, labels = self._frames()
        try:
            image, values = images[number], labels[number]
        except OSError as error:
            raise DataError(f"{self._path}: expected frame {number + 1} to be readable, got: {error}") from error
        # MATLAB's order of axes is the reverse of HDF5's.
        label = translate(values.T, self._lookup, f"{self._path}, frame {number + 1}")
        return np.ascontiguousarray(image.transpose(2, 1, 0)), np.ascontiguousarray(label)

    def _frames(self) -> tuple[Any, Any]:
        if self._file is None:
            self._file = _open(self._path)
        images, labels = (self._file[name] for name in _FRAMES)
        fits = images.ndim == 4 and images.shape[1] == 3 and labels.shape == (images.shape[0], *images.shape[2:])
        if not fits or images.dtype != np.uint8 or labels.dtype.kind != "u":
            raise DataError(
                f"{self._path}: expected images uint8 [N, 3, W, H] and labels of unsigned integers [N, W, H], got"
                f" {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
            )
        return images, labels


def _split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"NYUv2: expected split out of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS[split]


def _package(name: str, path: Path) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{path}: reading it needs the package {name}; pip install 'transkd_fast[nyuv2]'") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: expected this file of NYUv2, found none; as files, NYUv2 has images/, labels40/, train.txt and"
            " test.txt"
        )
    return path


def _open(path: Path) -> Any:
    h5py = _package("h5py", _existing(path))
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path}: expected a MATLAB file of version 7.3 (HDF5), got: {error}; fetch it again"
        ) from error
    missing = [name for name in _FRAMES if name not in file]
    if missing:
        raise DataError(f"{path}: expected the variables {' and '.join(_FRAMES)}, it lacks {', '.join(missing)}")
    return file


def _variable(path: Path, name: str) -> np.ndarray:
    """A vector of numbers in a MATLAB file of the older format."""
    io = _package("scipy.io", _existing(path))
    try:
        content = io.loadmat(path, variable_names=[name])
    except Exception as error:
        raise DataError(f"{path}: expected a MATLAB file with {name}, got: {error}; fetch it again") from error
    if name not in content:
        raise DataError(f"{path}: expected the variable {name}, found none")
    return np.asarray(content[name]).ravel()
