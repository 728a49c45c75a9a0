"""What seg_ce's launchers check and work out beforehand: from shapes, dtypes and layouts alone, once for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # by the code that `seg_ce_bwd` takes
LANES = 128  # pixels that the threads of a program take at a time
ROWS = 4  # label rows that a thread takes at a time: they share what is interpolated along the row
STRIP = 32  # most label rows of a program
CLASSES = 8  # most classes whose gradients a thread holds
FEWEST_CLASSES = 4
SOURCE_ROWS = 16  # most source rows of a program: the label rows above the first are looked at twice
FEWEST_SOURCE_ROWS = 4
PROGRAMS = 2112  # wanted: sixteen per multiprocessor of an H100
PARTS = 2  # sums of a program: of the loss, of the weights
COUNTS = 4
SUM_BLOCK = 1024
ADD_BLOCK = 1024
SCALE_BLOCK = 2048


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs.

    A *cell* of an axis are the label pixels between two source pixels: cell c those from source position c up to
    c + 1, cell 0 also those before. A program of the loss takes label columns of the rows of one cell; a program of the
    gradient takes some classes of the cells at some source rows, and goes over all label rows that touch these.

    Attributes:
        sizes: (classes, height, width, label height, label width).
        axes: per axis, height and width, whether source and label have one size, and whether positions need 64 bits.
        tile: (label rows, label columns) of a program's step.
        cut: (label rows of a strip, strips of a cell, chunks of label columns).
        programs: of the loss and of the prediction.
        source_tile: (classes, cells, label columns of each) of a gradient program's step.
        source_cut: (source rows of a strip, strips, chunks of cells, blocks of classes).
        source_programs: of the gradient.
        adds: programs that add to the gradient what cells give their right source pixels; 0 where that is nothing.
        dtype: compute type.
    """

    sizes: tuple[int, int, int, int, int]
    axes: tuple[tuple[bool, bool], tuple[bool, bool]]
    tile: tuple[int, int]
    cut: tuple[int, int, int]
    programs: int
    source_tile: tuple[int, int, int]
    source_cut: tuple[int, int, int, int]
    source_programs: int
    adds: int
    dtype: torch.dtype


def plan_of(logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> Plan:
    """The plan of a loss.

    Args:
        logits: as for `seg_ce_fwd`.
        labels: the same.
        weight: the same.
        ignore_index: the same.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the arguments do not fit each other.
    """
    if labels.dim() != 3 or labels.numel() == 0:
        raise RuntimeError(
            f"seg_ce: expected labels [B, H, W] with at least one element, got shape {list(labels.shape)}"
        )
    _check_logits("seg_ce", logits)
    batch, classes = logits.shape[:2]
    if labels.dtype not in LABELS:
        raise RuntimeError(
            f"seg_ce: expected uint8, int16, int32 or int64 labels, got {labels.dtype}: convert them with .long()"
        )
    if labels.shape[0] != batch:
        raise RuntimeError(f"seg_ce: expected labels to have shape [{batch}, H, W], got {list(labels.shape)}")
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype not in _common.COMPUTE):
        raise RuntimeError(
            f"seg_ce: expected weight to have shape [{classes}] and a floating dtype, got {_common.described(weight)}"
        )
    for name, tensor in (("labels", labels), ("weight", weight)):
        if tensor is not None and not tensor.is_contiguous():
            raise RuntimeError(
                f"seg_ce: expected {name} contiguous, got {_common.described(tensor)}: call .contiguous() first"
            )
        if tensor is not None and tensor.device != logits.device:
            raise RuntimeError(f"seg_ce: expected {name} on {logits.device} like the logits, got {tensor.device}")
    if 0 <= ignore_index < classes:
        raise RuntimeError(f"seg_ce: expected ignore_index outside the classes [0, {classes}), got {ignore_index}")
    return _plan(tuple(logits.shape), tuple(labels.shape[1:]), logits.dtype)


def plan_of_predict(logits: Tensor, height: int, width: int) -> Plan:
    """The plan of a prediction.

    Args:
        logits: as for `seg_ce_predict`.
        height: the same.
        width: the same.

    Returns:
        The plan.

    Raises:
        RuntimeError: if the arguments are not as said there.
    """
    _check_logits("seg_ce_predict", logits)
    if height < 1 or width < 1:
        raise RuntimeError(f"seg_ce_predict: expected a height and width of at least 1, got {height} and {width}")
    return _plan(tuple(logits.shape), (height, width), logits.dtype)


def _check_logits(op: str, logits: Tensor) -> None:
    if logits.dim() != 4 or logits.numel() == 0:
        raise RuntimeError(
            f"{op}: expected logits [B, K, h, w] with at least one element, got shape {list(logits.shape)}"
        )
    if logits.dtype not in _common.COMPUTE:
        raise RuntimeError(f"{op}: expected float32, float64, bfloat16 or float16 logits, got {logits.dtype}")
    _common.is_channels_last(op, logits)


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype) -> Plan:
    batch, classes, height, width = shape
    label_height, label_width = size
    rows = min(ROWS, triton.next_power_of_2(triton.cdiv(label_height, height)))
    columns = min(LANES, triton.next_power_of_2(label_width))
    longest = longest_cell(height, label_height)
    per_strip = longest if longest <= STRIP else STRIP
    strips, chunks = triton.cdiv(longest, per_strip), triton.cdiv(label_width, columns)

    cell_columns = min(LANES, triton.next_power_of_2(triton.cdiv(label_width, width)))
    cells = min(LANES // cell_columns, triton.next_power_of_2(width))
    class_block = _common.block_of(classes, CLASSES, FEWEST_CLASSES)
    source_chunks, class_blocks = triton.cdiv(width, cells), triton.cdiv(classes, class_block)
    across = batch * source_chunks * class_blocks
    source_rows = SOURCE_ROWS
    while source_rows > FEWEST_SOURCE_ROWS and across * triton.cdiv(height, source_rows) < PROGRAMS:
        source_rows //= 2
    source_strips = triton.cdiv(height, source_rows)
    return Plan(
        sizes=(classes, height, width, label_height, label_width),
        axes=(_axis(height, label_height), _axis(width, label_width)),
        tile=(rows, columns),
        cut=(per_strip, strips, chunks),
        programs=batch * height * strips * chunks,
        source_tile=(class_block, cells, cell_columns),
        source_cut=(source_rows, source_strips, source_chunks, class_blocks),
        source_programs=across * source_strips,
        adds=0 if width in (1, label_width) else triton.cdiv(batch * classes * height * width, ADD_BLOCK),
        dtype=_common.COMPUTE[dtype],
    )


def _axis(source: int, target: int) -> tuple[bool, bool]:
    # The largest number on the way to a position is 2 n N + n, and lanes may lie past the end.
    return source == target, (2 * (target + LANES) + 1) * (source + LANES) >= 2**31


def longest_cell(source: int, target: int) -> int:
    """Most label pixels of a cell of an axis.

    Args:
        source: source pixels of the axis.
        target: its label pixels.

    Returns:
        The length of a cell inside, or of cell 0 if that is longer.
    """
    if source in (1, target):
        return target // source
    before_cell_1 = triton.cdiv(max(3 * target - source, 0), 2 * source)
    return max(triton.cdiv(target, source), before_cell_1)


def check_backward(grad: Tensor, total: Tensor, kept: Tensor, dtype: int) -> None:
    """Raises RuntimeError unless the arguments of `seg_ce_bwd` fit each other."""
    if kept.dim() != 4 or kept.numel() == 0 or kept.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"seg_ce_bwd: expected what seg_ce_fwd kept, [B, K, h, w], got {_common.described(kept)}")
    _common.is_channels_last("seg_ce_bwd", kept)
    for name, scalar in (("grad", grad), ("total", total)):
        if scalar.numel() != 1 or scalar.dtype != kept.dtype or scalar.device != kept.device:
            raise RuntimeError(
                f"seg_ce_bwd: expected a scalar {name} of {kept.dtype} on {kept.device}, got "
                f"{_common.described(scalar)} on {scalar.device}"
            )
    if not 0 <= dtype < len(DTYPES):
        raise RuntimeError(f"seg_ce_bwd: expected a dtype code of 0 to {len(DTYPES) - 1}, got {dtype}")
    if (DTYPES[dtype] == torch.float64) != (kept.dtype == torch.float64):
        raise RuntimeError(f"seg_ce_bwd: expected a gradient of float64 for float64 only, got code {dtype}")
