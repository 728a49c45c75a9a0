"""csf between its two passes: statistics, squeeze layer and attention of a batch, and their gradients, by one program.

These are a few thousand numbers, in float64: the squeeze layer's batch norm over two samples can amplify an error a
thousandfold. A tile holds all samples. Between phases stands a barrier wherever a thread reads what another one wrote.
Lanes of small tiles are held by several warps, so nothing is read and overwritten without a barrier between either.

`parameters`, `state` and the coefficients of the passes are those of csf.py's docstrings.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels import _batch_norm as bn
from transkd_fast.kernels._common import whole


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0, x)  # lets NaN through, as torch does


@triton.jit
def _sections(state, sizes):
    """Where the sections of the state begin."""
    samples, _, channels, squeezed, _, _, _ = sizes
    fc_invstd = state + 2 * channels
    logit = fc_invstd + squeezed
    plane = samples * channels
    return state, state + channels, fc_invstd, logit, logit + plane, logit + 2 * plane, logit + 3 * plane


@triton.jit
def _load_sums(sums, part, sample, channel, sizes):
    """The three sums of a part, each [K, channels]; zero where there is no such part."""
    samples, _, channels, _, parts, _, _ = sizes
    at = (sample[:, None] * parts + part) * (3 * channels) + channel[None, :]
    inside = (sample < tl.where(part < parts, samples, 0))[:, None] & (channel < channels)[None, :]
    first = tl.load(sums + at, mask=inside, other=0)
    return (
        first,
        tl.load(sums + at + channels, mask=inside, other=0),
        tl.load(sums + at + 2 * channels, mask=inside, other=0),
    )


@triton.jit
def _moments(sums, sample, channel, sizes, PARTS: tl.constexpr):
    """Per sample and channel the mean of z, its sum of squares about that, and the mean of up(y).

    Parts are merged about the mean of the first one: as a mean over a share of the values it is within their spread,
    so that no digits are lost. A sample that is not finite leaves the others as they are.
    """
    _, _, _, _, parts, pixels, length = sizes
    shift, _, _ = _load_sums(sums, 0, sample, channel, sizes)
    z = tl.zeros([sample.shape[0], channel.shape[0]], tl.float64)
    squares, y = z, z
    for begin in range(0, parts, PARTS):
        # Unrolled, so that several loads are under way at a time.
        for k in tl.static_range(PARTS):
            part = begin + k
            mean, centred, of_y = _load_sums(sums, part, sample, channel, sizes)
            count = tl.maximum(tl.minimum(length, pixels - tl.cast(part, tl.int64) * length), 0).to(tl.float64)
            z += count * (mean - shift)
            squares += centred + count * (mean - shift) * (mean - shift)
            y += of_y
    in_plane = tl.cast(pixels, tl.float64)
    distance = z / in_plane
    return shift + distance, squares - z * distance, y / in_plane


@triton.jit
def _product(x, weight, less, sample, out, inners, outs, strides, sizes, INNER: tl.constexpr):
    """The product of x [K, inners] and weight (minus less), whose entries (out, inner) lie at these strides."""
    total = tl.zeros([sample.shape[0], out.shape[0]], tl.float64)
    for begin in range(0, inners, INNER):
        inner = begin + tl.arange(0, INNER)
        at = out[:, None] * strides[0] + inner[None, :] * strides[1]
        inside = (out < outs)[:, None] & (inner < inners)[None, :]
        w = tl.load(weight + at, mask=inside, other=0).to(tl.float64)
        if less is not None:
            w -= tl.load(less + at, mask=inside, other=0).to(tl.float64)
        x_inside = (sample < sizes[0])[:, None] & (inner < inners)[None, :]
        row = tl.load(x + sample[:, None] * inners + inner[None, :], mask=x_inside, other=0)
        total += tl.sum(row[:, None, :] * w[None, :, :], axis=2)
    return total


@triton.jit
def forward(
    sums, first, parameters, statistics, state, work, sizes, settings, KINDS: tl.constexpr, TILES: tl.constexpr
):
    """Fills state and the coefficients A, S, C, U [4, B, M] of v = A (z - S) + C + U up(y); updates the statistics.

    `statistics` are, of z's batch norm and of the squeeze layer's, running mean, running variance, counter; `settings`
    momentum and eps of either, in halves. `work` are scratch [K, L] and the coefficients; `sizes` (samples, batch,
    channels, squeezed, parts, pixels, length of a part). KINDS: how z and the squeeze layer are normalised, and whether
    their running statistics are cumulative averages.
    """
    NORM: tl.constexpr = KINDS[0]
    FC_NORM: tl.constexpr = KINDS[1]
    samples, batch, channels, squeezed, _, pixels, _ = sizes
    weight, bias, fc, fc_weight, fc_bias, head_0, bias_0, head_1, bias_1 = parameters
    running, fc_running = statistics
    momentum, eps, fc_momentum, fc_eps = settings
    activations, coefficients = work
    mean_at, invstd_at, fc_invstd_at, logit_at, pooled_at, centre_at, squeezed_at = _sections(state, sizes)
    sample = tl.arange(0, TILES[0])
    in_samples = (sample < samples)[:, None]

    CHANNELS: tl.constexpr = TILES[1]
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        in_channels = channel < channels
        means, squares, y = _moments(sums, sample, channel, sizes, TILES[2])
        values = tl.cast(samples, tl.float64) * tl.cast(pixels, tl.float64)
        if NORM == 1:
            mean = tl.load(running[0] + channel, mask=in_channels, other=0).to(tl.float64)
            variance = tl.load(running[1] + channel, mask=in_channels, other=0).to(tl.float64)
            distance = means - mean[None, :]
        else:
            mean = tl.sum(means, axis=0) / tl.cast(samples, tl.float64)
            distance = tl.where(in_samples, means - mean[None, :], 0)
            variance = tl.sum(squares + tl.cast(pixels, tl.float64) * distance * distance, axis=0) / values
            variance = tl.where(variance < 0, 0, variance)
        if NORM == 3:
            unbiased = variance * (values / (values - 1))
            new_mean = bn.track(running[0], running[2], channel, in_channels, mean, momentum, KINDS[2])
            new_var = bn.track(running[1], running[2], channel, in_channels, unbiased, momentum, KINDS[2])
            tl.debug_barrier()
            bn.store(running[0], channel, new_mean, in_channels)
            bn.store(running[1], channel, new_var, in_channels)
        invstd = 1 / tl.sqrt(variance + whole(eps, tl.float64))
        scale = bn.parameter(weight, channel, in_channels, 1) * invstd
        tl.store(mean_at + channel, mean, mask=in_channels)
        tl.store(invstd_at + channel, invstd, mask=in_channels)
        at = sample[:, None] * channels + channel[None, :]
        inside = in_samples & in_channels[None, :]
        pooled = scale[None, :] * distance + bn.parameter(bias, channel, in_channels, 0)[None, :] + y
        tl.store(centre_at + at, distance, mask=inside)
        tl.store(pooled_at + at, pooled, mask=inside)
    tl.debug_barrier()
    if NORM == 3:
        bn.count(running[2])

    SQUEEZED: tl.constexpr = TILES[3]
    for begin in range(0, squeezed, SQUEEZED):
        layer = begin + tl.arange(0, SQUEEZED)
        in_layers = layer < squeezed
        inside = in_samples & in_layers[None, :]
        s = _product(pooled_at, fc, None, sample, layer, channels, squeezed, (channels, 1), sizes, TILES[4])
        invstd = tl.full([SQUEEZED], 1, tl.float64)
        if FC_NORM == 1:
            s -= tl.load(fc_running[0] + layer, mask=in_layers, other=0).to(tl.float64)[None, :]
            variance = tl.load(fc_running[1] + layer, mask=in_layers, other=0).to(tl.float64)
            invstd = 1 / tl.sqrt(variance + whole(fc_eps, tl.float64))
        if FC_NORM >= 2:
            values = tl.cast(samples, tl.float64)
            mean = tl.sum(s, axis=0) / values
            s = tl.where(in_samples, s - mean[None, :], 0)
            variance = tl.sum(s * s, axis=0) / values
            invstd = 1 / tl.sqrt(variance + whole(fc_eps, tl.float64))
            if FC_NORM == 3:
                unbiased = variance * (values / (values - 1))
                new_mean = bn.track(fc_running[0], fc_running[2], layer, in_layers, mean, fc_momentum, KINDS[3])
                new_var = bn.track(fc_running[1], fc_running[2], layer, in_layers, unbiased, fc_momentum, KINDS[3])
                tl.debug_barrier()
                bn.store(fc_running[0], layer, new_mean, in_layers)
                bn.store(fc_running[1], layer, new_var, in_layers)
        s *= invstd[None, :]
        at = sample[:, None] * squeezed + layer[None, :]
        gamma, beta = bn.parameter(fc_weight, layer, in_layers, 1), bn.parameter(fc_bias, layer, in_layers, 0)
        tl.store(fc_invstd_at + layer, invstd, mask=in_layers)
        tl.store(squeezed_at + at, s, mask=inside)
        tl.store(activations + at, _relu(gamma[None, :] * s + beta[None, :]), mask=inside)
    tl.debug_barrier()
    if FC_NORM == 3:
        bn.count(fc_running[2])

    OUT: tl.constexpr = TILES[5]
    own = in_samples & (sample >= first)[:, None] & (sample < first + batch)[:, None]
    for begin in range(0, channels, OUT):
        channel = begin + tl.arange(0, OUT)
        in_channels = channel < channels
        strides = (squeezed, 1)
        l_0 = _product(activations, head_0, None, sample, channel, squeezed, channels, strides, sizes, TILES[6])
        l_1 = _product(activations, head_1, None, sample, channel, squeezed, channels, strides, sizes, TILES[6])
        l_0 += bn.parameter(bias_0, channel, in_channels, 0)[None, :]
        l_1 += bn.parameter(bias_1, channel, in_channels, 0)[None, :]
        # Infinite logits give what torch's softmax gives.
        top = tl.where(l_0 > l_1, l_0, l_1)
        logit = (l_0 - top) - (l_1 - top)
        at = sample[:, None] * channels + channel[None, :]
        tl.store(logit_at + at, logit, mask=in_samples & in_channels[None, :])
        mean = tl.load(mean_at + channel, mask=in_channels, other=0)
        invstd = tl.load(invstd_at + channel, mask=in_channels, other=0)
        scale = bn.parameter(weight, channel, in_channels, 1) * invstd
        shift = mean.to(coefficients.dtype.element_ty)
        level = bn.parameter(bias, channel, in_channels, 0) - scale * (mean - shift.to(tl.float64))
        at = (sample - first)[:, None] * channels + channel[None, :]
        inside = own & in_channels[None, :]
        plane = batch * channels
        tl.store(coefficients + at, _logistic(logit) * scale[None, :], mask=inside)
        tl.store(coefficients + plane + at, tl.broadcast_to(shift[None, :], at.shape), mask=inside)
        tl.store(coefficients + 2 * plane + at, _logistic(logit) * level[None, :], mask=inside)
        tl.store(coefficients + 3 * plane + at, _logistic(-logit), mask=inside)


@triton.jit
def _gradients(sums, sample, channel, sizes, PARTS: tl.constexpr):
    """Per sample and channel the sums of G, G (z - mean), G up(y) over all parts."""
    of_g = tl.zeros([sample.shape[0], channel.shape[0]], tl.float64)
    of_z, of_y = of_g, of_g
    for begin in range(0, sizes[4], PARTS):
        for k in tl.static_range(PARTS):
            g, gz, gy = _load_sums(sums, begin + k, sample, channel, sizes)
            of_g += g
            of_z += gz
            of_y += gy
    return of_g, of_z, of_y


@triton.jit
def _outer(a, b, gradient, negated, rows, columns, sample, own, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over our own samples of a [K, rows] b [K, columns] to gradient [rows, columns]; negated has the negative."""
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        a_inside = own & (row < rows)[None, :]
        left = tl.load(a + sample[:, None] * rows + row[None, :], mask=a_inside, other=0)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            b_inside = own & (column < columns)[None, :]
            right = tl.load(b + sample[:, None] * columns + column[None, :], mask=b_inside, other=0)
            total = tl.sum(left[:, :, None] * right[:, None, :], axis=0)
            at = row[:, None] * columns + column[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            bn.store(gradient, at, total, inside)
            bn.store(negated, at, -total, inside)


@triton.jit
def backward(sums, state, first, parameters, gradients, work, sizes, KINDS: tl.constexpr, TILES: tl.constexpr):
    """Fills our own share of the parameters' gradients and the coefficients of the pass, P, Q, S, R, U, V [6, B, M].

    dz = P G + Q (z - S) + R, dy = U (sum of G over the window) + V m. `work` are scratch of 3 K M + 2 K L entries and
    the coefficients; these and gradients are None where they are not wanted.
    """
    FC_NORM: tl.constexpr = KINDS[1]
    samples, batch, channels, squeezed, _, pixels, _ = sizes
    weight, bias, fc, fc_weight, fc_bias, head_0, _, head_1, _ = parameters
    mean_at, invstd_at, fc_invstd_at, logit_at, pooled_at, centre_at, squeezed_at = _sections(state, sizes)
    scratch, coefficients = work
    of_logit, of_g_at, of_z_at = scratch, scratch + samples * channels, scratch + 2 * samples * channels
    activations = scratch + 3 * samples * channels
    of_squeezed = activations + samples * squeezed
    sample = tl.arange(0, TILES[0])
    in_samples = (sample < samples)[:, None]
    own = in_samples & (sample >= first)[:, None] & (sample < first + batch)[:, None]

    CHANNELS: tl.constexpr = TILES[1]
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        in_channels = channel < channels
        at = sample[:, None] * channels + channel[None, :]
        inside = in_samples & in_channels[None, :]
        of_g, of_z, of_y = _gradients(sums, sample, channel, sizes, TILES[2])
        logit = tl.load(logit_at + at, mask=inside, other=0)
        invstd = tl.load(invstd_at + channel, mask=in_channels, other=0)
        scale = bn.parameter(weight, channel, in_channels, 1) * invstd
        of_attention = scale[None, :] * of_z + bn.parameter(bias, channel, in_channels, 0)[None, :] * of_g - of_y
        value = _logistic(logit) * _logistic(-logit) * of_attention
        tl.store(of_logit + at, value, mask=inside)
        tl.store(of_g_at + at, of_g, mask=inside)
        tl.store(of_z_at + at, of_z, mask=inside)
        of_bias = tl.sum(tl.where(own, value, 0), axis=0)
        bn.store(gradients[6], channel, of_bias, in_channels)
        bn.store(gradients[8], channel, -of_bias, in_channels)
    tl.debug_barrier()

    SQUEEZED: tl.constexpr = TILES[3]
    for begin in range(0, squeezed, SQUEEZED):
        layer = begin + tl.arange(0, SQUEEZED)
        in_layers = layer < squeezed
        at = sample[:, None] * squeezed + layer[None, :]
        inside = in_samples & in_layers[None, :]
        of_r = _product(of_logit, head_0, head_1, sample, layer, channels, squeezed, (1, squeezed), sizes, TILES[4])
        s = tl.load(squeezed_at + at, mask=inside, other=0)
        gamma = bn.parameter(fc_weight, layer, in_layers, 1)
        r = _relu(gamma[None, :] * s + bn.parameter(fc_bias, layer, in_layers, 0)[None, :])
        of_r = tl.where(in_samples & ~(r <= 0), of_r, 0)
        tl.store(activations + at, r, mask=inside)
        bn.store(gradients[3], layer, tl.sum(tl.where(own, of_r * s, 0), axis=0), in_layers)
        bn.store(gradients[4], layer, tl.sum(tl.where(own, of_r, 0), axis=0), in_layers)
        if FC_NORM >= 2:
            values = tl.cast(samples, tl.float64)
            of_r -= (tl.sum(of_r, axis=0) / values)[None, :] + s * (tl.sum(of_r * s, axis=0) / values)[None, :]
        if FC_NORM >= 1:
            of_r *= (gamma * tl.load(fc_invstd_at + layer, mask=in_layers, other=0))[None, :]
        tl.store(of_squeezed + at, of_r, mask=inside)
    tl.debug_barrier()

    OUT: tl.constexpr = TILES[5]
    for begin in range(0, channels, OUT):
        channel = begin + tl.arange(0, OUT)
        in_channels = channel < channels
        inside = in_samples & in_channels[None, :]
        at = sample[:, None] * channels + channel[None, :]
        of_pooled = _product(of_squeezed, fc, None, sample, channel, squeezed, channels, (1, channels), sizes, TILES[6])
        logit = tl.load(logit_at + at, mask=inside, other=0)
        of_x = _logistic(logit) * tl.load(of_g_at + at, mask=inside, other=0) + of_pooled
        centre = tl.load(centre_at + at, mask=inside, other=0)
        of_xz = _logistic(logit) * tl.load(of_z_at + at, mask=inside, other=0) + of_pooled * centre
        of_x, of_xz = tl.where(in_samples, of_x, 0), tl.where(in_samples, of_xz, 0)
        invstd = tl.load(invstd_at + channel, mask=in_channels, other=0)
        bn.store(gradients[0], channel, tl.sum(tl.where(own, of_xz, 0), axis=0) * invstd, in_channels)
        bn.store(gradients[1], channel, tl.sum(tl.where(own, of_x, 0), axis=0), in_channels)
        if coefficients is not None:
            in_plane = tl.cast(pixels, tl.float64)
            scale = bn.parameter(weight, channel, in_channels, 1) * invstd
            mean = tl.load(mean_at + channel, mask=in_channels, other=0)
            shift = mean.to(coefficients.dtype.element_ty)
            of_z, level = tl.zeros([OUT], tl.float64), tl.zeros([OUT], tl.float64)
            if KINDS[0] >= 2:
                values = tl.cast(samples, tl.float64) * in_plane
                of_z = -scale * invstd * invstd * (tl.sum(of_xz, axis=0) / values)
                level = of_z * (shift.to(tl.float64) - mean) - scale * (tl.sum(of_x, axis=0) / values)
            share = of_pooled / in_plane
            at = (sample - first)[:, None] * channels + channel[None, :]
            inside = own & in_channels[None, :]
            plane = batch * channels
            tl.store(coefficients + at, scale[None, :] * _logistic(logit), mask=inside)
            tl.store(coefficients + plane + at, tl.broadcast_to(of_z[None, :], at.shape), mask=inside)
            tl.store(coefficients + 2 * plane + at, tl.broadcast_to(shift[None, :], at.shape), mask=inside)
            tl.store(coefficients + 3 * plane + at, scale[None, :] * share + level[None, :], mask=inside)
            tl.store(coefficients + 4 * plane + at, _logistic(-logit), mask=inside)
            tl.store(coefficients + 5 * plane + at, share, mask=inside)

    if (gradients[5] is not None) or (gradients[7] is not None):
        _outer(of_logit, activations, gradients[5], gradients[7], channels, squeezed, sample, own, TILES[5], TILES[6])
    if gradients[2] is not None:
        _outer(of_squeezed, pooled_at, gradients[2], None, squeezed, channels, sample, own, TILES[3], TILES[4])
