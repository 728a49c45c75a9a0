"""Segmentation cross-entropy at label size, of logits at a smaller one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import as_dtype, compute_dtype, without_autocast


def seg_ce(logits: Tensor, labels: Tensor, weight: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Computes the class-weighted mean cross-entropy of the bilinearly upsampled logits.

    The mean divides by the summed weights of the labelled pixels; where that sum is 0 (every pixel ignored), the loss
    and its gradient are 0.

    Args:
        logits: Class scores, shape [B, K, h, w], any floating dtype.
        labels: Class indices in [0, K) or `ignore_index`, shape [B, H, W] of any size, integer dtype.
        weight: Class weights, shape [K], or None for 1 each.
        ignore_index: Label of pixels that do not count.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits).

    Source: TransKD section III-A; interpolation with align_corners=False.
    """
    dtype = compute_dtype(logits)
    weight = as_dtype(weight, dtype)
    with without_autocast(logits):
        scores = logits.to(dtype)
        if labels.shape[1:] != logits.shape[2:]:
            scores = F.interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=False)
        labels = labels.long()
        summed = F.cross_entropy(scores, labels, weight, ignore_index=ignore_index, reduction="sum")
        valid = labels != ignore_index
        total = valid.sum(dtype=dtype) if weight is None else (weight[labels.where(valid, 0)] * valid).sum()
        return summed / torch.where(total > 0, total, torch.ones_like(total))
