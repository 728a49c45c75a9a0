"""What a call of hcl's kernels works out beforehand: from shapes, dtypes, layouts and weights alone, once for each.

hcl_bn cuts its maps in the same way, and takes its plans from here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

LEVELS = (4, 2, 1)
STAGES_PER_LAUNCH = 4  # the code of a launch grows with it
TILE_BYTES = 4096  # of each map per step of a program: two 16-byte loads per thread of four warps
PROGRAMS = 1024  # wanted per stage: about what the largest GPUs run at a time
STEPS = 2  # fewest steps of a program where a cell is long enough
NARROW_COLUMNS = 64  # rows no longer than that are not divided among programs, nor are fewer channels than
NARROW_CHANNELS = 32
WIDE_COLUMNS = 512
WIDE_CHANNELS = 128
POOL_CHANNELS = 8
POOL_PARTS = 8
ALIGNMENT = 32  # elements between the parts of a workspace, so that each begins at a multiple of 16 bytes


@dataclass(frozen=True)
class Stage:
    """How one stage is cut into cells, and these into programs.

    A program of the sums' and the backward's kernel takes one strip. Contiguous maps: a block of planes, a strip of
    the rows of one band, a chunk of columns. Channels-last maps: a strip of one cell's pixels, a chunk of channels.

    Attributes:
        sizes: (batch, channels, height, width, split, bands, segments, strips). split is the largest level of the
            pyramid that is used, 0 if none is; bands and segments are the numbers of cells along height and width.
        tile: what a program takes in one step: (vector, planes, rows, columns) for contiguous maps, (vector, pixels,
            channels) for channels-last ones. Rows of the map are known to be a multiple of vector long.
        parts: partial sums per cell and channel.
        programs: programs of the sums' and the backward's kernel.
        pool_programs: programs of the pooling kernel.
        alpha: the gradient of the full-size term is alpha d.
        level_scales: of each level that is used, in the order of `LEVELS`, its weight divided by its number of values;
            0 for as many as are not used.
    """

    sizes: tuple[int, ...]
    tile: tuple[int, ...]
    parts: int
    programs: int
    pool_programs: int
    alpha: float
    level_scales: tuple[float, ...]

    @property
    def table_shape(self) -> tuple[int, int, int]:
        batch, channels, _, _, _, bands, segments, _ = self.sizes
        return batch, bands * segments, channels


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch of each kernel; tuples have one entry per stage of the launch.

    Scales are pairs of floats (`_common.halves`), those of the pooled terms three such pairs per stage. A stage's
    programs are those below its end and not below the one before.
    """

    stages: slice
    sizes: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    parts: tuple[int, ...]
    pool_ends: tuple[int, ...]
    pool_tile: tuple[int, int, int]
    losses_at: int
    pool_losses_at: int
    alphas: tuple[tuple[float, float], ...]
    pixel_scales: tuple[tuple[float, float], ...]
    pool_scales: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def programs(self) -> int:
        return self.ends[-1]

    @property
    def pool_programs(self) -> int:
        return self.pool_ends[-1]


@dataclass(frozen=True)
class Plan:
    """All launches of a call, and its workspace: the partial sums of each stage, then the loss's parts.

    Attributes:
        op: name of the op, for messages.
        stages: all stages.
        launches: all launches.
        partial_at: where in the workspace each stage's partial sums begin.
        losses_at: where the loss's parts begin.
        losses: number of the loss's parts.
        dtype: compute type, that of the workspace, the loss and the tables.
    """

    op: str
    stages: tuple[Stage, ...]
    launches: tuple[Launch, ...]
    partial_at: tuple[int, ...]
    losses_at: int
    losses: int
    dtype: torch.dtype

    @property
    def workspace(self) -> int:
        return self.losses_at + self.losses

    def check_backward(self, grad: Tensor, tables: Sequence[Tensor]) -> None:
        """Raises RuntimeError unless the upstream gradient and the tables fit this plan."""
        name = f"{self.op}_bwd"
        if grad.numel() != 1 or grad.dtype != self.dtype:
            raise RuntimeError(f"{name}: expected a scalar grad of {self.dtype}, got {_common.described(grad)}")
        if len(tables) != len(self.stages):
            raise RuntimeError(f"{name}: expected one table per stage, got {len(tables)} for {len(self.stages)}")
        for stage, table in zip(self.stages, tables, strict=True):
            if tuple(table.shape) != stage.table_shape or table.dtype != self.dtype or not table.is_contiguous():
                raise RuntimeError(
                    f"{name}: expected the tables that {self.op}_fwd made, contiguous, here of shape "
                    f"{list(stage.table_shape)} and {self.dtype}, got {_common.described(table)}"
                )


def plan_of(
    op: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    level_weights: Sequence[float],
    sums: int = 1,
    called: str = "students",
) -> Plan:
    """The plan for these maps.

    Args:
        op: name of the op, for messages.
        students: maps [B, C, H, W], one per stage.
        teachers: as many, of the same shapes and layouts.
        weights: as many.
        level_weights: three.
        sums: how many sums the op takes per cell and part.
        called: what the op calls the students' maps, for messages.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the maps do not fit each other, or there are not three level weights.
    """
    if not students or len(students) != len(teachers) or len(students) != len(weights):
        raise RuntimeError(
            f"{op}: expected as many teachers and weights as {called}, and at least one, got {len(students)} {called}, "
            f"{len(teachers)} teachers and {len(weights)} weights"
        )
    if len(level_weights) != len(LEVELS):
        raise RuntimeError(
            f"{op}: expected {len(LEVELS)} level weights, of the levels used in the order 4, 2, 1, got "
            f"{len(level_weights)}"
        )
    maps = [*students, *teachers]
    if any(m.device != maps[0].device for m in maps):
        raise RuntimeError(f"{op}: expected all maps on one device, got {sorted({str(m.device) for m in maps})}")
    described = tuple((tuple(m.shape), m.dtype, _common.is_channels_last(op, m)) for m in maps)
    return _plan(op, described, tuple(weights), tuple(level_weights), sums)


@functools.lru_cache(maxsize=256)
def _plan(
    op: str,
    maps: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...],
    weights: tuple[float, ...],
    level_weights: tuple[float, ...],
    sums: int,
) -> Plan:
    count = len(weights)
    pairs = list(zip(maps[:count], maps[count:], strict=True))
    stages = []
    for ((shape, dtype, channels_last), (other_shape, other_dtype, other_layout)), weight in zip(
        pairs, weights, strict=True
    ):
        _check_pair(op, shape, other_shape, dtype, other_dtype, maps[0][1])
        if channels_last != other_layout:
            raise RuntimeError(f"{op}: expected both maps contiguous or both channels-last, got one of each")
        itemsizes = (dtype.itemsize, other_dtype.itemsize)
        stages.append(_stage(shape, channels_last, min(itemsizes), max(itemsizes), weight, level_weights))
    partial_at, at = [], 0
    for stage in stages:
        partial_at.append(at)
        at += triton.cdiv(sums * math.prod(stage.table_shape) * stage.parts, ALIGNMENT) * ALIGNMENT
    launches, losses = [], 0
    for begin in range(0, count, STAGES_PER_LAUNCH):
        launches.append(_launch(stages, slice(begin, min(begin + STAGES_PER_LAUNCH, count)), losses))
        losses = launches[-1].pool_losses_at + launches[-1].pool_programs
    return Plan(op, tuple(stages), tuple(launches), tuple(partial_at), at, losses, _common.COMPUTE[maps[0][1]])


def _check_pair(
    op: str,
    shape: tuple[int, ...],
    other_shape: tuple[int, ...],
    dtype: torch.dtype,
    other_dtype: torch.dtype,
    first_dtype: torch.dtype,
) -> None:
    if len(shape) != 4 or len(other_shape) != 4:
        raise RuntimeError(f"{op}: expected maps [B, C, H, W], got {list(shape)} and {list(other_shape)}")
    for dim in range(4):
        if shape[dim] != other_shape[dim] or shape[dim] == 0:
            raise RuntimeError(
                f"{op}: expected non-empty maps of one shape; they differ in dimension {dim}, got {list(shape)} and "
                f"{list(other_shape)}"
            )
    check_dtypes(op, (dtype, other_dtype), first_dtype)


def check_dtypes(op: str, dtypes: Sequence[torch.dtype], first_dtype: torch.dtype) -> None:
    """Raises RuntimeError unless the maps' dtypes are known and go together with that of the first map."""
    for dtype in dtypes:
        if dtype not in _common.COMPUTE:
            raise RuntimeError(f"{op}: expected float32, float64, bfloat16 or float16 maps, got {dtype}")
        if (dtype == torch.float64) != (first_dtype == torch.float64):
            raise RuntimeError(f"{op}: float64 does not mix with other dtypes, got {dtype} and {first_dtype}")


def _stage(
    shape: tuple[int, ...],
    channels_last: bool,
    smallest: int,
    largest: int,
    weight: float,
    level_weights: Sequence[float],
) -> Stage:
    batch, channels, height, width = shape
    used = dict(zip((level for level in LEVELS if level < min(height, width)), level_weights, strict=False))
    split = max(used, default=0)
    share = weight / ((1 + sum(used.values())) * batch * channels)
    level_scales = [share * level_weight / level**2 for level, level_weight in used.items()]
    rows, columns = borders(height, split), borders(width, split)
    bands, segments = len(rows) - 1, len(columns) - 1
    tallest, widest = (max(b - a for a, b in itertools.pairwise(cut)) for cut in (rows, columns))
    if channels_last:
        vector = _common.vector_length(channels, smallest)
        elements = _elements(vector, smallest, largest)
        block = _common.block_of(channels, min(WIDE_CHANNELS, elements), NARROW_CHANNELS)
        pixels = min(elements // block, triton.next_power_of_2(tallest * widest))
        tile: tuple[int, ...] = (vector, pixels, block)
        chunks = triton.cdiv(channels, block)
        programs = batch * bands * segments * chunks
        strips = _strips(programs, tallest * widest, pixels)
        parts = strips
    else:
        vector = _common.vector_length(width, smallest)
        elements = _elements(vector, smallest, largest)
        block = _common.block_of(width, min(WIDE_COLUMNS, elements), NARROW_COLUMNS)
        rows_at_once = min(elements // block, triton.next_power_of_2(tallest))
        planes = min(elements // block // rows_at_once, triton.next_power_of_2(batch * channels))
        tile = (vector, planes, rows_at_once, block)
        chunks = triton.cdiv(width, block)
        programs = triton.cdiv(batch * channels, planes) * bands * chunks
        strips = _strips(programs, tallest, rows_at_once)
        parts = strips * chunks
    return Stage(
        sizes=(batch, channels, height, width, split, bands, segments, strips),
        tile=tile,
        parts=parts,
        programs=programs * strips,
        pool_programs=batch * triton.cdiv(channels, POOL_CHANNELS),
        alpha=2 * share / (height * width),
        level_scales=(*level_scales, *[0.0] * (len(LEVELS) - len(used))),
    )


def _elements(vector: int, smallest: int, largest: int) -> int:
    """Elements of a tile. Short vectors mean many loads, each with a mask and an address to hold: then half as many."""
    full = TILE_BYTES // largest
    return full if vector * smallest >= _common.VECTOR_BYTES else full // 2


def _strips(programs: int, length: int, step: int) -> int:
    """Number of strips to cut each of `length` into, of which a program does `step` at a time."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(length, step * STEPS)))


def _launch(stages: Sequence[Stage], chosen: slice, losses_at: int) -> Launch:
    own = stages[chosen]
    ends = tuple(itertools.accumulate(stage.programs for stage in own))
    cells = 16 if max(stage.table_shape[1] for stage in own) <= 16 else 64
    at_once = min(triton.next_power_of_2(max(stage.parts for stage in own)), POOL_PARTS)
    return Launch(
        stages=chosen,
        sizes=tuple(stage.sizes for stage in own),
        tiles=tuple(stage.tile for stage in own),
        ends=ends,
        parts=tuple(stage.parts for stage in own),
        pool_ends=tuple(itertools.accumulate(stage.pool_programs for stage in own)),
        pool_tile=(cells, POOL_CHANNELS, at_once),
        losses_at=losses_at,
        pool_losses_at=losses_at + ends[-1],
        alphas=tuple(_common.halves(stage.alpha) for stage in own),
        pixel_scales=tuple(_common.halves(stage.alpha / 2) for stage in own),
        pool_scales=tuple(tuple(map(_common.halves, stage.level_scales)) for stage in own),
    )


def borders(size: int, split: int) -> list[int]:
    """Borders of all adaptive windows of the levels up to `split` along an axis.

    Args:
        size: length of the axis, in pixels.
        split: the largest level used, 0 if none is.

    Returns:
        Increasing positions, the first 0 and the last size.
    """
    found = {0, size}
    for level in LEVELS:
        if level <= split:
            found |= {i * size // level for i in range(level)} | {-(-i * size // level) for i in range(level)}
    return sorted(found)
