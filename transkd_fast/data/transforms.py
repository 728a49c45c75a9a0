"""Joint transforms of image and mask, and the collation of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from transkd_fast.data.base import IGNORE_INDEX, DataError

_FILL = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}


def _check_size(what: str, size: tuple[int, int]) -> tuple[int, int]:
    size = tuple(size)  # type: ignore[assignment]
    if len(size) != 2 or not all(isinstance(edge, int) and edge > 0 for edge in size):
        raise ValueError(f"{what}: expected size as (height, width), two positive integers, got {size}")
    return size


class RandomScale(v2.Transform):
    """Resizes image and mask to a random multiple of `size`.

    Images are resized bilinearly with antialiasing, masks by the nearest pixel centre (the "nearest" of
    `v2.Resize` shifts masks against images by up to half a pixel).

    Args:
        size: (height, width) at factor 1.
        scale: range of the factor, drawn uniformly; (1, 1) makes it a fixed resize.
        masks: False leaves masks at their own size.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0), masks: bool = True) -> None:
        super().__init__()
        self.size = size
        self.scale = scale
        self.masks = masks

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws one factor for all inputs and returns the size it gives."""
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item() if low < high else low
        return {"size": [max(1, round(factor * edge)) for edge in self.size]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes one image or mask to `params["size"]`."""
        if not isinstance(inpt, tv_tensors.Mask):
            return functional.resize(inpt, params["size"], InterpolationMode.BILINEAR, antialias=True)
        if not self.masks:
            return inpt
        plane = inpt.as_subclass(Tensor).unsqueeze(-3)
        resized = functional.resize_image(plane, params["size"], InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(resized.squeeze(-3), like=inpt)


def _to_float() -> v2.Transform:
    return v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)


def train_transforms(
    size: tuple[int, int],
    scale: tuple[float, float] = (0.75, 1.5),
    flip: float = 0.5,
    jitter: float = 0.0,
) -> v2.Compose:
    """Random scale, crop, horizontal flip and colour jitter for training.

    Scale 1 shows the frame as `eval_transforms` does; smaller ones pad, the image with 0 and the mask with 255.

    Args:
        size: (height, width) of the result.
        scale: range of the scale, relative to the whole frame resized to `size`.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation changes (each factor in [1 - jitter, 1 + jitter]).

    Returns:
        Transform `(image, mask) -> (float32 image [3, *size] in [0, 1], mask [*size])`.

    Raises:
        ValueError: an argument out of range.
    """
    size = _check_size("train_transforms", size)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"train_transforms: expected scale as (low, high) with 0 < low <= high, got {scale}")
    if not 0 <= flip <= 1:
        raise ValueError(f"train_transforms: expected flip to be a probability in [0, 1], got {flip}")
    if not 0 <= jitter <= 1:
        raise ValueError(f"train_transforms: expected jitter in [0, 1], got {jitter}")
    steps: list[v2.Transform] = [
        RandomScale(size, (float(scale[0]), float(scale[1]))),
        v2.RandomCrop(list(size), pad_if_needed=True, fill=_FILL),
        v2.RandomHorizontalFlip(flip),
    ]
    if jitter > 0:
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    return v2.Compose([*steps, _to_float()])


def published_transforms(size: tuple[int, int]) -> v2.Compose:
    """The augmentation of the published training: horizontal flip and a shift of up to 2 pixels in each direction.

    The mask moves with the image; what the shift uncovers is 0 in the image and 255 in the mask.

    Args:
        size: (height, width) to which the frame is resized first.

    Returns:
        Transform `(image, mask) -> (float32 image [3, *size] in [0, 1], mask [*size])`.

    Raises:
        ValueError: `size` is not two positive integers.

    Source: TransKD, arXiv 2202.13393, section 4 (training settings).
    """
    size = _check_size("published_transforms", size)
    return v2.Compose(
        [
            RandomScale(size),
            v2.RandomHorizontalFlip(0.5),
            # A crop of the padded frame at a uniform position is a uniform shift of -2 to 2 pixels.
            v2.RandomCrop(list(size), padding=2, fill=_FILL),
            _to_float(),
        ]
    )


def eval_transforms(size: tuple[int, int]) -> v2.Compose:
    """Resizes the image alone; the mask keeps its own size, at which mIoU is taken.

    Args:
        size: (height, width) of the image given to the model.

    Returns:
        Transform `(image, mask) -> (float32 image [3, *size] in [0, 1], mask as it is)`.

    Raises:
        ValueError: `size` is not two positive integers.
    """
    size = _check_size("eval_transforms", size)
    return v2.Compose([RandomScale(size, masks=False), _to_float()])


def network_input(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """An image without a label, as `eval_transforms` prepares it.

    Args:
        pixels: RGB, uint8 [H, W, 3].
        size: (height, width) of the image given to the model.

    Returns:
        float32 [3, *size] in [0, 1].

    Raises:
        ValueError: `size` is not two positive integers.
    """
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    mask = tv_tensors.Mask(torch.zeros(1, 1, dtype=torch.uint8))
    return eval_transforms(size)(image, mask)[0].as_subclass(Tensor)


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stacks samples into a batch of plain tensors.

    Args:
        samples: (image [3, H, W], mask [h, w]) pairs; all images of one size and all masks of one size.

    Returns:
        images [B, 3, H, W] and masks [B, h, w], dtypes unchanged.

    Raises:
        DataError: sizes differ within the batch.
    """
    for position, (what, remedy) in enumerate(
        (
            ("images", "resize them with a transform"),
            ("masks", "use batch_size=1 to take metrics at label size, or resize the masks"),
        )
    ):
        sizes = sorted({tuple(sample[position].shape[-2:]) for sample in samples})
        if len(sizes) > 1:
            raise DataError(
                f"collate: expected all {what} of a batch to have one size, got "
                f"{', '.join(f'{height}x{width}' for height, width in sizes)}; {remedy}"
            )
    images = torch.stack([image.as_subclass(Tensor) for image, _ in samples])
    masks = torch.stack([mask.as_subclass(Tensor) for _, mask in samples])
    return images, masks
