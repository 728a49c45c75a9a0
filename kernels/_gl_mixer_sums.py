"""gl_mixer's merges: gradients of weights, biases and scalars, from what the parts of the rows have summed.

Each does nothing where its gradient is None. `gl_mixer.merge_kernel` says what the arguments are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels._common import cast


@triton.jit
def merge_weight(pid, partials, gradient, branch, branches, parts, channels, BLOCK: tl.constexpr):
    """A block of dL/dweight [C, C, 3], of partials [parts, branches, 3, C, C]."""
    if gradient is not None:
        plane = tl.cast(channels, tl.int64) * channels
        entry = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = entry < plane
        for t in tl.static_range(3):
            total = tl.zeros([BLOCK], partials.dtype.element_ty)
            for part in range(0, parts):
                total += tl.load(partials + ((part * branches + branch) * 3 + t) * plane + entry, mask=inside, other=0)
            tl.store(gradient + 3 * entry + t, cast(total, gradient.dtype.element_ty), mask=inside)


@triton.jit
def merge_bias(pid, sums, gradient, branch, parts, channels, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """A block of dL/dbias [C], of sums [parts, 2, C]."""
    if gradient is not None:
        CHANNELS: tl.constexpr = BLOCK // PARTS
        channel = pid * CHANNELS + tl.arange(0, CHANNELS)
        total = tl.zeros([PARTS, CHANNELS], sums.dtype.element_ty)
        for begin in range(0, parts, PARTS):
            part = begin + tl.arange(0, PARTS)
            at = (2 * part + branch)[:, None].to(tl.int64) * channels + channel[None, :]
            total += tl.load(sums + at, mask=(part < parts)[:, None] & (channel < channels)[None, :], other=0)
        merged = tl.sum(total, axis=0)
        tl.store(gradient + channel, cast(merged, gradient.dtype.element_ty), mask=channel < channels)


@triton.jit
def merge_scalar(shares, gradient, which, count, BLOCK: tl.constexpr):
    """dL/dscalar, of shares [count, 2]."""
    if gradient is not None:
        total = tl.zeros([BLOCK], shares.dtype.element_ty)
        for begin in range(0, count, BLOCK):
            entry = begin + tl.arange(0, BLOCK)
            total += tl.load(shares + 2 * entry.to(tl.int64) + which, mask=entry < count, other=0)
        tl.store(gradient, cast(tl.sum(total), gradient.dtype.element_ty))
