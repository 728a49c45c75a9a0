"""Bilinear interpolation in seg_ce, exact in integers: cells of an axis, fractions, mixtures.

Label pixel i of N lies at (2 i + 1) n / (2 N) - 1/2 on an axis of n source pixels. Cell c holds the label pixels from
position c up to c + 1, cell 0 also those before; its pixels mix source pixels c and c + 1, of which the last has no
next. AXIS is (whether n == N, whether positions need 64 bits), AXES those of height and width. An axis of equal sizes
mixes a pixel with itself, and two of them mix nothing, as in torch: 0 times an infinite neighbour would be NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_of(cell, source, target, AXIS: tl.constexpr):
    """First label pixel of a cell; 0 for cells before the first, `target` for those after the last."""
    NUMBER: tl.constexpr = tl.int64 if AXIS[1] else tl.int32
    if AXIS[0]:
        return cell
    else:
        n = tl.cast(source, NUMBER)
        twice = tl.maximum((2 * tl.cast(cell, NUMBER) + 1) * target - n, 0)
        first = tl.minimum((twice + 2 * n - 1) // (2 * n), target).to(tl.int32)
        return tl.where(cell <= 0, 0, tl.where(cell >= source, target, first))


@triton.jit
def cell_of(label, source, target, AXIS: tl.constexpr):
    """Cell of a label pixel; of those past the end, the last."""
    NUMBER: tl.constexpr = tl.int64 if AXIS[1] else tl.int32
    twice = tl.maximum((2 * tl.cast(label, NUMBER) + 1) * source - target, 0)
    return tl.minimum(twice // (2 * tl.cast(target, NUMBER)), source - 1).to(tl.int32)


@triton.jit
def next_of(cell, source, AXIS: tl.constexpr):
    """The other source pixel of a cell."""
    if AXIS[0]:
        return cell
    else:
        return tl.minimum(cell + 1, source - 1)


@triton.jit
def fraction_of(label, cell, source, target, dtype: tl.constexpr, AXIS: tl.constexpr):
    """How far a label pixel lies from its cell's first source pixel to the next; 0 where sizes are equal."""
    NUMBER: tl.constexpr = tl.int64 if AXIS[1] else tl.int32
    size = tl.cast(target, NUMBER)
    rest = (2 * tl.cast(label, NUMBER) + 1) * source - size - 2 * size * cell
    return tl.maximum(rest, 0).to(dtype) / (2 * size).to(dtype)


@triton.jit
def between_columns(rows, left, right, fraction, dtype: tl.constexpr, AXES: tl.constexpr):
    """Values of two source rows between their columns; rows are pointers, left and right offsets."""
    DOWN: tl.constexpr = AXES[0]
    ACROSS: tl.constexpr = AXES[1]
    above, below = tl.load(rows[0] + left).to(dtype), tl.load(rows[1] + left).to(dtype)
    if not (DOWN[0] and ACROSS[0]):
        # Not as above + fraction (next - above), which is NaN where above is infinite.
        above = (1 - fraction) * above + fraction * tl.load(rows[0] + right).to(dtype)
        below = (1 - fraction) * below + fraction * tl.load(rows[1] + right).to(dtype)
    return above, below
