"""What ops with a batch norm do to its small tensors: parameters of any dtype, running statistics, counters."""

from __future__ import annotations

import triton
import triton.language as tl
from transkd_fast.kernels._common import cast, whole


@triton.jit
def parameter(pointer, at, mask, default: tl.constexpr):
    """Entries of a parameter in float64, of one that is None the default."""
    if pointer is None:
        return tl.full(at.shape, default, tl.float64)
    else:
        return tl.load(pointer + at, mask=mask, other=0).to(tl.float64)


@triton.jit
def store(tensor, at, value, mask):
    """Stores float64 in the tensor's dtype, nothing where the tensor is None."""
    if tensor is not None:
        tl.store(tensor + at, cast(value, tensor.dtype.element_ty), mask=mask)


@triton.jit
def track(running, counter, at, mask, value, momentum, CUMULATIVE: tl.constexpr):
    """A running statistic after this batch; to be stored behind a barrier."""
    old = tl.load(running + at, mask=mask, other=0).to(tl.float64)
    share = 1 / (tl.load(counter) + 1).to(tl.float64) if CUMULATIVE else whole(momentum, tl.float64)
    return old + share * (value - old)


@triton.jit
def count(counter):
    if counter is not None:
        batches = tl.load(counter) + 1
        tl.debug_barrier()
        tl.store(counter, batches)
