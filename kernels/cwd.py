"""cwd in Triton: KL divergences of softmaxes along one axis, all stages in three launches forward and one backward.

A program reads its part of several softmaxes once and keeps for each the maxima m_s and m_t of student s and teacher t,
Z_s and Z_t, the sums of e = exp((x - m) / T), and A, the sum of e_t ((t - m_t) - (s - m_s)); all are rescaled when a
maximum moves. Then KL = A / (T Z_t) + ln(Z_s / Z_t), and no large value is subtracted from another. `part_kernel` does
this; where a softmax is cut into parts, each leaves a record of the five numbers, and `merge_kernel` merges them.
`total_kernel` adds the loss up. Every sum has a fixed order: results repeat bit for bit.

A launch takes several stages of any shapes, dtypes and axes; each program works for one of them. `_cwd_plan` holds what
the launchers must work out beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _cwd_plan
from transkd_fast.kernels._common import cast, whole
from transkd_fast.kernels._cwd_numbers import keep, kept, merged, raised, with_tile, write_record

# As for hcl: a limit on registers keeps ptxas from spilling for the sake of occupancy, and every Triton version fuses
# multiplications and additions.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
TOTAL_BLOCK = 2048


# `sizes`, `TILE`, `ends`, `inverse` and the scales come from `_cwd_plan`, which says what they are.


@triton.jit
def _read(view, offsets, mask, dtype: tl.constexpr):
    return tl.load(view + offsets, mask=mask, other=float("-inf")).to(dtype)


@triton.jit
def _place_in_rows(pid, sizes, TILE: tl.constexpr):
    """A program's softmaxes, which of their parts it takes, and that part's first and last column."""
    _, _, columns, steps, parts = sizes
    ROWS: tl.constexpr = TILE[1]
    COLUMNS: tl.constexpr = TILE[2]
    row = (pid // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = pid % parts
    first = part * steps * COLUMNS
    return row, part, first, tl.minimum(first + steps * COLUMNS, columns)


@triton.jit
def _tile_of_rows(row, begin, sizes, TILE: tl.constexpr):
    """Offsets and mask [rows, columns] of a tile that begins at a column."""
    batch, rows, columns, _, _ = sizes
    VECTOR: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[2]
    # Known to be a multiple of VECTOR, so that offsets and masks let the compiler keep whole vectors.
    length = columns // VECTOR * VECTOR
    column = begin + tl.arange(0, COLUMNS)
    return row[:, None] * length + column[None, :], (row < batch * rows)[:, None] & (column < length)[None, :]


@triton.jit
def _part_of_rows(pid, student, teacher, records, statistics, inverse, sizes, TILE: tl.constexpr):
    """For softmaxes along the contiguous axis: writes records; or the statistics, and returns the divergences."""
    batch, rows, _, _, parts = sizes
    ROWS: tl.constexpr = TILE[1]
    COLUMNS: tl.constexpr = TILE[2]
    VECTOR: tl.constexpr = TILE[0]
    VECTORS: tl.constexpr = COLUMNS // VECTOR
    row, part, first, last = _place_in_rows(pid, sizes, TILE)
    dtype: tl.constexpr = statistics.dtype.element_ty
    z_s = tl.zeros([ROWS, VECTORS], dtype)
    max_s = z_s + float("-inf")
    max_t, z_t, a = max_s, z_s, z_s
    for begin in range(first, last, COLUMNS):
        offsets, mask = _tile_of_rows(row, begin, sizes, TILE)
        s, t = _read(student, offsets, mask, dtype), _read(teacher, offsets, mask, dtype)
        # Only as a tile of two dimensions is it sure to lie among the threads as memory does.
        s, t = tl.reshape(s, [ROWS, VECTORS, VECTOR]), tl.reshape(t, [ROWS, VECTORS, VECTOR])
        max_s, z_s, max_t, z_t, a = with_tile(max_s, z_s, max_t, z_t, a, s, t, inverse, 2)
    max_s, z_s, max_t, z_t, a = merged(max_s, z_s, max_t, z_t, a, inverse, 1)
    inside = row < batch * rows
    divergence = tl.zeros([ROWS], dtype)
    if parts == 1:
        divergence = keep(statistics, row, rows, inside, max_s, z_s, max_t, z_t, a, inverse)
    else:
        write_record(records, row, rows, part, parts, inside, max_s, z_s, max_t, z_t, a)
    return tl.sum(divergence)


@triton.jit
def _place_in_columns(pid, sizes, TILE: tl.constexpr):
    """A program's sample and columns, which part of their softmaxes it takes, and that part's first and last row."""
    _, rows, columns, steps, parts = sizes
    STEP: tl.constexpr = TILE[1] * TILE[2]
    COLUMNS: tl.constexpr = TILE[3]
    chunks = tl.cdiv(columns, COLUMNS)
    column = pid % chunks * COLUMNS + tl.arange(0, COLUMNS)
    part = pid // chunks % parts
    first = part * steps * STEP
    return (pid // (chunks * parts)).to(tl.int64), column, part, first, tl.minimum(first + steps * STEP, rows)


@triton.jit
def _tile_of_columns(sample, column, begin, sizes, TILE: tl.constexpr):
    """Offsets and mask [rows, columns] of a tile that begins at a row; the rows of a thread are a group apart."""
    _, rows, columns, _, _ = sizes
    VECTOR: tl.constexpr = TILE[0]
    STEP: tl.constexpr = TILE[1] * TILE[2]
    # As in _tile_of_rows: known to be a multiple of VECTOR.
    length = columns // VECTOR * VECTOR
    row = begin + tl.arange(0, STEP)
    offsets = (sample * rows + row)[:, None] * length + column[None, :]
    # Also no more than VECTOR at a time, where more were aligned: else a thread would have more columns, fewer rows.
    return tl.max_contiguous(offsets, [1, VECTOR]), (row < rows)[:, None] & (column < length)[None, :]


@triton.jit
def _part_of_columns(pid, student, teacher, records, statistics, inverse, sizes, TILE: tl.constexpr):
    """As _part_of_rows, for softmaxes along the strided axis."""
    _, _, columns, _, parts = sizes
    GROUP: tl.constexpr = TILE[1]
    ROWS: tl.constexpr = TILE[2]
    STEP: tl.constexpr = GROUP * ROWS
    COLUMNS: tl.constexpr = TILE[3]
    sample, column, part, first, last = _place_in_columns(pid, sizes, TILE)
    dtype: tl.constexpr = statistics.dtype.element_ty
    z_s = tl.zeros([ROWS, COLUMNS], dtype)
    max_s = z_s + float("-inf")
    max_t, z_t, a = max_s, z_s, z_s
    for begin in range(first, last, STEP):
        offsets, mask = _tile_of_columns(sample, column, begin, sizes, TILE)
        s, t = _read(student, offsets, mask, dtype), _read(teacher, offsets, mask, dtype)
        s, t = tl.reshape(s, [GROUP, ROWS, COLUMNS]), tl.reshape(t, [GROUP, ROWS, COLUMNS])
        max_s, z_s, max_t, z_t, a = with_tile(max_s, z_s, max_t, z_t, a, s, t, inverse, 0)
    max_s, z_s, max_t, z_t, a = merged(max_s, z_s, max_t, z_t, a, inverse, 0)
    inside = column < columns
    softmax = sample * columns + column
    divergence = tl.zeros([COLUMNS], dtype)
    if parts == 1:
        divergence = keep(statistics, softmax, columns, inside, max_s, z_s, max_t, z_t, a, inverse)
    else:
        write_record(records, softmax, columns, part, parts, inside, max_s, z_s, max_t, z_t, a)
    return tl.sum(divergence)


@triton.jit(do_not_specialize=["losses"])
def part_kernel(students, teachers, records, statistics, losses, weights, inverse, sizes, ends, TILES: tl.constexpr):
    """Per stage the records of the parts; of softmaxes in one part the statistics, and their share of the loss."""
    pid = tl.program_id(0)
    first = 0
    dtype: tl.constexpr = losses.dtype.element_ty
    scale = whole(inverse, dtype)
    share = tl.cast(0, dtype)
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            if len(TILE) == 3:
                divergence = _part_of_rows(
                    pid - first, students[m], teachers[m], records[m], statistics[m], scale, sizes[m], TILE
                )
            else:
                divergence = _part_of_columns(
                    pid - first, students[m], teachers[m], records[m], statistics[m], scale, sizes[m], TILE
                )
            share = divergence * whole(weights[m], dtype)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit
def _merge(pid, records, statistics, inverse, batch, softmaxes, parts, PARTS: tl.constexpr, SOFTMAXES: tl.constexpr):
    """Writes the statistics of some softmaxes; returns the sum of their divergences."""
    softmax = pid.to(tl.int64) * SOFTMAXES + tl.arange(0, SOFTMAXES)
    inside = softmax < batch.to(tl.int64) * softmaxes
    at = softmax // softmaxes * parts * (5 * softmaxes) + softmax % softmaxes
    dtype: tl.constexpr = records.dtype.element_ty
    z_s = tl.zeros([PARTS, SOFTMAXES], dtype)
    max_s = z_s + float("-inf")
    max_t, z_t, a = max_s, z_s, z_s
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & inside[None, :]
        place = records + at[None, :] + part.to(tl.int64) * (5 * softmaxes)
        more_s = tl.load(place, mask=mask, other=float("-inf"))
        of_s = tl.load(place + softmaxes, mask=mask, other=0)
        more_t = tl.load(place + 2 * softmaxes, mask=mask, other=float("-inf"))
        of_t = tl.load(place + 3 * softmaxes, mask=mask, other=0)
        of_a = tl.load(place + 4 * softmaxes, mask=mask, other=0)
        to_s, to_t = tl.maximum(max_s, more_s), tl.maximum(max_t, more_t)
        z_s, z_t, a = raised(max_s, z_s, max_t, z_t, a, to_s, to_t, inverse)
        of_s, of_t, of_a = raised(more_s, of_s, more_t, of_t, of_a, to_s, to_t, inverse)
        max_s, z_s, max_t, z_t, a = to_s, z_s + of_s, to_t, z_t + of_t, a + of_a
    max_s, z_s, max_t, z_t, a = merged(max_s, z_s, max_t, z_t, a, inverse, 0)
    return tl.sum(keep(statistics, softmax, softmaxes, inside, max_s, z_s, max_t, z_t, a, inverse))


@triton.jit(do_not_specialize=["losses"])
def merge_kernel(
    records,
    statistics,
    losses,
    weights,
    inverse,
    sizes,
    softmaxes,
    ends,
    PARTS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
):
    """Per stage of several parts the statistics, merged in the parts' order; per program its share of the loss."""
    pid = tl.program_id(0)
    first = 0
    dtype: tl.constexpr = losses.dtype.element_ty
    share = tl.cast(0, dtype)
    for m in tl.static_range(len(records)):
        if (pid >= first) & (pid < ends[m]):
            divergence = _merge(
                pid - first,
                records[m],
                statistics[m],
                whole(inverse, dtype),
                tl.cast(sizes[m][0], tl.int64),
                softmaxes[m],
                sizes[m][4],
                PARTS,
                SOFTMAXES,
            )
            share = divergence * whole(weights[m], dtype)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit(do_not_specialize=["count"])
def total_kernel(losses, loss, count, BLOCK: tl.constexpr):
    """The sum of losses [count]; one program, so that its order is fixed."""
    total = tl.zeros([BLOCK], loss.dtype.element_ty)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(losses + at, mask=at < count, other=0)
    tl.store(loss, tl.sum(total))


@triton.jit
def _write_gradient(student, teacher, gradient, offsets, mask, max_s, log_s, max_t, log_t, scale, inverse):
    s, t = _read(student, offsets, mask, scale.dtype), _read(teacher, offsets, mask, scale.dtype)
    p_s, p_t = tl.exp((s - max_s) * inverse - log_s), tl.exp((t - max_t) * inverse - log_t)
    tl.store(gradient + offsets, cast(scale * (p_s - p_t), gradient.dtype.element_ty), mask=mask)


@triton.jit
def _backward_rows(pid, student, teacher, statistics, gradient, scale, inverse, sizes, TILE: tl.constexpr):
    COLUMNS: tl.constexpr = TILE[2]
    batch, rows, _, _, _ = sizes
    row, _, first, last = _place_in_rows(pid, sizes, TILE)
    max_s, log_s, max_t, log_t = kept(statistics, row, rows, row < batch * rows)
    max_s, log_s = max_s[:, None], log_s[:, None]
    max_t, log_t = max_t[:, None], log_t[:, None]
    for begin in range(first, last, COLUMNS):
        offsets, mask = _tile_of_rows(row, begin, sizes, TILE)
        _write_gradient(student, teacher, gradient, offsets, mask, max_s, log_s, max_t, log_t, scale, inverse)


@triton.jit
def _backward_columns(pid, student, teacher, statistics, gradient, scale, inverse, sizes, TILE: tl.constexpr):
    STEP: tl.constexpr = TILE[1] * TILE[2]
    _, _, columns, _, _ = sizes
    sample, column, _, first, last = _place_in_columns(pid, sizes, TILE)
    max_s, log_s, max_t, log_t = kept(statistics, sample * columns + column, columns, column < columns)
    max_s, log_s = max_s[None, :], log_s[None, :]
    max_t, log_t = max_t[None, :], log_t[None, :]
    for begin in range(first, last, STEP):
        offsets, mask = _tile_of_columns(sample, column, begin, sizes, TILE)
        _write_gradient(student, teacher, gradient, offsets, mask, max_s, log_s, max_t, log_t, scale, inverse)


@triton.jit
def backward_kernel(grad, students, teachers, statistics, gradients, scales, inverse, sizes, ends, TILES: tl.constexpr):
    """Per stage grad scale (p_s - p_t), to gradients."""
    pid = tl.program_id(0)
    first = 0
    upstream = tl.load(grad)
    dtype: tl.constexpr = grad.dtype.element_ty
    rate = whole(inverse, dtype)
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            scale = upstream * whole(scales[m], dtype)
            if len(TILE) == 3:
                _backward_rows(
                    pid - first, students[m], teachers[m], statistics[m], gradients[m], scale, rate, sizes[m], TILE
                )
            else:
                _backward_columns(
                    pid - first, students[m], teachers[m], statistics[m], gradients[m], scale, rate, sizes[m], TILE
                )
        first = ends[m]


def cwd_fwd(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """Computes KL(softmax(t / T) || softmax(s / T)), summed over softmaxes and, weighted, over stages.

    Args:
        students: one contiguous view [B, M, N] per stage; float32, bfloat16, float16 or, then all views, float64.
        teachers: the same shapes; the dtypes may differ.
        dims: per stage 2 for one softmax over the N entries of each row, 1 for one over the M entries of each column.
        weights: one factor per stage.
        temperature: T > 0.

    Returns:
        loss: 0-d, float32 (float64 for float64 views).
        statistics: per stage [B, 4, R] in the loss's dtype, R = M (dims 2) or N (dims 1): of student and teacher the
            maximum, before the division by T, and ln of the sum of exp((x - maximum) / T).

    Raises:
        RuntimeError: if the views are not as said above.

    Source:
        Shu et al., channel-wise knowledge distillation for dense prediction, equation 4.
    """
    plan = _cwd_plan.plan_of(students, teachers, dims, weights, temperature)
    first = students[0]
    statistics = [first.new_empty(stage.statistics_shape, dtype=plan.dtype) for stage in plan.stages]
    loss = first.new_empty((), dtype=plan.dtype)
    workspace = first.new_empty(plan.workspace, dtype=plan.dtype)
    records = tuple(workspace[begin:] for begin in plan.records_at)
    losses = workspace[plan.losses_at :]
    with _common.device_guard(loss):
        for launch in plan.launches:
            chosen = launch.stages
            part_kernel[(launch.programs,)](
                tuple(students[chosen]),
                tuple(teachers[chosen]),
                records[chosen],
                tuple(statistics[chosen]),
                losses[launch.losses_at :],
                launch.weights,
                plan.inverse,
                launch.sizes,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
            if launch.merge_programs:
                merge_kernel[(launch.merge_programs,)](
                    records[chosen],
                    tuple(statistics[chosen]),
                    losses[launch.merge_losses_at :],
                    launch.weights,
                    plan.inverse,
                    launch.sizes,
                    launch.softmaxes,
                    launch.merge_ends,
                    PARTS=_cwd_plan.MERGED_PARTS,
                    SOFTMAXES=_cwd_plan.MERGED_SOFTMAXES,
                    **OPTIONS,
                )
        total_kernel[(1,)](losses, loss, plan.losses, BLOCK=TOTAL_BLOCK, **OPTIONS)
    return loss, statistics


def cwd_bwd(
    grad: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    statistics: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> list[Tensor]:
    """Computes the gradient of `cwd_fwd`'s loss with respect to the students: grad weight / T (p_s - p_t).

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        students: as for `cwd_fwd`.
        teachers: as for `cwd_fwd`.
        statistics: as `cwd_fwd` made them.
        dims: as for `cwd_fwd`.
        weights: as for `cwd_fwd`.
        temperature: as for `cwd_fwd`.

    Returns:
        Per stage the gradient [B, M, N], in the student's dtype.

    Raises:
        RuntimeError: if the views, statistics or grad are not as said above.

    Source:
        Shu et al., channel-wise knowledge distillation for dense prediction, equation 4.
    """
    plan = _cwd_plan.plan_of(students, teachers, dims, weights, temperature)
    plan.check_backward(grad, statistics)
    gradients = [torch.empty_like(student) for student in students]
    with _common.device_guard(grad):
        for launch in plan.launches:
            chosen = launch.stages
            backward_kernel[(launch.programs,)](
                grad,
                tuple(students[chosen]),
                tuple(teachers[chosen]),
                tuple(statistics[chosen]),
                tuple(gradients[chosen]),
                launch.gradient_scales,
                plan.inverse,
                launch.sizes,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
    return gradients
