"""csf in Triton: normalise, upsample, attend and fuse, in three launches forward and three backward.

All that statistics, attention and their gradients need of the maps are sums per sample and channel. `reduce_kernel` and
`backward_reduce_kernel` take them, `attention_kernel` and `attention_backward_kernel` make of them a few coefficients
per sample and channel (`_csf_attention`), `fuse_kernel` and `backward_kernel` go over the maps again with these. Every
sum has a fixed order: results repeat bit for bit.

A fine pixel reads one coarse pixel, so the fine pixels fall apart into the *windows* of the coarse ones. A tile goes
over flat pixels and gathers y, or over windows: then y is loaded once, and the gradient's window sums stay in a
program. Between neighbouring stages windows are 2 x 2 (rule 0), and in contiguous maps every pass goes over them.

Tiles are [channels, pixels], for channels-last maps [pixels, channels]. `_csf_plan` holds what the launchers must check
and work out beforehand, and says what `sizes`, `scales` and `TILE` are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _csf_attention, _csf_passes, _csf_plan

# A limit on registers keeps ptxas from spilling for the sake of occupancy; multiplications and additions are fused also
# in the Triton versions that no longer do so by default.
OPTIONS = {"num_warps": _csf_plan.WARPS, "maxnreg": 168, "enable_fp_fusion": True}
ATTENTION_OPTIONS = {"num_warps": _csf_plan.ATTENTION_WARPS, "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit
def reduce_kernel(z, y, sums, scales, sizes, cut, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr):
    """Sums of the maps, part by part."""
    _csf_passes.reduce(z, y, sums, scales, sizes, cut, TILE, COARSE, RULE)


@triton.jit(do_not_specialize=["first"])
def attention_kernel(
    sums, first, parameters, statistics, state, work, sizes, settings, KINDS: tl.constexpr, TILES: tl.constexpr
):
    """Statistics and attention of the batch; one program."""
    _csf_attention.forward(sums, first, parameters, statistics, state, work, sizes, settings, KINDS, TILES)


@triton.jit
def fuse_kernel(
    z, y, v, coefficients, scales, sizes, batch, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr
):
    """The fused map."""
    _csf_passes.fuse(z, y, v, coefficients, scales, sizes, batch, TILE, COARSE, RULE)


@triton.jit
def backward_reduce_kernel(
    grad, z, y, mean, sums, scales, sizes, cut, TILE: tl.constexpr, COARSE: tl.constexpr, RULE: tl.constexpr
):
    """Sums of the maps and the upstream gradient, part by part."""
    _csf_passes.backward_reduce(grad, z, y, mean, sums, scales, sizes, cut, TILE, COARSE, RULE)


@triton.jit(do_not_specialize=["first"])
def attention_backward_kernel(
    sums, state, first, parameters, gradients, work, sizes, KINDS: tl.constexpr, TILES: tl.constexpr
):
    """Gradients of the parameters; one program."""
    _csf_attention.backward(sums, state, first, parameters, gradients, work, sizes, KINDS, TILES)


@triton.jit
def backward_kernel(grad, z, dz, dy, coefficients, scales, sizes, batch, TILE: tl.constexpr):
    """Gradients of the maps."""
    _csf_passes.backward(grad, z, dz, dy, coefficients, scales, sizes, batch, TILE)


def csf_reduce(z: Tensor, y: Tensor, parts: int) -> Tensor:
    """Computes the sums over the maps that the statistics and the attention need, part by part.

    Args:
        z: fine map [B, M, H, W], float32, bfloat16, float16 or float64; contiguous or channels-last.
        y: coarse map [B, M, h, w] in z's layout; float64 with a float64 z only.
        parts: into how many parts the pixels of a plane are cut; the last ones may be empty.

    Returns:
        [B, parts, 3, M], float64: the mean of z over the part, its sum of squares about that, and the sum of y times
        the number of fine pixels that read it.

    Raises:
        RuntimeError: if the maps are not as said above.

    Source:
        TransKD section III-C.
    """
    plan = _csf_plan.plan_of(z, y)
    _csf_plan.check_parts(parts)
    sums = z.new_empty((plan.batch, parts, 3, plan.sizes[0]), dtype=torch.float64)
    tile, coarse_tile = plan.flat(parts, _csf_plan.SUM_LOADS)
    with _common.device_guard(z):
        reduce_kernel[(plan.sum_programs(parts, tile[2]),)](
            z,
            y,
            sums,
            plan.scales,
            plan.sizes,
            plan.cut(parts),
            TILE=tile,
            COARSE=coarse_tile,
            RULE=plan.rule,
            **OPTIONS,
        )
    return sums


def csf_fuse(
    z: Tensor,
    y: Tensor,
    sums: Tensor,
    first: int,
    parameters: Sequence[Tensor | None],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    fc_running_mean: Tensor | None,
    fc_running_var: Tensor | None,
    fc_num_batches_tracked: Tensor | None,
    norm: int,
    momentum: float | None,
    eps: float,
    fc_norm: int,
    fc_momentum: float | None,
    fc_eps: float,
) -> tuple[Tensor, Tensor]:
    """Computes the fused map, and updates running statistics and counters.

    Args:
        z: as for `csf_reduce`.
        y: as for `csf_reduce`.
        sums: [K, parts, 3, M] of all K samples of the global batch, as `csf_reduce` makes them for these maps.
        first: index of our first sample among them.
        parameters: weight [M] and bias [M] of z's batch norm; squeeze layer [L, M]; weight [L] and bias [L] of its
            batch norm; weight [M, L] and bias [M] of head 0, then of head 1. Those of the batch norms may be None.
        running_mean: [M], or None where norm needs none.
        running_var: as running_mean.
        num_batches_tracked: one int64, or None.
        fc_running_mean: [L], as running_mean.
        fc_running_var: [L], as running_mean.
        fc_num_batches_tracked: one int64, or None.
        norm: how z is normalised: 1 with running statistics, 2 with the batch's, 3 with the batch's, which then move
            the running ones.
        momentum: weight of new statistics, or None for the cumulative average.
        eps: added to the variance.
        fc_norm: as norm, for the squeeze layer; 0 for no normalisation.
        fc_momentum: as momentum.
        fc_eps: as eps.

    Returns:
        v: [B, M, H, W] in z's dtype and layout.
        state: 1-D float64, what the backward needs: mean [M], 1/sigma [M], 1/sigma of the squeeze layer [L]; l_0 - l_1,
            g, mean of z less the channel's, each [K, M]; the squeeze layer's normalised output [K, L].

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-C.
    """
    plan = _csf_plan.plan_of(z, y)
    _csf_plan.check_sums(plan, z, sums, first)
    squeezed = _csf_plan.check_parameters(plan, z, parameters)
    statistics = (running_mean, running_var, num_batches_tracked)
    fc_statistics = (fc_running_mean, fc_running_var, fc_num_batches_tracked)
    _csf_plan.check_statistics("the batch norm", norm, momentum, statistics, plan.sizes[0], z, least=1)
    _csf_plan.check_statistics("the squeeze layer", fc_norm, fc_momentum, fc_statistics, squeezed, z, least=0)
    samples, parts = sums.shape[:2]
    flat, coarse_tile = plan.flat(1, _csf_plan.MAP_LOADS)
    v = torch.empty_like(z)
    state = sums.new_empty(_csf_plan.state_entries(samples, plan.sizes[0], squeezed))
    activations = sums.new_empty(samples * squeezed)
    coefficients = z.new_empty(4 * plan.batch * plan.sizes[0], dtype=plan.dtype)
    with _common.device_guard(z):
        attention_kernel[(1,)](
            sums,
            first,
            tuple(parameters),
            (statistics, fc_statistics),
            state,
            (activations, coefficients),
            plan.attention_sizes(samples, squeezed, parts),
            tuple(_common.halves(setting or 0.0) for setting in (momentum, eps, fc_momentum, fc_eps)),
            KINDS=(norm, fc_norm, momentum is None, fc_momentum is None),
            TILES=_csf_plan.attention_tiles(samples, plan.sizes[0], squeezed, parts),
            **ATTENTION_OPTIONS,
        )
        fuse_kernel[(plan.window_programs if plan.in_windows else plan.flat_programs,)](
            z,
            y,
            v,
            coefficients,
            plan.scales,
            plan.sizes,
            plan.batch,
            TILE=plan.windows if plan.in_windows else flat,
            COARSE=coarse_tile,
            RULE=plan.rule,
            **OPTIONS,
        )
    return v, state


def csf_bwd_reduce(grad: Tensor, z: Tensor, y: Tensor, state: Tensor, parts: int) -> Tensor:
    """Computes the sums over the maps that the gradients of statistics, attention and parameters need, part by part.

    Args:
        grad: dL/dv, in z's dtype and layout.
        z: as for `csf_reduce`.
        y: as for `csf_reduce`.
        state: as `csf_fuse` made it.
        parts: as for `csf_reduce`.

    Returns:
        [B, parts, 3, M], float64: the sums of G = grad, of G (z - mean) and of G up(y) over the part.

    Raises:
        RuntimeError: if the maps or the state are not as said above.

    Source:
        TransKD section III-C.
    """
    plan = _csf_plan.plan_of(z, y)
    _csf_plan.check_parts(parts)
    _csf_plan.check_grad(grad, z)
    _csf_plan.check_state(z, state, 2 * plan.sizes[0])
    sums = z.new_empty((plan.batch, parts, 3, plan.sizes[0]), dtype=torch.float64)
    flat, coarse_tile = plan.flat(parts, _csf_plan.MAP_LOADS)
    tile = plan.windows if plan.in_windows else flat
    with _common.device_guard(z):
        backward_reduce_kernel[(plan.sum_programs(parts, tile[3] if plan.in_windows else tile[2]),)](
            grad,
            z,
            y,
            state,
            sums,
            plan.scales,
            plan.sizes,
            plan.cut(parts),
            TILE=tile,
            COARSE=coarse_tile,
            RULE=plan.rule,
            **OPTIONS,
        )
    return sums


def csf_bwd_apply(
    grad: Tensor,
    z: Tensor,
    y: Tensor,
    sums: Tensor,
    state: Tensor,
    first: int,
    parameters: Sequence[Tensor | None],
    norm: int,
    fc_norm: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Computes the gradients of z, y and the parameters.

    Args:
        grad: as for `csf_bwd_reduce`.
        z: as for `csf_reduce`.
        y: as for `csf_reduce`.
        sums: [K, parts, 3, M] of all K samples of the global batch, as `csf_bwd_reduce` makes them for these maps.
        state: as `csf_fuse` made it.
        first: as for `csf_fuse`.
        parameters: as for `csf_fuse`.
        norm: as for `csf_fuse`.
        fc_norm: as for `csf_fuse`.
        wanted: flags of z, y and the 9 parameters.

    Returns:
        The wanted gradients in this order, each in its tensor's dtype, those of z and y in its layout. Those of the
        parameters are our own samples' share.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-C.
    """
    plan = _csf_plan.plan_of(z, y)
    _csf_plan.check_grad(grad, z)
    _csf_plan.check_sums(plan, z, sums, first)
    squeezed = _csf_plan.check_parameters(plan, z, parameters)
    _csf_plan.check_norm("the batch norm", norm, least=1)
    _csf_plan.check_norm("the squeeze layer", fc_norm, least=0)
    _csf_plan.check_wanted(wanted, parameters)
    samples, parts = sums.shape[:2]
    channels = plan.sizes[0]
    _csf_plan.check_state(z, state, _csf_plan.state_entries(samples, channels, squeezed))
    gradients = [
        torch.empty_like(tensor) if tensor is not None and want else None
        for tensor, want in zip((z, y, *parameters), wanted, strict=True)
    ]
    dz, dy, *of_parameters = gradients
    large = dz is not None or dy is not None
    scratch = sums.new_empty(3 * samples * channels + 2 * samples * squeezed)
    coefficients = z.new_empty(6 * plan.batch * channels, dtype=plan.dtype) if large else None
    with _common.device_guard(z):
        attention_backward_kernel[(1,)](
            sums,
            state,
            first,
            tuple(parameters),
            tuple(of_parameters),
            (scratch, coefficients),
            plan.attention_sizes(samples, squeezed, parts),
            KINDS=(norm, fc_norm),
            TILES=_csf_plan.attention_tiles(samples, channels, squeezed, parts),
            **ATTENTION_OPTIONS,
        )
        if large:
            backward_kernel[(plan.window_programs,)](
                grad,
                z if dz is not None and norm != 1 else None,
                dz,
                dy,
                coefficients,
                plan.scales,
                plan.sizes,
                plan.batch,
                TILE=plan.windows,
                **OPTIONS,
            )
    return [gradient for gradient in gradients if gradient is not None]
