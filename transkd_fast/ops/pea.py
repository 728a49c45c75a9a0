"""pea: linear projection of patch embeddings and their mean-squared error, several stages in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _registration
from transkd_fast.ops._autograd import distinct, first_derivative, witness
from transkd_fast.ops._checks import check_given, check_length, check_not_empty, check_scalar, check_shape
from transkd_fast.ops._precision import tf32_allowed
from transkd_fast.reference import pea as reference

OP = "pea"
STAGE_WEIGHTS = (0.1, 0.1, 0.5, 1.0)
# What has a gradient, stage by stage and in this order.
KINDS = ("x", "weight", "bias", "target", "assistant", "projection_scale", "assistant_scale")
# What kernels/_pea_plan.py counts in 32 bits.
_TRITON_TOKENS, _TRITON_CHANNELS = 1 << 30, 1 << 14
# The raw ops' codes of dtypes (csrc/common/storage_type.h).
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _same_precision(tensors: Sequence[Tensor]) -> str | None:
    doubles = {tensor.dtype == torch.float64 for tensor in tensors if tensor.dim() > 2}
    if len(doubles) > 1:
        return "float64 embeddings do not mix with other dtypes in this kernel"
    return None


def _fits_triton(tensors: Sequence[Tensor]) -> str | None:
    for tensor in tensors:
        rows, channels = _size_of(tensor)
        if rows > _TRITON_TOKENS or channels > _TRITON_CHANNELS:
            return f"this kernel takes at most 2^30 tokens and 2^14 channels, got shape {list(tensor.shape)}"
    return _same_precision(tensors)


def _size_of(tensor: Tensor) -> tuple[int, int]:
    """Tokens of all samples and channels of an embedding; of a weight or bias, its longest side as channels."""
    if tensor.dim() < 3:
        return 1, max(tensor.shape)
    channels = tensor.shape[2 if tensor.dim() == 3 else 1]
    return tensor.numel() // channels, channels


backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _fits_triton if _backend == "triton" else _same_precision)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that keeps an unnormalised gradient: float16's range is too small for it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fwd_fake(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    targets: list[Tensor],
    assistants: list[Tensor],
    projection_scales: list[Tensor],
    assistant_scales: list[Tensor],
    stage_weights: Sequence[float],
    wanted: Sequence[bool],
    tf32: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = _compute(xs[0])
    kept = []
    for m, (x, weight, bias, target) in enumerate(zip(xs, weights, biases, targets, strict=True)):
        of_x, of_weight, of_bias, *of_terms, of_projection, of_assistant = wanted[len(KINDS) * m : len(KINDS) * (m + 1)]
        if of_x:
            kept.append(torch.empty_like(x, dtype=_wide(x.dtype)))
        kept += [torch.empty_like(t, dtype=dtype) for t, want in ((weight, of_weight), (bias, of_bias)) if want]
        terms = [t for t, want in zip((target, *assistants[m : m + 1]), of_terms, strict=False) if want]
        if terms:
            same = all(t.dtype == terms[0].dtype for t in terms)
            kept.append(torch.empty_like(terms[0], dtype=_wide(terms[0].dtype) if same else dtype))
        if of_projection or of_assistant:
            kept.append(x.new_empty(2, dtype=dtype))
    return xs[0].new_empty((), dtype=dtype), xs[0].new_empty((len(xs), 3), dtype=dtype), kept


def _bwd_fake(grad: Tensor, factors: Tensor, kept: list[Tensor], dtypes: Sequence[int]) -> list[Tensor]:
    source = iter(kept)
    gradients = []
    for m in range(0, len(dtypes), 6):
        x, weight, bias, target, assistant, scales = dtypes[m : m + 6]
        for codes in ((x,), (weight,), (bias,), (target, assistant), (scales,)):
            given = [code for code in codes if code >= 0]
            if given:
                tensor = next(source)
                gradients += [torch.empty_like(tensor, dtype=_DTYPES[code]) for code in given]
    return gradients


_registration.register_fakes(pea_fwd=_fwd_fake, pea_bwd=_bwd_fake)
_registration.register_triton(
    OP,
    pea_fwd="(Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor[] targets, Tensor[] assistants,"
    " Tensor[] projection_scales, Tensor[] assistant_scales, float[] stage_weights, bool[] wanted, bool tf32)"
    " -> (Tensor loss, Tensor factors, Tensor[] kept)",
    pea_bwd="(Tensor grad, Tensor factors, Tensor[] kept, int[] dtypes) -> Tensor[]",
)


class _PEA(torch.autograd.Function):
    """All stages at once. Makes the gradients in the forward, before they are normalised, and saves nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        stage_weights: tuple[float, ...],
        wanted: tuple[bool, ...],
        tf32: bool,
        of_inputs: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        stages = len(stage_weights)
        lists = [[t for t in tensors[k * stages : (k + 1) * stages] if t is not None] for k in range(len(KINDS))]
        loss, factors, kept = _registration.raw_op("pea_fwd", backend)(*lists, stage_weights, wanted, tf32)
        ctx.backend, ctx.wanted = backend, wanted
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.scale_shapes = [None if t is None else t.shape for t in tensors[5 * stages :]]
        if any(wanted):
            ctx.save_for_backward(of_inputs, factors, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.wanted)
        stages = count // len(KINDS)
        of_inputs, factors, *kept = ctx.saved_tensors
        codes = []
        for m in range(stages):
            dtypes, wanted = ctx.dtypes[m::stages], ctx.wanted[len(KINDS) * m :]
            codes += [_DTYPES.index(dtypes[k]) if wanted[k] else -1 for k in range(5)]
            codes.append(_DTYPES.index(factors.dtype) if wanted[5] or wanted[6] else -1)
        with torch.no_grad():
            made = iter(_registration.raw_op("pea_bwd", ctx.backend)(grad, factors, kept, codes))
        result: list[Tensor | None] = [None] * count
        for m in range(stages):
            wanted = ctx.wanted[len(KINDS) * m :]
            for k in range(5):
                if wanted[k]:
                    result[k * stages + m] = first_derivative(OP, next(made), grad, of_inputs)
            scales = next(made).unbind() if wanted[5] or wanted[6] else ()
            for k, scale in enumerate(scales, start=5):
                if wanted[k]:
                    place = k * stages + m
                    gradient = scale.view(ctx.scale_shapes[place - 5 * stages]).to(ctx.dtypes[place])
                    result[place] = first_derivative(OP, gradient, grad, of_inputs)
        return (None, None, None, None, None, *result)


def _rows(t: Tensor) -> Tensor:
    """Views a map as tokens; copies what is neither dense tokens nor a dense map."""
    t = reference.as_tokens(t)
    return t if t.is_contiguous() or t.transpose(1, 2).is_contiguous() else t.contiguous()


def pea_loss(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Sequence[Tensor],
    stage_weights: Sequence[float] = STAGE_WEIGHTS,
    assistants: Sequence[Tensor] | None = None,
    projection_scales: Sequence[Tensor] | None = None,
    assistant_scales: Sequence[Tensor] | None = None,
    target_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Computes sum_m w_m mean((P_m - T_m)^2) with P = x W^T + b, or P = f_p (x W^T + b) + f_a A with assistants.

    Args:
        xs: Student embeddings, one per stage: tokens [B, N, C_in] or maps [B, C_in, H, W], any floating dtype.
        weights: Projection weights, shapes [C_out, C_in].
        biases: Projection biases, shapes [C_out].
        targets: Teacher embeddings, tokens [B, N, C_out] or maps; without a gradient, but for `target_grad`.
        stage_weights: One weight w_m per stage; default 0.1, 0.1, 0.5, 1.
        assistants: Assistant terms A, tokens [B, N, C_out] or maps, or None for none.
        projection_scales: Scalars f_p, one element each; given exactly when `assistants` is.
        assistant_scales: Scalars f_a, one element each; given exactly when `assistants` is.
        target_grad: Whether targets may require a gradient and then get one; default no: a teacher is frozen.
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    On a GPU, float16 embeddings make float16 operands of the gradients' products too: residuals P - T beyond 65504
    then give infinite gradients, as they would in `F.linear`.

    Returns:
        The weighted loss, 0-d, float32 (float64 if an activation is float64).

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes, devices or numbers of stages do not fit, an embedding is empty, or a target requires a
            gradient without `target_grad`.
        BackendError: If the chosen backend cannot run.

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
    check_given(OP, **{f"xs[{m}]": x for m, x in enumerate(xs)})
    for m in range(stages):
        stage = {"xs": xs[m], "weights": weights[m], "biases": biases[m], "targets": targets[m]}
        stage |= {name: values[m] for name, values in given.items()}
        _check_stage(m, {f"{name}[{m}]": tensor for name, tensor in stage.items()})
        if targets[m].requires_grad and not target_grad:
            raise ValueError(
                f"pea: expected targets[{m}] (stage {m + 1}) not to require a gradient, since a teacher is frozen; run"
                " it under torch.no_grad(), or pass target_grad=True"
            )
    tensors = [*xs, *weights, *biases, *targets, *(assistants or ())]
    chosen = backends.choose(OP, tensors, backend)
    if chosen == "eager":
        return reference.pea(
            xs, weights, biases, targets, stage_weights, assistants, projection_scales, assistant_scales
        )
    absent: list[Tensor | None] = [None] * stages
    rows = [[_rows(t) for t in maps] for maps in (xs, targets, assistants or ())]
    scales = [
        [t.contiguous() for t in values] or absent for values in (projection_scales or (), assistant_scales or ())
    ]
    inputs = distinct(
        [
            *rows[0],
            *(t.contiguous() for t in weights),
            *(t.contiguous() for t in biases),
            *rows[1],
            *(rows[2] or absent),
            *scales[0],
            *scales[1],
        ]
    )
    given_inputs = [t for t in inputs if t is not None]
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given_inputs)
    wanted = [with_gradient and t is not None and t.requires_grad for t in inputs]
    return _PEA.apply(
        chosen,
        tuple(float(weight) for weight in stage_weights),
        tuple(wanted[k * stages + m] for m in range(stages) for k in range(len(KINDS))),
        any(tf32_allowed(t) for t in rows[0]),
        witness(*given_inputs) if with_gradient else None,
        *inputs,
    )


def _check_stage(stage: int, arguments: dict[str, Tensor]) -> None:
    """Checks one stage's x, weight, bias, target and, where given, assistant and its two scalars."""
    check_given(OP, **arguments)
    (x_name, x), (weight_name, weight), (bias_name, bias), target, *rest = arguments.items()
    where = f"{OP}: stage {stage + 1}"
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{where}: expected {x_name} to be tokens [B, N, C_in] or a map [B, C_in, H, W], got shape {list(x.shape)}"
        )
    check_not_empty(where, x_name, x)
    check_shape(where, weight_name, weight, "C_out", x.shape[2] if x.dim() == 3 else x.shape[1])
    check_not_empty(where, weight_name, weight)
    channels = weight.shape[0]
    check_shape(where, bias_name, bias, channels)
    tokens = x.shape[1] if x.dim() == 3 else x.shape[2:].numel()
    for name, tensor in (target, *rest[:1]):
        if tensor.dim() != 4:
            check_shape(where, name, tensor, x.shape[0], tokens, channels)
        elif x.dim() == 4:
            check_shape(where, name, tensor, x.shape[0], channels, *x.shape[2:])
        else:
            check_shape(where, name, tensor, x.shape[0], channels, "H", "W")
            if tensor.shape[2:].numel() != tokens:
                raise ValueError(
                    f"{where}: expected {name} to have H W = {tokens} pixels like the tokens of {x_name}"
                    f" {list(x.shape)}, got shape {list(tensor.shape)}"
                )
    for name, scale in rest[1:]:
        check_scalar(where, name, scale)
