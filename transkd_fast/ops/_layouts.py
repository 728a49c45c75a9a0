"""The memory layouts of maps: NCHW and channels-last, each taken as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd_fast.ops._checks import check_given, check_not_empty
from transkd_fast.reference._common import compute_dtype, without_autocast


def is_channels_last(maps: Tensor) -> bool:
    """Says whether a map [B, C, H, W] lies channels-last in memory and not NCHW as well."""
    return not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)


def in_layout(maps: Tensor, channels_last: bool) -> Tensor:
    """Brings a map to a layout; only one that is not in it is copied."""
    return maps.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def same_layout(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Brings two maps to the layout of the first; only maps that are in no layout, or in different ones, are copied."""
    channels_last = is_channels_last(student)
    return in_layout(student, channels_last), in_layout(teacher, channels_last)


def resized(op: str, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
    """Resizes student maps to their teachers' height and width, bilinearly (align_corners=False).

    Args:
        op: Name of the op, for the message.
        students: One map [B, C_m, H_m, W_m] per stage, any floating dtype.
        teachers: One map [B, C_m, H'_m, W'_m] per stage.

    Returns:
        The maps [B, C_m, H'_m, W'_m], resized ones at least in float32; one that has the size is returned as it is.

    Raises:
        TypeError: If one is no floating tensor.
        ValueError: If one of a pair is no map, or empty.
    """
    result = []
    for stage, (student, teacher) in enumerate(zip(students, teachers, strict=True), start=1):
        name = f"{op}: stage {stage}"
        check_given(name, student=student, teacher=teacher)
        check_not_empty(name, "student", student)
        check_not_empty(name, "teacher", teacher)
        if student.dim() != 4 or teacher.dim() != 4:
            raise ValueError(
                f"{name}: expected maps [B, C, H, W] to resize, got shapes {list(student.shape)} and"
                f" {list(teacher.shape)}"
            )
        size = (teacher.shape[2], teacher.shape[3])
        if student.shape[2:] != size:
            with without_autocast(student):
                student = student.to(compute_dtype(student))
                student = F.interpolate(student, size=size, mode="bilinear", align_corners=False)
        result.append(student)
    return result
