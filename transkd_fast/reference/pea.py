"""PEA, patch embedding alignment: linear projections of embeddings and their mean-squared errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from transkd_fast.reference._common import compute_dtype, without_autocast


def as_tokens(t: Tensor) -> Tensor:
    """Views a map [B, C, H, W] as tokens [B, H W, C]; tokens pass through."""
    return t.flatten(2).transpose(1, 2) if t.dim() == 4 else t


def pea(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Sequence[Tensor],
    stage_weights: Sequence[float],
    assistants: Sequence[Tensor] | None = None,
    projection_scales: Sequence[Tensor] | None = None,
    assistant_scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """Computes sum_m w_m mean((P_m - T_m)^2) with P = x W^T + b, or P = f_p (x W^T + b) + f_a A with assistants.

    Args:
        xs: Student embeddings, one per stage: tokens [B, N, C_in] or maps [B, C_in, H, W], any floating dtype.
        weights: Projection weights, shapes [C_out, C_in].
        biases: Projection biases, shapes [C_out].
        targets: Teacher embeddings, tokens [B, N, C_out] or maps; a gradient flows into them if they require one.
        stage_weights: One weight w_m per stage.
        assistants: Assistant terms A, tokens [B, N, C_out] or maps, or None for none.
        projection_scales: Scalars f_p, one element each; given exactly when `assistants` is.
        assistant_scales: Scalars f_a, one element each; given exactly when `assistants` is.

    Returns:
        The weighted loss, 0-d, float32 (float64 if an activation is float64).

    Source: TransKD section III-B (patch embedding alignment) and the embedding assistant of variant EA.
    """
    dtype = compute_dtype(*xs, *targets, *(assistants or ()))
    loss = xs[0].new_zeros((), dtype=dtype)
    with without_autocast(xs[0]):
        for m, (x, weight, bias, target) in enumerate(zip(xs, weights, biases, targets, strict=True)):
            projection = F.linear(as_tokens(x).to(dtype), weight.to(dtype), bias.to(dtype))
            if assistants is not None and projection_scales is not None and assistant_scales is not None:
                assistant = as_tokens(assistants[m]).to(dtype)
                f_p, f_a = projection_scales[m].to(dtype), assistant_scales[m].to(dtype)
                projection = f_p * projection + f_a * assistant
            loss = loss + stage_weights[m] * (projection - as_tokens(target).to(dtype)).square().mean()
    return loss
