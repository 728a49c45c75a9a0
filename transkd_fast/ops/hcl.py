"""hcl: pyramid mean-squared error between the maps of student and teacher, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _checks, _registration
from transkd_fast.ops._autograd import distinct, first_derivative
from transkd_fast.ops._layouts import resized, same_layout
from transkd_fast.reference.hcl import LEVEL_WEIGHTS
from transkd_fast.reference.hcl import hcl as hcl_reference

OP = "hcl"


backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _checks.same_precision)


def _hcl_fwd_fake(
    students: list[Tensor], teachers: list[Tensor], weights: Sequence[float], level_weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    tables = [student.new_empty(table_shape(student), dtype=dtype) for student in students]
    return students[0].new_empty((), dtype=dtype), tables


def _hcl_bwd_fake(
    grad: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    tables: list[Tensor],
    weights: Sequence[float],
    level_weights: Sequence[float],
) -> list[Tensor]:
    return [torch.empty_like(student) for student in students]


def table_shape(student: Tensor) -> tuple[int, int, int]:
    """Shape [B, cells, C] of a stage's table of the pooled levels' gradients, for the map [B, C, H, W]."""
    batch, channels, height, width = student.shape
    cells = _segments(height, min(height, width)) * _segments(width, min(height, width))
    return batch, cells, channels


_registration.register_fakes(hcl_fwd=_hcl_fwd_fake, hcl_bwd=_hcl_bwd_fake)
_registration.register_triton(
    "hcl",
    hcl_fwd="(Tensor[] students, Tensor[] teachers, float[] weights, float[] level_weights)"
    " -> (Tensor loss, Tensor[] tables)",
    hcl_bwd="(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor[] tables, float[] weights,"
    " float[] level_weights) -> Tensor[]",
)


def _segments(size: int, shorter: int) -> int:
    """Number of pieces that the borders of all pooling windows cut an axis into (csrc/common/hcl_pyramid.h).

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
    """All stages at once; saves the maps as they are and the small tables of the pooled levels' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        weights: tuple[float, ...],
        level_weights: tuple[float, ...],
        grad_enabled: bool,
        first: Tensor,
        *others: Tensor,
    ) -> Tensor:
        # The first one by name: where no gradient is asked for, torch.compile (seen in torch 2.14) calls a forward
        # with exactly two variable arguments without its context.
        maps = (first, *others)
        stages = len(weights)
        loss, tables = _registration.raw_op("hcl_fwd", backend)(maps[:stages], maps[stages:], weights, level_weights)
        ctx.backend, ctx.weights, ctx.level_weights = backend, weights, level_weights
        if grad_enabled:
            ctx.save_for_backward(*maps, *tables)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stages = len(ctx.weights)
        saved = ctx.saved_tensors
        students, teachers, tables = saved[:stages], saved[stages : 2 * stages], saved[2 * stages :]
        needed = ctx.needs_input_grad[4:]
        student_grads = _gradients(ctx, grad, students, teachers, tables, needed[:stages])
        # The loss depends on student - teacher only: with the two exchanged, difference and table change sign.
        teacher_grads = _gradients(ctx, grad, teachers, students, tables, needed[stages:], sign=-1)
        return None, None, None, None, *student_grads, *teacher_grads


def _gradients(
    ctx: Any,
    grad: Tensor,
    of: Sequence[Tensor],
    others: Sequence[Tensor],
    tables: Sequence[Tensor],
    needed: Sequence[bool],
    sign: int = 1,
) -> list[Tensor | None]:
    stages = [m for m, wanted in enumerate(needed) if wanted]
    result: list[Tensor | None] = [None] * len(needed)
    if stages:
        with torch.no_grad():
            gradients = _registration.raw_op("hcl_bwd", ctx.backend)(
                grad,
                [of[m] for m in stages],
                [others[m] for m in stages],
                [tables[m] if sign > 0 else -tables[m] for m in stages],
                [ctx.weights[m] for m in stages],
                ctx.level_weights,
            )
        for m, gradient in zip(stages, gradients, strict=True):
            result[m] = first_derivative(OP, gradient, grad, of[m], others[m])
    return result


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
    return _run([student], [teacher], [1.0], LEVEL_WEIGHTS, backend)


def hcl_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    stage_weights: Sequence[float] | None = None,
    backend: str | None = None,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    resize_student: bool = False,
) -> Tensor:
    """HCL over all stages: ``sum_m weight_m hcl(student_m, teacher_m)``.

    Args:
        student_maps: one map [B, C_m, H_m, W_m] per stage, any floating dtype, NCHW or channels-last.
        teacher_maps: the same shapes.
        stage_weights: one factor per stage; default 1 each (the published alternative is 0.1, 0.1, 0.5, 1).
        backend: see :mod:`transkd_fast.backends`.
        level_weights: weights of the pooled levels, in the order of those that a map uses (4 x 4, 2 x 2, 1 x 1, without
            those that are not smaller than its shorter side); the full-size term has weight 1. Default 1/2, 1/4, 1/8.
        resize_student: resize student maps of another height and width to the teacher's, bilinearly
            (align_corners=False), instead of rejecting them.

    Returns:
        Loss, 0-d, float32 (float64 for float64 maps).

    Raises:
        TypeError: if a map is no floating tensor.
        ValueError: if the numbers of stages or the shapes differ, a map is empty, or there are not three finite
            level weights >= 0.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-B.
    """
    if not len(student_maps):
        raise ValueError("hcl_loss: expected at least one stage, got empty lists")
    _checks.check_length("hcl_loss", "teacher_maps", teacher_maps, len(student_maps), "student_maps")
    weights = [1.0] * len(student_maps) if stage_weights is None else list(stage_weights)
    _checks.check_length("hcl_loss", "stage_weights", weights, len(student_maps), "student_maps")
    _checks.check_weights("hcl_loss", "stage_weights", weights)
    check_level_weights("hcl_loss", level_weights)
    if resize_student:
        student_maps = resized("hcl_loss", student_maps, teacher_maps)
    for stage, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True), start=1):
        _check_stage(f"hcl_loss: stage {stage}", student, teacher, "; resize_student=True resizes the student's map")
    return _run(student_maps, teacher_maps, weights, level_weights, backend)


def check_level_weights(op: str, level_weights: Sequence[float]) -> None:
    """Checks that there is one weight per pooled level, none of them negative.

    Args:
        op: Name of the op, for the message.
        level_weights: The weights.

    Raises:
        ValueError: If there are not three, or one is negative or not finite.
    """
    if len(level_weights) != len(LEVEL_WEIGHTS) or not all(0 <= weight < math.inf for weight in level_weights):
        raise ValueError(
            f"{op}: expected level_weights to be {len(LEVEL_WEIGHTS)} finite numbers >= 0, for the levels in the order"
            f" 4 x 4, 2 x 2, 1 x 1, got {list(level_weights)}"
        )


def _check_stage(name: str, student: Tensor, teacher: Tensor, advice: str = "") -> None:
    _checks.check_given(name, student=student, teacher=teacher)
    _checks.check_shape(name, "student", student, "B", "C", "H", "W")
    _checks.check_not_empty(name, "student", student)
    if teacher.shape[2:] != student.shape[2:] and teacher.shape[:2] == student.shape[:2]:
        raise ValueError(
            f"{name}: expected teacher to have shape {list(student.shape)} like student, got {list(teacher.shape)}"
            f"{advice}"
        )
    _checks.check_shape(name, "teacher", teacher, *student.shape)


def _run(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    level_weights: Sequence[float],
    backend: str | None,
) -> Tensor:
    chosen = backends.choose(OP, (*students, *teachers), backend)
    if chosen == "eager":
        total = hcl_reference(students[0], teachers[0], level_weights) * weights[0]
        for student, teacher, weight in zip(students[1:], teachers[1:], weights[1:], strict=True):
            total = total + hcl_reference(student, teacher, level_weights) * weight
        return total
    pairs = [same_layout(student, teacher) for student, teacher in zip(students, teachers, strict=True)]
    maps = distinct([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    grad_enabled = torch.is_grad_enabled() and any(m.requires_grad for m in maps)
    return _HCL.apply(chosen, tuple(map(float, weights)), tuple(map(float, level_weights)), grad_enabled, *maps)
