"""hcl: pyramid mean-squared error between the maps of student and teacher, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd_fast import _extension, backends
from transkd_fast.ops import _checks
from transkd_fast.ops._autograd import first_derivative
from transkd_fast.reference.hcl import hcl as hcl_reference

OP = "hcl"


def _cpu_can_run(tensors: Sequence[Tensor]) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "float64 maps do not mix with other dtypes in this kernel"
    return None


backends.register_op(OP)
backends.register(OP, "cpu", _cpu_can_run)


if _extension.loaded("_C"):

    @torch.library.register_fake("transkd_fast::hcl_fwd")
    def _hcl_fwd_fake(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = student.shape
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        cells = _segments(height, min(height, width)) * _segments(width, min(height, width))
        return student.new_empty((), dtype=dtype), student.new_empty((batch, cells, channels), dtype=dtype)

    @torch.library.register_fake("transkd_fast::hcl_bwd")
    def _hcl_bwd_fake(grad: Tensor, student: Tensor, teacher: Tensor, table: Tensor) -> Tensor:
        return torch.empty_like(student)


def _segments(size: int, shorter: int) -> int:
    """Number of pieces that the borders of all pooling windows cut an axis into (csrc/cpu/hcl_pyramid.h).

    Written with comparisons only, so that it also holds for symbolic sizes.
    """
    if shorter <= 2:  # no level, or the 1 x 1 level
        return 1
    if shorter <= 4:  # borders at floor and ceil of n / 2
        return 2 if size % 2 == 0 else 3
    if size % 4 == 0:
        return 4
    if size % 2 == 0:
        return 6
    return 5 if size == 5 else 7


class _HCL(torch.autograd.Function):
    """One stage on CPU; saves the maps as they are and the small table of the pooled levels' gradients."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, grad_enabled: bool) -> Tensor:
        loss, table = torch.ops.transkd_fast.hcl_fwd(student, teacher)
        if grad_enabled:
            ctx.save_for_backward(student, teacher, table)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        student, teacher, table = ctx.saved_tensors
        grad_student = grad_teacher = None
        if ctx.needs_input_grad[0]:
            grad_student = _gradient(grad, student, teacher, table)
        if ctx.needs_input_grad[1]:
            # The loss depends on student - teacher only: with the two exchanged, difference and table change sign.
            grad_teacher = _gradient(grad, teacher, student, -table)
        return grad_student, grad_teacher, None


def _gradient(grad: Tensor, of: Tensor, other: Tensor, table: Tensor) -> Tensor:
    with torch.no_grad():
        gradient = torch.ops.transkd_fast.hcl_bwd(grad, of, other, table)
    return first_derivative(OP, gradient, grad, of, other)


def _same_dense_layout(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both maps to the student's layout; only maps that are in no layout, or in different ones, are copied."""
    channels_last = not student.is_contiguous() and student.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return student.contiguous(memory_format=layout), teacher.contiguous(memory_format=layout)


def hcl_stage(student: Tensor, teacher: Tensor, backend: str | None = None) -> Tensor:
    """HCL of one stage: ``(mean d^2 + sum_l w_l mean pool_l(d)^2) / (1 + sum_l w_l)`` with ``d = student - teacher``.

    Args:
        student: [B, C, H, W], any floating dtype, NCHW or channels-last.
        teacher: [B, C, H, W], any floating dtype; detach it unless its gradient is wanted.
        backend: see :mod:`transkd_fast.backends`.

    Returns:
        Loss, 0-d, float32 (float64 for float64 maps).

    Raises:
        TypeError: if a map is no floating tensor.
        ValueError: if the shapes differ or a map is empty.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-B; levels and weights as in the published ``hcl`` with ``min(h, w)`` for ``h``.
    """
    _check_stage("hcl", student, teacher)
    return _run_stage(student, teacher, backend)


def hcl_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    stage_weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """HCL over all stages: ``sum_m weight_m hcl(student_m, teacher_m)``.

    Args:
        student_maps: one map [B, C_m, H_m, W_m] per stage, any floating dtype, NCHW or channels-last.
        teacher_maps: the same shapes.
        stage_weights: one factor per stage; default 1 each (the published alternative is 0.1, 0.1, 0.5, 1).
        backend: see :mod:`transkd_fast.backends`.

    Returns:
        Loss, 0-d, float32 (float64 for float64 maps).

    Raises:
        TypeError: if a map is no floating tensor.
        ValueError: if the numbers of stages or the shapes differ, or a map is empty.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-B.
    """
    if not len(student_maps):
        raise ValueError("hcl_loss: expected at least one stage, got empty lists")
    _checks.check_length("hcl_loss", "teacher_maps", teacher_maps, len(student_maps), "student_maps")
    weights = [1.0] * len(student_maps) if stage_weights is None else list(stage_weights)
    _checks.check_length("hcl_loss", "stage_weights", weights, len(student_maps), "student_maps")
    for stage, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True), start=1):
        _check_stage(f"hcl_loss: stage {stage}", student, teacher)
    losses = [_run_stage(s, t, backend) for s, t in zip(student_maps, teacher_maps, strict=True)]
    total = losses[0] * weights[0]
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * weight
    return total


def _check_stage(name: str, student: Tensor, teacher: Tensor) -> None:
    _checks.check_floating(name, student=student, teacher=teacher)
    _checks.check_shape(name, "student", student, "B", "C", "H", "W")
    _checks.check_shape(name, "teacher", teacher, *student.shape)
    _checks.check_not_empty(name, "student", student)


def _run_stage(student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
    if backends.choose(OP, (student, teacher), backend) == "cpu":
        student, teacher = _same_dense_layout(student, teacher)
        grad_enabled = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
        return _HCL.apply(student, teacher, grad_enabled)
    return hcl_reference(student, teacher)
