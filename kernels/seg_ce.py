"""seg_ce in Triton: cross-entropy of logits between their pixels; three launches forward, one backward, one to predict.

What is interpolated is never stored. `loss_kernel` goes over the classes once for every label pixel and keeps, where a
gradient is wanted, the largest score and the logarithm of the softmax's denominator. `gradient_kernel` then makes the
softmax anew. Its programs own source rows and go over all label rows that touch these, so that nothing but the sums of
a strip's first label rows is made twice; a lane owns a label column of a cell, so that its part for the source pixel at
the left goes to the result and its part for the one at the right to a workspace. Triton has no exchange between lanes
but reductions: `finish_kernel` adds the two, and the programs' sums. `scale_kernel` is the backward: a multiplication.

Beside the result a call needs two numbers per label pixel and one per logit. Every sum has a fixed order: results
repeat bit for bit. Label pixels that are NaN reach just the source pixels that they reach in torch, because nothing
else is multiplied with them.

`_seg_ce_plan` holds what the launchers must check and work out beforehand, and says what `sizes`, `cut` and TILE are;
`_seg_ce_axes` where label pixels lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _seg_ce_plan
from transkd_fast.kernels._common import cast
from transkd_fast.kernels._seg_ce_axes import between_columns, cell_of, first_of, fraction_of, next_of

# A limit on registers keeps ptxas from spilling for the sake of occupancy; multiplications and additions are fused also
# in the Triton versions that no longer do so by default.
OPTIONS = {"num_warps": 4, "maxnreg": 192, "enable_fp_fusion": True}


@triton.jit
def _place(pid, sizes, cut, TILE: tl.constexpr, AXES: tl.constexpr):
    """A program's sample, cell row, label rows from `first` to `last`, and label columns."""
    DOWN: tl.constexpr = AXES[0]
    COLUMNS: tl.constexpr = TILE[1]
    _, height, _, label_height, _ = sizes
    per_strip, strips, chunks = cut
    column = pid % chunks * COLUMNS + tl.arange(0, COLUMNS)
    strip = pid // chunks % strips
    y = pid // (chunks * strips) % height
    sample = (pid // (chunks * strips * height)).to(tl.int64)
    first = first_of(y, height, label_height, DOWN) + strip * per_strip
    last = tl.minimum(first + per_strip, first_of(y + 1, height, label_height, DOWN))
    return sample, y, first, last, column


@triton.jit
def _rows(logits, sample, y, strides, sizes, AXES: tl.constexpr):
    """Pointers to class 0 of the two source rows of cell row y."""
    DOWN: tl.constexpr = AXES[0]
    sample_stride, _, row_stride, _ = strides
    base = logits + sample * sample_stride
    below = next_of(y, sizes[1], DOWN)
    return base + tl.cast(y, tl.int64) * row_stride, base + tl.cast(below, tl.int64) * row_stride


@triton.jit
def _columns(column, stride, sizes, dtype: tl.constexpr, AXES: tl.constexpr):
    """Offsets [1, columns] of the left and right source pixels of label columns, and the fraction between them."""
    ACROSS: tl.constexpr = AXES[1]
    _, _, width, _, label_width = sizes
    x = cell_of(column, width, label_width, ACROSS)
    fraction = fraction_of(column, x, width, label_width, dtype, ACROSS)
    right = next_of(x, width, ACROSS)
    return (x.to(tl.int64) * stride)[None, :], (right.to(tl.int64) * stride)[None, :], fraction[None, :]


@triton.jit
def _lowest(dtype: tl.constexpr):
    """The smallest finite number. Unlike -inf it can be subtracted from an infinite value."""
    if dtype == tl.float64:
        return tl.full([], -1.7976931348623157e308, dtype)
    else:
        return tl.full([], -3.4028234663852886e38, dtype)


@triton.jit
def _softmax(rows, columns, down, label, strides, classes, dtype: tl.constexpr, TILE: tl.constexpr, AXES: tl.constexpr):
    """Over the classes: largest value, its class, the sum of exponentials below it, and the label's value."""
    DOWN: tl.constexpr = AXES[0]
    ACROSS: tl.constexpr = AXES[1]
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    top, bottom = rows
    left, right, across = columns
    best = tl.zeros([ROWS, COLUMNS], dtype) + _lowest(dtype)
    chosen = tl.zeros([ROWS, COLUMNS], tl.int32)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    own = tl.zeros([ROWS, COLUMNS], dtype)
    for k in range(classes):
        if DOWN[0] and ACROSS[0]:
            value = tl.load(top + left).to(dtype) + tl.zeros([ROWS, COLUMNS], dtype)
        else:
            # Not as left + across (right - left), which is NaN where left is infinite.
            above = (1 - across) * tl.load(top + left).to(dtype) + across * tl.load(top + right).to(dtype)
            below = (1 - across) * tl.load(bottom + left).to(dtype) + across * tl.load(bottom + right).to(dtype)
            value = (1 - down) * above + down * below
        # As torch's argmax: the first of equal values, and NaN above all.
        better = ((value > best) | (value != value)) & (best == best)
        # One exponential does for both cases: of the new value below the old one, or of the old below the new.
        ratio = tl.exp(-tl.abs(value - best))
        total = tl.where(better, total * ratio + 1, total + ratio)
        best = tl.where(better, value, best)
        chosen = tl.where(better, k, chosen)
        own = tl.where(label == k, value, own)
        top += strides[1]
        bottom += strides[1]
    # infinity - infinity, as the softmax has it.
    return best, chosen, tl.where(best == float("inf"), float("nan"), total), own


@triton.jit(do_not_specialize=["ignore_index", "programs"])
def loss_kernel(
    logits,
    labels,
    weight,
    normalizers,
    sums,
    counts,
    ignore_index,
    programs,
    strides,
    sizes,
    cut,
    TILE: tl.constexpr,
    AXES: tl.constexpr,
):
    """Per program its share of sums [2, programs] and counts [4, programs]; the normalizers [2, B, H, W] if wanted."""
    DOWN: tl.constexpr = AXES[0]
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    dtype: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    classes, height, _, label_height, label_width = sizes
    samples = tl.cast(programs // (height * cut[1] * cut[2]), tl.int64)
    pid = tl.program_id(0)
    sample, y, first, last, column = _place(pid, sizes, cut, TILE, AXES)
    rows = _rows(logits, sample, y, strides, sizes, AXES)
    columns = _columns(column, strides[3], sizes, dtype, AXES)
    losses, weights = tl.zeros([ROWS, COLUMNS], dtype), tl.zeros([ROWS, COLUMNS], dtype)
    labelled, right = tl.zeros([ROWS, COLUMNS], tl.int32), tl.zeros([ROWS, COLUMNS], tl.int32)
    ignored, outside = tl.zeros([ROWS, COLUMNS], tl.int32), tl.zeros([ROWS, COLUMNS], tl.int32)
    for begin in range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < label_width)[None, :]
        at = ((sample * label_height + row) * label_width)[:, None] + column[None, :]
        found = tl.load(labels + at, mask=inside, other=0).to(tl.int64)
        valid = inside & (found >= 0) & (found < classes)
        label = tl.where(valid, found, -1).to(tl.int32)
        down = fraction_of(row, y, height, label_height, dtype, DOWN)[:, None]
        best, chosen, total, own = _softmax(rows, columns, down, label, strides, classes, dtype, TILE, AXES)
        logarithm = tl.log(total)
        if normalizers is not None:
            # Not their sum: where values are large it has no digits left for the logarithm.
            tl.store(normalizers + at, best, mask=inside)
            tl.store(normalizers + samples * label_height * label_width + at, logarithm, mask=inside)
        factor = valid.to(dtype)
        if weight is not None:
            factor = tl.load(weight + label, mask=valid, other=0).to(dtype)
        losses += tl.where(valid, factor * ((best - own) + logarithm), 0)
        weights += factor
        is_ignored = inside & (found == ignore_index)
        labelled += valid.to(tl.int32)
        right += (valid & (chosen == label)).to(tl.int32)
        ignored += is_ignored.to(tl.int32)
        outside += (inside & (valid == 0) & (is_ignored == 0)).to(tl.int32)
    tl.store(sums + pid, tl.sum(losses).to(tl.float64))
    tl.store(sums + programs + pid, tl.sum(weights).to(tl.float64))
    tl.store(counts + pid, tl.sum(labelled))
    tl.store(counts + programs + pid, tl.sum(right))
    tl.store(counts + 2 * programs + pid, tl.sum(ignored))
    tl.store(counts + 3 * programs + pid, tl.sum(outside))


@triton.jit
def gradient_kernel(
    logits,
    labels,
    weight,
    normalizers,
    kept,
    of_right,
    strides,
    sizes,
    cut,
    TILE: tl.constexpr,
    AXES: tl.constexpr,
):
    """The gradient of the weighted sum, of some classes and cells, down a strip of source rows.

    kept gets what the cells give their left source pixels, of_right what they give their right ones.
    """
    DOWN: tl.constexpr = AXES[0]
    ACROSS: tl.constexpr = AXES[1]
    CLASSES: tl.constexpr = TILE[0]
    CELLS: tl.constexpr = TILE[1]
    COLUMNS: tl.constexpr = TILE[2]
    dtype: tl.constexpr = kept.dtype.element_ty
    classes, height, width, label_height, label_width = sizes
    per_strip, strips, chunks, class_blocks = cut
    pid = tl.program_id(0)
    k = pid % class_blocks * CLASSES + tl.arange(0, CLASSES)
    x = pid // class_blocks % chunks * CELLS + tl.arange(0, CELLS)
    strip = pid // (class_blocks * chunks) % strips
    sample = (pid // (class_blocks * chunks * strips)).to(tl.int64)
    first = strip * per_strip
    last = tl.minimum(first + per_strip, height)
    samples = tl.num_programs(0) // (class_blocks * chunks * strips)
    logarithms = normalizers + tl.cast(samples, tl.int64) * label_height * label_width
    # Classes past the last read the last, and are not stored; the same with cells.
    of_class = tl.minimum(k, classes - 1).to(tl.int64) * strides[1]
    inside_map = (k < classes)[:, None] & (x < width)[None, :]
    at = sample * strides[0] + of_class[:, None] + (x.to(tl.int64) * strides[3])[None, :]
    of_class, k = of_class[:, None, None], k[:, None, None]
    start, stop = first_of(x, width, label_width, ACROSS), first_of(x + 1, width, label_width, ACROSS)
    longest = tl.max(tl.where(x < width, stop - start, 0))
    x = tl.minimum(x, width - 1)[:, None]
    right = next_of(x, width, ACROSS)
    is_last = right == x
    left, right = (x.to(tl.int64) * strides[3])[None, :, :], (right.to(tl.int64) * strides[3])[None, :, :]
    # The label rows above the first source row touch it too.
    y = first if DOWN[0] else tl.maximum(first - 1, 0)
    begin = first_of(y, height, label_height, DOWN)
    of_left, to_right = tl.zeros([CLASSES, CELLS], dtype), tl.zeros([CLASSES, CELLS], dtype)
    while y < last:
        end = first_of(y + 1, height, label_height, DOWN)
        top, bottom = _rows(logits, sample, y, strides, sizes, AXES)
        next_left, next_right = tl.zeros([CLASSES, CELLS], dtype), tl.zeros([CLASSES, CELLS], dtype)
        for offset in range(0, longest, COLUMNS):
            column = start[:, None] + offset + tl.arange(0, COLUMNS)[None, :]
            inside = column < stop[:, None]
            across = fraction_of(column, x, width, label_width, dtype, ACROSS)
            # A source pixel that has no next one gets both shares.
            share_of_left, share_of_right = tl.where(is_last, 1, 1 - across)[None, :, :], across[None, :, :]
            rows = (top + of_class, bottom + of_class)
            above, below = between_columns(rows, left, right, across[None, :, :], dtype, AXES)
            upper = tl.zeros([CLASSES, CELLS, COLUMNS], dtype)
            lower = tl.zeros([CLASSES, CELLS, COLUMNS], dtype)
            for row in range(begin, end):
                pixel = (sample * label_height + row) * label_width + column
                label = tl.load(labels + pixel, mask=inside, other=0).to(tl.int64)
                valid = inside & (label >= 0) & (label < classes)
                factor = valid.to(dtype)
                if weight is not None:
                    factor = tl.load(weight + label, mask=valid, other=0).to(dtype)
                label = tl.where(valid, label, -1).to(tl.int32)
                best = tl.load(normalizers + pixel, mask=inside, other=0)[None, :, :]
                logarithm = tl.load(logarithms + pixel, mask=inside, other=0)[None, :, :]
                down = fraction_of(row, y, height, label_height, dtype, DOWN)
                value = above
                if not (DOWN[0] and ACROSS[0]):
                    value = (1 - down) * above + down * below
                probability = tl.exp((value - best) - logarithm)
                slope = (probability - (label[None, :, :] == k).to(dtype)) * factor[None, :, :]
                # No product with 0: what such lanes hold may be NaN.
                slope = tl.where(inside[None, :, :], slope, 0)
                upper += (1 - down) * slope
                lower += down * slope
            if y == height - 1:
                upper += lower
            of_left += tl.sum(upper * share_of_left, axis=2)
            to_right += tl.sum(upper * share_of_right, axis=2)
            next_left += tl.sum(lower * share_of_left, axis=2)
            next_right += tl.sum(lower * share_of_right, axis=2)
        if y >= first:
            place = at + y.to(tl.int64) * strides[2]
            tl.store(kept + place, of_left, mask=inside_map)
            if of_right is not None:
                tl.store(of_right + place, to_right, mask=inside_map)
        of_left, to_right = next_left, next_right
        if DOWN[0]:
            of_left, to_right = tl.zeros_like(of_left), tl.zeros_like(to_right)
        begin = end
        y += 1


@triton.jit
def _sum(values, count, dtype: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < count, other=0).to(dtype)
    return tl.sum(total)


@triton.jit(do_not_specialize=["programs"])
def finish_kernel(
    sums,
    counts,
    loss,
    total,
    counted,
    programs,
    kept,
    of_right,
    width,
    step,
    entries,
    SUM_BLOCK: tl.constexpr,
    ADD_BLOCK: tl.constexpr,
):
    """Adds to kept what came from the left; the first program: the loss, the summed weights and the counts.

    kept and of_right have `step` entries between neighbours in a row.
    """
    pid = tl.program_id(0)
    if pid == 0:
        weights = _sum(sums + programs, programs, tl.float64, SUM_BLOCK)
        # NaN is no 0: weights that are NaN make a loss that is.
        mean = tl.where(weights <= 0, 0, _sum(sums, programs, tl.float64, SUM_BLOCK) / weights)
        tl.store(loss, mean.to(loss.dtype.element_ty))
        tl.store(total, weights.to(loss.dtype.element_ty))
        for entry in tl.static_range(4):
            tl.store(counted + entry, _sum(counts + entry * programs, programs, tl.int64, SUM_BLOCK))
    elif of_right is not None:
        at = tl.cast(pid - 1, tl.int64) * ADD_BLOCK + tl.arange(0, ADD_BLOCK)
        inside = at < entries
        has_left = inside & (at // step % width > 0)
        value = tl.load(kept + at, mask=inside) + tl.load(of_right + at - step, mask=has_left, other=0)
        tl.store(kept + at, value, mask=inside)


@triton.jit
def scale_kernel(grad, total, kept, gradient, count, BLOCK: tl.constexpr):
    """What was kept times grad / total; 0 where total is not positive."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(total)
    value = tl.load(grad) / weights * tl.load(kept + at, mask=at < count, other=0)
    tl.store(gradient + at, cast(tl.where(weights <= 0, 0, value), gradient.dtype.element_ty), mask=at < count)


@triton.jit
def predict_kernel(logits, prediction, strides, sizes, cut, TILE: tl.constexpr, AXES: tl.constexpr):
    """The class of the largest value at every pixel of prediction [B, H, W]."""
    DOWN: tl.constexpr = AXES[0]
    ROWS: tl.constexpr = TILE[0]
    dtype: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    classes, height, _, label_height, label_width = sizes
    sample, y, first, last, column = _place(tl.program_id(0), sizes, cut, TILE, AXES)
    rows = _rows(logits, sample, y, strides, sizes, AXES)
    columns = _columns(column, strides[3], sizes, dtype, AXES)
    for begin in range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        down = fraction_of(row, y, height, label_height, dtype, DOWN)[:, None]
        # The compiler leaves out what only the other results need.
        softmax = _softmax(rows, columns, down, -1, strides, classes, dtype, TILE, AXES)
        at = ((sample * label_height + row) * label_width)[:, None] + column[None, :]
        inside = (row < last)[:, None] & (column < label_width)[None, :]
        tl.store(prediction + at, softmax[1].to(tl.int64), mask=inside)


def seg_ce_fwd(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the weighted mean cross-entropy of the upsampled logits, and what the backward multiplies.

    Args:
        logits: [B, K, h, w], contiguous or channels-last; float32, bfloat16, float16 or float64.
        labels: [B, H, W], contiguous; uint8, int16, int32 or int64.
        weight: [K], contiguous, any floating dtype, or None for 1 each.
        ignore_index: label of pixels that do not count, outside [0, K).
        keep: whether a gradient is wanted.

    Returns:
        loss: 0-d, float32 (float64 for float64 logits); 0 where total is.
        counts: int64 [4]: labelled pixels, those of them whose highest score is the label's, ignored ones, those whose
            label is out of range.
        total: 0-d in the loss's dtype, the summed weights of the labelled pixels.
        kept: the gradient of the weighted sum, in the logits' layout and the loss's dtype; empty without keep.

    Raises:
        RuntimeError: if the tensors are not as said above.

    Source:
        TransKD section III-A; interpolation with align_corners=False.
    """
    plan = _seg_ce_plan.plan_of(logits, labels, weight, ignore_index)
    channels_last = _common.is_channels_last("seg_ce", logits)
    new = logits.new_empty
    loss, total = new((), dtype=plan.dtype), new((), dtype=plan.dtype)
    counted = new(_seg_ce_plan.COUNTS, dtype=torch.int64)
    sums = new((_seg_ce_plan.PARTS, plan.programs), dtype=torch.float64)
    counts = new((_seg_ce_plan.COUNTS, plan.programs), dtype=torch.int32)
    kept = torch.empty_like(logits, dtype=plan.dtype) if keep else new(0, dtype=plan.dtype)
    normalizers = new((2, *labels.shape), dtype=plan.dtype) if keep else None
    of_right = torch.empty_like(kept) if keep and plan.adds else None
    with _common.device_guard(logits):
        loss_kernel[(plan.programs,)](
            logits,
            labels,
            weight,
            normalizers,
            sums,
            counts,
            ignore_index,
            plan.programs,
            logits.stride(),
            plan.sizes,
            plan.cut,
            TILE=plan.tile,
            AXES=plan.axes,
            **OPTIONS,
        )
        if keep:
            gradient_kernel[(plan.source_programs,)](
                logits,
                labels,
                weight,
                normalizers,
                kept,
                of_right,
                logits.stride(),
                plan.sizes,
                plan.source_cut,
                TILE=plan.source_tile,
                AXES=plan.axes,
                **OPTIONS,
            )
        finish_kernel[(1 + (plan.adds if keep else 0),)](
            sums,
            counts,
            loss,
            total,
            counted,
            plan.programs,
            kept,
            of_right,
            logits.shape[3],
            logits.shape[1] if channels_last else 1,
            kept.numel(),
            SUM_BLOCK=_seg_ce_plan.SUM_BLOCK,
            ADD_BLOCK=_seg_ce_plan.ADD_BLOCK,
            **OPTIONS,
        )
    return loss, counted, total, kept


def seg_ce_bwd(grad: Tensor, total: Tensor, kept: Tensor, dtype: int) -> Tensor:
    """Computes the gradient of `seg_ce_fwd`'s loss.

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        total: as `seg_ce_fwd` made it.
        kept: the same; it is left as it is.
        dtype: of the gradient: 0 float32, 1 float16, 2 bfloat16, 3 float64.

    Returns:
        The gradient of the logits, in their layout; 0 where total is.

    Raises:
        RuntimeError: if the arguments do not fit each other.

    Source:
        TransKD section III-A.
    """
    _seg_ce_plan.check_backward(grad, total, kept, dtype)
    gradient = torch.empty_like(kept, dtype=_seg_ce_plan.DTYPES[dtype])
    count, block = kept.numel(), _seg_ce_plan.SCALE_BLOCK
    with _common.device_guard(kept):
        scale_kernel[(triton.cdiv(count, block),)](grad, total, kept, gradient, count, BLOCK=block, **OPTIONS)
    return gradient


def seg_ce_predict(logits: Tensor, height: int, width: int) -> Tensor:
    """Computes the class of the highest upsampled score at every pixel.

    Args:
        logits: [B, K, h, w], contiguous or channels-last; float32, bfloat16, float16 or float64.
        height: of the result, in pixels.
        width: of the result.

    Returns:
        Class indices, int64 [B, height, width]; the first of equal scores, NaN counting as the highest.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        Interpolation with align_corners=False.
    """
    plan = _seg_ce_plan.plan_of_predict(logits, height, width)
    prediction = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    with _common.device_guard(logits):
        predict_kernel[(plan.programs,)](
            logits, prediction, logits.stride(), plan.sizes, plan.cut, TILE=plan.tile, AXES=plan.axes, **OPTIONS
        )
    return prediction
