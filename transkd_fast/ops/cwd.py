"""The op cwd: channel-wise distillation of maps or tokens."""

from __future__ import annotations

import math

from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops._checks import check_floating, check_not_empty, check_shape
from transkd_fast.reference import cwd as reference

backends.register_op("cwd")


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, backend: str | None = None) -> Tensor:
    """Computes T^2 / (B C) * sum over (sample, channel) of KL(softmax(t / T) || softmax(s / T)), over pixels.

    Args:
        student: Map [B, C, H, W], or tokens [B, N, C] which are taken as pixels; any floating dtype.
        teacher: Same shape; its dtype may differ. No gradient flows into it.
        temperature: Temperature T > 0; default 1.
        backend: Backend to run on; default: the context's, the environment's, or the first that can.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If shapes or devices do not fit, the maps are empty, or the temperature is not positive and finite.

    Source: Shu et al., channel-wise knowledge distillation for dense prediction, equation 4.
    """
    check_floating("cwd", student=student, teacher=teacher)
    if student.dim() not in (3, 4):
        raise ValueError(
            f"cwd: expected student to be a map [B, C, H, W] or tokens [B, N, C], got shape {list(student.shape)}"
        )
    check_shape("cwd", "teacher", teacher, *student.shape)
    check_not_empty("cwd", "student", student)
    check_temperature("cwd", temperature)
    backends.choose("cwd", [student, teacher], backend)
    return reference.cwd(student, teacher, temperature)


def check_temperature(op: str, temperature: float) -> None:
    """Checks that a temperature is positive and finite.

    Args:
        op: Name of the op or module, for the message.
        temperature: The temperature.

    Raises:
        ValueError: If it is not.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: expected temperature to be positive and finite, got {temperature}")
