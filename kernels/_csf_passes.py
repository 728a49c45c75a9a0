"""What a program of csf's large launches does: sums over the maps, and the passes that write maps.

Maps of stored dtypes, arithmetic in the compute type, sums per part and channel in float64. `_csf_plan` says what
`sizes`, `scales`, `cut` and the tiles are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels import _csf_tiles as tiles


@triton.jit
def reduce(z, y, sums, scales, sizes, cut, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr):
    """Per part the mean of z, its sum of squares about that, and the sum of y times its windows' pixels.

    Squares are taken about the mean of the first tile: as a mean over a share of the values it lies within their
    spread, so that an offset costs no digits.
    """
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    LAST: tl.constexpr = TILE[0]
    PIXELS: tl.constexpr = TILE[3]
    KEPT: tl.constexpr = TILE[4]
    channels, height, width, coarse_height, coarse_width = sizes
    parts, length, coarse_length = cut
    pixels, coarse_pixels = height * width, coarse_height * coarse_width
    sample, channel, part = tiles.flat_place(tl.program_id(0), parts, channels, TILE[2])
    first, end = part * length, (part + 1) * length
    last = tl.minimum(end, pixels)
    lane = tl.arange(0, PIXELS)
    x, _at, inside = tiles.load_flat(z, sample, channel, first + lane, end, pixels, channels, dtype, TILE)
    shift = tl.sum(x, axis=0 if LAST else 1) / tl.maximum(tl.minimum(last - first, PIXELS), 1).to(dtype)
    centred = tl.where(inside, x - tiles.over_channels(shift, LAST), 0)
    total, squares = tiles.folded(centred, LAST, KEPT), tiles.folded(centred * centred, LAST, KEPT)
    for begin in range(first + PIXELS, last, PIXELS):
        x, _at, inside = tiles.load_flat(z, sample, channel, begin + lane, end, pixels, channels, dtype, TILE)
        centred = tl.where(inside, x - tiles.over_channels(shift, LAST), 0)
        total += tiles.folded(centred, LAST, KEPT)
        squares += tiles.folded(centred * centred, LAST, KEPT)
    count = tl.maximum(last - first, 1).to(tl.float64)
    distance = tiles.total_of(total, LAST) / count
    of_squares = tiles.total_of(squares, LAST) - distance * distance * count
    row = ((sample * parts + part) * 3) * channels + channel
    tl.store(sums + row, shift.to(tl.float64) + distance, mask=channel < channels)
    tl.store(sums + row + channels, tl.where(of_squares < 0, 0, of_squares), mask=channel < channels)

    COARSE_KEPT: tl.constexpr = COARSE[4]
    EACH: tl.constexpr = COARSE[5]
    weighted: tl.constexpr = dtype if RULE == 0 else tl.float64
    coarse_first, coarse_end = part * coarse_length, (part + 1) * coarse_length
    coarse_lane = tl.arange(0, COARSE[3])
    of_y = tiles.zeros(COARSE[2], COARSE_KEPT, tl.float64, LAST)
    for begin in range(coarse_first, tl.minimum(coarse_end, coarse_pixels), COARSE[3]):
        pixel = begin + coarse_lane
        up, _coarse_at, _coarse_inside = tiles.load_flat(
            y, sample, channel, pixel, coarse_end, coarse_pixels, channels, dtype, COARSE
        )
        if EACH == 0:
            in_window = tiles.over_pixels(tiles.window_pixels(pixel, scales, sizes, RULE), LAST)
            up = tl.where(in_window > 0, up.to(weighted) * in_window.to(weighted), 0)
        of_y += tiles.folded(up, LAST, COARSE_KEPT).to(tl.float64)
    of_y = tl.sum(of_y, axis=0 if LAST else 1) * (1 if EACH == 0 else EACH)
    tl.store(sums + row + 2 * channels, of_y, mask=channel < channels)


@triton.jit
def fuse(z, y, v, coefficients, scales, sizes, batch, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr):
    """The map v = A (z - S) + C + U up(y)."""
    dtype: tl.constexpr = coefficients.dtype.element_ty
    WINDOWS: tl.constexpr = len(TILE) == 8
    LAST: tl.constexpr = TILE[0]
    channels, height, width, _, _ = sizes
    pixels = height * width
    if WINDOWS:
        sample, channel, row, column = tiles.window_place(tl.program_id(0), sizes, TILE)
        _, _, at, inside = tiles.coarse_at(sample, channel, row, column, sizes, TILE)
        top, in_top = tiles.halves_at(sample, channel, row, column, 0, 0, 0, pixels, sizes, TILE)
        bottom, in_bottom = tiles.halves_at(sample, channel, row, column, 1, 0, 0, pixels, sizes, TILE)
        up = tiles.widened(tl.load(y + at, mask=inside, other=0)).to(dtype)
        upper = tl.load(z + top, mask=in_top, other=0).to(dtype)
        lower = tl.load(z + bottom, mask=in_bottom, other=0).to(dtype)
    else:
        sample, channel, block = tiles.flat_place(tl.program_id(0), tl.cdiv(pixels, TILE[3]), channels, TILE[2])
        pixel = block * TILE[3] + tl.arange(0, TILE[3])
        upper, top, in_top = tiles.load_flat(z, sample, channel, pixel, pixels, pixels, channels, dtype, TILE)
        up = tiles.gathered(y, sample, channel, pixel, in_top, scales, sizes, dtype, COARSE, RULE)
    scale = tiles.coefficient(coefficients, 0, sample, channel, batch, channels, LAST)
    shift = tiles.coefficient(coefficients, 1, sample, channel, batch, channels, LAST)
    level = tiles.coefficient(coefficients, 2, sample, channel, batch, channels, LAST)
    rest = tiles.coefficient(coefficients, 3, sample, channel, batch, channels, LAST) * up + level
    tl.store(v + top, (scale * (upper - shift) + rest).to(v.dtype.element_ty), mask=in_top)
    if WINDOWS:
        tl.store(v + bottom, (scale * (lower - shift) + rest).to(v.dtype.element_ty), mask=in_bottom)


@triton.jit
def backward_reduce(
    grad, z, y, mean, sums, scales, sizes, cut, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr
):
    """Per part the sums of G, G (z - mean) and G up(y)."""
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    WINDOWS: tl.constexpr = len(TILE) == 8
    LAST: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[3] if WINDOWS else TILE[2]
    channels, height, width, _coarse_height, coarse_width = sizes
    parts, length, _ = cut
    pixels = height * width
    sample, channel, part = tiles.flat_place(tl.program_id(0), parts, channels, CHANNELS)
    first, end = part * length, (part + 1) * length
    last = tl.minimum(end, pixels)
    about = tl.load(mean + channel, mask=channel < channels, other=0)
    shift = tiles.over_channels(about.to(dtype), LAST)
    if WINDOWS:
        # A window that lies in two parts is read by both, its pixels by one.
        of_g = tiles.zeros(CHANNELS, TILE[4] * TILE[5], dtype, 0)
        of_z, of_y = of_g, of_g
        for row in range(first // width // 2, tl.cdiv(tl.cdiv(last, width), 2), TILE[4]):
            for column in range(0, coarse_width, TILE[5]):
                _rows, _columns, at, inside = tiles.coarse_at(sample, channel, row, column, sizes, TILE)
                top, in_top = tiles.halves_at(sample, channel, row, column, 0, 0, first, length, sizes, TILE)
                bottom, in_bottom = tiles.halves_at(sample, channel, row, column, 1, 0, first, length, sizes, TILE)
                up = tl.load(y + at, mask=inside, other=0).to(dtype)
                g_top = tl.load(grad + top, mask=in_top, other=0).to(dtype)
                g_bottom = tl.load(grad + bottom, mask=in_bottom, other=0).to(dtype)
                z_top = tl.load(z + top, mask=in_top, other=0).to(dtype)
                z_bottom = tl.load(z + bottom, mask=in_bottom, other=0).to(dtype)
                window = tiles.narrowed(g_top + g_bottom, 0, 2)
                of_g += window
                of_z += tiles.narrowed(g_top * (z_top - shift) + g_bottom * (z_bottom - shift), 0, 2)
                of_y += window * up
    else:
        of_g = tiles.zeros(CHANNELS, TILE[4], dtype, LAST)
        of_z, of_y = of_g, of_g
        for begin in range(first, last, TILE[3]):
            pixel = begin + tl.arange(0, TILE[3])
            g, at, inside = tiles.load_flat(grad, sample, channel, pixel, end, pixels, channels, dtype, TILE)
            centred = tl.load(z + at, mask=inside, other=0).to(dtype) - shift
            up = tiles.gathered(y, sample, channel, pixel, inside, scales, sizes, dtype, COARSE, RULE)
            of_g += tiles.folded(g, LAST, TILE[4])
            of_z += tiles.folded(g * centred, LAST, TILE[4])
            of_y += tiles.folded(g * up, LAST, TILE[4])
    total = tiles.total_of(of_g, LAST)
    total_z = tiles.total_of(of_z, LAST) + (about.to(dtype).to(tl.float64) - about) * total
    row = ((sample * parts + part) * 3) * channels + channel
    tl.store(sums + row, total, mask=channel < channels)
    tl.store(sums + row + channels, total_z, mask=channel < channels)
    tl.store(sums + row + 2 * channels, tiles.total_of(of_y, LAST), mask=channel < channels)


@triton.jit
def backward(grad, z, dz, dy, coefficients, scales, sizes, batch, TILE: tl.constexpr):
    """The maps dz = P G + Q (z - S) + R and dy = U (sum of G over the window) + V m; z is None where Q is zero."""
    dtype: tl.constexpr = coefficients.dtype.element_ty
    LAST: tl.constexpr = TILE[0]
    WIDE: tl.constexpr = TILE[6]
    RULE: tl.constexpr = TILE[7]
    channels, height, width, coarse_height, coarse_width = sizes
    pixels = height * width
    sample, channel, row, column = tiles.window_place(tl.program_id(0), sizes, TILE)
    rows, columns, coarse, in_coarse = tiles.coarse_at(sample, channel, row, column, sizes, TILE)
    p = tiles.coefficient(coefficients, 0, sample, channel, batch, channels, LAST)
    q = tiles.coefficient(coefficients, 1, sample, channel, batch, channels, LAST)
    s = tiles.coefficient(coefficients, 2, sample, channel, batch, channels, LAST)
    r = tiles.coefficient(coefficients, 3, sample, channel, batch, channels, LAST)
    top = tiles.start(rows, scales[0], coarse_height, height, RULE)
    left = tiles.start(columns, scales[1], coarse_width, width, RULE)
    heights = tiles.start(rows + 1, scales[0], coarse_height, height, RULE) - top
    widths = tiles.start(columns + 1, scales[1], coarse_width, width, RULE) - left
    if RULE == 0:
        # Everything is loaded before anything is stored, so that the loads are under way together.
        gs, zs, places = (), (), ()
        for k in tl.static_range(4 // WIDE):
            below, right = k * WIDE // 2, k * WIDE % 2
            place = tiles.halves_at(sample, channel, row, column, below, right, 0, pixels, sizes, TILE)
            places += (place,)
            gs += (tl.load(grad + place[0], mask=place[1], other=0).to(dtype),)
            if z is not None:
                zs += (tl.load(z + place[0], mask=place[1], other=0).to(dtype),)
        window = gs[0]
        for k in tl.static_range(1, 4 // WIDE):
            window += gs[k]
        window = tiles.narrowed(window, LAST, WIDE)
        if dz is not None:
            for k in tl.static_range(4 // WIDE):
                value = p * gs[k] + r
                if z is not None:
                    value += q * (zs[k] - s)
                tl.store(dz + places[k][0], value.to(dz.dtype.element_ty), mask=places[k][1])
    else:
        window = tl.zeros(coarse.shape, dtype)
        lane = tl.arange(0, TILE[4] * TILE[5] * WIDE)
        fine_row, fine_column = row + lane // WIDE // TILE[5], column + lane // WIDE % TILE[5]
        fine_top = tiles.start(fine_row, scales[0], coarse_height, height, RULE)
        fine_left = tiles.start(fine_column, scales[1], coarse_width, width, RULE)
        fine_bottom = tiles.start(fine_row + 1, scales[0], coarse_height, height, RULE)
        fine_right = tiles.start(fine_column + 1, scales[1], coarse_width, width, RULE)
        for below in range(0, tl.max(heights)):
            for right in range(0, tl.max(widths), WIDE):
                # Outside its window a pixel is put outside the map.
                at_row, at_column = fine_top + below, fine_left + right + lane % WIDE
                at_row = tl.where((at_row < fine_bottom) & (at_column < fine_right), at_row, height)
                at, inside = tiles.offsets_at(
                    sample, channel, at_row, at_column, channels, height, width, TILE[1], LAST
                )
                g = tl.load(grad + at, mask=inside, other=0).to(dtype)
                window += tiles.narrowed(g, LAST, WIDE)
                if dz is not None:
                    value = p * g + r
                    if z is not None:
                        value += q * (tl.load(z + at, mask=inside, other=0).to(dtype) - s)
                    tl.store(dz + at, value.to(dz.dtype.element_ty), mask=inside)
    if dy is not None:
        u = tiles.coefficient(coefficients, 4, sample, channel, batch, channels, LAST)
        share = tiles.coefficient(coefficients, 5, sample, channel, batch, channels, LAST)
        in_window = tiles.over_pixels(heights * widths, LAST)
        # A coarse pixel that none reads has no gradient, whatever the others have.
        value = tl.where(in_window > 0, u * window + share * in_window.to(dtype), 0)
        tl.store(dy + coarse, value.to(dy.dtype.element_ty), mask=in_coarse)
