"""What gl_mixer's launchers check and work out beforehand: from shapes, dtypes and the device alone, once for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

TAPS = 3
BRANCHES = 2  # the value's and the gate's convolution
GRADIENTS = (
    "e",
    "u",
    "conv_a_weight",
    "conv_a_bias",
    "conv_b_weight",
    "conv_b_bias",
    "attention_weight",
    "conv_weight",
)
LARGEST_ROWS = 2**30  # tokens of all samples are counted in 32 bits
LARGEST_VECTOR = 16  # what is known to divide the number of channels
PROGRAMS = 96  # that a launch should have at least, before its tiles become larger
SMALLEST = 16  # side of a tile that the matrix units take
SHARED = 96 * 1024  # bytes that a program of a product may hold, which even small GPUs have
# Tiles [rows, channels] of a product, largest first; the largest depth of its steps; tile of a weight's gradient, and
# the depth of its steps in bytes.
TENSOR_CORES = ((128, 64), (64, 64), (64, 32), (32, 32)), 32, 64, 64
FLOAT32 = ((64, 32), (32, 16)), 16, 32, 64
FLOAT64 = ((32, 32),), 16, 32, 128
ELEMENTS = 1024  # of a step of the pass over the maps, which
CHANNELS = 64  # takes so many channels at a time
PARTS = 128  # that the rows are cut into at most, for sums over them
MERGE_BLOCK = 512
MERGE_PARTS = 8


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs.

    Attributes:
        sizes: (tokens of all samples, tokens of a sample, channels).
        dtype: compute type.
        precision: of the products: "ieee", "tf32", or "widened" where bfloat16 operands go into the product as float32.
        tile: of outputs and input gradients: (a power of two that divides the channels, rows, channels, depth).
        weight_tile: of weight gradients: (the same divisor, output channels, input channels, depth in rows).
        pass_tile: of the pass over the maps: (the same divisor, rows, channels).
        part_rows: rows of a part of the sums over rows.
    """

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    precision: str
    tile: tuple[int, ...]
    weight_tile: tuple[int, ...]
    pass_tile: tuple[int, ...]
    part_rows: int

    @property
    def programs(self) -> int:
        """Tiles of the output, or of the input's gradient."""
        return triton.cdiv(self.sizes[0], self.tile[1]) * triton.cdiv(self.sizes[2], self.tile[2])

    @property
    def parts(self) -> int:
        """Parts of the sums over rows that the pass over the maps takes."""
        return triton.cdiv(self.sizes[0], self.part_rows)

    @property
    def pass_programs(self) -> int:
        return self.parts * triton.cdiv(self.sizes[2], self.pass_tile[2])

    def weight_parts(self, branches: int) -> tuple[int, int, int]:
        """Number of programs of so many weights' gradients, number of parts of their sums over rows, and its rows."""
        rows, _, channels = self.sizes
        _, outer, inner, step = self.weight_tile
        tiles = branches * triton.cdiv(channels, outer) * triton.cdiv(channels, inner)
        if tiles == 0:
            return 0, 0, 0
        part_rows = triton.cdiv(triton.cdiv(rows, triton.cdiv(PROGRAMS, tiles)), step) * step
        parts = triton.cdiv(rows, part_rows)
        return tiles * parts, parts, part_rows

    def merge_ends(self, wanted: Sequence[bool]) -> tuple[int, ...]:
        """First program after those that merge each of the gradients of weights, biases and scalars, two of each."""
        channels = self.sizes[2]
        of_weight = triton.cdiv(channels * channels, MERGE_BLOCK)
        of_bias = triton.cdiv(channels, MERGE_BLOCK // MERGE_PARTS)
        programs = (of_weight, of_weight, of_bias, of_bias, 1, 1)
        return tuple(itertools.accumulate(n if want else 0 for n, want in zip(programs, wanted, strict=True)))


def plan_of(
    e: Tensor,
    u: Tensor,
    conv_a_weight: Tensor,
    conv_a_bias: Tensor,
    conv_b_weight: Tensor,
    conv_b_bias: Tensor,
    attention_weight: Tensor,
    conv_weight: Tensor,
    tf32: bool,
) -> Plan:
    """The plan for these arguments of a call.

    Args:
        e: [B, N, C].
        u: [B, N, C].
        conv_a_weight: [C, C, 3].
        conv_a_bias: [C].
        conv_b_weight: [C, C, 3].
        conv_b_bias: [C].
        attention_weight: one element.
        conv_weight: one element.
        tf32: whether float32 products may take TF32 tensor cores.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the arguments do not fit each other.
    """
    if e.dim() != 3 or e.numel() == 0:
        raise RuntimeError(
            f"gl_mixer: expected e as tokens [B, N, C] with at least one element, got shape {list(e.shape)}"
        )
    check_tokens("e", e, e)
    check_tokens("u", u, e)
    channels = e.shape[2]
    check_parameter("conv_a_weight", conv_a_weight, e, (channels, channels, TAPS))
    check_parameter("conv_a_bias", conv_a_bias, e, (channels,))
    check_parameter("conv_b_weight", conv_b_weight, e, (channels, channels, TAPS))
    check_parameter("conv_b_bias", conv_b_bias, e, (channels,))
    check_scalar("attention_weight", attention_weight, e)
    check_scalar("conv_weight", conv_weight, e)
    if e.shape[0] * e.shape[1] > LARGEST_ROWS:
        raise RuntimeError(
            f"gl_mixer: expected at most {LARGEST_ROWS} tokens in all, got e of shape {list(e.shape)}: use "
            "backend='eager'"
        )
    # Only the interpreter takes tensors on CPU, and it has no product of bfloat16.
    interpreted = e.device.type == "cpu"
    weight_itemsize = max(conv_a_weight.itemsize, conv_b_weight.itemsize)
    return _plan(tuple(e.shape), e.dtype, weight_itemsize, tf32, interpreted)


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, int, int], dtype: torch.dtype, weight_itemsize: int, tf32: bool, interpreted: bool) -> Plan:
    batch, length, channels = shape
    rows = batch * length
    precision = "tf32" if tf32 and dtype == torch.float32 else "ieee"
    if interpreted and dtype == torch.bfloat16:
        precision = "widened"
    vector = min(channels & -channels, LARGEST_VECTOR)
    kind = {torch.float64: FLOAT64, torch.float32: TENSOR_CORES if tf32 else FLOAT32}.get(dtype, TENSOR_CORES)
    tiles, depth, side, weight_depth = kind
    tile = _tile(rows, channels, tiles)
    depth = side_of(channels, depth)
    while depth > SMALLEST and shared_bytes(*tile, depth, dtype.itemsize, weight_itemsize) > SHARED:
        depth //= 2
    side = side_of(channels, side)
    of_pass = _common.block_of(channels, CHANNELS, SMALLEST)
    pass_rows = max(1, ELEMENTS // of_pass)
    return Plan(
        sizes=(rows, length, channels),
        dtype=_common.COMPUTE[dtype],
        precision=precision,
        tile=(vector, *tile, depth),
        weight_tile=(vector, side, side, side_of(rows, weight_depth // dtype.itemsize)),
        pass_tile=(vector, pass_rows, of_pass),
        part_rows=triton.cdiv(triton.cdiv(rows, PARTS), pass_rows) * pass_rows,
    )


def side_of(size: int, largest: int) -> int:
    """Side of a tile along an axis, a power of two that the matrix units take."""
    return max(SMALLEST, min(largest, triton.next_power_of_2(size)))


def _tile(rows: int, channels: int, tiles: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The largest of the tiles with which there are enough programs, else the smallest."""
    for high, wide in tiles:
        tile = side_of(rows, high), side_of(channels, wide)
        if triton.cdiv(rows, tile[0]) * triton.cdiv(channels, tile[1]) >= PROGRAMS:
            break
    return tile


def shared_bytes(rows: int, channels: int, depth: int, itemsize: int, weight_itemsize: int) -> int:
    """What a program of the forward holds: two steps' shifted rows, a step's weights as stored and as operands."""
    weights = BRANCHES * channels * (weight_itemsize + itemsize)
    return TAPS * depth * (2 * rows * itemsize + weights)


def check_tokens(name: str, tensor: Tensor, e: Tensor) -> None:
    """Raises RuntimeError unless a tensor is like e; the dtype may differ, except for float64."""
    if tensor.shape != e.shape:
        raise RuntimeError(f"gl_mixer: expected {name} of e's shape {list(e.shape)}, got {list(tensor.shape)}")
    _check_storage(name, tensor, e)
    if (tensor.dtype == torch.float64) != (e.dtype == torch.float64):
        raise RuntimeError(
            f"gl_mixer: float64 does not mix with other dtypes, got e of {e.dtype} and {name} of {tensor.dtype}"
        )


def check_parameter(name: str, tensor: Tensor, e: Tensor, shape: tuple[int, ...]) -> None:
    """Raises RuntimeError unless a parameter has this shape."""
    if tuple(tensor.shape) != shape:
        raise RuntimeError(f"gl_mixer: expected {name} to have shape {list(shape)}, got {list(tensor.shape)}")
    _check_storage(name, tensor, e)


def check_scalar(name: str, tensor: Tensor, e: Tensor) -> None:
    """Raises RuntimeError unless a tensor has one element."""
    if tensor.numel() != 1:
        raise RuntimeError(f"gl_mixer: expected {name} with one element, got {list(tensor.shape)}")
    _check_storage(name, tensor, e)


def check_backward(plan: Plan, e: Tensor, grad: Tensor, branches: Tensor, wanted: Sequence[bool]) -> None:
    """Raises RuntimeError unless grad is like e, the branches are those that the forward kept, and each has a flag."""
    check_tokens("grad", grad, e)
    if grad.dtype != e.dtype:
        raise RuntimeError(f"gl_mixer: expected grad of e's dtype {e.dtype}, got {grad.dtype}")
    shape = (*e.shape[:2], BRANCHES, e.shape[2])
    fits = tuple(branches.shape) == shape and branches.is_contiguous() and branches.dtype == plan.dtype
    if not fits or branches.device != e.device:
        raise RuntimeError(
            f"gl_mixer: expected the branches that gl_mixer_fwd kept, contiguous {plan.dtype} of shape {list(shape)} "
            f"on {e.device}, got {_common.described(branches)} on {branches.device}"
        )
    if len(wanted) != len(GRADIENTS):
        raise RuntimeError(f"gl_mixer: expected {len(GRADIENTS)} flags of wanted gradients, got {len(wanted)}")


def _check_storage(name: str, tensor: Tensor, e: Tensor) -> None:
    if tensor.dtype not in _common.COMPUTE:
        raise RuntimeError(f"gl_mixer: expected float32, float64, bfloat16 or float16, got {name} of {tensor.dtype}")
    if tensor.device != e.device:
        raise RuntimeError(f"gl_mixer: expected {name} on e's device {e.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise RuntimeError(
            f"gl_mixer: expected {name} contiguous, got {_common.described(tensor)}: call .contiguous() first"
        )
