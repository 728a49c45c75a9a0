"""pea in Triton: projections, their mean-squared error and its gradients, one launch per stage, one more each way.

P = f_p (x W^T + b) + f_a A is made tile by tile and never stored; while the residual R = P - T of a tile is at hand,
the forward takes from it the loss and, unnormalised, what gradients are wanted. `stage_kernel` has two roles
(`_pea_tiles.columns` and `rows`): what is summed over tokens, and the gradient of x; a narrow stage needs only the
first. `finish_kernel` adds the partial sums up, `scale_kernel` is the backward: a multiplication. Every sum has a fixed
order: results repeat bit for bit.

`_pea_plan` holds what the launchers must check and work out beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _pea_plan, _pea_tiles
from transkd_fast.kernels._common import cast, whole

# Multiplications and additions are fused also in the Triton versions that no longer do so by default.
# Registers are given as many as there are for the warps: left to itself, ptxas 12.9 spills some for more blocks.
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 168, "enable_fp_fusion": True}
STAGE_OPTIONS = {"maxnreg": 255, "enable_fp_fusion": True}
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["column_programs"])
def stage_kernel(
    x,
    weight,
    bias,
    terms,
    scales,
    dx,
    residual,
    parts,
    shares,
    moments,
    share,
    sizes,
    cut,
    column_programs,
    TILE: tl.constexpr,
    MATH: tl.constexpr,
    NARROW: tl.constexpr,
):
    """A stage's gradients and partial sums; its share of the loss per program, and of the scales' gradients."""
    pid = tl.program_id(0)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    factors = (tl.full([], 1, dtype), tl.full([], 0, dtype))
    if scales[0] is not None:
        factors = (tl.load(scales[0]).to(dtype), tl.load(scales[1]).to(dtype))
    if pid < column_programs:
        made = (dx if NARROW else None, residual, parts[0], parts[1], moments)
        sums = _pea_tiles.columns(pid, x, weight, bias, terms, made, factors, sizes, cut, dtype, TILE, MATH)
        tl.store(shares + pid, sums[0] * whole(share, tl.float64))
        if moments is not None:
            tl.store(moments + 2 * pid, sums[1])
            tl.store(moments + 2 * pid + 1, sums[2])
    elif dx is not None and not NARROW:
        _pea_tiles.rows(pid - column_programs, x, weight, bias, terms, dx, factors, sizes, dtype, TILE, MATH)


@triton.jit
def _merge(pid, parts, weight, bias, factor, counts, TILE: tl.constexpr):
    """Sums over strips of TILE[1] entries of parts [strips, stride]: first the weight's, by matrices."""
    STRIPS: tl.constexpr = TILE[0]
    ENTRIES: tl.constexpr = TILE[1]
    OUTPUTS: tl.constexpr = TILE[2]
    INPUTS: tl.constexpr = TILE[3]
    MATRICES: tl.constexpr = TILE[4]
    weight_entries, entries, strips, stride, inputs, outputs, _ = counts
    entry = pid * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros([ENTRIES], parts.dtype.element_ty)
    for begin in range(0, strips, STRIPS):
        strip = begin + tl.arange(0, STRIPS)
        inside = (strip < strips)[:, None] & (entry < entries)[None, :]
        part = tl.load(parts + (strip.to(tl.int64) * stride)[:, None] + entry[None, :], mask=inside, other=0)
        total += tl.sum(part, axis=0)
    total *= factor
    if weight is not None:
        matrix = entry // (OUTPUTS * INPUTS)
        output = matrix // MATRICES * OUTPUTS + entry // INPUTS % OUTPUTS
        channel = matrix % MATRICES * INPUTS + entry % INPUTS
        inside = (entry < weight_entries) & (output < outputs) & (channel < inputs)
        tl.store(weight + output.to(tl.int64) * inputs + channel, total, mask=inside)
    if bias is not None:
        output = entry - weight_entries
        tl.store(bias + output, total, mask=(output >= 0) & (output < outputs))


@triton.jit
def _sum(values, count, stride, BLOCK: tl.constexpr):
    """Sum of every stride-th of the values, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(values + at * stride, mask=at < count, other=0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["shares", "share_count"])
def finish_kernel(
    parts,
    weights,
    biases,
    scales,
    counts,
    ends,
    shares,
    share_count,
    loss,
    factors,
    moments,
    of_scales,
    values,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per stage the gradients of weight and bias from their partial sums; the last program: all that is a scalar."""
    pid = tl.program_id(0)
    first = 0
    dtype: tl.constexpr = factors.dtype.element_ty
    for m in tl.static_range(len(TILES)):
        if len(TILES[m]) > 0:  # noqa: SIM102
            if (pid >= first) & (pid < ends[m]):
                TILE: tl.constexpr = TILES[m]
                factor = tl.full([], 1, dtype)
                if scales[m][0] is not None:
                    factor = tl.load(scales[m][0]).to(dtype)
                _merge(pid - first, parts[m], weights[m], biases[m], factor, counts[m], TILE)
        first = ends[m]
    if pid == first:
        if loss is not None:
            tl.store(loss, _sum(shares, share_count, 1, BLOCK).to(dtype))
        for m in tl.static_range(len(TILES)):
            factor = whole(values[m], dtype)
            assistant = tl.full([], 0, dtype)
            if scales[m][1] is not None:
                assistant = tl.load(scales[m][1]).to(dtype)
            tl.store(factors + 3 * m, factor)
            tl.store(factors + 3 * m + 1, -factor)
            tl.store(factors + 3 * m + 2, assistant * factor)
            if of_scales[m] is not None:
                count = counts[m][6]
                tl.store(of_scales[m], _sum(moments[m], count, 2, BLOCK).to(dtype))
                tl.store(of_scales[m] + 1, _sum(moments[m] + 1, count, 2, BLOCK).to(dtype))


@triton.jit
def scale_kernel(grad, factors, kept, gradients, counts, ends, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Per gradient grad times its factor times what was kept."""
    pid = tl.program_id(0)
    first = 0
    upstream = tl.load(grad)
    for m in tl.static_range(len(COLUMNS)):
        if (pid >= first) & (pid < ends[m]):
            factor = upstream * tl.load(factors + COLUMNS[m])
            at = tl.cast(pid - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = factor * tl.load(kept[m] + at, mask=at < counts[m], other=0).to(factor.dtype)
            tl.store(gradients[m] + at, cast(value, gradients[m].dtype.element_ty), mask=at < counts[m])
        first = ends[m]


def _math(x: Tensor, tf32: bool) -> tuple[tl.dtype, str]:
    """Type that matrix products take, and their precision."""
    if x.dtype == torch.float16:
        return tl.float16, "ieee"
    # The interpreter has no arithmetic of bfloat16: there the rounded factors go in as float32.
    if x.dtype == torch.bfloat16 and isinstance(stage_kernel, triton.JITFunction):
        return tl.bfloat16, "ieee"
    if x.dtype == torch.float64:
        return tl.float64, "ieee"
    return tl.float32, "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


def _arch() -> int:
    """The current GPU's architecture, 90 for compute capability 9.0; the interpreter does as an H100 does."""
    if not isinstance(stage_kernel, triton.JITFunction):
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)


def pea_fwd(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Sequence[Tensor],
    assistants: Sequence[Tensor],
    projection_scales: Sequence[Tensor],
    assistant_scales: Sequence[Tensor],
    stage_weights: Sequence[float],
    wanted: Sequence[bool],
    tf32: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Computes pea of all stages, weighted and summed, and what the backward multiplies to gradients.

    Args:
        xs: one embedding [B, N, C_in] per stage, dense tokens or the view of a dense map; float32, bfloat16, float16
            or, then all activations, float64.
        weights: [C_out, C_in], contiguous, any floating dtype.
        biases: [C_out], contiguous, any floating dtype.
        targets: [B, N, C_out], each in its own layout and dtype.
        assistants: as targets, or empty.
        projection_scales: one element each, any floating dtype; empty without assistants.
        assistant_scales: the same.
        stage_weights: one factor per stage.
        wanted: per stage, whether the gradients of x, weight, bias, target, assistant, projection_scale and
            assistant_scale are wanted.
        tf32: whether products of float32 may take TF32.

    Returns:
        loss: 0-d, float32 (float64 for float64 activations).
        factors: [stages, 3] in the loss's dtype, the factors of what was kept.
        kept: stage by stage what is wanted of: f_p R W in x's layout and dtype (float32 for float16); f_p R^T x; f_p
            times R summed over tokens; R in the layout of the target, or of the assistant; the sums of R (x W^T + b)
            and of R A.

    Raises:
        RuntimeError: if the tensors are not as said above.

    Source:
        TransKD section III-B and the embedding assistant of variant EA.
    """
    plan = _pea_plan.plan_of(
        xs,
        weights,
        biases,
        targets,
        assistants,
        projection_scales,
        assistant_scales,
        stage_weights,
        wanted,
        tf32,
        _arch(),
    )
    new = xs[0].new_empty
    loss, factors = new((), dtype=plan.dtype), new((len(xs), 3), dtype=plan.dtype)
    workspace, shares = new(plan.parts, dtype=plan.dtype), new(plan.shares, dtype=torch.float64)
    kept: list[Tensor] = []
    merges = []
    with _common.device_guard(loss):
        for m, (x, stage) in enumerate(zip(xs, plan.stages, strict=True)):
            of_x, of_weight, of_bias, *_ = flags = wanted[_pea_plan.FLAGS * m : _pea_plan.FLAGS * (m + 1)]
            dx = torch.empty_like(x, dtype=_pea_plan.kept_dtype(x.dtype)) if of_x else None
            dweight = torch.empty_like(weights[m], dtype=plan.dtype) if of_weight else None
            dbias = torch.empty_like(biases[m], dtype=plan.dtype) if of_bias else None
            residual = None
            if stage.residual is not None:
                dtype, source = stage.residual
                residual = torch.empty_like(targets[m] if source == 3 else assistants[m], dtype=dtype)
            of_scales = new(2, dtype=plan.dtype) if flags[5] or flags[6] else None
            moments = new(2 * stage.column_programs, dtype=torch.float64) if of_scales is not None else None
            kept += [t for t in (dx, dweight, dbias, residual, of_scales) if t is not None]
            parts = workspace[plan.parts_at[m] :]
            scales = (projection_scales[m], assistant_scales[m]) if assistants else (None, None)
            merges.append((parts, dweight, dbias, scales, moments, of_scales))
            stage_kernel[(stage.column_programs + stage.row_programs,)](
                x,
                weights[m],
                biases[m],
                (targets[m], assistants[m] if assistants else None),
                scales,
                dx,
                residual,
                (parts if of_weight else None, parts[stage.weight_entries :] if of_bias else None),
                shares[plan.shares_at[m] :],
                moments,
                _common.halves(stage_weights[m] / stage.values),
                stage.sizes,
                stage.cut,
                stage.column_programs,
                TILE=stage.tile,
                MATH=_math(x, tf32),
                NARROW=stage.row_programs == 0,
                num_warps=stage.warps,
                num_stages=stage.buffers,
                **STAGE_OPTIONS,
            )
        for begin in range(0, len(xs), _pea_plan.STAGES_PER_LAUNCH):
            chosen = slice(begin, begin + _pea_plan.STAGES_PER_LAUNCH)
            _finish(plan, chosen, merges[chosen], stage_weights, shares, None if begin else loss, factors)
    return loss, factors, kept


def _finish(
    plan: _pea_plan.Plan,
    chosen: slice,
    merges: Sequence[
        tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor | None, ...], Tensor | None, Tensor | None]
    ],
    stage_weights: Sequence[float],
    shares: Tensor,
    loss: Tensor | None,
    factors: Tensor,
) -> None:
    stages = plan.stages[chosen]
    parts, weights, biases, scales, moments, of_scales = zip(*merges, strict=True)
    ends = tuple(itertools.accumulate(stage.merge_programs for stage in stages))
    finish_kernel[(ends[-1] + 1,)](
        parts,
        weights,
        biases,
        scales,
        tuple(stage.counts for stage in stages),
        ends,
        shares,
        plan.shares,
        loss,
        factors[chosen],
        moments,
        of_scales,
        tuple(
            _common.halves(2 * weight / stage.values)
            for weight, stage in zip(stage_weights[chosen], stages, strict=True)
        ),
        TILES=tuple(stage.merge_tile for stage in stages),
        BLOCK=SUM_BLOCK,
        **OPTIONS,
    )


def pea_bwd(grad: Tensor, factors: Tensor, kept: Sequence[Tensor], dtypes: Sequence[int]) -> list[Tensor]:
    """Computes the gradients of `pea_fwd`'s loss.

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        factors: as `pea_fwd` made them.
        kept: the same; they are left as they are.
        dtypes: six per stage, of the gradients of x, weight, bias, target, assistant and the two scales: -1 not
            wanted, 0 float32, 1 float16, 2 bfloat16, 3 float64.

    Returns:
        The wanted gradients in that order, in the layouts of what was kept.

    Raises:
        RuntimeError: if the arguments do not fit each other.

    Source:
        TransKD section III-B and the embedding assistant of variant EA.
    """
    entries = _pea_plan.backward_entries(grad, factors, kept, dtypes)
    gradients = [torch.empty_like(t, dtype=dtype) for t, _, dtype in entries]
    at_once = _pea_plan.CODES * _pea_plan.STAGES_PER_LAUNCH
    with _common.device_guard(factors):
        for begin in range(0, len(entries), at_once):
            tensors, columns, _ = zip(*entries[begin : begin + at_once], strict=True)
            counts = tuple(t.numel() for t in tensors)
            ends = tuple(itertools.accumulate(triton.cdiv(count, _pea_plan.SCALE_BLOCK) for count in counts))
            scale_kernel[(ends[-1],)](
                grad,
                factors,
                tensors,
                tuple(gradients[begin : begin + at_once]),
                counts,
                ends,
                COLUMNS=columns,
                BLOCK=_pea_plan.SCALE_BLOCK,
                **OPTIONS,
            )
    return gradients
