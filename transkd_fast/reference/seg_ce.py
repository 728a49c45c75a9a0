"""Segmentation cross-entropy at label size, of logits at a smaller one; and the classes at that size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import compute_dtype, without_autocast


def seg_ce(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Computes the class-weighted mean cross-entropy of the bilinearly upsampled logits, and counts pixels.

    The mean divides by the summed weights of the labelled pixels; where that sum is not above 0 (every pixel
    ignored), the loss and its gradient are 0.

    Args:
        logits: Class scores, shape [B, K, h, w], any floating dtype.
        labels: Class indices in [0, K) or `ignore_index`, shape [B, H, W] of any size, integer dtype. Pixels of any
            other value are left out as the ignored ones are, and counted.
        weight: Class weights, shape [K], or None for 1 each.
        ignore_index: Label of pixels that do not count.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits), and int64 [4]: the pixels that are labelled, those of them
        whose highest score is the label's, the ignored ones, and those whose label is out of range.

    Source: TransKD section III-A; interpolation with align_corners=False.
    """
    dtype = compute_dtype(logits)
    weight = None if weight is None else weight.detach().to(dtype)
    with without_autocast(logits):
        scores = _at_size(logits, labels.shape[1], labels.shape[2])
        labels = labels.long()
        ignored = labels == ignore_index
        valid = (labels >= 0) & (labels < logits.shape[1]) & ~ignored
        labels = labels.where(valid, -1)
        summed = F.cross_entropy(scores, labels, weight, ignore_index=-1, reduction="sum")
        total = valid.sum(dtype=dtype) if weight is None else (weight[labels.where(valid, 0)] * valid).sum()
        right = scores.argmax(dim=1) == labels  # which is -1 where the pixel does not count
        counts = torch.stack([valid.sum(), right.sum(), ignored.sum(), (~valid & ~ignored).sum()])
        nothing = total <= 0
        return (summed / total.masked_fill(nothing, 1)).masked_fill(nothing, 0), counts


def seg_predict(logits: Tensor, height: int, width: int) -> Tensor:
    """Computes the class of the highest bilinearly upsampled score.

    Args:
        logits: Class scores, shape [B, K, h, w], any floating dtype.
        height: Height of the result in pixels.
        width: Its width.

    Returns:
        Class indices, int64 [B, height, width].

    Source: interpolation with align_corners=False.
    """
    with without_autocast(logits):
        return _at_size(logits, height, width).argmax(dim=1)


def _at_size(logits: Tensor, height: int, width: int) -> Tensor:
    scores = logits.to(compute_dtype(logits))
    if (height, width) == tuple(logits.shape[2:]):
        return scores
    return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)
