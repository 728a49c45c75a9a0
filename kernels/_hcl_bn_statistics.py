"""hcl_bn beside its large passes: moments of the maps, what the channels are normalised with, gradients of parameters.

All but the moments' sums over a tile is a few thousand numbers, in float64. `_hcl_bn_plan` says what `sizes`, `cut` and
the tiles are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels import _batch_norm as bn
from transkd_fast.kernels._common import whole


@triton.jit
def in_planes(begin, end, channel, sizes, TILE: tl.constexpr):
    """Offsets and mask [channels, values] of the values from `begin` on, below `end`, of contiguous maps."""
    VECTOR: tl.constexpr = TILE[0]
    VALUES: tl.constexpr = TILE[2]
    index: tl.constexpr = tl.int64 if TILE[3] else tl.int32
    _, channels, pixels = sizes
    # Known to be multiples of VECTOR, so that offsets and masks let the compiler keep whole vectors.
    length = pixels // VECTOR * VECTOR
    start = tl.cast(begin % length, index) // VECTOR * VECTOR
    count = tl.cast(tl.minimum(end - begin, VALUES), tl.int32) // VECTOR * VECTOR
    lane = tl.arange(0, VALUES)
    position = start + lane
    sample = begin // length + (position // length).to(tl.int64)
    offsets = (sample[None, :] * channels + channel[:, None]) * length + (position % length)[None, :]
    return offsets, (channel < channels)[:, None] & (lane < count)[None, :]


@triton.jit
def in_pixels(begin, end, channel, sizes, TILE: tl.constexpr):
    """As in_planes, [values, channels] of channels-last maps."""
    VECTOR: tl.constexpr = TILE[0]
    VALUES: tl.constexpr = TILE[1]
    length = sizes[1] // VECTOR * VECTOR
    value = tl.cast(begin, tl.int64) + tl.arange(0, VALUES)
    return value[:, None] * length + channel[None, :], (value < end)[:, None] & (channel < length)[None, :]


@triton.jit
def _values(u, begin, end, channel, sizes, TILE: tl.constexpr):
    """A tile of values in the compute type, and its mask."""
    dtype: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    if len(TILE) == 4:
        offsets, inside = in_planes(begin, end, channel, sizes, TILE)
    else:
        offsets, inside = in_pixels(begin, end, channel, sizes, TILE)
    return tl.load(u + offsets, mask=inside, other=0).to(dtype), inside


@triton.jit
def reduce(pid, u, moments, sizes, cut, TILE: tl.constexpr):
    """Number, mean and centred squares of some channels' values in one part, to moments [parts, 3, C].

    Squares are taken about the mean of the first tile: as a mean over a share of the values it lies within their
    spread, so that an offset costs no digits.
    """
    PLANES: tl.constexpr = len(TILE) == 4
    CHANNELS: tl.constexpr = TILE[1] if PLANES else TILE[2]
    VALUES: tl.constexpr = TILE[2] if PLANES else TILE[1]
    AXIS: tl.constexpr = 1 if PLANES else 0
    dtype: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    batch, channels, pixels = sizes
    _, length = cut
    chunks = tl.cdiv(channels, CHANNELS)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    part = pid // chunks
    values = tl.cast(batch, tl.int64) * pixels
    first = tl.minimum(tl.cast(part, tl.int64) * length, values)
    end = tl.minimum(first + length, values)
    # A part may be empty. Its first tile is then all masked off.
    x, inside = _values(u, first, end, channel, sizes, TILE)
    shift = tl.sum(x, axis=AXIS) / tl.maximum(tl.minimum(end - first, VALUES), 1).to(dtype)
    centred = tl.where(inside, x - tl.expand_dims(shift, AXIS), 0)
    total, squares = centred, centred * centred
    for begin in range(first + VALUES, end, VALUES):
        x, inside = _values(u, begin, end, channel, sizes, TILE)
        centred = tl.where(inside, x - tl.expand_dims(shift, AXIS), 0)
        total += centred
        squares += centred * centred
    count = (end - first).to(tl.float64)
    distance = tl.sum(total, axis=AXIS).to(tl.float64) / tl.maximum(count, 1)
    of_squares = tl.sum(squares, axis=AXIS).to(tl.float64) - distance * distance * count
    in_channels = channel < channels
    row = moments + tl.cast(part, tl.int64) * 3 * channels + channel
    tl.store(row, tl.zeros([CHANNELS], tl.float64) + count, mask=in_channels)
    tl.store(row + channels, shift.to(tl.float64) + distance, mask=in_channels)
    tl.store(row + 2 * channels, tl.where(of_squares < 0, 0, of_squares), mask=in_channels)


@triton.jit
def _merged(moments, rows, channel, channels, ROWS: tl.constexpr):
    """Number, mean and centred squares of all rows together (Chan), taken about the first row's mean."""
    in_channels = (channel < channels)[None, :]
    shift = tl.load(moments + channels + channel, mask=channel < channels, other=0)[None, :]
    count = tl.zeros([ROWS, channel.shape[0]], tl.float64)
    total, squares = count, count
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = moments + (row.to(tl.int64) * 3 * channels)[:, None] + channel[None, :]
        inside = (row < rows)[:, None] & in_channels
        of_row = tl.load(at, mask=inside, other=0)
        mean = tl.load(at + channels, mask=inside, other=0)
        centred = tl.load(at + 2 * channels, mask=inside, other=0)
        distance = tl.where(of_row > 0, mean - shift, 0)  # empty parts have no mean
        count += of_row
        total += of_row * distance
        squares += centred + of_row * distance * distance
    number = tl.sum(count, axis=0)
    distance = tl.sum(total, axis=0) / tl.where(number > 0, number, 1)  # lanes past the last channel have no values
    of_squares = tl.sum(squares, axis=0) - number * distance * distance
    return number, tl.reshape(shift, [channel.shape[0]]) + distance, tl.where(of_squares < 0, 0, of_squares)


@triton.jit
def statistics(
    pid,
    moments,
    rows,
    affine,
    running,
    state,
    coefficients,
    settings,
    channels,
    KIND: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and 1 / sigma of some channels to state [2, C]; updates the running statistics, all but the counter.

    BN(u) = A (u - S) + O: S, A and O go to coefficients [3, C].
    """
    NORM: tl.constexpr = KIND[0]
    channel = pid * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    if NORM == 1:
        mean = tl.load(running[0] + channel, mask=inside, other=0).to(tl.float64)
        variance = tl.load(running[1] + channel, mask=inside, other=0).to(tl.float64)
    else:
        number, mean, squares = _merged(moments, rows, channel, channels, ROWS)
        variance = squares / tl.where(inside, number, 1)
        if NORM == 3:
            unbiased = squares / tl.where(inside, number - 1, 1)
            new_mean = bn.track(running[0], running[2], channel, inside, mean, settings[0], KIND[1])
            new_var = bn.track(running[1], running[2], channel, inside, unbiased, settings[0], KIND[1])
            # Several warps may hold a lane: none reads what another one has written.
            tl.debug_barrier()
            bn.store(running[0], channel, new_mean, inside)
            bn.store(running[1], channel, new_var, inside)
    invstd = 1 / tl.sqrt(variance + whole(settings[1], tl.float64))
    tl.store(state + channel, mean, mask=inside)
    tl.store(state + channels + channel, invstd, mask=inside)
    dtype: tl.constexpr = coefficients.dtype.element_ty
    shift = mean.to(dtype)
    scale = bn.parameter(affine[0], channel, inside, 1) * invstd
    offset = bn.parameter(affine[1], channel, inside, 0) + scale * (shift.to(tl.float64) - mean)
    tl.store(coefficients + channel, shift, mask=inside)
    tl.store(coefficients + channels + channel, scale.to(dtype), mask=inside)
    tl.store(coefficients + 2 * channels + channel, offset.to(dtype), mask=inside)


@triton.jit
def gradients(
    pid,
    grad,
    state,
    sums,
    means,
    affine,
    of_affine,
    coefficients,
    alpha,
    sizes,
    NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Gradients of weight and bias; coefficients [5, C]: S, P, Q, F, E of du = P (u - S) + Q teacher + F table + E."""
    batch, channels, height, width, _, _, _, _ = sizes
    channel = pid * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    of_g = tl.zeros([SAMPLES, CHANNELS], tl.float64)
    of_product = of_g
    for begin in range(0, batch, SAMPLES):
        sample = begin + tl.arange(0, SAMPLES)
        at = sums + (sample.to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
        in_sums = (sample < batch)[:, None] & inside[None, :]
        of_g += tl.load(at, mask=in_sums, other=0)
        of_product += tl.load(at + channels, mask=in_sums, other=0)
    upstream = tl.load(grad).to(tl.float64)
    total, product = upstream * tl.sum(of_g, axis=0), upstream * tl.sum(of_product, axis=0)
    bn.store(of_affine[0], channel, product, inside)
    bn.store(of_affine[1], channel, total, inside)
    if coefficients is not None:
        mean = tl.load(state + channel, mask=inside, other=0)
        invstd = tl.load(state + channels + channel, mask=inside, other=0)
        scale = bn.parameter(affine[0], channel, inside, 1) * invstd
        dtype: tl.constexpr = coefficients.dtype.element_ty
        shift = mean.to(dtype)
        distance = shift.to(tl.float64) - mean
        slope = upstream * whole(alpha, tl.float64)
        of_u = scale * slope * scale
        level = scale * slope * (bn.parameter(affine[1], channel, inside, 0) + scale * distance)
        if NORM != 1:
            if means is None:
                values = tl.cast(batch, tl.float64) * tl.cast(height, tl.float64) * tl.cast(width, tl.float64)
                mean_g, mean_product = total / values, product / values
            else:
                mean_g = tl.load(means + channel, mask=inside, other=0)
                mean_product = tl.load(means + channels + channel, mask=inside, other=0)
            of_u -= scale * invstd * mean_product
            level -= scale * (mean_g + distance * invstd * mean_product)
        tl.store(coefficients + channel, shift, mask=inside)
        tl.store(coefficients + channels + channel, of_u.to(dtype), mask=inside)
        tl.store(coefficients + 2 * channels + channel, (-scale * slope).to(dtype), mask=inside)
        tl.store(coefficients + 3 * channels + channel, (scale * upstream).to(dtype), mask=inside)
        tl.store(coefficients + 4 * channels + channel, level.to(dtype), mask=inside)
