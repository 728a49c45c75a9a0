"""Datasets whose frames are an image file and a label file of the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from transkd_fast.data.base import IGNORE_INDEX, DataError, SegmentationDataset, Transforms

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)
_COLOUR_MODES = ("RGB", "RGBA", "L", "P", "CMYK", "YCbCr")
_INDEX_MODES = ("L", "P")


def list_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files directly in `folder` with one of `suffixes`, by name without suffix.

    Args:
        folder: folder to list; hidden files and files with other suffixes are left out.
        suffixes: accepted suffixes, lower case, with the dot.

    Returns:
        Mapping from stem to path, sorted by stem.

    Raises:
        DataError: the folder is missing or holds no such file, or two files share a stem.
    """
    wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with {wanted} files, but it does not exist; check root and split")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise DataError(
                f"{path}: expected one file per frame name, but {files[path.stem].name} has the same; remove one"
            )
        files[path.stem] = path
    if not files:
        raise DataError(f"{folder}: expected {wanted} files, found none; check root and split")
    return files


def list_tree(folder: Path, suffix: str, required: bool = True) -> dict[str, Path]:
    """Files in the folders directly below `folder`, one per city or sequence, by "<folder>/<name without suffix>".

    Args:
        folder: folder to search.
        suffix: how the files' names end.
        required: whether finding none is an error.

    Returns:
        Mapping from name to path, sorted.

    Raises:
        DataError: the folder is missing, or holds no such file though it is required to.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with */*{suffix} files, but it does not exist; check root and split"
        )
    files = {
        f"{path.parent.name}/{path.name.removesuffix(suffix)}": path
        for path in sorted(folder.glob(f"*/*{suffix}"))
        if not path.name.startswith(".")
    }
    if required and not files:
        raise DataError(f"{folder}: expected */*{suffix} files, found none; check root and split")
    return files


def read_list(path: Path) -> list[str]:
    """Frame names of a split, one per line, as benchmarks list them.

    Args:
        path: text file; empty lines are left out.

    Returns:
        The names in the file's order.

    Raises:
        DataError: the file is missing, empty, or names a frame twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a text file with one frame name per line, found none; check root and split")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path}: expected one frame name per line, found none")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: expected every frame once, but {twice} stands there {names.count(twice)} times")
    return names


def listed(names: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a split's frames, as far as they exist.

    Args:
        names: frame names.
        folder: where the files are.
        suffix: how their names go on.

    Returns:
        Mapping from name to path.
    """
    paths = {name: folder / f"{name}{suffix}" for name in names}
    return {name: path for name, path in paths.items() if path.is_file()}


def pair_by_name(
    images: Mapping[str, Path], labels: Mapping[str, Path], allow_orphans: bool = False
) -> tuple[list[tuple[str, Path, Path]], tuple[int, int]]:
    """Pairs image and label files that have the same frame name.

    Args:
        images: image files by frame name.
        labels: label files by frame name.
        allow_orphans: leave out files without a partner instead of refusing them.

    Returns:
        (name, image, label) per frame, sorted by name; the numbers of images without a label and of labels without an
        image.

    Raises:
        DataError: an image has no label or a label has no image, and that is not allowed, or nothing pairs up.
    """
    lonely_images = sorted(images.keys() - labels.keys())
    lonely_labels = sorted(labels.keys() - images.keys())
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for names, what in ((lonely_images, "image(s) without a label"), (lonely_labels, "label(s) without an image"))
        if names
    ]
    paired = sorted(images.keys() & labels.keys())
    if complaints and not (allow_orphans and paired):
        some = next(iter((images if lonely_images else labels).values())).parent
        raise DataError(
            f"{some}: expected one label per image, paired by file name, but there are {'; '.join(complaints)}; "
            "add the missing files, remove the extra ones, or leave them out with data.allow_orphans=true"
        )
    return [(name, images[name], labels[name]) for name in paired], (len(lonely_images), len(lonely_labels))


def _decode(path: Path, modes: tuple[str, ...], what: str) -> Image.Image:
    # Another library in the process may have told Pillow to fill truncated files with grey.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        raise DataError(
            f"{path}: expected a readable {what}, but decoding failed ({error}); fetch the file again"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    if image.mode not in modes:
        raise DataError(
            f"{path}: expected a {what} in a Pillow mode out of {', '.join(modes)}, got mode {image.mode}; convert it"
        )
    return image


def read_image(path: Path) -> np.ndarray:
    """Decodes an image file to RGB.

    Args:
        path: JPEG or PNG file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: the file cannot be decoded to its end or is not an 8-bit image.
    """
    return np.array(_decode(path, _COLOUR_MODES, "8-bit image").convert("RGB"))


def read_label(path: Path, lookup: np.ndarray) -> np.ndarray:
    """Decodes a label file and translates its values to class indices.

    Args:
        path: 8-bit single-channel (or palette) PNG file of label values.
        lookup: int16 [256], class index (or 255 for ignored) per label value; negative for values that may not occur.

    Returns:
        uint8 [H, W].

    Raises:
        DataError: the file cannot be decoded, is not an index map, or holds a value that may not occur.
    """
    return translate(np.asarray(_decode(path, _INDEX_MODES, "label map (8-bit, one value per pixel)")), lookup, path)


def translate(values: np.ndarray, lookup: np.ndarray, source: Path | str) -> np.ndarray:
    """Translates label values to class indices.

    Args:
        values: label values, [H, W], below the table's size.
        lookup: see `read_label`.
        source: where they come from, for the message.

    Returns:
        uint8 [H, W].

    Raises:
        DataError: a value occurs that may not.
    """
    labels = lookup[values]
    if labels.min(initial=0) < 0:
        bad = sorted({int(value) for value in np.unique(values[labels < 0])})
        allowed = ", ".join(str(value) for value in np.flatnonzero(lookup >= 0))
        raise DataError(
            f"{source}: expected label values out of ({allowed}), got {', '.join(map(str, bad[:8]))}"
            f"{', ...' if len(bad) > 8 else ''} in {int((labels < 0).sum())} pixels; "
            "convert the labels to class indices or correct the file"
        )
    return labels.astype(np.uint8)


def lookup_of(values: Mapping[int, int], size: int = 256) -> np.ndarray:
    """The table that `read_label` translates by.

    Args:
        values: class index, or 255 for ignored, per label value that may occur.
        size: number of values that the label's type has.

    Returns:
        int16 [size], negative for values that may not occur.
    """
    lookup = np.full(size, -1, dtype=np.int16)
    lookup[list(values)] = list(values.values())
    return lookup


class FileDataset(SegmentationDataset):
    """Segmentation dataset over pairs of image and label files.

    A subclass sets `classes`, `palette` and, where label values are not class indices already, `void_values`.

    Args:
        images: image files by frame name.
        labels: label files by frame name; the same names.
        transforms: joint transform of image and mask; None for none.
        values: class index, or 255 for ignored, per label value that may occur; default: class indices and
            `void_values`.
        allow_orphans: leave out images without a label and labels without an image instead of refusing them.

    Raises:
        DataError: an image without label or a label without image, unless they are allowed.
    """

    void_values: tuple[int, ...] = (IGNORE_INDEX,)

    def __init__(
        self,
        images: Mapping[str, Path],
        labels: Mapping[str, Path],
        transforms: Transforms | None = None,
        values: Mapping[int, int] | None = None,
        allow_orphans: bool = False,
    ) -> None:
        super().__init__(transforms)
        self.frames, self.orphans = pair_by_name(images, labels, allow_orphans)
        if values is None:
            values = {k: k for k in range(self.num_classes)} | dict.fromkeys(self.void_values, IGNORE_INDEX)
        self._lookup = lookup_of(values)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def name(self, index: int) -> str:
        """File name of frame `index` without its suffix."""
        return self.frames[index][0]

    def load_label(self, index: int) -> np.ndarray:
        """Label map uint8 [H, W] of frame `index`; its image is not decoded."""
        return read_label(self.frames[index][2], self._lookup)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] and label map uint8 [H, W] of frame `index`; raises DataError on any inconsistency."""
        _, image_path, label_path = self.frames[index]
        image = read_image(image_path)
        label = self.load_label(index)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: expected the size of its image {image_path.name}, {image.shape[0]}x{image.shape[1]} "
                f"(height x width), got {label.shape[0]}x{label.shape[1]}; the two must show the same frame"
            )
        return image, label
