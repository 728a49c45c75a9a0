"""seg_ce: cross-entropy at label size of logits at a smaller one, and the classes at that size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _checks, _registration
from transkd_fast.ops._autograd import first_derivative, witness
from transkd_fast.ops._layouts import in_layout, is_channels_last
from transkd_fast.reference import seg_ce as reference

OP = "seg_ce"
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# The raw ops' codes of the gradient's dtype.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, lambda tensors: None)


class SegCE(NamedTuple):
    """What :func:`seg_ce` returns.

    Args:
        loss: The loss, 0-d, float32 (float64 for float64 logits).
        counts: int64 [4]: the pixels that are labelled, those of them whose highest score is the label's, the ignored
            ones, and those whose label is out of range.
    """

    loss: Tensor
    counts: Tensor


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _seg_ce_fwd_fake(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(logits)
    kept = torch.empty_like(logits, dtype=dtype) if keep else logits.new_empty(0, dtype=dtype)
    counts = logits.new_empty(4, dtype=torch.int64)
    return logits.new_empty((), dtype=dtype), counts, logits.new_empty((), dtype=dtype), kept


def _seg_ce_bwd_fake(grad: Tensor, total: Tensor, kept: Tensor, dtype: int) -> Tensor:
    return torch.empty_like(kept, dtype=next(d for d, code in DTYPE_CODES.items() if code == dtype))


def _seg_ce_predict_fake(logits: Tensor, height: int, width: int) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


_registration.register_fakes(
    seg_ce_fwd=_seg_ce_fwd_fake, seg_ce_bwd=_seg_ce_bwd_fake, seg_ce_predict=_seg_ce_predict_fake
)
_registration.register_triton(
    OP,
    seg_ce_fwd="(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, bool keep)"
    " -> (Tensor loss, Tensor counts, Tensor total, Tensor kept)",
    seg_ce_bwd="(Tensor grad, Tensor total, Tensor kept, int dtype) -> Tensor",
    seg_ce_predict="(Tensor logits, int height, int width) -> Tensor",
)


class _SegCE(torch.autograd.Function):
    """Makes the gradient of the summed loss while the softmax is at hand; the backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        ignore_index: int,
        keep: bool,
        labels: Tensor,
        weight: Tensor | None,
        source: Tensor | None,
        logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, counts, total, kept = _registration.raw_op("seg_ce_fwd", backend)(
            logits, labels, weight, ignore_index, keep
        )
        ctx.backend, ctx.dtype = backend, DTYPE_CODES[logits.dtype]
        ctx.mark_non_differentiable(counts)
        if keep:
            ctx.save_for_backward(total, kept, source)
        return loss, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        total, kept, source = ctx.saved_tensors
        with torch.no_grad():
            gradient = _registration.raw_op("seg_ce_bwd", ctx.backend)(grad, total, kept, ctx.dtype)
        return None, None, None, None, None, None, first_derivative(OP, gradient, grad, source)


def seg_ce(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> SegCE:
    """Class-weighted mean cross-entropy of the bilinearly upsampled logits, which are never stored, and pixel counts.

    The mean divides by the summed weights of the labelled pixels; where that sum is not above 0 (every pixel ignored),
    the loss and its gradient are 0.

    Args:
        logits: class scores, [B, K, h, w], any floating dtype, NCHW or channels-last.
        labels: class indices in [0, K) or `ignore_index`, [B, H, W] of any size; uint8, int16, int32 or int64. Pixels
            of any other value are left out and counted; on the CPU they are an error. On a GPU, where asking would
            stall it, and inside a compiled graph look at ``counts[3]``.
        weight: class weights, [K], or None for 1 each; no gradient flows into them.
        ignore_index: label of pixels that do not count, outside [0, K); default 255.
        backend: see :mod:`transkd_fast.backends`.

    Returns:
        Loss and counts (see `SegCE`).

    Raises:
        TypeError: if logits or weight are no floating tensors, or labels no integer tensor.
        ValueError: if shapes or devices do not fit, an input is empty, ignore_index is a class, or, on the CPU, a
            label is out of range.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-A; interpolation with align_corners=False.
    """
    _check(logits, labels, weight, ignore_index)
    chosen = backends.choose(OP, [logits], backend)
    if chosen == "eager":
        result = SegCE(*reference.seg_ce(logits, labels, weight, ignore_index))
    else:
        keep = torch.is_grad_enabled() and logits.requires_grad
        weight = None if weight is None else weight.detach().contiguous()
        logits = in_layout(logits, is_channels_last(logits))
        source = witness(logits) if keep else None
        result = SegCE(*_SegCE.apply(chosen, ignore_index, keep, labels.contiguous(), weight, source, logits))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and int(result.counts[3]):
        _reject_labels(labels, logits.shape[1], ignore_index)
    return result


def seg_ce_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """The loss of :func:`seg_ce`, without the counts.

    Args:
        logits: class scores, [B, K, h, w], any floating dtype, NCHW or channels-last.
        labels: class indices in [0, K) or `ignore_index`, [B, H, W] of any size; uint8, int16, int32 or int64.
        weight: class weights, [K], or None for 1 each; no gradient flows into them.
        ignore_index: label of pixels that do not count, outside [0, K); default 255.
        backend: see :mod:`transkd_fast.backends`.

    Returns:
        Loss, 0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError: as :func:`seg_ce`.
        ValueError: as :func:`seg_ce`.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-A; interpolation with align_corners=False.
    """
    return seg_ce(logits, labels, weight, ignore_index, backend).loss


def seg_predict(logits: Tensor, size: tuple[int, int], backend: str | None = None) -> Tensor:
    """The class of the highest bilinearly upsampled score at every pixel, without storing the upsampled scores.

    Args:
        logits: class scores, [B, K, h, w], any floating dtype, NCHW or channels-last.
        size: height and width of the result in pixels.
        backend: see :mod:`transkd_fast.backends`; the op is "seg_ce".

    Returns:
        Class indices, int64 [B, *size]; the first of equal scores.

    Raises:
        TypeError: if logits are no floating tensor.
        ValueError: if they are no map, or empty, or the size is not positive.
        BackendError: if the chosen backend cannot run.

    Source:
        Interpolation with align_corners=False.
    """
    _checks.check_given("seg_predict", logits=logits)
    _checks.check_shape("seg_predict", "logits", logits, "B", "K", "h", "w")
    _checks.check_not_empty("seg_predict", "logits", logits)
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"seg_predict: expected size to be height and width in pixels, got {size}")
    chosen = backends.choose(OP, [logits], backend)
    if chosen == "eager":
        return reference.seg_predict(logits, *size)
    with torch.no_grad():
        logits = in_layout(logits, is_channels_last(logits))
        return _registration.raw_op("seg_ce_predict", chosen)(logits, *size)


def _check(logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    _checks.check_floating(OP, logits=logits, weight=weight)
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"seg_ce: expected labels to be a tensor of uint8, int16, int32 or int64 class indices, got {got}"
        )
    _checks.check_shape(OP, "logits", logits, "B", "K", "h", "w")
    batch, classes = logits.shape[:2]
    _checks.check_shape(OP, "labels", labels, batch, "H", "W")
    _checks.check_not_empty(OP, "logits", logits)
    _checks.check_not_empty(OP, "labels", labels)
    if labels.device != logits.device:
        raise ValueError(f"seg_ce: expected labels on {logits.device} like logits, got {labels.device}")
    if weight is not None:
        _checks.check_shape(OP, "weight", weight, classes)
    if not isinstance(ignore_index, int) or 0 <= ignore_index < classes:
        raise ValueError(
            f"seg_ce: expected ignore_index to be a whole number outside the classes [0, {classes}), got"
            f" {ignore_index}; a class that is not to count gets weight 0"
        )


def _reject_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    raise ValueError(
        f"seg_ce: expected labels in [0, {classes}) or ignore_index {ignore_index}, got {wrong[0].item()}"
        f" ({wrong.numel()} pixels out of range); map the other values to ignore_index"
    )
