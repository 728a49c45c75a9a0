"""The global-local mixer of variant GL: a gated convolution over tokens, mixed with an attention branch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import compute_dtype, without_autocast


def gl_mixer(
    e: Tensor,
    u: Tensor,
    conv_a_weight: Tensor,
    conv_a_bias: Tensor,
    conv_b_weight: Tensor,
    conv_b_bias: Tensor,
    attention_weight: Tensor,
    conv_weight: Tensor,
    residual: bool = False,
) -> Tensor:
    """Computes w_att u + w_conv (conv_a(e) * sigmoid(conv_b(e))), plus e with `residual`.

    Both convolutions run over the token axis, kernel 3, zero-padded by 1 at each sample's ends.

    Args:
        e: Embedding, shape [B, N, C], any floating dtype.
        u: Global branch's output (self-attention of e), shape [B, N, C]; its dtype may differ.
        conv_a_weight: Value convolution, shape [C, C, 3].
        conv_a_bias: Its bias, shape [C].
        conv_b_weight: Gate convolution, shape [C, C, 3].
        conv_b_bias: Its bias, shape [C].
        attention_weight: Scalar w_att, one element.
        conv_weight: Scalar w_conv, one element.
        residual: Whether e is added to the mix.

    Returns:
        The mixed embedding, shape [B, N, C], in e's dtype.

    Source: TransKD section III-D (global-local context mixer).
    """
    storage, dtype = e.dtype, compute_dtype(e, u)
    with without_autocast(e):
        e = e.to(dtype)  # once: the gradients of both its uses are then added before they are rounded
        x = e.transpose(1, 2)
        value = F.conv1d(x, conv_a_weight.to(dtype), conv_a_bias.to(dtype), padding=1)
        gate = F.conv1d(x, conv_b_weight.to(dtype), conv_b_bias.to(dtype), padding=1)
        local = (value * gate.sigmoid()).transpose(1, 2)
        mix = attention_weight.to(dtype) * u.to(dtype) + conv_weight.to(dtype) * local
        return (mix + e if residual else mix).to(storage)
