"""How the ops hand batch norms to their kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from transkd_fast.reference._common import BatchNorm

# How the kernels normalise (csrc/common/batch_norm.h).
NO_NORM, RUNNING, BATCH, TRACKED = range(4)
Settings = tuple[int, "float | None", float]  # kind of normalisation, momentum, eps
Statistics = tuple["Tensor | None", "Tensor | None", "Tensor | None"]  # running mean and variance, counter


def settings_of(bn: BatchNorm | None) -> tuple[Settings, Statistics]:
    """How the kernels normalise, and the running statistics that they read or update."""
    if bn is None:
        return (NO_NORM, None, 0.0), (None, None, None)
    if bn.running_mean is None:
        return (BATCH, None, bn.eps), (None, None, None)
    if not bn.training:
        return (RUNNING, None, bn.eps), (bn.running_mean, bn.running_var, None)
    return (TRACKED, bn.momentum, bn.eps), (bn.running_mean, bn.running_var, bn.num_batches_tracked)


def write_back(statistics: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Makes updated statistics known to their owner.

    Args:
        statistics: pairs of a module's tensor and of the contiguous one that the kernels updated: the same, or a copy.
    """
    for own, new in statistics:
        if new is not own:
            own.copy_(new)
        elif not torch.compiler.is_compiling():  # kernels write through pointers, past autograd's count of changes
            torch.autograd.graph.increment_version(own)
