"""cwd: channel-wise distillation of maps or tokens, and its sibling over classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _checks, _registration
from transkd_fast.ops._autograd import distinct, first_derivative
from transkd_fast.ops._layouts import is_channels_last, resized, same_layout
from transkd_fast.reference import cwd as reference

OP = "cwd"
# The axis of a dense view [B, M, N] along which the kernels take the softmax.
STRIDED, CONTIGUOUS = 1, 2

backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _checks.same_precision)


def _cwd_fwd_fake(
    students: list[Tensor],
    teachers: list[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    statistics = [
        student.new_empty((student.shape[0], 4, student.shape[3 - dim]), dtype=dtype)
        for student, dim in zip(students, dims, strict=True)
    ]
    return students[0].new_empty((), dtype=dtype), statistics


def _cwd_bwd_fake(
    grad: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    statistics: list[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> list[Tensor]:
    return [torch.empty_like(student) for student in students]


_registration.register_fakes(cwd_fwd=_cwd_fwd_fake, cwd_bwd=_cwd_bwd_fake)
_registration.register_triton(
    OP,
    cwd_fwd="(Tensor[] students, Tensor[] teachers, int[] dims, float[] weights, float temperature)"
    " -> (Tensor loss, Tensor[] statistics)",
    cwd_bwd="(Tensor grad, Tensor[] students, Tensor[] teachers, Tensor[] statistics, int[] dims, float[] weights,"
    " float temperature) -> Tensor[]",
)


class _CWD(torch.autograd.Function):
    """All stages at once, as dense views [B, M, N]; saves them as they are, and four numbers per softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        dims: tuple[int, ...],
        weights: tuple[float, ...],
        temperature: float,
        grad_enabled: bool,
        first: Tensor,
        *others: Tensor,
    ) -> Tensor:
        views = (first, *others)  # the first one by name: see _HCL
        stages = len(weights)
        loss, statistics = _registration.raw_op("cwd_fwd", backend)(
            views[:stages], views[stages:], dims, weights, temperature
        )
        ctx.backend, ctx.dims, ctx.weights, ctx.temperature = backend, dims, weights, temperature
        if grad_enabled:
            ctx.save_for_backward(*views, *statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stages = len(ctx.weights)
        saved = ctx.saved_tensors
        students, teachers, statistics = saved[:stages], saved[stages : 2 * stages], saved[2 * stages :]
        wanted = [m for m in range(stages) if ctx.needs_input_grad[5 + m]]
        with torch.no_grad():
            gradients = _registration.raw_op("cwd_bwd", ctx.backend)(
                grad,
                *([tensors[m] for m in wanted] for tensors in (students, teachers, statistics)),
                [ctx.dims[m] for m in wanted],
                [ctx.weights[m] for m in wanted],
                ctx.temperature,
            )
        result: list[Tensor | None] = [None] * (5 + 2 * stages)
        for m, gradient in zip(wanted, gradients, strict=True):
            result[5 + m] = first_derivative(OP, gradient, grad, students[m])
        return tuple(result)


def cwd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    temperature: float = 1.0,
    stage_weights: Sequence[float] | None = None,
    backend: str | None = None,
    resize_student: bool = False,
) -> Tensor:
    """Channel-wise distillation over all stages: the KL divergence of softmaxes over pixels, per channel.

    ``sum_m weight_m T^2 / (B C_m) sum_{sample, channel} KL(softmax(t_m / T) || softmax(s_m / T))``.

    Args:
        student_maps: one map [B, C_m, H_m, W_m], NCHW or channels-last, or tokens [B, N_m, C_m], which are taken as
            pixels, per stage; any floating dtype.
        teacher_maps: the same shapes; their dtype may differ. No gradient flows into them.
        temperature: temperature T > 0; default 1.
        stage_weights: one factor per stage; default 1 each.
        backend: see :mod:`transkd_fast.backends`.
        resize_student: resize student maps of another height and width to the teacher's, bilinearly
            (align_corners=False), instead of rejecting them.

    Returns:
        Loss, 0-d, float32 (float64 for float64 maps); finite for entries of up to 1e4 T. In float32 a divergence has an
        error of some 1e-7, times T^2: at high temperatures, where both softmaxes are nearly uniform, few digits remain.

    Raises:
        TypeError: if a map is no floating tensor.
        ValueError: if the numbers of stages, shapes or devices do not fit, a map is empty, or the temperature is not
            positive and finite.
        BackendError: if the chosen backend cannot run.

    Source:
        Shu et al., channel-wise knowledge distillation for dense prediction, equation 4.
    """
    if isinstance(student_maps, Tensor) or isinstance(teacher_maps, Tensor):
        raise TypeError("cwd_loss: expected lists with one map per stage, got a tensor; put it into a list")
    if not len(student_maps):
        raise ValueError("cwd_loss: expected at least one stage, got empty lists")
    _checks.check_length("cwd_loss", "teacher_maps", teacher_maps, len(student_maps), "student_maps")
    weights = [1.0] * len(student_maps) if stage_weights is None else list(stage_weights)
    _checks.check_length("cwd_loss", "stage_weights", weights, len(student_maps), "student_maps")
    _checks.check_weights("cwd_loss", "stage_weights", weights)
    check_temperature("cwd_loss", temperature)
    if resize_student:
        student_maps = resized("cwd_loss", student_maps, teacher_maps)
    for stage, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True), start=1):
        _check_pair(f"cwd_loss: stage {stage}", student, teacher, "; resize_student=True resizes the student's map")
    chosen = backends.choose(OP, (*student_maps, *teacher_maps), backend)
    if chosen == "eager":
        terms = zip(weights, student_maps, teacher_maps, strict=True)
        return torch.stack([weight * reference.cwd(s, t, temperature) for weight, s, t in terms]).sum()
    factors = [
        weight * temperature**2 / (student.shape[0] * student.shape[2 if student.dim() == 3 else 1])
        for weight, student in zip(weights, student_maps, strict=True)
    ]
    return _run(student_maps, teacher_maps, factors, temperature, chosen, over_pixels=True)


def kd_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, backend: str | None = None) -> Tensor:
    """Distillation of class scores: the KL divergence of softmaxes over classes, mean over pixels.

    ``T^2 / (B H W) sum_{sample, pixel} KL(softmax(t / T) || softmax(s / T))``. The same kernels as :func:`cwd_loss`,
    along the other axis.

    Args:
        student: class scores [B, K, H, W], NCHW or channels-last, or tokens [B, N, K]; any floating dtype.
        teacher: the same shape; its dtype may differ. No gradient flows into it.
        temperature: temperature T > 0; default 1.
        backend: see :mod:`transkd_fast.backends`; the op is "cwd".

    Returns:
        Loss, 0-d, float32 (float64 for float64 scores); finite and exact as that of :func:`cwd_loss`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices do not fit, a tensor is empty, or the temperature is not positive and finite.
        BackendError: if the chosen backend cannot run.

    Source:
        Hinton et al., distilling the knowledge in a neural network, section 2; per pixel.
    """
    check_temperature("kd_kl_loss", temperature)
    _check_pair("kd_kl_loss", student, teacher)
    chosen = backends.choose(OP, (student, teacher), backend)
    if chosen == "eager":
        return reference.kd_kl(student, teacher, temperature)
    pixels = student.shape[1] if student.dim() == 3 else student.shape[2:].numel()
    return _run([student], [teacher], [temperature**2 / (student.shape[0] * pixels)], temperature, chosen, False)


def check_temperature(op: str, temperature: float) -> None:
    """Checks that a temperature is positive and finite.

    Args:
        op: Name of the op or module, for the message.
        temperature: The temperature.

    Raises:
        ValueError: If it is no number, or not positive and finite.
    """
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{op}: expected temperature to be positive and finite, got {temperature}")


def _check_pair(name: str, student: Tensor, teacher: Tensor, advice: str = "") -> None:
    _checks.check_given(name, student=student, teacher=teacher)
    if student.dim() not in (3, 4):
        raise ValueError(
            f"{name}: expected student to be a map [B, C, H, W] or tokens [B, N, C], got shape {list(student.shape)}"
        )
    if teacher.dim() == 4 and teacher.shape[:2] == student.shape[:2] and teacher.shape != student.shape:
        raise ValueError(
            f"{name}: expected teacher to have shape {list(student.shape)} like student, got {list(teacher.shape)}"
            f"{advice}"
        )
    _checks.check_shape(name, "teacher", teacher, *student.shape)
    _checks.check_not_empty(name, "student", student)


def _run(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    factors: Sequence[float],
    temperature: float,
    backend: str,
    over_pixels: bool,
) -> Tensor:
    views, dims = [], []
    for student, teacher in zip(students, teachers, strict=True):
        pair, channels_inside = _dense(student, teacher.detach())
        views.append(pair)
        dims.append(STRIDED if channels_inside == over_pixels else CONTIGUOUS)
    tensors = distinct([pair[0] for pair in views] + [pair[1] for pair in views])
    grad_enabled = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _CWD.apply(backend, tuple(dims), tuple(map(float, factors)), float(temperature), grad_enabled, *tensors)


def _dense(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], bool]:
    """Both as contiguous views [B, M, N] of one layout, and whether N counts channels; else copies."""
    if student.dim() == 3:
        return (student.contiguous(), teacher.contiguous()), True
    student, teacher = same_layout(student, teacher)
    if is_channels_last(student):
        return (_tokens(student), _tokens(teacher)), True
    return (student.flatten(2), teacher.flatten(2)), False


def _tokens(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(1, 2)
