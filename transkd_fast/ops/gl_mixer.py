"""gl_mixer: gated convolution over tokens, mixed with the output of an attention branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _registration
from transkd_fast.ops._autograd import distinct, first_derivative
from transkd_fast.ops._checks import check_given, check_not_empty, check_scalar, check_shape
from transkd_fast.ops._precision import tf32_allowed
from transkd_fast.reference import gl_mixer as reference

OP = "gl_mixer"


def _same_precision(tensors: Sequence[Tensor]) -> str | None:
    e, u = tensors[:2]
    if (e.dtype == torch.float64) != (u.dtype == torch.float64):
        return "float64 tokens do not mix with other dtypes in this kernel"
    return None


backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _same_precision)


def _fwd_fake(e: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, keep, _tf32 = arguments
    dtype = torch.float64 if e.dtype == torch.float64 else torch.float32
    batch, tokens, channels = e.shape
    return torch.empty_like(e), e.new_empty((batch, tokens, 2, channels) if keep else (0,), dtype=dtype)


def _bwd_fake(grad: Tensor, e: Tensor, u: Tensor, branches: Tensor, *arguments: Any) -> list[Tensor]:
    *parameters, _residual, wanted, _tf32 = arguments
    return [torch.empty_like(t) for t, want in zip((e, u, *parameters), wanted, strict=True) if want]


_registration.register_fakes(gl_mixer_fwd=_fwd_fake, gl_mixer_bwd=_bwd_fake)
_registration.register_triton(
    OP,
    gl_mixer_fwd="(Tensor e, Tensor u, Tensor conv_a_weight, Tensor conv_a_bias, Tensor conv_b_weight,"
    " Tensor conv_b_bias, Tensor attention_weight, Tensor conv_weight, bool residual, bool keep, bool tf32)"
    " -> (Tensor out, Tensor branches)",
    gl_mixer_bwd="(Tensor grad, Tensor e, Tensor u, Tensor branches, Tensor conv_a_weight, Tensor conv_a_bias,"
    " Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight, Tensor conv_weight, bool residual,"
    " bool[] wanted, bool tf32) -> Tensor[]",
)


class _GLMixer(torch.autograd.Function):
    """Saves its inputs as they are, and both convolutions' outputs before the gate."""

    @staticmethod
    def forward(ctx: Any, backend: str, residual: bool, keep: bool, tf32: bool, *inputs: Tensor) -> Tensor:
        out, branches = _registration.raw_op("gl_mixer_fwd", backend)(*inputs, residual, keep, tf32)
        ctx.backend, ctx.residual, ctx.tf32 = backend, residual, tf32
        if keep:
            ctx.save_for_backward(*inputs, branches)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, branches = ctx.saved_tensors
        e, u, *parameters = inputs
        wanted = list(ctx.needs_input_grad[4:])
        with torch.no_grad():
            made = iter(
                _registration.raw_op("gl_mixer_bwd", ctx.backend)(
                    grad.contiguous(), e, u, branches, *parameters, ctx.residual, wanted, ctx.tf32
                )
            )
        gradients = (first_derivative(OP, gradient, grad, *inputs) for gradient in made)
        return (None, None, None, None, *(next(gradients) if want else None for want in wanted))


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
        e: Embedding, shape [B, N, C], any floating dtype; copied where it is not contiguous, as u is.
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
        BackendError: If the chosen backend cannot run.

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
    check_given("gl_mixer", **tensors)
    check_shape("gl_mixer", "e", e, "B", "N", "C")
    check_not_empty("gl_mixer", "e", e)
    check_shape("gl_mixer", "u", u, *e.shape)
    channels = e.shape[2]
    for name in ("conv_a", "conv_b"):
        check_shape("gl_mixer", f"{name}_weight", tensors[f"{name}_weight"], channels, channels, 3)
        check_shape("gl_mixer", f"{name}_bias", tensors[f"{name}_bias"], channels)
    check_scalar("gl_mixer", "attention_weight", attention_weight)
    check_scalar("gl_mixer", "conv_weight", conv_weight)
    chosen = backends.choose(OP, list(tensors.values()), backend)
    if chosen == "eager":
        return reference.gl_mixer(
            e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight, residual
        )
    inputs = distinct([tensor.contiguous() for tensor in tensors.values()])
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _GLMixer.apply(chosen, residual, keep, tf32_allowed(inputs[0]), *inputs)
