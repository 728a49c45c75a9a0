"""Hands a batch norm module's parameters and settings to an op."""

from __future__ import annotations

import torch
from torch import nn

from transkd_fast.functional import BatchNorm


def batch_norm_of(module: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    """Collects what an op needs to normalise as the module would.

    Args:
        module: The batch norm.

    Returns:
        Its parameters, running statistics (not copied) and settings.

    Raises:
        NotImplementedError: If the statistics would have to be synchronised over processes.
    """
    if isinstance(module, nn.SyncBatchNorm) and module.training and world_size() > 1:
        raise NotImplementedError(
            "CSF: SyncBatchNorm over several processes is not supported; use nn.BatchNorm2d, do not convert the model"
        )
    return BatchNorm(
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        module.training,
        module.momentum,
        module.eps,
    )


def world_size() -> int:
    """Counts the processes of the default group, 1 where torch.distributed is not in use."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
