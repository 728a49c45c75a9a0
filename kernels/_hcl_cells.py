"""The cells of hcl's pyramid in device code, for hcl and hcl_bn: what a program works on, and the pooled terms.

`sizes`, the tiles, `parts` and the scales come from `_hcl_plan`, which says what they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels._common import whole


@triton.jit
def edge(k, size, split, segments):
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
def strip(index, begin, end, strips):
    """Strip `index` of [begin, end) cut into equal strips."""
    length = tl.cdiv(end - begin, strips)
    first = begin + index * length
    return first, tl.minimum(first + length, end)


@triton.jit
def place_in_planes(pid, sizes, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's planes, columns, band, first and last row, and which part of its cells that is."""
    _, _, height, width, split, bands, _, strips = sizes
    chunks = tl.cdiv(width, COLUMNS)
    parts = strips * chunks
    part = pid % parts
    band = pid // parts % bands
    plane = (pid // (parts * bands)).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    column = part % chunks * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = edge(band, height, split, bands), edge(band + 1, height, split, bands)
    first, last = strip(part // chunks, begin, end, strips)
    return plane, column, band, first, last, part, parts


@triton.jit
def rows_of_planes(plane, column, sizes, VECTOR: tl.constexpr):
    """Offsets and mask [planes, 1, columns] of row 0, and a row's length."""
    batch, channels, height, width, _, _, _, _ = sizes
    # Known to be a multiple of VECTOR, so that offsets and masks let the compiler keep whole vectors.
    length = width // VECTOR * VECTOR
    offsets = plane[:, None, None] * height * length + column[None, None, :]
    mask = (plane < batch * channels)[:, None, None] & (column < length)[None, None, :]
    return offsets, mask, length


@triton.jit
def place_in_pixels(pid, sizes, CHANNELS: tl.constexpr):
    """A program's channels, cell (of all samples), its corner and width, first and last pixel, part of the cell."""
    _, channels, height, width, split, bands, segments, strips = sizes
    chunks = tl.cdiv(channels, CHANNELS)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    part = pid // chunks % strips
    cell = (pid // (chunks * strips)).to(tl.int64)
    band, segment = (cell // segments % bands).to(tl.int32), (cell % segments).to(tl.int32)
    top, bottom = edge(band, height, split, bands), edge(band + 1, height, split, bands)
    left, right = edge(segment, width, split, segments), edge(segment + 1, width, split, segments)
    corner = (cell // (segments * bands) * height + top) * width + left
    first, last = strip(part, 0, (bottom - top) * (right - left), strips)
    return channel, cell, corner, right - left, first, last, part


@triton.jit
def pixel_offsets(pixel, channel, corner, cell_width, sizes, VECTOR: tl.constexpr):
    """Offsets [pixels, channels] of a cell's pixels, counted row by row, and the mask of the channels."""
    _, channels, _, width, _, _, _, _ = sizes
    # As in rows_of_planes: known to be a multiple of VECTOR.
    length = channels // VECTOR * VECTOR
    position = corner + pixel // cell_width * width + pixel % cell_width
    return position[:, None] * length + channel[None, :], (channel < length)[None, :]


@triton.jit
def segments_of(column, sizes):
    """The segment of its band that each column is in."""
    _, _, _, width, split, _, segments, _ = sizes
    segment = tl.zeros(column.shape, tl.int32)
    for k in range(1, segments):
        segment += tl.where(column >= edge(k, width, split, segments), 1, 0)
    return segment


@triton.jit
def place_in_pool(pid, sizes, CHANNELS: tl.constexpr):
    """The sample and channels of a program of the pooling kernel."""
    chunks = tl.cdiv(sizes[1], CHANNELS)
    return (pid // chunks).to(tl.int64), pid % chunks * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def borders_of(cell, sizes):
    """Top, bottom, left and right of cells, numbered band by band."""
    _, _, height, width, split, bands, segments, _ = sizes
    band, segment = cell // segments, cell % segments
    top, bottom = edge(band, height, split, bands), edge(band + 1, height, split, bands)
    return top, bottom, edge(segment, width, split, segments), edge(segment + 1, width, split, segments)


@triton.jit
def sum_of_parts(partial, sample, channel, cell, parts, sizes, PARTS: tl.constexpr):
    """Sums [cells, channels] over the parts of partial [B, cells, parts, C]; zero where there is no such cell."""
    _, channels, _, _, _, bands, segments, _ = sizes
    in_channels = (channel < channels)[None, :]
    entry = (sample * bands * segments + cell)[:, None]
    sums = tl.zeros([cell.shape[0], channel.shape[0]], partial.dtype.element_ty)
    for begin in range(0, parts, PARTS):
        # Unrolled, so that several loads are under way at a time.
        for part in tl.static_range(PARTS):
            at = (entry * parts + begin + part) * channels + channel[None, :]
            cells = tl.where(begin + part < parts, bands * segments, 0)
            sums += tl.load(partial + at, mask=(cell < cells)[:, None] & in_channels, other=0)
    return sums


@triton.jit
def pooled_terms(sums, cell, scales, sizes):
    """Of the cells' sums of d [cells, channels]: the loss's pooled terms [channels], and their gradient per pixel."""
    _, _, height, width, split, _, _, _ = sizes
    top, bottom, left, right = borders_of(cell, sizes)
    dtype: tl.constexpr = sums.dtype
    first, second, third = whole(scales[0], dtype), whole(scales[1], dtype), whole(scales[2], dtype)
    slopes = tl.zeros(sums.shape, dtype)
    loss = tl.zeros([sums.shape[1]], dtype)
    level = tl.cast(split, tl.int32)
    while level > 0:
        scale = tl.where(level == split, first, tl.where(2 * level == split, second, third))
        for window in range(0, level * level):
            i, j = window // level, window % level
            # F.adaptive_avg_pool's window i of level over n pixels: [floor(i n / level), ceil((i + 1) n / level)).
            from_row, to_row = i * height // level, tl.cdiv((i + 1) * height, level)
            from_column, to_column = j * width // level, tl.cdiv((j + 1) * width, level)
            in_rows = (top >= from_row) & (bottom <= to_row)
            inside = (in_rows & (left >= from_column) & (right <= to_column))[:, None]
            share = 1 / ((to_row - from_row).to(dtype) * (to_column - from_column).to(dtype))
            pooled = tl.sum(tl.where(inside, sums, 0), axis=0) * share
            weighted = pooled * scale
            loss += weighted * pooled
            slopes += tl.where(inside, (2 * share * weighted)[None, :], 0)
        level = level // 2
    return loss, slopes


@triton.jit
def total_of(losses, count, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of losses [count], by one program, so that its order is fixed."""
    total = tl.zeros([BLOCK], dtype)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(losses + at, mask=at < count, other=0)
    return tl.sum(total)
