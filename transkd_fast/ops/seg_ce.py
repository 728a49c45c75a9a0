"""The op seg_ce: cross-entropy at label size, of logits at a smaller one."""

from __future__ import annotations

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops._checks import check_floating, check_not_empty, check_shape
from transkd_fast.reference import seg_ce as reference

backends.register_op("seg_ce")

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def seg_ce_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """Computes the class-weighted mean cross-entropy of the bilinearly upsampled logits.

    The mean divides by the summed weights of the labelled pixels; where that sum is 0 (every pixel ignored), the loss
    and its gradient are 0.

    Args:
        logits: Class scores, shape [B, K, h, w], any floating dtype.
        labels: Class indices in [0, K) or `ignore_index`, shape [B, H, W] of any size, integer dtype. Other values
            are an error on the CPU; on a GPU, where looking would stall it, they fail a device assertion.
        weight: Class weights, shape [K], or None for 1 each.
        ignore_index: Label of pixels that do not count; default 255.
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError: If logits or weight are no floating-point tensors, or labels no integer tensor.
        ValueError: If shapes or devices do not fit, an input is empty, or a label is out of range.

    Source: TransKD section III-A; interpolation with align_corners=False.
    """
    check_floating("seg_ce", logits=logits, weight=weight)
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"seg_ce: expected labels to be an integer tensor of class indices, got {got}")
    check_shape("seg_ce", "logits", logits, "B", "K", "h", "w")
    batch, classes = logits.shape[:2]
    check_shape("seg_ce", "labels", labels, batch, "H", "W")
    check_not_empty("seg_ce", "logits", logits)
    check_not_empty("seg_ce", "labels", labels)
    if labels.device != logits.device:
        raise ValueError(f"seg_ce: expected labels on {logits.device} like logits, got {labels.device}")
    if weight is not None:
        check_shape("seg_ce", "weight", weight, classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(labels, classes, ignore_index)
    backends.choose("seg_ce", [logits, labels] if weight is None else [logits, labels, weight], backend)
    return reference.seg_ce(logits, labels, weight, ignore_index)


def _check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"seg_ce: expected labels in [0, {classes}) or ignore_index {ignore_index}, got {wrong[0].item()}"
            f" ({wrong.numel()} pixels out of range); map the other values to ignore_index"
        )
