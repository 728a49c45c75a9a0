"""A plain folder of images and labels, with a file that names the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transkd_fast.data.base import IGNORE_INDEX, DataError, Transforms
from transkd_fast.data.files import IMAGE_SUFFIXES, LABEL_SUFFIXES, FileDataset, list_files

CLASS_FILES = ("classes.yaml", "classes.txt")
MOST_CLASSES = IGNORE_INDEX  # labels have 8 bits, one value of which is the ignored one


class Folder(FileDataset):
    """Your own images: `root/images/<split>/*`, `root/labels/<split>/*.png`, paired by name, and a class file.

    The class file is `root/classes.yaml`, a mapping with `classes` (names) and optionally `palette` (one [r, g, b]
    each) and `void` (label values that are ignored, beside 255), or `root/classes.txt` with one name per line. Label
    files have 8 bits and hold class indices.

    Args:
        root: folder that holds them.
        split: name of the split's folder.
        transforms: joint transform of image and mask; None for none.
        allow_orphans: leave out images without a label and labels without an image, see `FileDataset`.

    Raises:
        DataError: missing or empty folders, a class file that is missing or of another form, or images and labels that
            do not pair up.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transforms: Transforms | None = None,
        allow_orphans: bool = False,
    ) -> None:
        root = Path(root)
        names, palette, void = read_classes(root)
        self.classes, self.palette = names, palette
        images = list_files(root / "images" / split, IMAGE_SUFFIXES)
        labels = list_files(root / "labels" / split, LABEL_SUFFIXES)
        values = {k: k for k in range(len(names))} | dict.fromkeys((*void, IGNORE_INDEX), IGNORE_INDEX)
        super().__init__(images, labels, transforms, values, allow_orphans)
        self.root, self.split = root, split


def read_classes(root: Path) -> tuple[tuple[str, ...], torch.Tensor, tuple[int, ...]]:
    """Names and colours, uint8 [K, 3], of a folder's classes, and the label values that are ignored.

    Args:
        root: folder that holds the class file, see `Folder`.

    Raises:
        DataError: the class file is missing or of another form.
    """
    path = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    if path is None:
        raise DataError(f"{root}: expected {' or '.join(CLASS_FILES)} in it, found neither")
    text = path.read_text(encoding="utf-8")
    content: Any = {"classes": [line.strip() for line in text.splitlines() if line.strip()]}
    if path.suffix == ".yaml":
        import yaml

        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{path}: expected YAML, got: {error}") from error
    allowed = {"classes", "palette", "void"}
    if not isinstance(content, dict) or not content.keys() <= allowed or "classes" not in content:
        raise DataError(f"{path}: expected a mapping with classes, and optionally palette and void")
    names, void = content["classes"], content.get("void", [])
    if (
        not isinstance(names, list)
        or not 2 <= len(names) <= MOST_CLASSES
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) < len(names)
    ):
        raise DataError(f"{path}: expected 2 to {MOST_CLASSES} different class names, got {names!r}")
    if not isinstance(void, list) or not all(type(v) is int and len(names) <= v <= IGNORE_INDEX for v in void):
        raise DataError(f"{path}: expected void to list label values from {len(names)} to {IGNORE_INDEX}, got {void!r}")
    colours = content.get("palette", [_colour(k) for k in range(len(names))])
    fits = isinstance(colours, list) and len(colours) == len(names)
    if not fits or not all(
        isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v <= 255 for v in c) for c in colours
    ):
        raise DataError(f"{path}: expected palette to have one [r, g, b] of 0 to 255 per class, got {colours!r}")
    return tuple(names), torch.tensor(colours, dtype=torch.uint8), tuple(void)


def _colour(index: int) -> list[int]:
    """Some colour of a class that came without: the bits of its number, spread over the channels."""
    number = index + 1
    return [sum(((number >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)) for channel in range(3)]
