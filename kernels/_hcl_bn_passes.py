"""What a program of hcl_bn's large launches does: sums over cells and planes, pooled terms, and the gradient of u.

`_hcl_cells` says what a program works on, `_hcl_plan` what `sizes` and the tiles are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels import _hcl_cells as cells
from transkd_fast.kernels._common import whole


@triton.jit
def _load(pointer, offsets, mask, dtype: tl.constexpr):
    return tl.load(pointer + offsets, mask=mask, other=0).to(dtype)


@triton.jit
def sum_planes(pid, u, teacher, coefficients, partial, sizes, TILE: tl.constexpr):
    """Writes a program's share of the sums to partial [3, B, cells, parts, C]; returns that of the sum of d^2.

    The third sum, of which a plane's total is wanted only, stands at the first cell of a band.
    """
    VECTOR: tl.constexpr = TILE[0]
    PLANES: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    batch, channels, _, width, split, bands, segments, _ = sizes
    plane, column, band, first, last, part, parts = cells.place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = cells.rows_of_planes(plane, column, sizes, VECTOR)
    dtype: tl.constexpr = partial.dtype.element_ty
    channel, in_planes = plane % channels, plane < batch * channels
    shift = tl.load(coefficients + channel, mask=in_planes, other=0)[:, None, None]
    scale = tl.load(coefficients + channels + channel, mask=in_planes, other=0)[:, None, None]
    offset = tl.load(coefficients + 2 * channels + channel, mask=in_planes, other=0)[:, None, None]
    of_d = tl.zeros([PLANES, ROWS, COLUMNS], dtype)
    of_u = of_d
    squares = tl.zeros([PLANES, ROWS, COLUMNS // VECTOR], dtype)
    products = squares
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS))[None, :, None]
        at, inside = offsets + row.to(tl.int64) * length, mask & (row < last)
        centred = tl.where(inside, _load(u, at, inside, dtype) - shift, 0)
        d = tl.where(inside, scale * centred + (offset - _load(teacher, at, inside, dtype)), 0)
        of_d += d
        of_u += centred
        squares += tl.sum(tl.reshape(d * d, [PLANES, ROWS, COLUMNS // VECTOR, VECTOR]), axis=3)
        products += tl.sum(tl.reshape(d * centred, [PLANES, ROWS, COLUMNS // VECTOR, VECTOR]), axis=3)
    d_of_columns, u_of_columns = tl.sum(of_d, axis=1), tl.sum(of_u, axis=1)
    of_plane = tl.sum(tl.sum(products, axis=1), axis=1)
    cell = (plane // channels * bands + band) * segments
    each = tl.cast(batch, tl.int64) * bands * segments * parts * channels
    for segment in range(segments):
        begin, end = cells.edge(segment, width, split, segments), cells.edge(segment + 1, width, split, segments)
        inside = ((column >= begin) & (column < end))[None, :]
        entry = partial + ((cell + segment) * parts + part) * channels + channel
        tl.store(entry, tl.sum(tl.where(inside, d_of_columns, 0), axis=1), mask=in_planes)
        tl.store(entry + each, tl.sum(tl.where(inside, u_of_columns, 0), axis=1), mask=in_planes)
        tl.store(entry + 2 * each, tl.where(segment == 0, of_plane, 0), mask=in_planes)
    return tl.sum(squares)


@triton.jit
def sum_pixels(pid, u, teacher, coefficients, partial, sizes, TILE: tl.constexpr):
    """As sum_planes, for channels-last maps."""
    VECTOR: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    batch, channels, _, _, _, bands, segments, strips = sizes
    channel, cell, corner, cell_width, first, last, part = cells.place_in_pixels(pid, sizes, CHANNELS)
    dtype: tl.constexpr = partial.dtype.element_ty
    in_channels = channel < channels
    shift = tl.load(coefficients + channel, mask=in_channels, other=0)[None, :]
    scale = tl.load(coefficients + channels + channel, mask=in_channels, other=0)[None, :]
    offset = tl.load(coefficients + 2 * channels + channel, mask=in_channels, other=0)[None, :]
    of_d = tl.zeros([PIXELS, CHANNELS], dtype)
    of_u, products = of_d, of_d
    squares = tl.zeros([PIXELS, CHANNELS // VECTOR], dtype)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        at, mask = cells.pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
        inside = mask & (pixel < last)[:, None]
        centred = tl.where(inside, _load(u, at, inside, dtype) - shift, 0)
        d = tl.where(inside, scale * centred + (offset - _load(teacher, at, inside, dtype)), 0)
        of_d += d
        of_u += centred
        products += d * centred
        squares += tl.sum(tl.reshape(d * d, [PIXELS, CHANNELS // VECTOR, VECTOR]), axis=2)
    entry = partial + (cell * strips + part) * channels + channel
    each = tl.cast(batch, tl.int64) * bands * segments * strips * channels
    tl.store(entry, tl.sum(of_d, axis=0), mask=in_channels)
    tl.store(entry + each, tl.sum(of_u, axis=0), mask=in_channels)
    tl.store(entry + 2 * each, tl.sum(products, axis=0), mask=in_channels)
    return tl.sum(squares)


@triton.jit
def pool(
    pid,
    partial,
    state,
    table,
    sums,
    alpha,
    scales,
    sizes,
    parts,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of CHANNELS channels of a sample: table [cells, C] and sums [2, C]; returns their share of the pooled terms."""
    batch, channels, _, _, _, bands, segments, _ = sizes
    sample, channel = cells.place_in_pool(pid, sizes, CHANNELS)
    cell = tl.arange(0, CELLS)
    in_channels = channel < channels
    each = tl.cast(batch, tl.int64) * bands * segments * parts * channels
    of_d = cells.sum_of_parts(partial, sample, channel, cell, parts, sizes, PARTS)
    of_u = cells.sum_of_parts(partial + each, sample, channel, cell, parts, sizes, PARTS)
    products = cells.sum_of_parts(partial + 2 * each, sample, channel, cell, parts, sizes, PARTS)
    loss, slopes = cells.pooled_terms(of_d, cell, scales, sizes)
    inside = (cell < bands * segments)[:, None] & in_channels[None, :]
    at = (sample * bands * segments + cell)[:, None] * channels + channel[None, :]
    tl.store(table + at, slopes, mask=inside)

    top, bottom, left, right = cells.borders_of(cell, sizes)
    pixels = ((bottom - top).to(tl.float64) * (right - left).to(tl.float64))[:, None]
    mean = tl.load(state + channel, mask=in_channels, other=0)
    invstd = tl.load(state + channels + channel, mask=in_channels, other=0)
    distance = mean.to(table.dtype.element_ty).to(tl.float64) - mean
    slope = tl.where(inside, slopes.to(tl.float64), 0)
    total_d = tl.sum(of_d.to(tl.float64), axis=0)
    of_g = whole(alpha, tl.float64) * total_d + tl.sum(slope * pixels, axis=0)
    product = tl.sum(products.to(tl.float64), axis=0) + distance * total_d
    product = whole(alpha, tl.float64) * product
    product += tl.sum(slope * (of_u.to(tl.float64) + pixels * distance[None, :]), axis=0)
    row = sums + sample * 2 * channels + channel
    tl.store(row, of_g, mask=in_channels)
    tl.store(row + channels, product * invstd, mask=in_channels)
    return tl.sum(loss)


@triton.jit
def _coefficient(coefficients, row, channel, channels, mask):
    return tl.load(coefficients + row * channels + channel, mask=mask, other=0)


@triton.jit
def backward_planes(pid, u, teacher, table, coefficients, gradient, sizes, TILE: tl.constexpr):
    VECTOR: tl.constexpr = TILE[0]
    PLANES: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    batch, channels, _, _, _, bands, segments, _ = sizes
    plane, column, band, first, last, _, _ = cells.place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, mask, length = cells.rows_of_planes(plane, column, sizes, VECTOR)
    dtype: tl.constexpr = table.dtype.element_ty
    channel, in_planes = (plane % channels)[:, None, None], (plane < batch * channels)[:, None, None]
    shift = _coefficient(coefficients, 0, channel, channels, in_planes)
    of_u = _coefficient(coefficients, 1, channel, channels, in_planes)
    of_teacher = _coefficient(coefficients, 2, channel, channels, in_planes)
    cell = ((plane // channels * bands + band) * segments)[:, None, None]
    cell += cells.segments_of(column, sizes)[None, None, :]
    level = _coefficient(coefficients, 3, channel, channels, in_planes)
    level *= tl.load(table + cell * channels + channel, mask=mask, other=0)
    level += _coefficient(coefficients, 4, channel, channels, in_planes)
    for begin in range(first, last, ROWS):
        row = (begin + tl.arange(0, ROWS))[None, :, None]
        at, inside = offsets + row.to(tl.int64) * length, mask & (row < last)
        rest = of_teacher * _load(teacher, at, inside, dtype) + level
        tl.store(gradient + at, of_u * (_load(u, at, inside, dtype) - shift) + rest, mask=inside)


@triton.jit
def backward_pixels(pid, u, teacher, table, coefficients, gradient, sizes, TILE: tl.constexpr):
    VECTOR: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    _, channels, _, _, _, _, _, _ = sizes
    channel, cell, corner, cell_width, first, last, _ = cells.place_in_pixels(pid, sizes, CHANNELS)
    dtype: tl.constexpr = table.dtype.element_ty
    in_channels = channel < channels
    shift = _coefficient(coefficients, 0, channel, channels, in_channels)[None, :]
    of_u = _coefficient(coefficients, 1, channel, channels, in_channels)[None, :]
    of_teacher = _coefficient(coefficients, 2, channel, channels, in_channels)[None, :]
    level = _coefficient(coefficients, 3, channel, channels, in_channels)
    level *= tl.load(table + cell * channels + channel, mask=in_channels, other=0)
    level += _coefficient(coefficients, 4, channel, channels, in_channels)
    for begin in range(first, last, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        at, mask = cells.pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR)
        inside = mask & (pixel < last)[:, None]
        rest = of_teacher * _load(teacher, at, inside, dtype) + level[None, :]
        tl.store(gradient + at, of_u * (_load(u, at, inside, dtype) - shift) + rest, mask=inside)
