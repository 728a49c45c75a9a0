"""A dry run: what a model gives on a batch, before anything is trained on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transkd_fast.models.outputs import StageOutputs

STRIDES = (4, 8, 16, 32)


@torch.no_grad()
def describe(name: str, model: nn.Module, images: Tensor, features_only: bool = False) -> list[str]:
    """Runs a model once in evaluation mode, checks what it gives, and says it in lines.

    Args:
        name: What it is called, e.g. "teacher".
        model: Returns `StageOutputs` and has `channels`, four, fine to coarse.
        images: RGB images in [0, 1], [B, 3, H, W], on the model's device.
        features_only: Whether the decoder is left out; default no.

    Returns:
        One line for the model and one per stage.

    Raises:
        ValueError: If it gives anything else than four maps of `channels` at strides 4, 8, 16 and 32, their tokens or
            none, and logits.
    """
    training = model.training
    model.eval()
    try:
        outputs = model(images, features_only=True) if features_only else model(images)
    finally:
        model.train(training)
    if not isinstance(outputs, StageOutputs):
        raise ValueError(f"{name}: expected StageOutputs from its forward, got {type(outputs).__name__}")
    channels: tuple[int, ...] = tuple(model.channels)  # type: ignore[arg-type]
    sizes = [tuple(-(-edge // stride) for edge in images.shape[2:]) for stride in STRIDES]
    expected = [[len(images), c, *size] for c, size in zip(channels, sizes, strict=True)]
    got = [list(x.shape) for x in outputs.features]
    if got != expected:
        raise ValueError(
            f"{name}: expected features {expected} of images {list(images.shape)}, its channels at strides 4, 8, 16 and"
            f" 32, got {got}"
        )
    if outputs.embeddings:
        expected = [[len(images), h * w, c] for c, (h, w) in zip(channels, sizes, strict=True)]
        got = [list(x.shape) for x in outputs.embeddings]
        if got != expected:
            raise ValueError(f"{name}: expected patch embeddings {expected} or none, got {got}")
    if not features_only and outputs.logits is None:
        raise ValueError(f"{name}: expected logits, got None")
    scores = "without its decoder" if outputs.logits is None else f"logits {list(outputs.logits.shape)}"
    normalised = "with its own normalisation" if hasattr(model, "mean") else "as they are"
    lines = [f"{name}: {type(model).__name__}, images {list(images.shape)} {normalised}, {scores}"]
    taps: Any = getattr(model, "tapped", dict)
    tapped = taps()
    for m, x in enumerate(outputs.features):
        tokens = f"embedding {list(outputs.embeddings[m].shape)}" if outputs.embeddings else "no patch embedding"
        where = f"; {tapped[f'stage {m + 1}']}" if tapped else ""
        lines.append(f"{name} stage {m + 1}: features {list(x.shape)}, {tokens}{where}")
    return lines
