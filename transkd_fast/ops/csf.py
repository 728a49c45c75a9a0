"""The op csf: cross selective fusion of a stage's map with the coarser stage's fused map."""

from __future__ import annotations

from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops._checks import (
    check_batch_norm,
    check_batch_statistics,
    check_floating,
    check_not_empty,
    check_shape,
)
from transkd_fast.reference import csf as reference
from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.csf import Heads

backends.register_op("csf")


def csf(
    z: Tensor,
    y: Tensor,
    bn: BatchNorm,
    fc_weight: Tensor,
    fc_bn: BatchNorm | None,
    heads: Heads,
    backend: str | None = None,
) -> Tensor:
    """Fuses a stage's map with the coarser stage's fused map: v = a_0 BN(z) + a_1 up(y).

    up is nearest upsampling to z's size; g is the mean over pixels of BN(z) + up(y); r = ReLU(BN(W_fc g)); the
    attention (a_0, a_1) is the softmax over the two heads W_i r + b_i, per sample and channel.

    Args:
        z: Output of the 1 x 1 convolution before its batch norm, shape [B, M, H, W], any floating dtype, contiguous or
            channels-last.
        y: Fused map of the coarser stage, shape [B, M, h, w]; any size ratio.
        bn: Batch norm of z over M channels; running statistics are updated in place in training.
        fc_weight: Squeeze layer W_fc, shape [L, M].
        fc_bn: Batch norm of the squeeze layer over L channels, or None for none. Where it sees a single value per
            channel in training, it normalises with its running statistics and leaves them as they are.
        heads: ((W_0, b_0), (W_1, b_1)), each W of shape [M, L], each b of shape [M]; 0 weighs BN(z), 1 weighs up(y).
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    Returns:
        The fused map v, shape [B, M, H, W], in z's dtype.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes or devices do not fit, a map is empty, or a channel of z has a single value in training.

    Source: TransKD section III-C (cross selective fusion).
    """
    if len(heads) != 2:
        raise ValueError(f"csf: expected heads to have 2 entries, got {len(heads)}")
    (weight_0, bias_0), (weight_1, bias_1) = heads
    tensors = {
        "z": z,
        "y": y,
        "fc_weight": fc_weight,
        "heads[0] weight": weight_0,
        "heads[0] bias": bias_0,
        "heads[1] weight": weight_1,
        "heads[1] bias": bias_1,
    }
    check_floating("csf", **tensors)
    check_shape("csf", "z", z, "B", "M", "H", "W")
    batch, channels = z.shape[:2]
    check_shape("csf", "y", y, batch, channels, "h", "w")
    check_not_empty("csf", "z", z)
    check_not_empty("csf", "y", y)
    check_shape("csf", "fc_weight", fc_weight, "L", channels)
    squeezed = fc_weight.shape[0]
    for i, (weight, bias) in enumerate(heads):
        check_shape("csf", f"heads[{i}] weight", weight, channels, squeezed)
        check_shape("csf", f"heads[{i}] bias", bias, channels)
    check_batch_norm("csf", "bn", bn, channels, z.device)
    check_batch_statistics("csf", "z", z, bn)
    if fc_bn is not None:
        check_batch_norm("csf", "fc_bn", fc_bn, squeezed, z.device)
    backends.choose("csf", list(tensors.values()), backend)
    return reference.csf(z, y, bn, fc_weight, fc_bn, heads)
