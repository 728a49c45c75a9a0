"""What the reference ops share: the compute dtype, autocast switched off, and batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BatchNorm(NamedTuple):
    """Parameters, running statistics and settings of one batch normalisation.

    Args:
        weight: Scale, shape [C], or None for 1.
        bias: Shift, shape [C], or None for 0.
        running_mean: Running mean, shape [C], updated in place in training; None means that nothing is tracked.
        running_var: Running unbiased variance, shape [C], updated in place in training; None as above.
        num_batches_tracked: int64 0-d counter, incremented in place per training forward; None means not counted.
        training: Normalise with the batch's statistics (True) or the running ones (False).
        momentum: Weight of the new statistics, or None for the cumulative average.
        eps: Added to the variance.

    Source: `torch.nn.BatchNorm2d`, whose behaviour `batch_norm` reproduces.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5


class GlobalBatch(NamedTuple):
    """A batch of which a process holds some samples only, the others being at other processes.

    Args:
        gather: Maps this process's rows, [B, ...], to those of all samples, [K, ...]; differentiable.
        first: Index of this process's first sample among the K.
    """

    gather: Callable[[Tensor], Tensor]
    first: int


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Gives the dtype of the arithmetic: the inputs' common dtype, but at least float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Returns a context in which autocast is off on the tensor's device, where autocast exists there at all."""
    device_type = tensor.device.type
    # Dynamo of torch 2.11 cannot trace the question; where it compiles, autocast exists.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Casts an optional tensor."""
    return None if tensor is None else tensor.to(dtype)


def values_per_channel(x: Tensor) -> int:
    """Counts the values that one channel's statistics are taken over, for x of shape [B, C, ...]."""
    return x.shape[0] * x.shape[2:].numel()


def batch_norm(x: Tensor, bn: BatchNorm) -> Tensor:
    """Normalises x per channel as `nn.BatchNorm2d` does, running statistics included.

    Args:
        x: Shape [B, C] or [B, C, H, W], float32 or float64.
        bn: Parameters and settings; its running statistics and counter are updated in place in training.

    Returns:
        The normalised tensor, of x's shape and dtype.

    Raises:
        ValueError: In training, if a channel has a single value.
    """
    use_batch_statistics = bn.training or bn.running_mean is None or bn.running_var is None
    if use_batch_statistics and values_per_channel(x) == 1:
        raise ValueError(
            f"batch_norm: expected more than 1 value per channel when training, got input of shape {list(x.shape)}; "
            "use a larger batch or image, or eval mode"
        )
    weight, bias = as_dtype(bn.weight, x.dtype), as_dtype(bn.bias, x.dtype)
    if bn.running_mean is None or bn.running_var is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=bn.eps)
    if not bn.training:
        mean, var = bn.running_mean.to(x.dtype), bn.running_var.to(x.dtype)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=bn.eps)
    if bn.momentum is not None and bn.running_mean.dtype == bn.running_var.dtype == x.dtype:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        return F.batch_norm(x, bn.running_mean, bn.running_var, weight, bias, True, bn.momentum, bn.eps)
    var, mean = torch.var_mean(x.detach(), dim=[0, *range(2, x.dim())], correction=1)
    move_running_statistics(bn, mean, var)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=bn.eps)


def move_running_statistics(bn: BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Moves a batch norm's running statistics towards those of a batch and counts it; nothing is read on the host.

    Args:
        bn: The batch norm; its running statistics and counter are updated in place where it has them.
        mean: The batch's mean, shape [C], any floating dtype.
        var: Its unbiased variance, shape [C], in mean's dtype.

    Raises:
        ValueError: If momentum is None (cumulative average) and the batches are not counted.
    """
    if bn.running_mean is None or bn.running_var is None:
        return
    if bn.momentum is None and bn.num_batches_tracked is None:
        raise ValueError("batch_norm: expected num_batches_tracked with momentum=None (cumulative average), got None")
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    factor: float | Tensor
    if bn.momentum is not None:
        factor = bn.momentum
    else:
        assert bn.num_batches_tracked is not None
        factor = bn.num_batches_tracked.to(mean.dtype).reciprocal()
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        running.copy_(torch.lerp(running.to(new.dtype), new, factor))


def statistics_over(means: Tensor, squares: Tensor, pixels: int, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Gives the mean and biased variance that a batch norm normalises with, from those of all samples.

    Args:
        means: Mean of each sample's channels, shape [K, C], float32 or float64.
        squares: Sums of squared deviations from it, shape [K, C].
        pixels: Number of values behind each of them.
        bn: The batch norm; running statistics are updated in place in training, and given where they normalise.

    Returns:
        Mean and variance, each [C].

    Raises:
        ValueError: In training, if a channel has a single value.
    """
    if not (bn.training or bn.running_mean is None or bn.running_var is None):
        return bn.running_mean.to(means.dtype), bn.running_var.to(means.dtype)
    mean, count = means.mean(dim=0), means.shape[0] * pixels
    if count == 1:
        raise ValueError("batch_norm: expected more than 1 value per channel over all processes in training, got 1")
    var = (squares + pixels * (means - mean).square()).sum(dim=0) / count
    if bn.training:
        move_running_statistics(bn, mean.detach(), var.detach() * (count / (count - 1)))
    return mean, var


def normalise_with(mean: Tensor, var: Tensor, x: Tensor, bn: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises x per channel with given statistics.

    Args:
        mean: Shape [C].
        var: Biased variance, shape [C].
        x: Shape [B, C, H, W], in mean's dtype.
        bn: The batch norm; only weight, bias and eps are looked at.

    Returns:
        The normalised x, and per channel the factor and the shift of x - mean.
    """
    weight, bias = as_dtype(bn.weight, x.dtype), as_dtype(bn.bias, x.dtype)
    scale = (var + bn.eps).rsqrt() if weight is None else weight * (var + bn.eps).rsqrt()
    shift = torch.zeros_like(scale) if bias is None else bias
    return (x - mean[:, None, None]) * scale[:, None, None] + shift[:, None, None], scale, shift


def nearest_index(out_size: int, in_size: int) -> Tensor:
    """Computes the source index of each output pixel of nearest interpolation along one axis.

    Args:
        out_size: Output size in pixels.
        in_size: Input size in pixels.

    Returns:
        min(floor(i * (in_size / out_size)), in_size - 1) for i in [0, out_size) in float32 arithmetic, int64.

    Source: `torch.nn.functional.interpolate` of float32. In rare pairs of sizes, 2 to 82 for one, this is not
        (i * in_size) // out_size; in others, 2 to 164 for one, torch's float64 on CPU departs from it.
    """
    scale = torch.tensor(in_size, dtype=torch.float32) / out_size
    return (torch.arange(out_size, dtype=torch.float32) * scale).floor().long().clamp(max=in_size - 1)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolates by the nearest pixel, in every dtype by the rule of float32.

    Args:
        x: Shape [B, C, h, w], any floating dtype.
        size: Height and width of the result in pixels, in any ratio to x's.

    Returns:
        Shape [B, C, *size], x's dtype.

    Source: `torch.nn.functional.interpolate`, mode "nearest"; its float64 takes other pixels at rare ratios, so that
        results of two precisions could not be compared.
    """
    if x.dtype != torch.float64:
        return F.interpolate(x, size=size, mode="nearest")
    for dim, length in zip((2, 3), size, strict=True):
        x = x.index_select(dim, nearest_index(length, x.shape[dim]).to(x.device))
    return x
