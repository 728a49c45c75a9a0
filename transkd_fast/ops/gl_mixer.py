"""The op gl_mixer: gated convolution over tokens, mixed with the output of an attention branch."""

from __future__ import annotations

from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops._checks import check_floating, check_not_empty, check_scalar, check_shape
from transkd_fast.reference import gl_mixer as reference

backends.register_op("gl_mixer")


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
    backend: str | None = None,
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
        residual: Whether e is added to the mix; default no.
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    Returns:
        The mixed embedding, shape [B, N, C], in e's dtype.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes or devices do not fit, or e is empty.

    Source: TransKD section III-D (global-local context mixer).
    """
    tensors = {
        "e": e,
        "u": u,
        "conv_a_weight": conv_a_weight,
        "conv_a_bias": conv_a_bias,
        "conv_b_weight": conv_b_weight,
        "conv_b_bias": conv_b_bias,
        "attention_weight": attention_weight,
        "conv_weight": conv_weight,
    }
    check_floating("gl_mixer", **tensors)
    check_shape("gl_mixer", "e", e, "B", "N", "C")
    check_not_empty("gl_mixer", "e", e)
    check_shape("gl_mixer", "u", u, *e.shape)
    channels = e.shape[2]
    for name in ("conv_a", "conv_b"):
        check_shape("gl_mixer", f"{name}_weight", tensors[f"{name}_weight"], channels, channels, 3)
        check_shape("gl_mixer", f"{name}_bias", tensors[f"{name}_bias"], channels)
    check_scalar("gl_mixer", "attention_weight", attention_weight)
    check_scalar("gl_mixer", "conv_weight", conv_weight)
    backends.choose("gl_mixer", list(tensors.values()), backend)
    return reference.gl_mixer(
        e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight, residual
    )
