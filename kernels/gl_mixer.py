"""gl_mixer in Triton: two gated convolutions over tokens and their mix, in one launch forward and three backward.

`mix_kernel` makes both convolutions as products over three shifted rows, and the mix in their epilogue. Backward:
`gate_backward_kernel` goes over the maps once, for D, the gradients of the convolutions' outputs, and sums of them;
`products_kernel` makes the gradients of e and of the weights from D, tile by tile; `merge_kernel` adds up what the
parts of the rows have summed. Every sum has a fixed order: results repeat bit for bit.

`_gl_mixer_plan` holds what the launchers must check and work out beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from transkd_fast.kernels import _common, _gl_mixer_plan
from transkd_fast.kernels import _gl_mixer_products as products
from transkd_fast.kernels import _gl_mixer_sums as merges
from transkd_fast.kernels._common import cast

# Multiplications and additions are fused also in the Triton versions that no longer do so by default. Registers have no
# limit: with one, even of 255, ptxas keeps so many operands under way that it spills.
PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def mix_kernel(
    e,
    u,
    weights,
    biases,
    scalars,
    out,
    branches,
    sizes,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of the mixed tokens; branches [rows, 2, C] or None, for both convolutions' outputs."""
    VECTOR: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    dtype: tl.constexpr = tl.float64 if e.dtype.element_ty == tl.float64 else tl.float32
    rows, _, channels = sizes
    chunks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    row = pid // chunks * ROWS + tl.arange(0, ROWS)
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    value, gate = products.convolve(e, weights, row, channel, sizes, PRECISION, TILE)
    value += tl.load(biases[0] + channel, mask=channel < channels, other=0).to(dtype)[None, :]
    gate += tl.load(biases[1] + channel, mask=channel < channels, other=0).to(dtype)[None, :]
    if branches is not None:
        at, inside = products.tokens_at(row, 0, rows, channel, 2, sizes, VECTOR)
        tl.store(branches + at, value, mask=inside)
        tl.store(branches + channels // VECTOR * VECTOR + at, gate, mask=inside)
    at, inside = products.tokens_at(row, 0, rows, channel, 1, sizes, VECTOR)
    opened, _closed = products.logistic(gate)
    mix = tl.load(scalars[0]).to(dtype) * tl.load(u + at, mask=inside, other=0).to(dtype)
    mix += tl.load(scalars[1]).to(dtype) * (value * opened)
    if RESIDUAL:
        mix += tl.load(e + at, mask=inside, other=0).to(dtype)
    tl.store(out + at, cast(mix, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part_rows"])
def gate_backward_kernel(
    grad,
    u,
    branches,
    scalars,
    d,
    du,
    sums,
    shares,
    part_rows,
    sizes,
    NEEDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A part of the rows, some channels: D [rows, 2, C], dL/du, sums [parts, 2, C] of D, shares of dL/dscalars.

    NEEDS: which of D's branches, then which of the biases', then which of the scalars' gradients are needed; du is
    None where it is not.
    """
    VECTOR: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    OPENED: tl.constexpr = NEEDS[0] or NEEDS[2] or NEEDS[5]
    VALUED: tl.constexpr = NEEDS[1] or NEEDS[3] or NEEDS[5]
    dtype: tl.constexpr = branches.dtype.element_ty
    rows, _, channels = sizes
    row_length = channels // VECTOR * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    part = pid // chunks
    channel = pid % chunks * CHANNELS + tl.arange(0, CHANNELS)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    of_attention, of_convolution = tl.load(scalars[0]).to(dtype), tl.load(scalars[1]).to(dtype)
    of_value = tl.zeros([ROWS, CHANNELS], dtype)
    of_gate, of_u, of_mix = of_value, of_value, of_value
    for begin in range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        at, inside = products.tokens_at(row, 0, last, channel, 1, sizes, VECTOR)
        at_branches, _inside = products.tokens_at(row, 0, last, channel, 2, sizes, VECTOR)
        g = tl.load(grad + at, mask=inside, other=0).to(dtype)
        if du is not None:
            tl.store(du + at, cast(of_attention * g, du.dtype.element_ty), mask=inside)
        if NEEDS[4]:
            of_u += g * tl.load(u + at, mask=inside, other=0).to(dtype)
        if OPENED or VALUED:
            gate = tl.load(branches + row_length + at_branches, mask=inside, other=0)
            opened, closed = products.logistic(gate)
        if OPENED:
            through = g * opened
            d_value = of_convolution * through
            if NEEDS[0]:
                tl.store(d + at_branches, cast(d_value, d.dtype.element_ty), mask=inside)
            if NEEDS[2]:
                of_value += d_value
        if VALUED:
            value = tl.load(branches + at_branches, mask=inside, other=0)
            if NEEDS[5]:
                of_mix += through * value
            if NEEDS[1] or NEEDS[3]:
                d_gate = of_convolution * g * value * (opened * closed)
                if NEEDS[1]:
                    tl.store(d + row_length + at_branches, cast(d_gate, d.dtype.element_ty), mask=inside)
                if NEEDS[3]:
                    of_gate += d_gate
    at_sums = part.to(tl.int64) * 2 * channels + channel
    if NEEDS[2]:
        tl.store(sums + at_sums, tl.sum(of_value, axis=0), mask=channel < channels)
    if NEEDS[3]:
        tl.store(sums + channels + at_sums, tl.sum(of_gate, axis=0), mask=channel < channels)
    if NEEDS[4]:
        tl.store(shares + 2 * pid, tl.sum(of_u))
    if NEEDS[5]:
        tl.store(shares + 2 * pid + 1, tl.sum(of_mix))


@triton.jit(do_not_specialize=["programs", "part_rows"])
def products_kernel(
    d,
    e,
    weights,
    grad,
    de,
    partials,
    programs,
    part_rows,
    sizes,
    RESIDUAL: tl.constexpr,
    BRANCHES: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHT_TILE: tl.constexpr,
):
    """The first `programs` programs: a tile of dL/de each, the others: one of a part's share of dL/dweights.

    BRANCHES: the weights whose gradients are wanted, 0 and 1.
    """
    pid = tl.program_id(0)
    if pid < programs:
        products.input_gradient(pid, d, weights, grad, de, sizes, RESIDUAL, PRECISION, TILE)
    else:
        products.weight_gradient(pid - programs, d, e, partials, part_rows, sizes, BRANCHES, PRECISION, WEIGHT_TILE)


@triton.jit
def merge_kernel(
    partials,
    sums,
    shares,
    weights,
    biases,
    scalars,
    counts,
    ends,
    channels,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of weights, biases and scalars, each a pair or None, from the parts' shares of them.

    Args:
        partials: [parts, wanted weights, 3, C, C].
        sums: [parts, 2, C].
        shares: [programs, 2].
        weights: dL/dweight of both convolutions.
        biases: dL/dbias of both convolutions.
        scalars: dL/dw_att and dL/dw_conv.
        counts: parts of the weights, parts of the biases, programs of the scalars.
        ends: first program after those of each gradient.
        channels: C.
        BLOCK: entries that a program merges.
        PARTS: parts that it holds at a time.
    """
    pid = tl.program_id(0)
    first = 0
    BOTH: tl.constexpr = weights[0] is not None and weights[1] is not None
    for k in tl.static_range(2):
        if (pid >= first) & (pid < ends[k]):
            merges.merge_weight(
                pid - first, partials, weights[k], k if BOTH else 0, 2 if BOTH else 1, counts[0], channels, BLOCK
            )
        first = ends[k]
    for k in tl.static_range(2):
        if (pid >= first) & (pid < ends[2 + k]):
            merges.merge_bias(pid - first, sums, biases[k], k, counts[1], channels, BLOCK, PARTS)
        first = ends[2 + k]
    for k in tl.static_range(2):
        if (pid >= first) & (pid < ends[4 + k]):
            merges.merge_scalar(shares, scalars[k], k, counts[2], BLOCK)
        first = ends[4 + k]


def gl_mixer_fwd(
    e: Tensor,
    u: Tensor,
    conv_a_weight: Tensor,
    conv_a_bias: Tensor,
    conv_b_weight: Tensor,
    conv_b_bias: Tensor,
    attention_weight: Tensor,
    conv_weight: Tensor,
    residual: bool,
    keep: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Computes w_att u + w_conv (conv_a(e) * sigmoid(conv_b(e))), plus e with `residual`.

    Args:
        e: tokens [B, N, C], float32, bfloat16, float16 or float64; contiguous, as all arguments.
        u: [B, N, C]; float64 with a float64 e only.
        conv_a_weight: value convolution, [C, C, 3], any floating dtype, as all parameters.
        conv_a_bias: [C].
        conv_b_weight: gate convolution, [C, C, 3].
        conv_b_bias: [C].
        attention_weight: w_att, one element.
        conv_weight: w_conv, one element.
        residual: whether e is added.
        keep: whether the backward will follow.
        tf32: whether float32 products may take TF32 tensor cores.

    Returns:
        out: [B, N, C] in e's dtype.
        branches: [B, N, 2, C] float32 (float64 for float64 tokens), both convolutions' outputs; empty without keep.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-D.
    """
    arguments = (e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight)
    plan = _gl_mixer_plan.plan_of(*arguments, tf32)
    shape = (*e.shape[:2], _gl_mixer_plan.BRANCHES, e.shape[2]) if keep else (0,)
    branches = e.new_empty(shape, dtype=plan.dtype)
    out = torch.empty_like(e)
    with _common.device_guard(e):
        mix_kernel[(plan.programs,)](
            e,
            u,
            (conv_a_weight, conv_b_weight),
            (conv_a_bias, conv_b_bias),
            (attention_weight, conv_weight),
            out,
            branches if keep else None,
            plan.sizes,
            RESIDUAL=residual,
            PRECISION=plan.precision,
            TILE=plan.tile,
            **PRODUCT_OPTIONS,
        )
    return out, branches


def gl_mixer_bwd(
    grad: Tensor,
    e: Tensor,
    u: Tensor,
    branches: Tensor,
    conv_a_weight: Tensor,
    conv_a_bias: Tensor,
    conv_b_weight: Tensor,
    conv_b_bias: Tensor,
    attention_weight: Tensor,
    conv_weight: Tensor,
    residual: bool,
    wanted: Sequence[bool],
    tf32: bool,
) -> list[Tensor]:
    """Computes the gradients of `gl_mixer_fwd`'s output with respect to its arguments.

    Args:
        grad: dL/dout, [B, N, C] in e's dtype.
        e: as for `gl_mixer_fwd`.
        u: as for `gl_mixer_fwd`.
        branches: as `gl_mixer_fwd` kept them.
        conv_a_weight: as for `gl_mixer_fwd`.
        conv_a_bias: as for `gl_mixer_fwd`.
        conv_b_weight: as for `gl_mixer_fwd`.
        conv_b_bias: as for `gl_mixer_fwd`.
        attention_weight: as for `gl_mixer_fwd`.
        conv_weight: as for `gl_mixer_fwd`.
        residual: as for `gl_mixer_fwd`.
        wanted: flags of e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight.
        tf32: as for `gl_mixer_fwd`.

    Returns:
        The wanted gradients in this order, each in its tensor's dtype and shape.

    Raises:
        RuntimeError: if the arguments are not as said above.

    Source:
        TransKD section III-D.
    """
    arguments = (e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight)
    plan = _gl_mixer_plan.plan_of(*arguments, tf32)
    _gl_mixer_plan.check_backward(plan, e, grad, branches, wanted)
    gradients = [torch.empty_like(t) if want else None for t, want in zip(arguments, wanted, strict=True)]
    de, du, *_ = gradients
    weights, biases, scalars = (gradients[2], gradients[4]), (gradients[3], gradients[5]), tuple(gradients[6:])
    channels = e.shape[2]
    of_weights = tuple(k for k, gradient in enumerate(weights) if gradient is not None)
    needs = (
        *(de is not None or gradient is not None for gradient in weights),
        *(gradient is not None for gradient in (*biases, *scalars)),
    )
    programs = plan.programs if de is not None else 0
    weight_programs, weight_parts, weight_part_rows = plan.weight_parts(len(of_weights))
    d = e.new_empty((plan.sizes[0], _gl_mixer_plan.BRANCHES, channels)) if any(needs[:2]) else None
    sums = branches.new_empty((plan.parts, _gl_mixer_plan.BRANCHES, channels)) if any(needs[2:4]) else None
    shares = branches.new_empty((plan.pass_programs, 2)) if any(needs[4:]) else None
    partials = None
    if of_weights:
        partials = branches.new_empty((weight_parts, len(of_weights), _gl_mixer_plan.TAPS, channels, channels))
    with _common.device_guard(e):
        if any(wanted):
            gate_backward_kernel[(plan.pass_programs,)](
                grad,
                u,
                branches,
                (attention_weight, conv_weight),
                d,
                du,
                sums,
                shares,
                plan.part_rows,
                plan.sizes,
                NEEDS=needs,
                TILE=plan.pass_tile,
                **OPTIONS,
            )
        if d is not None:
            products_kernel[(programs + weight_programs,)](
                d,
                e,
                (conv_a_weight, conv_b_weight),
                grad,
                de,
                partials,
                programs,
                weight_part_rows,
                plan.sizes,
                RESIDUAL=residual,
                BRANCHES=of_weights,
                PRECISION=plan.precision,
                TILE=plan.tile,
                WEIGHT_TILE=plan.weight_tile,
                **PRODUCT_OPTIONS,
            )
        merged = (*weights, *biases, *scalars)
        ends = plan.merge_ends([gradient is not None for gradient in merged])
        if ends[-1]:
            merge_kernel[(ends[-1],)](
                partials,
                sums,
                shares,
                weights,
                biases,
                scalars,
                (weight_parts, plan.parts, plan.pass_programs),
                ends,
                channels,
                BLOCK=_gl_mixer_plan.MERGE_BLOCK,
                PARTS=_gl_mixer_plan.MERGE_PARTS,
                **OPTIONS,
            )
    return [gradient for gradient in gradients if gradient is not None]
