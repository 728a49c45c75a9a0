"""HCL, the hierarchical context loss: a pyramid of mean-squared errors between two maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import BatchNorm, batch_norm, compute_dtype, without_autocast

LEVELS = (4, 2, 1)


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean-squared error at full size and at 4 x 4, 2 x 2 and 1 x 1 average-pooled size, weighted.

    The full-size error has weight 1. A level l is left out when l >= min(H, W); the levels used have weights 1/2, 1/4,
    1/8 in the order 4, 2, 1, halving only for levels that are used. The sum is divided by the sum of the weights.

    Args:
        student: Student map, shape [B, C, H, W], any floating dtype, either memory layout.
        teacher: Teacher map of the same shape; its dtype may differ. A gradient flows into it if it requires one.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Source: TransKD section III-B (feature map distillation); review distillation's HCL.
    """
    dtype = compute_dtype(student, teacher)
    with without_autocast(student):
        # Pooling is linear: the pooled maps' difference is the pooled difference.
        difference = student.to(dtype) - teacher.to(dtype)
        loss = difference.square().mean()
        weight = total = 1.0
        for level in LEVELS:
            if level >= min(difference.shape[2:]):
                continue
            weight /= 2
            total += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
        return loss / total


def hcl_bn(u: Tensor, teacher: Tensor, bn: BatchNorm) -> Tensor:
    """Computes `hcl` of the batch-normalised student map: the last BN of the student's branch, folded in.

    Args:
        u: Output of the last convolution before its batch norm, shape [B, C, H, W], any floating dtype.
        teacher: Teacher map of the same shape; its dtype may differ.
        bn: The batch norm; running statistics are updated in place in training.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Raises:
        ValueError: In training, if a channel has a single value.

    Source: TransKD section III-B; the batch norm is the last one of a CSF stage.
    """
    with without_autocast(u):
        return hcl(batch_norm(u.to(compute_dtype(u, teacher)), bn), teacher)
