"""Pictures of label maps: in the dataset's colours, over the image, and side by side with what differs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from transkd_fast.data.base import IGNORE_INDEX
from transkd_fast.data.files import read_image

IGNORED_COLOUR = (0, 0, 0)
DIFFERENT_COLOUR = (255, 40, 40)
_GAP = 4
_INK = (255, 255, 255)


def full_palette(palette: np.ndarray) -> np.ndarray:
    """A colour for every label value, that of the classes and black for all others.

    Args:
        palette: uint8 [K, 3], RGB.

    Returns:
        uint8 [256, 3].
    """
    colours = np.full((IGNORE_INDEX + 1, 3), IGNORED_COLOUR, dtype=np.uint8)
    colours[: len(palette)] = palette
    return colours


def coloured(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label map in colours.

    Args:
        labels: uint8 [H, W].
        palette: uint8 [K, 3], RGB.

    Returns:
        uint8 [H, W, 3]; black where the label is no class.
    """
    return full_palette(palette)[labels]


def overlaid(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """A label map's colours over the image.

    Args:
        image: uint8 [H, W, 3], RGB.
        labels: uint8 [H, W].
        palette: uint8 [K, 3], RGB.
        opacity: of the colours, in [0, 1]; default 0.5. The image shows unchanged where the label is no class.

    Returns:
        uint8 [H, W, 3].
    """
    mixed = np.rint((1 - opacity) * image + opacity * coloured(labels, palette)).astype(np.uint8)
    return np.where((labels < len(palette))[..., None], mixed, image)


def marked(image: np.ndarray, different: np.ndarray) -> np.ndarray:
    """The image in dark grey, with some pixels in red.

    Args:
        image: uint8 [H, W, 3], RGB.
        different: bool [H, W], the pixels.

    Returns:
        uint8 [H, W, 3].
    """
    grey = np.broadcast_to((image.mean(axis=2, keepdims=True) / 2).astype(np.uint8), image.shape)
    return np.where(different[..., None], np.array(DIFFERENT_COLOUR, np.uint8), grey)


def side_by_side(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Pictures of one size in a row, each below its caption.

    Args:
        pictures: uint8 [H, W, 3] each.
        captions: one line each; what is wider than its picture is cut off.

    Returns:
        uint8 [h, w, 3].
    """
    height, width = pictures[0].shape[:2]
    size = min(24, max(10, width // 24))
    top = size + size // 2
    row = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height + top))
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        column = Image.new("RGB", (width, height + top))
        ImageDraw.Draw(column).text((size // 4, size // 8), caption, _INK, ImageFont.load_default(size))
        column.paste(Image.fromarray(picture), (0, top))
        row.paste(column, (index * (width + _GAP), 0))
    return np.asarray(row)


def read_upright(path: Path) -> np.ndarray:
    """Decodes an image file to RGB, turned as its camera noted.

    Args:
        path: the file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: the file cannot be decoded to its end or is not an 8-bit image.
    """
    upright = Image.fromarray(read_image(path))
    with Image.open(path) as image:
        upright.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return np.array(ImageOps.exif_transpose(upright))


def write_png(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Writes a PNG file, whole or not at all, and the folders that it needs.

    Args:
        path: the file.
        pixels: uint8, RGB [H, W, 3] or one value per pixel [H, W].
        palette: uint8 [K, 3], colours that viewers show for the values; None for greys.
    """
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(full_palette(palette).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
