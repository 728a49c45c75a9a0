"""Tiles of pea's tokens: where they lie, residuals, and the two roles of the programs that make gradients of them.

Tiles are [tokens, channels] whatever the layout of the tensor; `_pea_plan` says what `sizes`, `TILE` and a layout are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels._common import cast


@triton.jit
def tokens_of(tile, sizes, TILE: tl.constexpr):
    """Where a tile begins: (sample, first token); tiles do not cross samples."""
    TOKENS: tl.constexpr = TILE[0]
    per_sample = tl.cdiv(sizes[0], TOKENS)
    return tl.cast(tile // per_sample, tl.int64), tile % per_sample * TOKENS


@triton.jit
def place(values, at, channel, sizes, LAYOUT: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers to a tile from `channel` on and its mask; sizes are those of a sample, (tokens, channels).

    LAYOUT is (channel-major: 2 where a sample is beyond 32 bits; vector; whether tokens, whether channels fill tiles).
    A row is known to be a multiple of the vector long, so that pointers and masks let the compiler keep whole vectors.
    All that changes from tile to tile is one number, the 64-bit offset of its corner.
    """
    VECTOR: tl.constexpr = LAYOUT[1]
    tokens, channels = sizes
    sample, first = at
    lane, column = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    inside = tl.full([TOKENS, CHANNELS], 1, tl.int1)
    if LAYOUT[0]:
        tokens = tokens // VECTOR * VECTOR
        corner = (sample * channels + channel) * tokens + first
        offset: tl.constexpr = tl.int64 if LAYOUT[0] == 2 else tl.int32
        offsets = (column.to(offset) * tokens)[None, :] + lane[:, None]
    else:
        channels = channels // VECTOR * VECTOR
        corner = (sample * tokens + first) * channels + channel
        offsets = (lane * channels)[:, None] + column[None, :]
    if not LAYOUT[2]:
        inside = inside & (first + lane < tokens)[:, None]
    if not LAYOUT[3]:
        inside = inside & (channel + column < channels)[None, :]
    return values + corner + offsets, inside


@triton.jit
def operand(x, dtype: tl.constexpr, MATH: tl.constexpr):
    """A factor of a matrix product, rounded to dtype; MATH is (type that the product takes, precision)."""
    FACTOR: tl.constexpr = MATH[0]
    return cast(x, dtype).to(FACTOR)


@triton.jit
def load_x(x, at, channel, sizes, TILE: tl.constexpr, MATH: tl.constexpr):
    """A piece [tokens, input channels] of x."""
    TOKENS: tl.constexpr = TILE[0]
    INPUTS: tl.constexpr = TILE[3]
    OF_X: tl.constexpr = TILE[7]
    FACTOR: tl.constexpr = MATH[0]
    pointers, inside = place(x, at, channel, (sizes[0], sizes[1]), OF_X, TOKENS, INPUTS)
    return tl.load(pointers, mask=inside, other=0).to(FACTOR)


@triton.jit
def load_weight(weight, output, channel, sizes, dtype: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr):
    """A piece [output channels, input channels] of the weight, as a factor."""
    OUTPUTS: tl.constexpr = TILE[1]
    INPUTS: tl.constexpr = TILE[3]
    VECTOR: tl.constexpr = TILE[6]
    OF_X: tl.constexpr = TILE[7]
    OF_TARGET: tl.constexpr = TILE[8]
    LAYOUT: tl.constexpr = (0, VECTOR, OF_TARGET[3], OF_X[3])
    at = (tl.cast(0, tl.int64), output)
    pointers, inside = place(weight, at, channel, (sizes[2], sizes[1]), LAYOUT, OUTPUTS, INPUTS)
    return operand(tl.load(pointers, mask=inside, other=0), dtype, MATH)


@triton.jit
def pieces_of_x(x, at, first, sizes, TILE: tl.constexpr, MATH: tl.constexpr):
    """The pieces of a group of input channels from `first` on."""
    INPUTS: tl.constexpr = TILE[3]
    PIECES: tl.constexpr = TILE[4]
    pieces = ()
    for k in tl.static_range(PIECES):
        pieces += (load_x(x, at, first + k * INPUTS, sizes, TILE, MATH),)
    return pieces


@triton.jit
def pieces_of_weight(weight, output, first, sizes, dtype: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr):
    """As pieces_of_x, of the weight from output channel `output` on."""
    INPUTS: tl.constexpr = TILE[3]
    PIECES: tl.constexpr = TILE[4]
    pieces = ()
    for k in tl.static_range(PIECES):
        pieces += (load_weight(weight, output, first + k * INPUTS, sizes, dtype, TILE, MATH),)
    return pieces


@triton.jit
def zeros(ROWS: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr):
    """An accumulator [ROWS, input channels] per piece of a group."""
    INPUTS: tl.constexpr = TILE[3]
    PIECES: tl.constexpr = TILE[4]
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces += (tl.zeros([ROWS, INPUTS], dtype),)
    return pieces


@triton.jit
def added(total, left, pieces, MATH: tl.constexpr):
    """Sums of total and left times each piece."""
    PRECISION: tl.constexpr = MATH[1]
    sums = ()
    for k in tl.static_range(len(pieces)):
        sums += (tl.dot(left, pieces[k], total[k], input_precision=PRECISION, out_dtype=total[k].dtype),)
    return sums


@triton.jit
def linear(x, weight, xs, ws, at, output, sizes, dtype: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr):
    """The product x W^T of a tile: of xs and ws where one group holds all input channels, else of what it loads."""
    TOKENS: tl.constexpr = TILE[0]
    OUTPUTS: tl.constexpr = TILE[1]
    INPUTS: tl.constexpr = TILE[3]
    GROUPS: tl.constexpr = TILE[5]
    PRECISION: tl.constexpr = MATH[1]
    total = tl.zeros([TOKENS, OUTPUTS], dtype)
    if GROUPS == 1:
        for k in tl.static_range(len(xs)):
            total = tl.dot(xs[k], tl.trans(ws[k]), total, input_precision=PRECISION, out_dtype=dtype)
    else:
        for begin in range(0, sizes[1], INPUTS):
            left = load_x(x, at, begin, sizes, TILE, MATH)
            right = load_weight(weight, output, begin, sizes, x.dtype.element_ty, TILE, MATH)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=dtype)
    return total


@triton.jit
def load_bias(bias, output, sizes, dtype: tl.constexpr, TILE: tl.constexpr):
    OUTPUTS: tl.constexpr = TILE[1]
    OF_TARGET: tl.constexpr = TILE[8]
    channel = output + tl.arange(0, OUTPUTS)
    inside = tl.full([OUTPUTS], 1, tl.int1)
    if not OF_TARGET[3]:
        inside = channel < sizes[2]
    return tl.load(bias + channel, mask=inside, other=0).to(dtype)


@triton.jit
def residual_of(product, bias, terms, factors, at, output, sizes, TILE: tl.constexpr):
    """(R, x W^T + b, A) of a tile; R is 0 outside the stage. Without assistants the last is of no use."""
    TOKENS: tl.constexpr = TILE[0]
    OUTPUTS: tl.constexpr = TILE[1]
    OF_TARGET: tl.constexpr = TILE[8]
    OF_ASSISTANT: tl.constexpr = TILE[9]
    target, assistant = terms
    of_target = (sizes[0], sizes[2])
    dtype: tl.constexpr = product.dtype
    linear_part = product + load_bias(bias, output, sizes, dtype, TILE)[None, :]
    pointers, inside = place(target, at, output, of_target, OF_TARGET, TOKENS, OUTPUTS)
    wanted = tl.load(pointers, mask=inside, other=0).to(dtype)
    if assistant is None:
        return tl.where(inside, linear_part - wanted, 0), linear_part, wanted
    else:
        pointers, in_assistant = place(assistant, at, output, of_target, OF_ASSISTANT, TOKENS, OUTPUTS)
        term = tl.load(pointers, mask=in_assistant, other=0).to(dtype)
        mixed = factors[0] * linear_part + factors[1] * term
        return tl.where(inside, mixed - wanted, 0), linear_part, term


@triton.jit
def store_pieces(dx, pieces, factor, at, first, sizes, TILE: tl.constexpr):
    """Writes factor times the pieces of a group, from channel `first` on, in x's layout."""
    TOKENS: tl.constexpr = TILE[0]
    INPUTS: tl.constexpr = TILE[3]
    OF_X: tl.constexpr = TILE[7]
    for k in tl.static_range(len(pieces)):
        channel = first + k * INPUTS
        pointers, inside = place(dx, at, channel, (sizes[0], sizes[1]), OF_X, TOKENS, INPUTS)
        tl.store(pointers, cast(factor * pieces[k], dx.dtype.element_ty), mask=inside)


@triton.jit
def rows(pid, x, weight, bias, terms, dx, factors, sizes, dtype: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr):
    """The gradient of x, f_p R W, for one tile of tokens and a group of input channels."""
    TOKENS: tl.constexpr = TILE[0]
    OUTPUTS: tl.constexpr = TILE[1]
    INPUTS: tl.constexpr = TILE[3]
    PIECES: tl.constexpr = TILE[4]
    GROUPS: tl.constexpr = TILE[5]
    at = tokens_of(pid // GROUPS, sizes, TILE)
    first = pid % GROUPS * (INPUTS * PIECES)
    stored: tl.constexpr = x.dtype.element_ty
    xs = ()
    if GROUPS == 1:
        xs = pieces_of_x(x, at, 0, sizes, TILE, MATH)
    total = zeros(TOKENS, dtype, TILE)
    for begin in range(0, sizes[2], OUTPUTS):
        ws = pieces_of_weight(weight, begin, first, sizes, stored, TILE, MATH)
        product = linear(x, weight, xs, ws, at, begin, sizes, dtype, TILE, MATH)
        r, _, _ = residual_of(product, bias, terms, factors, at, begin, sizes, TILE)
        total = added(total, operand(r, stored, MATH), ws, MATH)
    store_pieces(dx, total, factors[0], at, first, sizes, TILE)


@triton.jit
def folded(x):
    """Sums of the rows 8 apart of each 16, which lie in one thread where tensor cores made them."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 16, 2, 8, x.shape[1]]), axis=1)


@triton.jit
def columns(
    pid, x, weight, bias, terms, made, factors, sizes, cut, dtype: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr
):
    """For some blocks of output channels, a group of input channels and a strip of tiles: what is summed over tokens.

    Returns:
        Sums of R^2, R (x W^T + b) and R A, in float64; 0 but for the first group. The last two are 0 if not wanted.
    """
    OF_RESIDUAL: tl.constexpr = TILE[10]
    TOKENS: tl.constexpr = TILE[0]
    OUTPUTS: tl.constexpr = TILE[1]
    BLOCKS: tl.constexpr = TILE[2]
    INPUTS: tl.constexpr = TILE[3]
    PIECES: tl.constexpr = TILE[4]
    GROUPS: tl.constexpr = TILE[5]
    dx, residual, weight_parts, bias_parts, moments = made
    outputs = sizes[2]
    tiles, per_strip, stride = cut
    OWN_GROUPS: tl.constexpr = GROUPS if weight_parts is not None else 1
    stored: tl.constexpr = x.dtype.element_ty
    # A program that makes dx has all channels.
    sets = 1 if dx is not None else tl.cdiv(outputs, OUTPUTS * BLOCKS)
    group = pid % OWN_GROUPS
    first_output = pid // OWN_GROUPS % sets * (OUTPUTS * BLOCKS)
    strip = pid // (OWN_GROUPS * sets)
    first = group * (INPUTS * PIECES)
    # What does not depend on the input channels is for the first group to write.
    own_outputs = tl.where(group == 0, outputs, 0)
    ws, of_weight, of_bias = (), (), ()
    for k in tl.static_range(BLOCKS):
        output = first_output + k * OUTPUTS
        if GROUPS == 1:
            ws += (pieces_of_weight(weight, output, 0, sizes, stored, TILE, MATH),)
        else:
            ws += ((),)
        if weight_parts is not None:
            of_weight += (zeros(OUTPUTS, dtype, TILE),)
        of_bias += (tl.zeros([TOKENS // 16, 8, OUTPUTS], dtype),)
    squares = tl.zeros([TOKENS], dtype)
    of_projection = tl.zeros([TOKENS], tl.float64)
    of_assistant = of_projection
    for tile in range(strip * per_strip, tl.minimum((strip + 1) * per_strip, tiles)):
        at = tokens_of(tile, sizes, TILE)
        xs, of_x, more_weight, more_bias = (), (), (), ()
        if GROUPS == 1 or weight_parts is not None:
            xs = pieces_of_x(x, at, first, sizes, TILE, MATH)
        if dx is not None:
            of_x = zeros(TOKENS, dtype, TILE)
        for k in tl.static_range(BLOCKS):
            output = first_output + k * OUTPUTS
            product = linear(x, weight, xs, ws[k], at, output, sizes, dtype, TILE, MATH)
            r, linear_part, term = residual_of(product, bias, terms, factors, at, output, sizes, TILE)
            squares += tl.sum(r * r, axis=1)
            if bias_parts is not None:
                more_bias += (of_bias[k] + folded(r),)
            if moments is not None:
                of_projection += tl.sum(r * linear_part, axis=1).to(tl.float64)
                of_assistant += tl.sum(r * term, axis=1).to(tl.float64)
            if residual is not None:
                pointers, inside = place(residual, at, output, (sizes[0], outputs), OF_RESIDUAL, TOKENS, OUTPUTS)
                inside = inside & (output < own_outputs)
                tl.store(pointers, cast(r, residual.dtype.element_ty), mask=inside)
            factor = operand(r, stored, MATH)
            if dx is not None:
                of_x = added(of_x, factor, ws[k], MATH)
            if weight_parts is not None:
                more_weight += (added(of_weight[k], tl.trans(factor), xs, MATH),)
        if dx is not None:
            store_pieces(dx, of_x, factors[0], at, 0, sizes, TILE)
        if weight_parts is not None:
            of_weight = more_weight
        if bias_parts is not None:
            of_bias = more_bias
    row = tl.cast(strip, tl.int64) * stride
    lane = tl.arange(0, OUTPUTS)
    for k in tl.static_range(BLOCKS):
        block = first_output // OUTPUTS + k
        if weight_parts is not None:
            # Matrix by matrix, so that the places differ from those of the weight: they would be kept through the loop.
            entry = lane[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :]
            for piece in tl.static_range(PIECES):
                matrix = block * (PIECES * GROUPS) + group * PIECES + piece
                corner = row + tl.cast(matrix, tl.int64) * (OUTPUTS * INPUTS)
                tl.store(weight_parts + corner + entry, of_weight[k][piece])
        if bias_parts is not None:
            of_outputs = tl.sum(tl.sum(of_bias[k], axis=1), axis=0)
            output = block * OUTPUTS + lane
            tl.store(bias_parts + row + output, of_outputs, mask=output < own_outputs)
    counts = group == 0
    return (
        tl.where(counts, tl.sum(squares.to(tl.float64)), 0),
        tl.where(counts, tl.sum(of_projection), 0),
        tl.where(counts, tl.sum(of_assistant), 0),
    )
