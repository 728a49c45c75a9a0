"""The five numbers by which cwd's kernels know a softmax of student and teacher, or a part: m_s, Z_s, m_t, Z_t and A.

kernels/cwd.py says what they are. NaN may stay out of the maxima, but comes into the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def base(maximum):
    """What is subtracted for a maximum: -inf, the maximum of nothing, would make NaN of -inf."""
    return tl.where(maximum == float("-inf"), 0, maximum)


@triton.jit
def raised(max_s, z_s, max_t, z_t, a, to_s, to_t, inverse):
    """Z_s, Z_t and A for larger maxima."""
    below_s, below_t = max_s - base(to_s), max_t - base(to_t)
    shrink = tl.exp(below_t * inverse)
    z_t *= shrink
    # A part without weight says nothing, however far the student's maximum has moved.
    a = tl.where(z_t == 0, 0, a * shrink + z_t * (below_t - below_s))
    return z_s * tl.exp(below_s * inverse), z_t, a


@triton.jit
def with_tile(max_s, z_s, max_t, z_t, a, s, t, inverse, AXIS: tl.constexpr):
    """The five numbers with a tile added, whose axis AXIS they do not have; what it lacks is -inf."""
    to_s = tl.maximum(max_s, tl.max(s, axis=AXIS))
    to_t = tl.maximum(max_t, tl.max(t, axis=AXIS))
    z_s, z_t, a = raised(max_s, z_s, max_t, z_t, a, to_s, to_t, inverse)
    below_s = s - tl.expand_dims(base(to_s), AXIS)
    below_t = t - tl.expand_dims(base(to_t), AXIS)
    e_t = tl.exp(below_t * inverse)
    # What has no weight counts for nothing, also where a difference is -inf.
    a += tl.sum(tl.where(e_t == 0, 0, e_t * (below_t - below_s)), axis=AXIS)
    z_s += tl.sum(tl.exp(below_s * inverse), axis=AXIS)
    z_t += tl.sum(e_t, axis=AXIS)
    return to_s, z_s, to_t, z_t, a


@triton.jit
def merged(max_s, z_s, max_t, z_t, a, inverse, AXIS: tl.constexpr):
    """The five numbers of all parts along an axis."""
    to_s, to_t = tl.max(max_s, axis=AXIS), tl.max(max_t, axis=AXIS)
    z_s, z_t, a = raised(max_s, z_s, max_t, z_t, a, tl.expand_dims(to_s, AXIS), tl.expand_dims(to_t, AXIS), inverse)
    return to_s, tl.sum(z_s, axis=AXIS), to_t, tl.sum(z_t, axis=AXIS), tl.sum(a, axis=AXIS)


@triton.jit
def keep(statistics, softmax, softmaxes, mask, max_s, z_s, max_t, z_t, a, inverse):
    """Writes the statistics [B, 4, R] of softmaxes, counted over all samples; returns their divergences, 0 outside."""
    at = softmax // softmaxes * (4 * softmaxes) + softmax % softmaxes
    tl.store(statistics + at, max_s, mask=mask)
    tl.store(statistics + at + softmaxes, tl.log(z_s), mask=mask)
    tl.store(statistics + at + 2 * softmaxes, max_t, mask=mask)
    tl.store(statistics + at + 3 * softmaxes, tl.log(z_t), mask=mask)
    return tl.where(mask, a / z_t * inverse + tl.log(z_s / z_t), 0)


@triton.jit
def write_record(records, softmax, softmaxes, part, parts, mask, max_s, z_s, max_t, z_t, a):
    """Records lie as [B, parts, 5, R]."""
    at = (softmax // softmaxes * parts + part) * (5 * softmaxes) + softmax % softmaxes
    tl.store(records + at, max_s, mask=mask)
    tl.store(records + at + softmaxes, z_s, mask=mask)
    tl.store(records + at + 2 * softmaxes, max_t, mask=mask)
    tl.store(records + at + 3 * softmaxes, z_t, mask=mask)
    tl.store(records + at + 4 * softmaxes, a, mask=mask)


@triton.jit
def kept(statistics, softmax, softmaxes, mask):
    """The four statistics of softmaxes, counted over all samples."""
    at = statistics + softmax // softmaxes * (4 * softmaxes) + softmax % softmaxes
    max_s = tl.load(at, mask=mask, other=0)
    log_s = tl.load(at + softmaxes, mask=mask, other=0)
    max_t = tl.load(at + 2 * softmaxes, mask=mask, other=0)
    log_t = tl.load(at + 3 * softmaxes, mask=mask, other=0)
    return max_s, log_s, max_t, log_t
