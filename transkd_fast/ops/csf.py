"""csf: cross selective fusion of a stage's map with the coarser stage's fused map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _checks, _collectives, _registration
from transkd_fast.ops._autograd import distinct, first_derivative
from transkd_fast.ops._batch_norm import TRACKED, Settings, settings_of, write_back
from transkd_fast.ops._layouts import in_layout, is_channels_last
from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.csf import Heads
from transkd_fast.reference.csf import csf as csf_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "csf"


def _same_precision(tensors: Sequence[Tensor]) -> str | None:
    return _checks.same_precision(tensors[:2])  # z and y; the parameters may have any dtype


backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _same_precision)


def _reduce_fake(z: Tensor, y: Tensor, parts: int) -> Tensor:
    return z.new_empty((z.shape[0], parts, 3, z.shape[1]), dtype=torch.float64)


def _fuse_fake(
    z: Tensor, y: Tensor, sums: Tensor, first: int, parameters: list[Tensor | None], *settings: Any
) -> tuple[Tensor, Tensor]:
    samples, channels, squeezed = sums.shape[0], z.shape[1], _given(parameters[2]).shape[0]
    entries = 2 * channels + squeezed + 3 * samples * channels + samples * squeezed
    return torch.empty_like(z), z.new_empty(entries, dtype=torch.float64)


def _bwd_reduce_fake(grad: Tensor, z: Tensor, y: Tensor, state: Tensor, parts: int) -> Tensor:
    return _reduce_fake(z, y, parts)


def _bwd_apply_fake(
    grad: Tensor,
    z: Tensor,
    y: Tensor,
    sums: Tensor,
    state: Tensor,
    first: int,
    parameters: list[Tensor | None],
    norm: int,
    fc_norm: int,
    wanted: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(_given(t)) for t, want in zip((z, y, *parameters), wanted, strict=True) if want]


_registration.register_fakes(
    csf_reduce=_reduce_fake,
    csf_fuse=_fuse_fake,
    csf_bwd_reduce=_bwd_reduce_fake,
    csf_bwd_apply=_bwd_apply_fake,
)
_registration.register_triton(
    OP,
    csf_reduce="(Tensor z, Tensor y, int parts) -> Tensor",
    csf_fuse="(Tensor z, Tensor y, Tensor sums, int first, Tensor?[] parameters, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? fc_running_mean,"
    " Tensor(e!)? fc_running_var, Tensor(f!)? fc_num_batches_tracked, int norm, float? momentum, float eps,"
    " int fc_norm, float? fc_momentum, float fc_eps) -> (Tensor v, Tensor state)",
    csf_bwd_reduce="(Tensor grad, Tensor z, Tensor y, Tensor state, int parts) -> Tensor",
    csf_bwd_apply="(Tensor grad, Tensor z, Tensor y, Tensor sums, Tensor state, int first, Tensor?[] parameters,"
    " int norm, int fc_norm, bool[] wanted) -> Tensor[]",
)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _parts(z: Tensor, channels_last: bool, backend: str) -> int:
    """Into how many parts a plane's sums are cut, so that their blocks fill a large GPU; a matter of sizes only."""
    batch, channels, height, width = z.shape
    blocks, wanted, least = (batch, 256, 256) if channels_last else (batch * channels, 1024, 2048)
    parts = 1
    while backend != "cpu" and blocks * parts < wanted and height * width >= 2 * parts * least:
        parts *= 2
    return parts


class _CSF(torch.autograd.Function):
    """Saves z and y as they are, and per (sample, channel) a few numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        settings: tuple[Settings, Settings],
        group: ProcessGroup | None,
        samples: tuple[int, ...],
        grad_enabled: bool,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        fc_running_mean: Tensor | None,
        fc_running_var: Tensor | None,
        fc_num_batches_tracked: Tensor | None,
        z: Tensor,
        y: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        parts = _parts(z, is_channels_last(z), backend)
        sums = _registration.raw_op("csf_reduce", backend)(z, y, parts)
        first = 0
        if group is not None:
            first = _collectives.first_of(samples, group)
            sums = _collectives.gather(_collectives.merge_moments(sums, z.shape[2:].numel()), samples, group)
        (norm, momentum, eps), (fc_norm, fc_momentum, fc_eps) = settings
        v, state = _registration.raw_op("csf_fuse", backend)(
            z,
            y,
            sums,
            first,
            parameters,
            running_mean,
            running_var,
            num_batches_tracked,
            fc_running_mean,
            fc_running_var,
            fc_num_batches_tracked,
            norm,
            momentum,
            eps,
            fc_norm,
            fc_momentum,
            fc_eps,
        )
        ctx.backend, ctx.kinds, ctx.parts = backend, (norm, fc_norm), parts
        ctx.group, ctx.samples, ctx.first = group, samples, first
        if grad_enabled:
            ctx.save_for_backward(state, z, y, *parameters)
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, *inputs = ctx.saved_tensors
        z, y, *parameters = inputs
        wanted = list(ctx.needs_input_grad[-len(inputs) :])
        with torch.no_grad():
            dense = in_layout(grad, is_channels_last(z))
            sums = _registration.raw_op("csf_bwd_reduce", ctx.backend)(dense, z, y, state, ctx.parts)
            if ctx.group is not None:
                sums = _collectives.gather(sums.sum(dim=1, keepdim=True), ctx.samples, ctx.group)
            gradients = iter(
                _registration.raw_op("csf_bwd_apply", ctx.backend)(
                    dense, z, y, sums, state, ctx.first, parameters, *ctx.kinds, wanted
                )
            )
        if torch.is_grad_enabled():
            sources = [grad, *(t for t in inputs if t is not None)]
            gradients = (first_derivative(OP, gradient, *sources) for gradient in gradients)
        result = [next(gradients) if want else None for want in wanted]
        return (*[None] * (len(ctx.needs_input_grad) - len(inputs)), *result)


def csf(
    z: Tensor,
    y: Tensor,
    bn: BatchNorm,
    fc_weight: Tensor,
    fc_bn: BatchNorm | None,
    heads: Heads,
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Fuses a stage's map with the coarser stage's fused map: ``v = a_0 BN(z) + a_1 up(y)``.

    up is nearest upsampling to z's size; g is the mean over pixels of BN(z) + up(y); r = ReLU(BN(W_fc g)); the
    attention (a_0, a_1) is the softmax over the two heads W_i r + b_i, per sample and channel.

    Args:
        z: output of the 1 x 1 convolution before its batch norm, [B, M, H, W], any floating dtype, NCHW or
            channels-last.
        y: fused map of the coarser stage, [B, M, h, w]; any size ratio. Where its layout is not z's, it is copied.
        bn: batch norm of z over M channels; running statistics are updated in place in training.
        fc_weight: squeeze layer W_fc, [L, M].
        fc_bn: batch norm of the squeeze layer over L channels, or None for none. Where it sees a single value per
            channel in training, it normalises with its running statistics and leaves them as they are.
        heads: ((W_0, b_0), (W_1, b_1)), each W [M, L], each b [M]; 0 weighs BN(z), 1 weighs up(y).
        backend: see :mod:`transkd_fast.backends`.
        process_group: processes over whose batches together both batch norms take their statistics; default: this
            process alone. Gradients of the parameters are then this process's share, to be summed over the group.
        samples: batch sizes of the group's processes in the order of ranks; default: asked of them, which waits for
            the device.

    Returns:
        The fused map v, [B, M, H, W], in z's dtype.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices do not fit, a map is empty, or a channel of z has a single value in training.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-C (cross selective fusion).
    """
    if len(heads) != 2:
        raise ValueError(f"csf: expected heads to have 2 entries, got {len(heads)}")
    (weight_0, bias_0), (weight_1, bias_1) = heads
    of_heads = {
        "heads[0] weight": weight_0,
        "heads[0] bias": bias_0,
        "heads[1] weight": weight_1,
        "heads[1] bias": bias_1,
    }
    _checks.check_floating(OP, z=z, y=y, fc_weight=fc_weight, **of_heads)
    _checks.check_shape(OP, "z", z, "B", "M", "H", "W")
    batch, channels = z.shape[:2]
    _checks.check_shape(OP, "y", y, batch, channels, "h", "w")
    _checks.check_not_empty(OP, "z", z)
    _checks.check_not_empty(OP, "y", y)
    _checks.check_shape(OP, "fc_weight", fc_weight, "L", channels)
    _checks.check_not_empty(OP, "fc_weight", fc_weight)
    squeezed = fc_weight.shape[0]
    for name, tensor in of_heads.items():
        _checks.check_shape(OP, name, tensor, *((channels, squeezed) if name.endswith("weight") else (channels,)))
    _checks.check_batch_norm(OP, "bn", bn, channels, z.device)
    if fc_bn is not None:
        _checks.check_batch_norm(OP, "fc_bn", fc_bn, squeezed, z.device)
    chosen = backends.choose(OP, (z, y, fc_weight, *of_heads.values()), backend)

    if samples is not None and process_group is None:
        raise ValueError("csf: expected a process_group with samples, got None")
    if process_group is not None and _collectives.size_of(process_group) == 1:
        process_group = None
    if process_group is None:
        samples = (batch,)
    elif samples is None:
        samples = _collectives.samples_of([z.shape], process_group, z.device)
    else:
        _collectives.check_samples(samples, batch, process_group)
    total = sum(samples)
    _checks.check_batch_statistics(OP, "z", z, bn, total)
    if fc_bn is not None and total == 1:
        if fc_bn.running_mean is None:
            raise ValueError(
                "csf: expected fc_bn to have running statistics, or more than 1 sample to take statistics over; "
                "use a larger batch"
            )
        fc_bn = fc_bn._replace(training=False)

    if chosen == "eager":
        return csf_reference(z, y, bn, fc_weight, fc_bn, heads, _collectives.joining(samples, process_group))
    z = in_layout(z, is_channels_last(z))
    y = in_layout(y, is_channels_last(z))
    affine = (None, None) if fc_bn is None else (fc_bn.weight, fc_bn.bias)
    parameters = [
        None if t is None else t.contiguous() for t in (bn.weight, bn.bias, fc_weight, *affine, *of_heads.values())
    ]
    inputs = distinct([z, y, *parameters])
    grad_enabled = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    map_settings, map_statistics = settings_of(bn)
    fc_settings, fc_statistics = settings_of(fc_bn)
    running = (*map_statistics, *fc_statistics)
    updated = [None if t is None else t.contiguous() for t in running]
    settings = map_settings, fc_settings
    v = _CSF.apply(chosen, settings, process_group, tuple(samples), grad_enabled, *updated, *inputs)
    kinds = [map_settings[0]] * 3 + [fc_settings[0]] * 3
    pairs = zip(running, updated, kinds, strict=True)
    write_back((own, new) for own, new, kind in pairs if own is not None and new is not None and kind == TRACKED)
    return v
