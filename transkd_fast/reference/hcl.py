"""HCL, the hierarchical context loss: a pyramid of mean-squared errors between two maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import compute_dtype, without_autocast

LEVELS = (4, 2, 1)
LEVEL_WEIGHTS = (0.5, 0.25, 0.125)


def hcl(student: Tensor, teacher: Tensor, level_weights: Sequence[float] = LEVEL_WEIGHTS) -> Tensor:
    """Computes the mean-squared error at full size and at 4 x 4, 2 x 2 and 1 x 1 average-pooled size, weighted.

    The full-size error has weight 1. A level l is left out when l >= min(H, W); the levels used have the first of the
    level weights in the order 4, 2, 1. The sum is divided by the sum of the weights used, the 1 included.

    Args:
        student: Student map, shape [B, C, H, W], any floating dtype, either memory layout.
        teacher: Teacher map of the same shape; its dtype may differ. A gradient flows into it if it requires one.
        level_weights: Three weights; the n-th level that is used has the n-th of them.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Source: TransKD section III-B (feature map distillation); review distillation's HCL.
    """
    dtype = compute_dtype(student, teacher)
    with without_autocast(student):
        # Pooling is linear: the pooled maps' difference is the pooled difference.
        difference = student.to(dtype) - teacher.to(dtype)
        loss = difference.square().mean()
        total = 1.0
        used = [level for level in LEVELS if level < min(difference.shape[2:])]
        for level, weight in zip(used, level_weights, strict=False):
            total += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
        return loss / total
