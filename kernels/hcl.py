"""hcl in Triton: the pyramid mean-squared error of all stages, in three launches forward and one backward.

Pooling is linear, so every level comes from sums of d = student - teacher. The borders of all pooling windows cut a
plane into at most 7 x 7 cells (4 x 4 where the sizes divide by 4), a row of cells is a band. Forward: `sum_kernel` sums
d per cell and d^2, `pool_kernel` makes of the cells' sums the pooled terms of the loss and the gradient's table,
`total_kernel` adds the loss up. Backward: dL/dstudent = upstream (alpha d + table[cell]), because all pixels of a cell
lie in the same windows. Every sum has a fixed order: results repeat bit for bit.

A launch takes several stages of any shapes, dtypes and layouts; each program works for one of them. `_hcl_plan` holds
what the launchers must work out beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _hcl_plan
from transkd_fast.kernels import _hcl_cells as cells
from transkd_fast.kernels._common import whole

# A limit on registers keeps ptxas from spilling for the sake of occupancy; multiplications and additions are fused also
# in the Triton versions that no longer do so by default.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
TOTAL_BLOCK = 2048


@triton.jit
def _difference(student, teacher, offsets, mask):
    dtype: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    s = tl.load(student + offsets, mask=mask, other=0).to(dtype)
    t = tl.load(teacher + offsets, mask=mask, other=0).to(dtype)
    return s - t


@triton.jit
def _sum_planes(pid, student, teacher, partial, sizes, TILE: tl.constexpr):
    """Writes a program's share of the sums of d to partial [B, cells, parts, C]; returns that of the sum of d^2."""
    VECTOR: tl.constexpr = TILE[0]
    PLANES: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    batch, channels, _, width, split, bands, segments, _ = sizes
    plane, column, band, first, last, part, parts = cells.place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = cells.rows_of_planes(plane, column, sizes, VECTOR)
    dtype: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([PLANES, ROWS, COLUMNS], dtype)
    squares = tl.zeros([PLANES, ROWS, COLUMNS // VECTOR], dtype)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS))[None, :, None]
        d = _difference(student, teacher, offsets + row.to(tl.int64) * length, mask & (row < last))
        total += d
        squares += tl.sum(tl.reshape(d * d, [PLANES, ROWS, COLUMNS // VECTOR, VECTOR]), axis=3)
    of_squares = tl.sum(squares)
    of_columns = tl.sum(total, axis=1)
    cell = (plane // channels * bands + band) * segments
    for segment in range(segments):
        begin, end = cells.edge(segment, width, split, segments), cells.edge(segment + 1, width, split, segments)
        inside = (column >= begin) & (column < end)
        of_cell = tl.sum(tl.where(inside[None, :], of_columns, 0), axis=1)
        entry = ((cell + segment) * parts + part) * channels + plane % channels
        tl.store(partial + entry, of_cell, mask=plane < batch * channels)
    return of_squares


@triton.jit
def _backward_planes(pid, upstream, alpha, student, teacher, table, gradient, sizes, TILE: tl.constexpr):
    VECTOR: tl.constexpr = TILE[0]
    PLANES: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    _, channels, _, _, _, bands, segments, _ = sizes
    plane, column, band, first, last, _, _ = cells.place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = cells.rows_of_planes(plane, column, sizes, VECTOR)
    segment = cells.segments_of(column, sizes)
    cell = ((plane // channels * bands + band) * segments)[:, None, None] + segment[None, None, :]
    level = upstream * tl.load(table + cell * channels + (plane % channels)[:, None, None], mask=mask, other=0)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS))[None, :, None]
        at = offsets + row.to(tl.int64) * length
        inside = mask & (row < last)
        tl.store(gradient + at, alpha * _difference(student, teacher, at, inside) + level, mask=inside)


@triton.jit
def _sum_pixels(pid, student, teacher, partial, sizes, TILE: tl.constexpr):
    """As _sum_planes, for channels-last maps."""
    VECTOR: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    _, channels, _, _, _, _, _, strips = sizes
    channel, cell, corner, cell_width, first, last, part = cells.place_in_pixels(pid, sizes, CHANNELS)
    dtype: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([PIXELS, CHANNELS], dtype)
    squares = tl.zeros([PIXELS, CHANNELS // VECTOR], dtype)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        offsets, mask = cells.pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
        d = _difference(student, teacher, offsets, mask & (pixel < last)[:, None])
        total += d
        squares += tl.sum(tl.reshape(d * d, [PIXELS, CHANNELS // VECTOR, VECTOR]), axis=2)
    entry = (cell * strips + part) * channels + channel
    tl.store(partial + entry, tl.sum(total, axis=0), mask=channel < channels)
    return tl.sum(squares)


@triton.jit
def _backward_pixels(pid, upstream, alpha, student, teacher, table, gradient, sizes, TILE: tl.constexpr):
    VECTOR: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    _, channels, _, _, _, _, _, _ = sizes
    channel, cell, corner, cell_width, first, last, _ = cells.place_in_pixels(pid, sizes, CHANNELS)
    level = upstream * tl.load(table + cell * channels + channel, mask=channel < channels, other=0)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        offsets, mask = cells.pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
        inside = mask & (pixel < last)[:, None]
        d = _difference(student, teacher, offsets, inside)
        tl.store(gradient + offsets, alpha * d + level[None, :], mask=inside)


@triton.jit(do_not_specialize=["losses"])
def sum_kernel(students, teachers, partials, losses, scales, sizes, ends, TILES: tl.constexpr):
    """Per stage the sums of d to partial [B, cells, parts, C]; per program its share of the loss's pixel terms."""
    pid = tl.program_id(0)
    first = 0
    share = tl.cast(0, losses.dtype.element_ty)
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            if len(TILE) == 4:
                squares = _sum_planes(pid - first, students[m], teachers[m], partials[m], sizes[m], TILE)
            else:
                squares = _sum_pixels(pid - first, students[m], teachers[m], partials[m], sizes[m], TILE)
            share = squares * whole(scales[m], squares.dtype)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit
def _pool(pid, partial, table, scales, sizes, parts, CELLS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Writes CHANNELS channels of a sample's table [cells, C]; returns their share of the loss's pooled terms."""
    _, channels, _, _, _, bands, segments, _ = sizes
    sample, channel = cells.place_in_pool(pid, sizes, CHANNELS)
    cell = tl.arange(0, CELLS)
    sums = cells.sum_of_parts(partial, sample, channel, cell, parts, sizes, PARTS)
    loss, slopes = cells.pooled_terms(sums, cell, scales, sizes)
    at = (sample * bands * segments + cell)[:, None] * channels + channel[None, :]
    tl.store(table + at, slopes, mask=(cell < bands * segments)[:, None] & (channel < channels)[None, :])
    return tl.sum(loss)


@triton.jit(do_not_specialize=["losses"])
def pool_kernel(
    partials,
    tables,
    losses,
    scales,
    sizes,
    parts,
    ends,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Per stage the cells' sums, partial [B, cells, parts, C], to table [B, cells, C]; the loss's pooled terms."""
    pid = tl.program_id(0)
    first = 0
    share = tl.cast(0, losses.dtype.element_ty)
    for m in tl.static_range(len(tables)):
        if (pid >= first) & (pid < ends[m]):
            share = _pool(pid - first, partials[m], tables[m], scales[m], sizes[m], parts[m], CELLS, CHANNELS, PARTS)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit(do_not_specialize=["count"])
def total_kernel(losses, loss, count, BLOCK: tl.constexpr):
    """The sum of losses [count]; one program."""
    tl.store(loss, cells.total_of(losses, count, loss.dtype.element_ty, BLOCK))


@triton.jit
def backward_kernel(grad, students, teachers, tables, gradients, scales, sizes, ends, TILES: tl.constexpr):
    """Per stage grad (scale d + table), to gradients."""
    pid = tl.program_id(0)
    first = 0
    upstream = tl.load(grad)
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            alpha = upstream * whole(scales[m], upstream.dtype)
            if len(TILE) == 4:
                _backward_planes(
                    pid - first, upstream, alpha, students[m], teachers[m], tables[m], gradients[m], sizes[m], TILE
                )
            else:
                _backward_pixels(
                    pid - first, upstream, alpha, students[m], teachers[m], tables[m], gradients[m], sizes[m], TILE
                )
        first = ends[m]


def hcl_fwd(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float], level_weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Computes hcl of all stages, weighted and summed, and the tables that the backward needs.

    Args:
        students: one map [B, C, H, W] per stage; float32, bfloat16, float16 or, then all maps, float64; contiguous or
            channels-last.
        teachers: the same shapes and layouts; the dtypes may differ.
        weights: one factor per stage.
        level_weights: three; the n-th level that a map uses, of 4 x 4, 2 x 2 and 1 x 1, has the n-th, the full size 1.

    Returns:
        loss: 0-d, float32 (float64 for float64 maps).
        tables: per stage [B, cells, C] in the loss's dtype, the gradient of the pooled terms per pixel of each cell.

    Raises:
        RuntimeError: if the maps or weights are not as said above.

    Source:
        TransKD section III-B; csrc/common/hcl_pyramid.h for the cells.
    """
    plan = _hcl_plan.plan_of("hcl", students, teachers, weights, level_weights)
    dtype = _common.COMPUTE[students[0].dtype]
    tables = [students[0].new_empty(stage.table_shape, dtype=dtype) for stage in plan.stages]
    loss = students[0].new_empty((), dtype=dtype)
    workspace = students[0].new_empty(plan.workspace, dtype=dtype)
    partials = tuple(workspace[begin:] for begin in plan.partial_at)
    losses = workspace[plan.losses_at :]
    with _common.device_guard(loss):
        for launch in plan.launches:
            chosen = launch.stages
            sum_kernel[(launch.programs,)](
                tuple(students[chosen]),
                tuple(teachers[chosen]),
                partials[chosen],
                losses[launch.losses_at :],
                launch.pixel_scales,
                launch.sizes,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
            pool_kernel[(launch.pool_programs,)](
                partials[chosen],
                tuple(tables[chosen]),
                losses[launch.pool_losses_at :],
                launch.pool_scales,
                launch.sizes,
                launch.parts,
                launch.pool_ends,
                CELLS=launch.pool_tile[0],
                CHANNELS=launch.pool_tile[1],
                PARTS=launch.pool_tile[2],
                **OPTIONS,
            )
        total_kernel[(1,)](losses, loss, plan.losses, BLOCK=TOTAL_BLOCK, **OPTIONS)
    return loss, tables


def hcl_bwd(
    grad: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    tables: Sequence[Tensor],
    weights: Sequence[float],
    level_weights: Sequence[float],
) -> list[Tensor]:
    """Computes the gradient of `hcl_fwd`'s loss with respect to the students.

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        students: as for `hcl_fwd`.
        teachers: as for `hcl_fwd`.
        tables: as `hcl_fwd` made them. With students and teachers exchanged and the tables negated, the gradient is the
            teachers'.
        weights: as for `hcl_fwd`.
        level_weights: as for `hcl_fwd`.

    Returns:
        Per stage the gradient, in the student's dtype and memory layout.

    Raises:
        RuntimeError: if the maps, weights, tables or grad are not as said above.

    Source:
        TransKD section III-B.
    """
    plan = _hcl_plan.plan_of("hcl", students, teachers, weights, level_weights)
    plan.check_backward(grad, tables)
    gradients = [torch.empty_like(student) for student in students]
    with _common.device_guard(grad):
        for launch in plan.launches:
            chosen = launch.stages
            backward_kernel[(launch.programs,)](
                grad,
                tuple(students[chosen]),
                tuple(teachers[chosen]),
                tuple(tables[chosen]),
                tuple(gradients[chosen]),
                launch.alphas,
                launch.sizes,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
    return gradients
