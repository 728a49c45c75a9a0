"""Tiles of csf's maps: which pixels a program has, where they lie, which coarse pixel they read.

Tiles are [channels, pixels], for channels-last maps (LAST) [pixels, channels]. `_csf_plan` says what `sizes`, `scales`
and the constants of a tile are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def over_pixels(x, LAST: tl.constexpr):
    """A vector over pixels as a tile that is the same for all channels."""
    if LAST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def over_channels(x, LAST: tl.constexpr):
    """A vector over channels as a tile that is the same for all pixels."""
    if LAST:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def flat_offsets(sample, channel, pixel, channels, pixels, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of pixels, counted row by row; VECTOR is known to divide a row of the innermost dimension."""
    if LAST:
        length = channels // VECTOR * VECTOR
        return (sample * pixels + pixel)[:, None] * length + channel[None, :]
    else:
        return ((sample * channels + channel) * pixels)[:, None] + pixel[None, :]


@triton.jit
def source(fine, scale, size, RULE: tl.constexpr):
    """The coarse index that a fine one reads: torch's rule, in float32."""
    if RULE == 0:
        return fine // 2
    else:
        return tl.minimum(tl.floor(fine.to(tl.float32) * scale).to(tl.int32), size - 1)


@triton.jit
def start(coarse, scale, size, fine_size, RULE: tl.constexpr):
    """The first fine index whose source is `coarse` or more: where its window begins, and the one before it ends."""
    if RULE == 0:
        return tl.minimum(2 * coarse, fine_size)
    else:
        span = 2 + fine_size // 1048576
        guess = (coarse.to(tl.float32) / scale).to(tl.int32)
        low = tl.minimum(tl.maximum(guess - span, 0), fine_size)
        high = tl.minimum(guess + span, fine_size)
        for _ in tl.static_range(RULE):
            middle = (low + high) // 2
            before = (low < high) & (source(middle, scale, size, RULE) < coarse)
            low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
        return low


@triton.jit
def zeros(CHANNELS: tl.constexpr, PIXELS: tl.constexpr, dtype: tl.constexpr, LAST: tl.constexpr):
    """A tile of zeros."""
    if LAST:
        return tl.zeros([PIXELS, CHANNELS], dtype)
    else:
        return tl.zeros([CHANNELS, PIXELS], dtype)


@triton.jit
def folded(x, LAST: tl.constexpr, KEPT: tl.constexpr):
    """Sums over pixels down to KEPT per channel: those that lie in one thread."""
    if LAST:
        return tl.sum(tl.reshape(x, [x.shape[0] // KEPT, KEPT, x.shape[1]]), axis=0)
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], KEPT, x.shape[1] // KEPT]), axis=2)


@triton.jit
def total_of(x, LAST: tl.constexpr):
    """Sum over the pixels of a tile, in float64."""
    return tl.sum(x.to(tl.float64), axis=0 if LAST else 1)


@triton.jit
def flat_place(pid, parts, channels, CHANNELS: tl.constexpr):
    """A program's sample, channels and part of the plane."""
    chunks = tl.cdiv(channels, CHANNELS)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    return (pid // (chunks * parts)).to(tl.int64), channel, pid // chunks % parts


@triton.jit
def flat_inside(pixel, last, pixels, channel, channels, TILE: tl.constexpr):
    """Mask of the pixels below `last`. Vectors stay whole as its bounds are known to be multiples of them."""
    LAST: tl.constexpr = TILE[0]
    VECTOR: tl.constexpr = TILE[1]
    if LAST:
        in_channels, in_pixels = channel < channels // VECTOR * VECTOR, (pixel < last) & (pixel < pixels)
    else:
        in_channels, in_pixels = channel < channels, (pixel < last) & (pixel < pixels // VECTOR * VECTOR)
    return over_pixels(in_pixels, LAST) & over_channels(in_channels, LAST)


@triton.jit
def load_flat(maps, sample, channel, pixel, last, pixels, channels, dtype: tl.constexpr, TILE: tl.constexpr):
    if TILE[0]:
        offsets = flat_offsets(sample, channel, pixel, channels, pixels, 1, TILE[1])
    else:
        offsets = flat_offsets(sample, channel, pixel, channels, pixels // TILE[1] * TILE[1], 0, TILE[1])
    inside = flat_inside(pixel, last, pixels, channel, channels, TILE)
    return tl.load(maps + offsets, mask=inside, other=0).to(dtype), offsets, inside


@triton.jit
def window_pixels(coarse_pixel, scales, sizes, RULE: tl.constexpr):
    """Number of fine pixels that read each coarse pixel."""
    _, height, width, coarse_height, coarse_width = sizes
    row, column = coarse_pixel // coarse_width, coarse_pixel % coarse_width
    top = start(row, scales[0], coarse_height, height, RULE)
    left = start(column, scales[1], coarse_width, width, RULE)
    rows = start(row + 1, scales[0], coarse_height, height, RULE) - top
    return rows * (start(column + 1, scales[1], coarse_width, width, RULE) - left)


@triton.jit
def coefficient(coefficients, row, sample, channel, batch, channels, LAST: tl.constexpr):
    at = (row * batch + sample) * channels + channel
    return over_channels(tl.load(coefficients + at, mask=channel < channels, other=0), LAST)


@triton.jit
def gathered(y, sample, channel, pixel, inside, scales, sizes, dtype: tl.constexpr, COARSE: tl.constexpr, RULE):
    """up(y) at fine pixels."""
    channels, _, width, coarse_height, coarse_width = sizes
    row = source(pixel // width, scales[0], coarse_height, RULE)
    column = source(pixel % width, scales[1], coarse_width, RULE)
    at = row * coarse_width + column
    offsets = flat_offsets(sample, channel, at, channels, coarse_height * coarse_width, COARSE[0], COARSE[1])
    return tl.load(y + offsets, mask=inside, other=0).to(dtype)


@triton.jit
def window_place(pid, sizes, TILE: tl.constexpr):
    """A program's sample, channels, first coarse row and first coarse column."""
    channels, _, _, coarse_height, coarse_width = sizes
    column_blocks, row_blocks = tl.cdiv(coarse_width, TILE[5]), tl.cdiv(coarse_height, TILE[4])
    chunks = tl.cdiv(channels, TILE[3])
    channel = pid % chunks * TILE[3] + tl.arange(0, TILE[3])
    block = pid // chunks
    column = block % column_blocks * TILE[5]
    row = block // column_blocks % row_blocks * TILE[4]
    return (block // (column_blocks * row_blocks)).to(tl.int64), channel, row, column


@triton.jit
def offsets_at(sample, channel, row, column, channels, height, width, VECTOR: tl.constexpr, LAST: tl.constexpr):
    """Offsets and mask of pixels (row, column)."""
    if LAST:
        length = channels // VECTOR * VECTOR
        offsets = ((sample * height + row) * width + column)[:, None] * length + channel[None, :]
        in_pixels, in_channels = (row < height) & (column < width), channel < length
    else:
        length = width // VECTOR * VECTOR
        offsets = ((sample * channels + channel) * height * length)[:, None] + (row * length + column)[None, :]
        in_pixels, in_channels = (row < height) & (column < length), channel < channels
    return offsets, over_pixels(in_pixels, LAST) & over_channels(in_channels, LAST)


@triton.jit
def coarse_at(sample, channel, row, column, sizes, TILE: tl.constexpr):
    """The windows' rows and columns, offsets and mask of a tile of coarse pixels from (row, column) on."""
    channels, _, _, coarse_height, coarse_width = sizes
    lane = tl.arange(0, TILE[4] * TILE[5])
    rows, columns = row + lane // TILE[5], column + lane % TILE[5]
    offsets, inside = offsets_at(
        sample, channel, rows, columns, channels, coarse_height, coarse_width, TILE[2], TILE[0]
    )
    return rows, columns, offsets, inside


@triton.jit
def halves_at(sample, channel, row, column, below, right, first, length, sizes, TILE: tl.constexpr):
    """Offsets of one row (and, of channels-last maps, one column) of 2 x 2 windows from coarse pixel (row, column) on.

    The mask leaves out pixels, counted row by row, that are not among `length` from `first` on.
    """
    channels, height, width, _, _ = sizes
    WIDE: tl.constexpr = TILE[5] * TILE[6]
    lane = tl.arange(0, TILE[4] * WIDE)
    rows = 2 * (row + lane // WIDE) + below
    columns = 2 * column + 2 // TILE[6] * (lane % WIDE) + right
    offsets, inside = offsets_at(sample, channel, rows, columns, channels, height, width, TILE[1], TILE[0])
    pixel = rows * (width if TILE[0] else width // TILE[1] * TILE[1]) + columns
    return offsets, inside & over_pixels((pixel >= first) & (pixel < first + length), TILE[0])


@triton.jit
def widened(x):
    """[channels, windows] to [channels, 2 windows]: each entry twice, beside each other."""
    return tl.reshape(tl.join(x, x), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def narrowed(x, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Sums of WIDE neighbouring pixels."""
    if WIDE == 1:
        return x
    elif LAST:
        return tl.sum(tl.reshape(x, [x.shape[0] // WIDE, WIDE, x.shape[1]]), axis=1)
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // WIDE, WIDE]), axis=2)
