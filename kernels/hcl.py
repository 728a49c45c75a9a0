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
from transkd_fast.kernels._common import whole

# A limit on registers keeps ptxas from spilling for the sake of occupancy; multiplications and additions are fused also
# in the Triton versions that no longer do so by default.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
TOTAL_BLOCK = 2048


# `sizes`, `TILE`, `parts`, `ends` and the scales come from `_hcl_plan`, which says what they are.


@triton.jit
def _edge(k, size, split, segments):
    """Border k of an axis of `size` pixels that the windows of all levels cut into `segments`.

    Window q of the largest level begins at floor(q size / split), the one before it ends at the ceiling of that; the
    smaller levels have no other borders. Borders that coincide count once.
    """
    parts = tl.maximum(split, 1)
    border = k + tl.where((segments == 6) & (k >= 4), 1, 0)  # 6 segments: the two borders in the middle coincide
    rounded_up = (parts - 1) * (1 - border % 2)
    border = ((border + 1) // 2 * size + rounded_up) // parts
    # An axis of 5 has a border at every pixel.
    return tl.where(segments == parts, k * size // parts, tl.where(segments == 5, k, border))


@triton.jit
def _strip(index, begin, end, strips):
    """Strip `index` of [begin, end) cut into equal strips."""
    length = tl.cdiv(end - begin, strips)
    first = begin + index * length
    return first, tl.minimum(first + length, end)


@triton.jit
def _difference(student, teacher, offsets, mask):
    dtype: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    s = tl.load(student + offsets, mask=mask, other=0).to(dtype)
    t = tl.load(teacher + offsets, mask=mask, other=0).to(dtype)
    return s - t


@triton.jit
def _place_in_planes(pid, sizes, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's planes, columns, band, first and last row, and which part of its cells that is."""
    _, _, height, width, split, bands, _, strips = sizes
    chunks = tl.cdiv(width, COLUMNS)
    parts = strips * chunks
    part = pid % parts
    band = pid // parts % bands
    plane = (pid // (parts * bands)).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    column = part % chunks * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = _edge(band, height, split, bands), _edge(band + 1, height, split, bands)
    first, last = _strip(part // chunks, begin, end, strips)
    return plane, column, band, first, last, part, parts


@triton.jit
def _rows_of_planes(plane, column, sizes, VECTOR: tl.constexpr):
    """Offsets and mask [planes, 1, columns] of row 0, and a row's length."""
    batch, channels, height, width, _, _, _, _ = sizes
    # Known to be a multiple of VECTOR, so that offsets and masks let the compiler keep whole vectors.
    length = width // VECTOR * VECTOR
    offsets = plane[:, None, None] * height * length + column[None, None, :]
    mask = (plane < batch * channels)[:, None, None] & (column < length)[None, None, :]
    return offsets, mask, length


@triton.jit
def _sum_planes(pid, student, teacher, partial, sizes, TILE: tl.constexpr):
    """Writes a program's share of the sums of d to partial [B, cells, parts, C]; returns that of the sum of d^2."""
    VECTOR: tl.constexpr = TILE[0]
    PLANES: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    batch, channels, _, width, split, bands, segments, _ = sizes
    plane, column, band, first, last, part, parts = _place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = _rows_of_planes(plane, column, sizes, VECTOR)
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
        begin, end = _edge(segment, width, split, segments), _edge(segment + 1, width, split, segments)
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
    _, channels, _, width, split, bands, segments, _ = sizes
    plane, column, band, first, last, _, _ = _place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = _rows_of_planes(plane, column, sizes, VECTOR)
    segment = tl.zeros([COLUMNS], tl.int32)
    for k in range(1, segments):
        segment += tl.where(column >= _edge(k, width, split, segments), 1, 0)
    cell = ((plane // channels * bands + band) * segments)[:, None, None] + segment[None, None, :]
    level = upstream * tl.load(table + cell * channels + (plane % channels)[:, None, None], mask=mask, other=0)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS))[None, :, None]
        at = offsets + row.to(tl.int64) * length
        inside = mask & (row < last)
        tl.store(gradient + at, alpha * _difference(student, teacher, at, inside) + level, mask=inside)


@triton.jit
def _place_in_pixels(pid, sizes, CHANNELS: tl.constexpr):
    """A program's channels, cell (of all samples), its corner and width, first and last pixel, part of the cell."""
    _, channels, height, width, split, bands, segments, strips = sizes
    chunks = tl.cdiv(channels, CHANNELS)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    part = pid // chunks % strips
    cell = (pid // (chunks * strips)).to(tl.int64)
    band, segment = (cell // segments % bands).to(tl.int32), (cell % segments).to(tl.int32)
    top, bottom = _edge(band, height, split, bands), _edge(band + 1, height, split, bands)
    left, right = _edge(segment, width, split, segments), _edge(segment + 1, width, split, segments)
    corner = (cell // (segments * bands) * height + top) * width + left
    first, last = _strip(part, 0, (bottom - top) * (right - left), strips)
    return channel, cell, corner, right - left, first, last, part


@triton.jit
def _pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR: tl.constexpr):
    """Offsets [pixels, channels] of a cell's pixels, counted row by row, and the mask of the channels."""
    _, channels, _, width, _, _, _, _ = sizes
    # As in _rows_of_planes: known to be a multiple of VECTOR.
    length = channels // VECTOR * VECTOR
    position = corner + pixel // cell_width * width + pixel % cell_width
    return position[:, None] * length + channel[None, :], (channel < length)[None, :]


@triton.jit
def _sum_pixels(pid, student, teacher, partial, sizes, TILE: tl.constexpr):
    """As _sum_planes, for channels-last maps."""
    VECTOR: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    _, channels, _, _, _, _, _, strips = sizes
    channel, cell, corner, cell_width, first, last, part = _place_in_pixels(pid, sizes, CHANNELS)
    dtype: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([PIXELS, CHANNELS], dtype)
    squares = tl.zeros([PIXELS, CHANNELS // VECTOR], dtype)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        offsets, mask = _pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
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
    channel, cell, corner, cell_width, first, last, _ = _place_in_pixels(pid, sizes, CHANNELS)
    level = upstream * tl.load(table + cell * channels + channel, mask=channel < channels, other=0)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        offsets, mask = _pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
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
def _pool(pid, partial, table, scale, sizes, parts, CELLS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Writes CHANNELS channels of a sample's table [cells, C]; returns their share of the loss's pooled terms."""
    _, channels, height, width, split, bands, segments, _ = sizes
    chunks = tl.cdiv(channels, CHANNELS)
    sample = (pid // chunks).to(tl.int64)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.arange(0, CELLS)
    in_channels = (channel < channels)[None, :]
    entry = (sample * bands * segments + cell)[:, None]
    dtype: tl.constexpr = table.dtype.element_ty
    sums = tl.zeros([CELLS, CHANNELS], dtype)
    for begin in range(0, parts, PARTS):
        # Unrolled, so that several loads are under way at a time.
        for part in tl.static_range(PARTS):
            at = (entry * parts + begin + part) * channels + channel[None, :]
            cells = tl.where(begin + part < parts, bands * segments, 0)
            sums += tl.load(partial + at, mask=(cell < cells)[:, None] & in_channels, other=0)
    band, segment = cell // segments, cell % segments
    top, bottom = _edge(band, height, split, bands), _edge(band + 1, height, split, bands)
    left, right = _edge(segment, width, split, segments), _edge(segment + 1, width, split, segments)
    slopes = tl.zeros([CELLS, CHANNELS], dtype)
    loss = tl.zeros([CHANNELS], dtype)
    level = tl.cast(split, tl.int32)
    while level > 0:
        for window in range(0, level * level):
            i, j = window // level, window % level
            # F.adaptive_avg_pool's window i of level over n pixels: [floor(i n / level), ceil((i + 1) n / level)).
            from_row, to_row = i * height // level, tl.cdiv((i + 1) * height, level)
            from_column, to_column = j * width // level, tl.cdiv((j + 1) * width, level)
            in_rows = (top >= from_row) & (bottom <= to_row)
            inside = (in_rows & (left >= from_column) & (right <= to_column))[:, None]
            share = 1 / ((to_row - from_row).to(dtype) * (to_column - from_column).to(dtype))
            pooled = tl.sum(tl.where(inside, sums, 0), axis=0) * share
            # The level's weight is in proportion to level, its number of windows to level squared.
            weighted = pooled * (scale / level.to(dtype))
            loss += weighted * pooled
            slopes += tl.where(inside, (2 * share * weighted)[None, :], 0)
        level = level // 2
    tl.store(table + entry * channels + channel[None, :], slopes, mask=(cell < bands * segments)[:, None] & in_channels)
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
            scale = whole(scales[m], tables[m].dtype.element_ty)
            share = _pool(pid - first, partials[m], tables[m], scale, sizes[m], parts[m], CELLS, CHANNELS, PARTS)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit(do_not_specialize=["count"])
def total_kernel(losses, loss, count, BLOCK: tl.constexpr):
    """The sum of losses [count]; one program, so that its order is fixed."""
    total = tl.zeros([BLOCK], loss.dtype.element_ty)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(losses + at, mask=at < count, other=0)
    tl.store(loss, tl.sum(total))


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
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Computes hcl of all stages, weighted and summed, and the tables that the backward needs.

    Args:
        students: one map [B, C, H, W] per stage; float32, bfloat16, float16 or, then all maps, float64; contiguous or
            channels-last.
        teachers: the same shapes and layouts; the dtypes may differ.
        weights: one factor per stage.

    Returns:
        loss: 0-d, float32 (float64 for float64 maps).
        tables: per stage [B, cells, C] in the loss's dtype, the gradient of the pooled terms per pixel of each cell.

    Raises:
        RuntimeError: if the maps are not as said above.

    Source:
        TransKD section III-B; csrc/common/hcl_pyramid.h for the cells.
    """
    plan = _hcl_plan.plan_of(students, teachers, weights)
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
) -> list[Tensor]:
    """Computes the gradient of `hcl_fwd`'s loss with respect to the students.

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        students: as for `hcl_fwd`.
        teachers: as for `hcl_fwd`.
        tables: as `hcl_fwd` made them. With students and teachers exchanged and the tables negated, the gradient is the
            teachers'.
        weights: as for `hcl_fwd`.

    Returns:
        Per stage the gradient, in the student's dtype and memory layout.

    Raises:
        RuntimeError: if the maps, tables or grad are not as said above.

    Source:
        TransKD section III-B.
    """
    plan = _hcl_plan.plan_of(students, teachers, weights)
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
