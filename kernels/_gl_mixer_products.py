"""gl_mixer's matrix products: both convolutions, and their gradients with respect to tokens and weights.

A convolution over tokens is a product of three shifted rows with the three taps of its weight. Tiles of rows go over
the tokens of all samples; a mask says where a shifted row would leave its sample. `_gl_mixer_plan` says what `sizes`,
`PRECISION` and the tiles are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels._common import cast


@triton.jit
def logistic(x):
    """sigmoid(x) and 1 - sigmoid(x), both without overflow and without cancellation."""
    small = tl.exp(-tl.abs(x))
    above, below = 1 / (1 + small), small / (1 + small)
    return tl.where(x < 0, below, above), tl.where(x < 0, above, below)


@triton.jit
def product(x, y, total, PRECISION: tl.constexpr):
    """The sum of total and x y, accumulated in total's dtype."""
    if PRECISION == "widened":
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=total.dtype)


@triton.jit
def tokens_at(row, shift, end, channel, width, sizes, VECTOR: tl.constexpr):
    """Offsets and mask [rows, channels] of the rows that lie `shift` tokens further in the same sample.

    Args:
        row: rows of all samples, one after another.
        shift: -1, 0 or 1.
        end: rows from here on do not count.
        channel: channels.
        width: how many times the channels make a row of the tensor.
        sizes: as the plan says.
        VECTOR: divides the number of channels.
    """
    _, length, channels = sizes
    position = row % length + shift
    # Known to be a multiple of VECTOR, so that offsets and masks let the compiler keep whole vectors.
    row_length = channels // VECTOR * VECTOR
    at = (row + shift).to(tl.int64)[:, None] * (width * row_length) + channel[None, :]
    inside = (row < end) & (position >= 0) & (position < length)
    return at, inside[:, None] & (channel < row_length)[None, :]


@triton.jit
def shifted_rows(maps, row, channel, end, width, first, sizes, VECTOR: tl.constexpr):
    """The rows shifted by `first`, by 0 and by -`first` tokens, zero beyond the sample's ends; see tokens_at."""
    at, inside = tokens_at(row, first, end, channel, width, sizes, VECTOR)
    before = tl.load(maps + at, mask=inside, other=0)
    at, inside = tokens_at(row, 0, end, channel, width, sizes, VECTOR)
    same = tl.load(maps + at, mask=inside, other=0)
    at, inside = tokens_at(row, -first, end, channel, width, sizes, VECTOR)
    return before, same, tl.load(maps + at, mask=inside, other=0)


@triton.jit
def _fours(run):
    """The four entries of the last dimension, each [rows, n]."""
    even, odd = tl.split(tl.reshape(run, [run.shape[0], run.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _by_turns(first, second, third, fourth, inside):
    """[rows, 4 n] of four [rows, n], zero where it is not inside."""
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    # A product whose operand comes straight out of a reshape fails to compile: in Triton 3.6 in bfloat16, in 3.9 in
    # TF32. So the mask stands here and not in the loads.
    return tl.where(inside, tl.reshape(joined, [first.shape[0], 4 * first.shape[1]]), 0)


@triton.jit
def taps(weight, row, column, first, channels, dtype: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """The three taps of weight [C, C, 3], each [rows, COLUMNS], COLUMNS columns from `first` on.

    The taps of a column lie beside each other in memory, those of four columns are three vectors of four: so they are
    loaded, and sorted in registers.
    """
    end = channels // VECTOR * VECTOR * 3
    entry = (first // 4 + tl.arange(0, COLUMNS // 4)[:, None]) * 12 + tl.arange(0, 4)[None, :]
    at = weight + (row.to(tl.int64) * end)[:, None, None] + entry[None, :, :]
    rows = (row < channels)[:, None, None]
    a0, a1, a2, b0 = _fours(cast(tl.load(at, mask=rows & (entry < end)[None, :, :]), dtype))
    b1, b2, c0, c1 = _fours(cast(tl.load(at + 4, mask=rows & (entry + 4 < end)[None, :, :]), dtype))
    c2, d0, d1, d2 = _fours(cast(tl.load(at + 8, mask=rows & (entry + 8 < end)[None, :, :]), dtype))
    inside = (row < channels)[:, None] & (column < channels)[None, :]
    before = _by_turns(a0, b0, c0, d0, inside)
    same = _by_turns(a1, b1, c1, d1, inside)
    return before, same, _by_turns(a2, b2, c2, d2, inside)


@triton.jit
def convolve(e, weights, row, channel, sizes, PRECISION: tl.constexpr, TILE: tl.constexpr):
    """Both convolutions without their biases, [rows, channels] in the compute type."""
    VECTOR: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    rows, _, channels = sizes
    stored: tl.constexpr = e.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    value = tl.zeros([ROWS, CHANNELS], dtype)
    gate = tl.zeros([ROWS, CHANNELS], dtype)
    for begin in range(0, channels, INNER):
        inner = begin + tl.arange(0, INNER)
        shifted = shifted_rows(e, row, inner, rows, 1, -1, sizes, VECTOR)
        of_value = taps(weights[0], channel, inner, begin, channels, stored, INNER, VECTOR)
        for t in tl.static_range(3):
            value = product(shifted[t], tl.trans(of_value[t]), value, PRECISION)
        of_gate = taps(weights[1], channel, inner, begin, channels, stored, INNER, VECTOR)
        for t in tl.static_range(3):
            gate = product(shifted[t], tl.trans(of_gate[t]), gate, PRECISION)
    return value, gate


@triton.jit
def input_gradient(
    pid, d, weights, grad, de, sizes, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr
):
    """A tile of dL/de, from the gradients D [rows, 2, C] of both convolutions' outputs."""
    if de is not None:
        VECTOR: tl.constexpr = TILE[0]
        ROWS: tl.constexpr = TILE[1]
        CHANNELS: tl.constexpr = TILE[2]
        INNER: tl.constexpr = TILE[3]
        rows, _, channels = sizes
        stored: tl.constexpr = d.dtype.element_ty
        dtype: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
        chunks = tl.cdiv(channels, CHANNELS)
        row = pid // chunks * ROWS + tl.arange(0, ROWS)
        first = pid % chunks * CHANNELS
        channel = first + tl.arange(0, CHANNELS)
        # Known to be a multiple of VECTOR, as in tokens_at.
        row_length = channels // VECTOR * VECTOR
        total = tl.zeros([ROWS, CHANNELS], dtype)
        for branch in tl.static_range(2):
            for begin in range(0, channels, INNER):
                inner = begin + tl.arange(0, INNER)
                of_branch = taps(weights[branch], inner, channel, first, channels, stored, CHANNELS, VECTOR)
                shifted = shifted_rows(d + branch * row_length, row, inner, rows, 2, 1, sizes, VECTOR)
                for t in tl.static_range(3):
                    total = product(shifted[t], of_branch[t], total, PRECISION)
        at, inside = tokens_at(row, 0, rows, channel, 1, sizes, VECTOR)
        if RESIDUAL:
            total += tl.load(grad + at, mask=inside, other=0).to(dtype)
        tl.store(de + at, cast(total, de.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient(
    pid, d, e, partials, part_rows, sizes, BRANCHES: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr
):
    """A tile of one part's share of dL/dweight, to partials [parts, branches, 3, C, C]."""
    if partials is not None:
        VECTOR: tl.constexpr = TILE[0]
        OUTER: tl.constexpr = TILE[1]
        INNER: tl.constexpr = TILE[2]
        ROWS: tl.constexpr = TILE[3]
        rows, _, channels = sizes
        dtype: tl.constexpr = partials.dtype.element_ty
        inner_chunks, outer_chunks = tl.cdiv(channels, INNER), tl.cdiv(channels, OUTER)
        inner = pid % inner_chunks * INNER + tl.arange(0, INNER)
        outer = pid // inner_chunks % outer_chunks * OUTER + tl.arange(0, OUTER)
        share = pid // (inner_chunks * outer_chunks)
        branch = share % len(BRANCHES) + BRANCHES[0]
        first = share // len(BRANCHES) * part_rows
        last = tl.minimum(first + part_rows, rows)
        # Known to be a multiple of VECTOR, as in tokens_at.
        row_length = channels // VECTOR * VECTOR
        before = tl.zeros([OUTER, INNER], dtype)
        same, after = before, before
        for begin in range(first, last, ROWS):
            row = begin + tl.arange(0, ROWS)
            at, inside = tokens_at(row, 0, last, outer, 2, sizes, VECTOR)
            x = tl.trans(tl.load(d + branch * row_length + at, mask=inside, other=0))
            shifted = shifted_rows(e, row, inner, last, 1, -1, sizes, VECTOR)
            before = product(x, shifted[0], before, PRECISION)
            same = product(x, shifted[1], same, PRECISION)
            after = product(x, shifted[2], after, PRECISION)
        plane = tl.cast(channels, tl.int64) * channels
        at = share.to(tl.int64) * 3 * plane + outer.to(tl.int64)[:, None] * row_length + inner[None, :]
        inside = (outer < channels)[:, None] & (inner < row_length)[None, :]
        tl.store(partials + at, before, mask=inside)
        tl.store(partials + plane + at, same, mask=inside)
        tl.store(partials + 2 * plane + at, after, mask=inside)
