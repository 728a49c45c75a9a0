"""What every op's launchers share: layouts, block sizes, the device guard, and exact scalars."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load and store of a thread
COMPUTE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def is_channels_last(op: str, maps: Tensor) -> bool:
    """Whether a dense map [B, C, H, W] is channels-last; one that is both counts as contiguous.

    Args:
        op: name of the op, for the message.
        maps: the map.

    Returns:
        True for channels-last, False for contiguous.

    Raises:
        RuntimeError: if the map is neither.
    """
    if maps.is_contiguous():
        return False
    if maps.is_contiguous(memory_format=torch.channels_last):
        return True
    raise RuntimeError(
        f"{op}: expected a contiguous or channels-last map, got shape {list(maps.shape)} with strides "
        f"{list(maps.stride())}: call .contiguous() first"
    )


def described(tensor: Tensor) -> str:
    """Shape, strides and dtype of a tensor, for messages."""
    return f"shape {list(tensor.shape)}, strides {list(tensor.stride())}, {tensor.dtype}"


def vector_length(size: int, itemsize: int) -> int:
    """Number of elements a thread may load at once where rows are `size` elements long.

    Args:
        size: length of the innermost dimension, in elements.
        itemsize: bytes of one element.

    Returns:
        The largest power of two that divides size, at most 16 bytes' worth.
    """
    return min(size & -size, VECTOR_BYTES // itemsize)


def block_of(size: int, largest: int, smallest: int) -> int:
    """Block length along an axis: the largest that leaves few lanes idle.

    Args:
        size: length of the axis.
        largest: largest block, a power of two.
        smallest: smallest block worth taking several of, a power of two.

    Returns:
        A power of two; at most an eighth of the lanes idle if any block in that range allows it.
    """
    blocks = [min(largest, triton.next_power_of_2(size))]
    while blocks[-1] > smallest:
        blocks.append(blocks[-1] // 2)
    covered = [triton.cdiv(size, block) * block for block in blocks]
    limit = max(min(covered), size + size // 8)
    return next(block for block, total in zip(blocks, covered, strict=True) if total <= limit)


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device the current one, on which Triton launches; does nothing for a tensor on CPU.

    Args:
        tensor: any tensor.

    Returns:
        A context manager.
    """
    return torch.cuda.device_of(tensor)


def halves(value: float) -> tuple[float, float]:
    """A float64 scalar as a sum of two float32 values, which is how Triton passes Python floats.

    Args:
        value: the scalar.

    Returns:
        The value rounded to float32, and the rest.
    """
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


@triton.jit
def whole(scalar, dtype: tl.constexpr):
    """The scalar that `halves` took apart, in the compute type."""
    return tl.cast(scalar[0], dtype) + tl.cast(scalar[1], dtype)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """The value in another dtype; double precision comes to a half one through float32.

    Triton's interpreter makes bfloat16 of float32 only, and of anything else silently a wrong number.
    """
    if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)
