"""HCL of a batch-normalised student map: the last batch norm of the student's branch, folded into the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transkd_fast.reference._common import (
    BatchNorm,
    GlobalBatch,
    batch_norm,
    compute_dtype,
    normalise_with,
    statistics_over,
    without_autocast,
)
from transkd_fast.reference.hcl import LEVEL_WEIGHTS, hcl


def hcl_bn(
    u: Tensor,
    teacher: Tensor,
    bn: BatchNorm,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    global_batch: GlobalBatch | None = None,
) -> Tensor:
    """Computes `hcl` of BN(u) and the teacher's map.

    Args:
        u: Output of the last convolution before its batch norm, shape [B, C, H, W], any floating dtype.
        teacher: Teacher map of the same shape; its dtype may differ. No gradient flows into it.
        bn: The batch norm; running statistics are updated in place in training.
        level_weights: Weights of the pooled levels (see `hcl`).
        global_batch: The batch whose statistics the batch norm takes in training; default these B samples.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Raises:
        ValueError: In training, if a channel has a single value in the whole batch.

    Source: TransKD section III-B; the batch norm is the last one of a CSF stage.
    """
    with without_autocast(u):
        x = u.to(compute_dtype(u, teacher))
        if global_batch is None:
            normalised = batch_norm(x, bn)
        else:
            mean = x.mean(dim=(2, 3))
            squares = (x - mean[..., None, None]).square().sum(dim=(2, 3))
            means, squares = global_batch.gather(torch.stack([mean, squares], dim=1)).unbind(1)
            normalised = normalise_with(*statistics_over(means, squares, x.shape[2:].numel(), bn), x, bn)[0]
        return hcl(normalised, teacher.detach(), level_weights)
