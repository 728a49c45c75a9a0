"""Batch normalisation whose statistics are synchronised over processes, on GPU and on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transkd_fast.nn._parameters import batch_norm_of, world_size
from transkd_fast.ops._autograd import first_derivative
from transkd_fast.reference._common import BatchNorm, as_dtype, compute_dtype, move_running_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(_BatchNorm):
    """Normalises per channel over the batches of all processes, as `nn.SyncBatchNorm`, which runs no tensor on CPU.

    On GPU this is torch's own. On CPU a training forward costs one all-gather of means, centred squares and counts
    (float64), the backward one all-reduce of two sums; the processes' batches may differ in size and may be empty.
    In evaluation, without torch.distributed or in a group of one process it is `nn.BatchNorm2d`, for inputs of any
    dimension from 2.

    It is no subclass of `nn.SyncBatchNorm`, which DistributedDataParallel refuses on CPU.

    Args:
        num_features: Number of channels C of the inputs [B, C, ...].
        eps: Added to the variance; default 1e-5.
        momentum: Weight of the new statistics, default 0.1; None for the cumulative average.
        affine: Whether there are a weight and a bias; default yes.
        track_running_stats: Whether there are running statistics; default yes.
        process_group: The processes over which statistics are synchronised; default all.
        device: Device of parameters and statistics.
        dtype: Their dtype.

    Source: `torch.nn.SyncBatchNorm`, whose keys and behaviour it has.
    """

    # nn.SyncBatchNorm.forward calls it on GPU.
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the input and, in training, updates the running statistics.

        Args:
            input: Shape [B, C, ...], any floating dtype and layout.

        Returns:
            The normalised tensor, in input's shape, dtype and layout.

        Raises:
            ValueError: If the shape does not fit, or in training a channel has a single value in all processes.
        """
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(cast(Any, self), input)
        group = synchronised_over(self)
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        bn = batch_norm_of(self)
        return _Synchronised.apply(input, bn.weight, bn.bias, bn, group)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: expected an input of shape [B, {self.num_features}, ...], got {list(input.shape)}"
            )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """Replaces every batch norm of a module, torch's synchronised ones included, as torch's method of this name.

        Args:
            module: The module; it is changed, and its parameters and buffers are kept, not copied.
            process_group: The processes over which statistics are synchronised; default all, or those of the layer
                that is replaced.

        Returns:
            The module, or the layer that replaces it if it is a batch norm itself.

        Raises:
            TypeError: If a batch norm is of another class, whose behaviour would be lost.
        """
        known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, cls)
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and type(layer) not in known:
                raise TypeError(
                    f"SyncBatchNorm: expected batch norms of torch.nn, got {type(layer).__name__} in"
                    f" {name or 'module'!r}: what it does besides would be lost; convert the parts without it, such as"
                    " model.skfs"
                )
        if isinstance(module, _BatchNorm):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group if process_group is not None else getattr(module, "process_group", None),
            )
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
            if hasattr(module, "qconfig"):
                converted.qconfig = module.qconfig
            return converted
        for name, child in module.named_children():
            module.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module


def synchronised_over(module: nn.Module) -> ProcessGroup | None:
    """Finds the processes over which a batch norm's statistics have to be synchronised now.

    Args:
        module: The batch norm, synchronised (torch's class or ours) or not.

    Returns:
        Their group; None where a process takes its own statistics or the running ones, and where it is the only one.
    """
    if not isinstance(module, (nn.SyncBatchNorm, SyncBatchNorm)) or not module.training or world_size() == 1:
        return None
    group = dist.group.WORLD if module.process_group is None else module.process_group
    return group if dist.get_world_size(group) > 1 else None


class _Synchronised(torch.autograd.Function):
    """Merges the statistics of all processes in float64; saves the input, the weight and two vectors."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, bn: BatchNorm, group: ProcessGroup
    ) -> Tensor:
        dtype = compute_dtype(input)
        mean, var, count = _merge(*_gather_statistics(input.to(dtype), group))
        if count <= 1:
            raise ValueError(
                "SyncBatchNorm: expected more than 1 value per channel over all processes when training, got input of"
                f" shape {list(input.shape)}; use a larger batch or image, or eval mode"
            )
        move_running_statistics(bn, mean, var * (count / (count - 1)))
        ctx.save_for_backward(input, weight, mean, var)
        ctx.group, ctx.count, ctx.eps = group, count, bn.eps
        ctx.dtypes = weight.dtype if weight is not None else None, bias.dtype if bias is not None else None
        return F.batch_norm(
            input,
            mean.to(dtype),
            var.to(dtype),
            as_dtype(weight, dtype),
            as_dtype(bias, dtype),
            training=False,
            eps=bn.eps,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, grad, input, weight, mean, var)
        sources = [t for t in (grad, input, weight) if t is not None]
        return *(g if g is None else first_derivative("SyncBatchNorm", g, *sources) for g in gradients), None, None


def _gradients(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of input, weight and bias, the last two from this process's samples only."""
    dtype = compute_dtype(input)
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    axes = [0, *range(2, input.dim())]
    invstd = (var + ctx.eps).rsqrt()
    normalised = (input.to(dtype) - mean.to(dtype).view(per_channel)) * invstd.to(dtype).view(per_channel)
    grad = grad.to(dtype)
    own = torch.stack([grad.sum(axes), (grad * normalised).sum(axes)]).double()
    wanted_input, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
    grad_input = None
    if wanted_input:
        means = own.clone()
        dist.all_reduce(means, group=ctx.group)
        mean_grad, mean_product = (t.to(dtype).view(per_channel) for t in means / ctx.count)
        scale = invstd if weight is None else invstd * weight.double()
        grad_input = (grad - mean_grad - normalised * mean_product) * scale.to(dtype).view(per_channel)
        grad_input = grad_input.to(input.dtype)
    grad_weight = own[1].to(ctx.dtypes[0]) if wanted_weight else None
    grad_bias = own[0].to(ctx.dtypes[1]) if wanted_bias else None
    return grad_input, grad_weight, grad_bias


def _gather_statistics(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Gathers every process's means, centred squares, [ranks, C] each, and counts [ranks, 1], all float64."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64)
    if count:  # the mean of nothing is NaN, and would stay so times the count 0
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        mine[:channels], mine[channels:-1], mine[-1] = mean, var.double() * count, count
    everyones = mine.new_empty(dist.get_world_size(group) * mine.numel())
    dist.all_gather_into_tensor(everyones, mine, group=group)
    means, squares, counts = everyones.view(-1, mine.numel()).split([channels, channels, 1], dim=1)
    return means, squares, counts


def _merge(means: Tensor, squares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Computes mean and biased variance of all values by Chan's formula, and their number."""
    count = int(counts.sum())
    mean = (means * counts).sum(dim=0) / count
    var = (squares + counts * (means - mean).square()).sum(dim=0) / count
    return mean, var, count
