"""The op pea: linear projection of embeddings and their mean-squared error, several stages in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops._checks import check_floating, check_length, check_not_empty, check_scalar, check_shape
from transkd_fast.reference import pea as reference

backends.register_op("pea")

STAGE_WEIGHTS = (0.1, 0.1, 0.5, 1.0)


def pea_loss(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Sequence[Tensor],
    stage_weights: Sequence[float] = STAGE_WEIGHTS,
    assistants: Sequence[Tensor] | None = None,
    projection_scales: Sequence[Tensor] | None = None,
    assistant_scales: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes sum_m w_m mean((P_m - T_m)^2) with P = x W^T + b, or P = f_p (x W^T + b) + f_a A with assistants.

    Args:
        xs: Student embeddings, one per stage: tokens [B, N, C_in] or maps [B, C_in, H, W], any floating dtype.
        weights: Projection weights, shapes [C_out, C_in].
        biases: Projection biases, shapes [C_out].
        targets: Teacher embeddings, tokens [B, N, C_out] or maps; a gradient flows into them if they require one.
        stage_weights: One weight w_m per stage; default 0.1, 0.1, 0.5, 1.
        assistants: Assistant terms A, tokens [B, N, C_out] or maps, or None for none.
        projection_scales: Scalars f_p, one element each; given exactly when `assistants` is.
        assistant_scales: Scalars f_a, one element each; given exactly when `assistants` is.
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    Returns:
        The weighted loss, 0-d, float32 (float64 if an activation is float64).

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes, devices or numbers of stages do not fit, or an embedding is empty.

    Source: TransKD section III-B (patch embedding alignment) and the embedding assistant of variant EA.
    """
    stages = len(xs)
    if stages == 0:
        raise ValueError("pea: expected xs to have at least one stage, got none")
    lists = {"weights": weights, "biases": biases, "targets": targets, "stage_weights": stage_weights}
    optional = {
        "assistants": assistants,
        "projection_scales": projection_scales,
        "assistant_scales": assistant_scales,
    }
    given = {name: values for name, values in optional.items() if values is not None}
    if given and len(given) < len(optional):
        raise ValueError(f"pea: expected {', '.join(optional)} all together or none, got only {', '.join(given)}")
    for name, values in (lists | given).items():
        check_length("pea", name, values, stages, "xs")
    for m in range(stages):
        stage = {"xs": xs[m], "weights": weights[m], "biases": biases[m], "targets": targets[m]}
        stage |= {name: values[m] for name, values in given.items()}
        _check_stage({f"{name}[{m}]": tensor for name, tensor in stage.items()})
    tensors = [*xs, *weights, *biases, *targets, *(assistants or ())]
    backends.choose("pea", tensors, backend)
    return reference.pea(xs, weights, biases, targets, stage_weights, assistants, projection_scales, assistant_scales)


def _check_stage(arguments: dict[str, Tensor]) -> None:
    """Checks one stage's x, weight, bias, target and, where given, assistant and its two scalars."""
    check_floating("pea", **arguments)
    (x_name, x), (weight_name, weight), (bias_name, bias), target, *rest = arguments.items()
    if x.dim() not in (3, 4):
        raise ValueError(
            f"pea: expected {x_name} to be tokens [B, N, C_in] or a map [B, C_in, H, W], got shape {list(x.shape)}"
        )
    check_not_empty("pea", x_name, x)
    check_shape("pea", weight_name, weight, "C_out", x.shape[2] if x.dim() == 3 else x.shape[1])
    channels = weight.shape[0]
    check_shape("pea", bias_name, bias, channels)
    for name, tensor in (target, *rest[:1]):
        if x.dim() == 4 and tensor.dim() == 4:
            check_shape("pea", name, tensor, x.shape[0], channels, *x.shape[2:])
        elif tensor.dim() == 4:
            check_shape("pea", name, tensor.flatten(2), x.shape[0], channels, x.shape[1])
        else:
            check_shape("pea", name, tensor, x.shape[0], reference.as_tokens(x).shape[1], channels)
    for name, scale in rest[1:]:
        check_scalar("pea", name, scale)
