"""CSF, cross selective fusion: normalise a stage's map, upsample the coarser one, attend over the two, fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import (
    BatchNorm,
    GlobalBatch,
    batch_norm,
    compute_dtype,
    normalise_with,
    statistics_over,
    upsample,
    values_per_channel,
    without_autocast,
)

Heads = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def csf(
    z: Tensor,
    y: Tensor,
    bn: BatchNorm,
    fc_weight: Tensor,
    fc_bn: BatchNorm | None,
    heads: Heads,
    global_batch: GlobalBatch | None = None,
) -> Tensor:
    """Fuses a stage's map with the coarser stage's fused map: v = a_0 BN(z) + a_1 up(y).

    up is nearest upsampling to z's size; g is the mean over pixels of BN(z) + up(y); r = ReLU(BN(W_fc g)); the
    attention (a_0, a_1) is the softmax over the two heads W_i r + b_i, per sample and channel.

    Args:
        z: Output of the 1 x 1 convolution before its batch norm, shape [B, M, H, W], any floating dtype and layout.
        y: Fused map of the coarser stage, shape [B, M, h, w]; any size ratio.
        bn: Batch norm of z over M channels; running statistics are updated in place in training.
        fc_weight: Squeeze layer W_fc, shape [L, M].
        fc_bn: Batch norm of the squeeze layer over L channels, or None for none. Where it sees a single value per
            channel in training, it normalises with its running statistics and leaves them as they are.
        heads: ((W_0, b_0), (W_1, b_1)), each W of shape [M, L], each b of shape [M]; 0 weighs BN(z), 1 weighs up(y).
        global_batch: The batch whose statistics both batch norms take in training; default these B samples.

    Returns:
        The fused map v, shape [B, M, H, W], in z's dtype.

    Raises:
        ValueError: In training, if a channel of z has a single value in the whole batch.

    Source: TransKD section III-C (cross selective fusion).
    """
    dtype = compute_dtype(z, y)
    with without_autocast(z):
        up = upsample(y.to(dtype), (z.shape[2], z.shape[3]))
        if global_batch is None:
            x = batch_norm(z.to(dtype), bn)
            pooled = (x + up).mean(dim=(2, 3))
        else:
            x, pooled = _normalise_over(global_batch, z.to(dtype), up, bn)
        squeezed = F.linear(pooled, fc_weight.to(dtype))
        if fc_bn is not None:
            if values_per_channel(squeezed) == 1:
                fc_bn = fc_bn._replace(training=False)
            squeezed = batch_norm(squeezed, fc_bn)
        r = squeezed.relu()
        if global_batch is not None:
            r = r[global_batch.first : global_batch.first + z.shape[0]]
        logits = torch.stack([F.linear(r, weight.to(dtype), bias.to(dtype)) for weight, bias in heads])
        a = logits.softmax(dim=0)[..., None, None]
        return (a[0] * x + a[1] * up).to(z.dtype)


def _normalise_over(global_batch: GlobalBatch, z: Tensor, up: Tensor, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Computes BN(z) of these samples, [B, M, H, W], and the means of BN(z) + up(y) over pixels, of all [K, M]."""
    pixels = z.shape[2:].numel()
    own_mean = z.mean(dim=(2, 3))
    own_squares = (z - own_mean[..., None, None]).square().sum(dim=(2, 3))
    rows = global_batch.gather(torch.stack([own_mean, own_squares, up.mean(dim=(2, 3))], dim=1))
    means, squares, up_means = rows.unbind(1)
    mean, var = statistics_over(means, squares, pixels, bn)
    x, scale, shift = normalise_with(mean, var, z, bn)
    return x, (means - mean) * scale + shift + up_means
