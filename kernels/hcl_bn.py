"""hcl_bn in Triton: hcl of BN(u), which is never stored; one launch for the moments, four forward, two backward.

With u' = u less its channel's mean and d = BN(u) - teacher. Forward: `statistics_kernel` merges the moments that
`reduce_kernel` took, and makes of them BN(u) = A (u - S) + O; `sum_kernel` takes the sums of d, u' and d u' per cell
(`_hcl_cells`), and that of d^2; `pool_kernel` makes of these the pooled terms, the gradient's table, and the sums over
each plane of the gradient g = alpha d + table[cell] and of g times the normalised u; `finish_kernel` adds the loss up
and counts the batch. Backward: as g is linear in u, so is du = P (u - S) + Q teacher + F table[cell] + E;
`gradients_kernel` makes the coefficients of each channel, `backward_kernel` goes over the maps.

Every sum has a fixed order: results repeat bit for bit. A launch takes several stages of any shapes, dtypes and
layouts; each program works for one of them. `_hcl_plan` and `_hcl_bn_plan` hold what the launchers must check and work
out beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _batch_norm as bn
from transkd_fast.kernels import _common, _hcl_bn_passes, _hcl_bn_plan, _hcl_bn_statistics
from transkd_fast.kernels import _hcl_cells as cells
from transkd_fast.kernels._common import whole

# A limit on registers keeps ptxas from spilling for the sake of occupancy; multiplications and additions are fused also
# in the Triton versions that no longer do so by default.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
TOTAL_BLOCK = 2048


@triton.jit
def reduce_kernel(us, moments, sizes, cuts, ends, TILES: tl.constexpr):
    """Per stage the moments of u, part by part."""
    pid = tl.program_id(0)
    first = 0
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            _hcl_bn_statistics.reduce(pid - first, us[m], moments[m], sizes[m], cuts[m], TILE)
        first = ends[m]


@triton.jit
def statistics_kernel(
    moments,
    rows,
    affine,
    running,
    states,
    coefficients,
    settings,
    sizes,
    ends,
    KINDS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per stage what the channels are normalised with; updates running statistics."""
    pid = tl.program_id(0)
    first = 0
    for m in tl.static_range(len(KINDS)):
        if (pid >= first) & (pid < ends[m]):
            KIND: tl.constexpr = KINDS[m]
            _hcl_bn_statistics.statistics(
                pid - first,
                moments[m],
                rows[m],
                affine[m],
                running[m],
                states[m],
                coefficients[m],
                settings[m],
                sizes[m][1],
                KIND,
                CHANNELS,
                ROWS,
            )
        first = ends[m]


@triton.jit(do_not_specialize=["losses"])
def sum_kernel(us, teachers, coefficients, partials, losses, scales, sizes, ends, TILES: tl.constexpr):
    """Per stage the three sums to partial [3, B, cells, parts, C]; per program its share of the loss's pixel terms."""
    pid = tl.program_id(0)
    first = 0
    share = tl.cast(0, losses.dtype.element_ty)
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            if len(TILE) == 4:
                squares = _hcl_bn_passes.sum_planes(
                    pid - first, us[m], teachers[m], coefficients[m], partials[m], sizes[m], TILE
                )
            else:
                squares = _hcl_bn_passes.sum_pixels(
                    pid - first, us[m], teachers[m], coefficients[m], partials[m], sizes[m], TILE
                )
            share = squares * whole(scales[m], squares.dtype)
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit(do_not_specialize=["losses"])
def pool_kernel(
    partials,
    states,
    tables,
    sums,
    losses,
    alphas,
    scales,
    sizes,
    parts,
    ends,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Per stage the pooled terms: the gradient's table, its sums over planes, and the loss's share."""
    pid = tl.program_id(0)
    first = 0
    share = tl.cast(0, losses.dtype.element_ty)
    for m in tl.static_range(len(tables)):
        if (pid >= first) & (pid < ends[m]):
            share = _hcl_bn_passes.pool(
                pid - first,
                partials[m],
                states[m],
                tables[m],
                sums[m],
                alphas[m],
                scales[m],
                sizes[m],
                parts[m],
                CELLS,
                CHANNELS,
                PARTS,
            )
        first = ends[m]
    tl.store(losses + pid, share)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(losses, loss, count, counters, BLOCK: tl.constexpr):
    """The sum of losses [count]; counts the batch. One program, after all that read the counters."""
    tl.store(loss, cells.total_of(losses, count, loss.dtype.element_ty, BLOCK))
    for m in tl.static_range(len(counters)):
        bn.count(counters[m])


@triton.jit
def gradients_kernel(
    grad,
    states,
    sums,
    means,
    affine,
    of_affine,
    coefficients,
    alphas,
    sizes,
    ends,
    NORMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Per stage the gradients of weight and bias, and the coefficients of that of u."""
    pid = tl.program_id(0)
    first = 0
    for m in tl.static_range(len(NORMS)):
        if (pid >= first) & (pid < ends[m]):
            NORM: tl.constexpr = NORMS[m]
            _hcl_bn_statistics.gradients(
                pid - first,
                grad,
                states[m],
                sums[m],
                means[m],
                affine[m],
                of_affine[m],
                coefficients[m],
                alphas[m],
                sizes[m],
                NORM,
                CHANNELS,
                SAMPLES,
            )
        first = ends[m]


@triton.jit
def backward_kernel(us, teachers, tables, coefficients, gradients, sizes, ends, TILES: tl.constexpr):
    """Per stage du = P (u - S) + Q teacher + F table + E."""
    pid = tl.program_id(0)
    first = 0
    for m in tl.static_range(len(TILES)):
        if (pid >= first) & (pid < ends[m]):
            TILE: tl.constexpr = TILES[m]
            if len(TILE) == 4:
                _hcl_bn_passes.backward_planes(
                    pid - first, us[m], teachers[m], tables[m], coefficients[m], gradients[m], sizes[m], TILE
                )
            else:
                _hcl_bn_passes.backward_pixels(
                    pid - first, us[m], teachers[m], tables[m], coefficients[m], gradients[m], sizes[m], TILE
                )
        first = ends[m]


def hcl_bn_reduce(us: Sequence[Tensor], parts: Sequence[int]) -> list[Tensor]:
    """Computes the moments of each channel's values, part by part.

    Args:
        us: one map [B, C, H, W] per stage; float32, bfloat16, float16 or, then all maps, float64; contiguous or
            channels-last.
        parts: per stage into how many parts the B H W values of a channel are cut; the last ones may be empty.

    Returns:
        Per stage [parts, 3, C], float64: number of values, their mean, the sum of squared deviations from it; zeros for
        an empty part.

    Raises:
        RuntimeError: if the maps are not as said above, or a number of parts is not positive.

    Source:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance"; csrc/common/batch_norm.h.
    """
    launches = _hcl_bn_plan.check_reduce(us, parts)
    moments = [u.new_empty((n, 3, u.shape[1]), dtype=torch.float64) for u, n in zip(us, parts, strict=True)]
    with _common.device_guard(us[0]):
        for launch in launches:
            reduce_kernel[(launch.programs,)](
                tuple(us[launch.stages]),
                tuple(moments[launch.stages]),
                launch.sizes,
                launch.cuts,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
    return moments


def hcl_bn_fwd(
    us: Sequence[Tensor],
    teachers: Sequence[Tensor],
    moments: Sequence[Tensor],
    affine: Sequence[Tensor | None],
    running: Sequence[Tensor],
    batches: Sequence[Tensor],
    norms: Sequence[int],
    momenta: Sequence[float],
    eps: Sequence[float],
    weights: Sequence[float],
    level_weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes hcl of BN(u) of all stages, weighted and summed; updates running statistics and counters.

    Args:
        us: as for `hcl_bn_reduce`.
        teachers: the same shapes and layouts; the dtypes may differ.
        moments: per stage [rows, 3, C], float64, of all values that the statistics are taken over, as `hcl_bn_reduce`
            makes them; no rows where running statistics normalise.
        affine: weight and bias [C] of every stage, of any floating dtype, or None.
        running: running mean and variance [C] of every stage of norm 1 or 3, of any floating dtype.
        batches: the counter of every stage of norm 3, one int64 each.
        norms: how each stage is normalised: 1 with running statistics, 2 with the batch's, 3 with the batch's, which
            then move the running ones.
        momenta: per stage the weight of new statistics, negative for the average over all batches.
        eps: per stage, added to the variance.
        weights: one factor per stage.
        level_weights: three; the n-th level that a map uses, of 4 x 4, 2 x 2 and 1 x 1, has the n-th, the full size 1.

    Returns:
        loss: 0-d, float32 (float64 for float64 maps).
        tables: of all stages one after the other, [B, cells, C] in the loss's dtype: the gradient of the pooled terms
            per pixel of each cell.
        states: likewise [2, C], float64: mean and 1 / sigma.
        sums: likewise [B, 2, C], float64: sums over a plane of g = dL/dBN(u), and of g times the normalised u.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-B; csrc/common/hcl_pyramid.h for the cells.
    """
    plan = _hcl_bn_plan.plan_of(us, teachers, weights, level_weights)
    bns = _hcl_bn_plan.check_norms(us, affine, running, batches, norms, momenta, eps)
    _hcl_bn_plan.check_moments(moments, us, norms)
    u = us[0]
    all_tables, tables = _hcl_bn_plan.flat(u, [stage.table_shape for stage in plan.stages], plan.dtype)
    all_states, states = _hcl_bn_plan.flat(u, [(2, u.shape[1]) for u in us], torch.float64)
    all_sums, sums = _hcl_bn_plan.flat(u, [(u.shape[0], 2, u.shape[1]) for u in us], torch.float64)
    loss = u.new_empty((), dtype=plan.dtype)
    workspace = u.new_empty(plan.workspace, dtype=plan.dtype)
    partials = tuple(workspace[begin:] for begin in plan.partial_at)
    losses = workspace[plan.losses_at :]
    coefficients = _hcl_bn_plan.coefficients(us, _hcl_bn_plan.FORWARD_COEFFICIENTS, plan.dtype)
    with _common.device_guard(u):
        for launch in plan.launches:
            chosen = launch.stages
            ends = _hcl_bn_plan.blocks(us[chosen], _hcl_bn_plan.MOMENT_CHANNELS)
            statistics_kernel[(ends[-1],)](
                tuple(moments[chosen]),
                tuple(len(rows) for rows in moments[chosen]),
                bns.affine[chosen],
                bns.statistics[chosen],
                tuple(states[chosen]),
                coefficients[chosen],
                bns.settings[chosen],
                launch.sizes,
                ends,
                KINDS=bns.kinds[chosen],
                CHANNELS=_hcl_bn_plan.MOMENT_CHANNELS,
                ROWS=_hcl_bn_plan.MOMENT_ROWS,
                **OPTIONS,
            )
            sum_kernel[(launch.programs,)](
                tuple(us[chosen]),
                tuple(teachers[chosen]),
                coefficients[chosen],
                partials[chosen],
                losses[launch.losses_at :],
                launch.pixel_scales,
                launch.sizes,
                launch.ends,
                TILES=launch.tiles,
                **OPTIONS,
            )
            pool_kernel[(launch.pool_programs,)](
                partials[chosen],
                tuple(states[chosen]),
                tuple(tables[chosen]),
                tuple(sums[chosen]),
                losses[launch.pool_losses_at :],
                launch.alphas,
                launch.pool_scales,
                launch.sizes,
                launch.parts,
                launch.pool_ends,
                CELLS=launch.pool_tile[0],
                CHANNELS=launch.pool_tile[1],
                PARTS=launch.pool_tile[2],
                **OPTIONS,
            )
        finish_kernel[(1,)](losses, loss, plan.losses, tuple(batches), BLOCK=TOTAL_BLOCK, **OPTIONS)
    return loss, all_tables, all_states, all_sums


def hcl_bn_bwd(
    grad: Tensor,
    us: Sequence[Tensor],
    teachers: Sequence[Tensor],
    tables: Sequence[Tensor],
    states: Sequence[Tensor],
    sums: Sequence[Tensor],
    means: Sequence[Tensor],
    affine: Sequence[Tensor | None],
    norms: Sequence[int],
    weights: Sequence[float],
    level_weights: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Computes the gradients of the maps and of the batch norms' parameters.

    Args:
        grad: upstream gradient, 0-d, in the loss's dtype.
        us: as for `hcl_bn_fwd`.
        teachers: as for `hcl_bn_fwd`.
        tables: as `hcl_bn_fwd` made them, per stage [B, cells, C].
        states: likewise, per stage [2, C].
        sums: likewise, per stage [B, 2, C].
        means: per stage [2, C], float64, the means of grad g and of grad g times the normalised u over all values that
            the statistics are taken over; none if these are the maps' own.
        affine: as for `hcl_bn_fwd`.
        norms: as for `hcl_bn_fwd`.
        weights: as for `hcl_bn_fwd`.
        level_weights: as for `hcl_bn_fwd`.
        wanted: per stage flags of u, weight and bias.

    Returns:
        The wanted gradients in this order, each in its tensor's dtype and memory layout. Those of the parameters are
        these maps' share.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-B.
    """
    plan = _hcl_bn_plan.plan_of(us, teachers, weights, level_weights)
    pairs = _hcl_bn_plan.check_affine(us, affine, norms)
    plan.check_backward(grad, tables)
    _hcl_bn_plan.check_kept(us, states, sums, means, affine, wanted)
    tensors = [t for u, pair in zip(us, pairs, strict=True) for t in (u, *pair)]
    gradients = [
        torch.empty_like(t) if want and t is not None else None for t, want in zip(tensors, wanted, strict=True)
    ]
    coefficients = _hcl_bn_plan.coefficients(us, _hcl_bn_plan.BACKWARD_COEFFICIENTS, plan.dtype)
    with _common.device_guard(grad):
        for launch in plan.launches:
            chosen = [m for m in range(*launch.stages.indices(len(us))) if any(wanted[3 * m : 3 * m + 3])]
            if not chosen:
                continue
            ends = _hcl_bn_plan.blocks([us[m] for m in chosen], _hcl_bn_plan.GRADIENT_CHANNELS)
            gradients_kernel[(ends[-1],)](
                grad,
                tuple(states[m] for m in chosen),
                tuple(sums[m] for m in chosen),
                tuple(means[m] if means else None for m in chosen),
                tuple(pairs[m] for m in chosen),
                tuple(tuple(gradients[3 * m + 1 : 3 * m + 3]) for m in chosen),
                tuple(coefficients[m] if wanted[3 * m] else None for m in chosen),
                tuple(launch.alphas[m - launch.stages.start] for m in chosen),
                tuple(plan.stages[m].sizes for m in chosen),
                ends,
                NORMS=tuple(norms[m] for m in chosen),
                CHANNELS=_hcl_bn_plan.GRADIENT_CHANNELS,
                SAMPLES=_hcl_bn_plan.GRADIENT_SAMPLES,
                **OPTIONS,
            )
            chosen = [m for m in chosen if wanted[3 * m]]
            if not chosen:
                continue
            ends = tuple(itertools.accumulate(plan.stages[m].programs for m in chosen))
            backward_kernel[(ends[-1],)](
                tuple(us[m] for m in chosen),
                tuple(teachers[m] for m in chosen),
                tuple(tables[m] for m in chosen),
                tuple(coefficients[m] for m in chosen),
                tuple(gradients[3 * m] for m in chosen),
                tuple(plan.stages[m].sizes for m in chosen),
                ends,
                TILES=tuple(plan.stages[m].tile for m in chosen),
                **OPTIONS,
            )
    return [gradient for gradient in gradients if gradient is not None]
