"""Hands the parameters of torch's layers to an op."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transkd_fast.functional import BatchNorm


def batch_norm_of(module: _BatchNorm) -> BatchNorm:
    """Collects what an op needs to normalise as the module would.

    Args:
        module: The batch norm.

    Returns:
        Its parameters, running statistics (not copied) and settings.
    """
    # As nn.BatchNorm2d: switched off after construction, tracking leaves the statistics alone in training.
    tracked = module.track_running_stats or not module.training
    return BatchNorm(
        module.weight,
        module.bias,
        module.running_mean if tracked else None,
        module.running_var if tracked else None,
        module.num_batches_tracked if tracked else None,
        module.training,
        module.momentum,
        module.eps,
    )


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Collects the parameters of a linear layer or a convolution that has a bias.

    Args:
        layer: The layer.

    Returns:
        Its weight and its bias (not copied).
    """
    return cast(Tensor, layer.weight), cast(Tensor, layer.bias)


def world_size() -> int:
    """Counts the processes of the default group, 1 where torch.distributed is not in use."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
