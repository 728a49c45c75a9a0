"""What every op checks of its arguments before any work: types, dtypes, devices, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transkd_fast.reference._common import BatchNorm

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same_precision(tensors: Sequence[Tensor]) -> str | None:
    """Says why kernels that compute in float32 or in float64 cannot take these tensors together.

    Args:
        tensors: The maps of a call.

    Returns:
        The reason, or None if they can.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "float64 maps do not mix with other dtypes in this kernel"
    return None


def check_given(op: str, **tensors: Tensor) -> None:
    """Checks that arguments are tensors of a supported floating dtype on one device; None does not pass.

    Args:
        op: Name of the op, for the message.
        **tensors: Arguments by name.

    Raises:
        TypeError: If one is no tensor or has another dtype.
        ValueError: If devices differ.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a tensor, got None")
    check_floating(op, **tensors)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Checks that arguments are tensors of a supported floating dtype on one device; None passes.

    Args:
        op: Name of the op, for the message.
        **tensors: Arguments by name.

    Raises:
        TypeError: If one is no tensor or has another dtype.
        ValueError: If devices differ.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: expected {name} to be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: expected {name} on {first[1]} like {first[0]}, got {tensor.device}; move it with .to()"
            )


def check_shape(op: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """Checks a tensor's shape.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        tensor: The argument.
        *expected: One entry per dimension: its size, or the name of one that may have any size.

    Raises:
        ValueError: If the shape is another one.
    """
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) != len(expected) or any(
        isinstance(want, int) and got != want for got, want in zip(shape, expected, strict=True)
    ):
        want = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: expected {name} to have shape [{want}], got {list(shape)}")


def check_not_empty(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor has elements, since means and statistics over nothing are undefined.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        tensor: The argument.

    Raises:
        ValueError: If it is empty.
    """
    if tensor.numel() == 0:
        raise ValueError(f"{op}: expected {name} to have at least one element, got shape {list(tensor.shape)}")


def check_scalar(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor has exactly one element.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        tensor: The argument.

    Raises:
        ValueError: If it has none or several.
    """
    if tensor.numel() != 1:
        raise ValueError(f"{op}: expected {name} to have one element, got shape {list(tensor.shape)}")


def check_length(op: str, name: str, values: Sequence[object], length: int, like: str) -> None:
    """Checks that a list has one entry per stage.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        values: The argument.
        length: The expected length.
        like: Name of what sets the length, for the message.

    Raises:
        ValueError: If the length is another one.
    """
    if len(values) != length:
        raise ValueError(f"{op}: expected {name} to have {length} entries like {like}, got {len(values)}")


def check_weights(op: str, name: str, weights: Sequence[float]) -> None:
    """Checks that factors of a loss's stages are finite numbers.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        weights: The argument.

    Raises:
        ValueError: If one is no number, or not finite.
    """
    if not all(isinstance(weight, (int, float)) and -math.inf < weight < math.inf for weight in weights):
        raise ValueError(f"{op}: expected {name} to be finite numbers, got {list(weights)}")


def check_batch_norm(op: str, name: str, bn: BatchNorm, channels: int, device: torch.device) -> None:
    """Checks a batch norm's parameters and running statistics against the number of channels.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument, for the message.
        bn: The argument.
        channels: Number of channels.
        device: Device of the normalised tensor.

    Raises:
        TypeError: If it is no `BatchNorm`, or a tensor has no floating dtype.
        ValueError: If a tensor has another shape than [channels] or another device, or the settings contradict one
            another.
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"{op}: expected {name} to be a BatchNorm, got {type(bn).__name__}")
    for field, tensor in zip(("weight", "bias", "running_mean", "running_var"), bn[:4], strict=True):
        if tensor is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.shape == (channels,) and tensor.device == device
        if not fits or tensor.dtype not in FLOATING:
            check_floating(op, **{f"{name}.{field}": tensor})
            check_shape(op, f"{name}.{field}", tensor, channels)
            if tensor.device != device:
                raise ValueError(f"{op}: expected {name}.{field} on {device}, got {tensor.device}; move it with .to()")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{op}: expected {name} to have both running_mean and running_var or neither, got one")
    if bn.momentum is not None and not 0 <= bn.momentum <= 1:
        raise ValueError(f"{op}: expected {name}.momentum to be in [0, 1], or None, got {bn.momentum}")
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return
    for field, tensor in (("running_mean", bn.running_mean), ("running_var", bn.running_var)):
        if channels > 1 and tensor.stride(0) == 0:
            raise ValueError(f"{op}: expected {name}.{field} to have its own memory per channel; use .clone()")
    count = bn.num_batches_tracked
    if count is None:
        if bn.momentum is None:
            raise ValueError(f"{op}: expected {name}.num_batches_tracked with momentum=None, got None")
    elif not isinstance(count, Tensor) or count.dtype != torch.int64 or count.numel() != 1 or count.device != device:
        got = f"{count.dtype} of shape {list(count.shape)} on {count.device}" if isinstance(count, Tensor) else count
        raise ValueError(f"{op}: expected {name}.num_batches_tracked to be one int64 on {device}, got {got}")


def check_batch_statistics(op: str, name: str, tensor: Tensor, bn: BatchNorm, samples: int) -> None:
    """Checks that a batch norm in training has more than one value per channel.

    Args:
        op: Name of the op, for the message.
        name: Name of the normalised argument, for the message.
        tensor: The normalised argument, shape [B, C, H, W].
        bn: The batch norm.
        samples: Samples over which it takes its statistics: B, or those of several processes.

    Raises:
        ValueError: If there is a single value per channel.
    """
    if (bn.training or bn.running_mean is None) and samples * tensor.shape[2:].numel() == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel in {name} when training, got shape {list(tensor.shape)}; "
            "use a larger batch or image, or eval mode"
        )
