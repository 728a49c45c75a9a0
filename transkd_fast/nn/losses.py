"""The distillation losses as modules, over the maps of all stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.ops.cwd import check_temperature
from transkd_fast.ops.hcl import check_level_weights
from transkd_fast.reference.hcl import LEVEL_WEIGHTS


class HCLLoss(nn.Module):
    """Hierarchical context loss, summed over stages.

    Args:
        stage_weights: One weight per stage; default 1 each (the published alternative is 0.1, 0.1, 0.5, 1).
        level_weights: Weights of the pooled levels (see `functional.hcl_loss`); default 1/2, 1/4, 1/8.
        resize_student: Resize student maps of another height and width to the teacher's, bilinearly, instead of
            rejecting them; default no.

    Raises:
        ValueError: If there are not three finite level weights >= 0.

    Source: TransKD section III-B.
    """

    def __init__(
        self,
        stage_weights: Sequence[float] | None = None,
        level_weights: Sequence[float] = LEVEL_WEIGHTS,
        resize_student: bool = False,
    ) -> None:
        super().__init__()
        check_level_weights("HCLLoss", level_weights)
        self.stage_weights = None if stage_weights is None else tuple(stage_weights)
        self.level_weights = tuple(level_weights)
        self.resize_student = resize_student

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Computes the loss.

        Args:
            student_maps: One map [B, C_m, H_m, W_m] per stage, any floating dtype.
            teacher_maps: Maps of the same shapes; of any height and width with `resize_student`.

        Returns:
            The loss, 0-d, float32 (float64 if a map is float64).

        Raises:
            ValueError: If shapes or numbers of stages do not fit.
        """
        return functional.hcl_loss(
            student_maps,
            teacher_maps,
            self.stage_weights,
            level_weights=self.level_weights,
            resize_student=self.resize_student,
        )

    def extra_repr(self) -> str:
        """Describes the settings."""
        return (
            f"stage_weights={self.stage_weights}, level_weights={self.level_weights},"
            f" resize_student={self.resize_student}"
        )


class CWDLoss(nn.Module):
    """Channel-wise distillation loss, summed over stages: softmaxes over pixels, per channel.

    Args:
        temperature: Temperature T > 0; default 1.
        stage_weights: One weight per stage; default 1 each.
        resize_student: Resize student maps of another height and width to the teacher's, bilinearly, instead of
            rejecting them; default no.

    Raises:
        ValueError: If the temperature is not positive and finite.

    Source: Shu et al., channel-wise knowledge distillation for dense prediction.
    """

    def __init__(
        self, temperature: float = 1.0, stage_weights: Sequence[float] | None = None, resize_student: bool = False
    ) -> None:
        super().__init__()
        check_temperature("CWDLoss", temperature)
        self.temperature = temperature
        self.stage_weights = None if stage_weights is None else tuple(stage_weights)
        self.resize_student = resize_student

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Computes the loss.

        Args:
            student_maps: One map [B, C_m, H_m, W_m] or tokens [B, N_m, C_m] per stage, any floating dtype.
            teacher_maps: Maps or tokens of the same shapes; maps of any height and width with `resize_student`. No
                gradient flows into them.

        Returns:
            The loss, 0-d, float32 (float64 if a map is float64).

        Raises:
            ValueError: If shapes or numbers of stages do not fit.
        """
        return functional.cwd_loss(
            student_maps, teacher_maps, self.temperature, self.stage_weights, resize_student=self.resize_student
        )

    def extra_repr(self) -> str:
        """Describes the settings."""
        return (
            f"temperature={self.temperature}, stage_weights={self.stage_weights}, resize_student={self.resize_student}"
        )


class KDLoss(nn.Module):
    """Distillation of class scores: softmaxes over classes, per pixel.

    Args:
        temperature: Temperature T > 0; default 1.

    Raises:
        ValueError: If the temperature is not positive and finite.

    Source: Hinton et al., distilling the knowledge in a neural network, section 2; per pixel.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature("KDLoss", temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            student: Class scores [B, K, H, W], any floating dtype.
            teacher: Class scores of the same shape; no gradient flows into them.

        Returns:
            The loss, 0-d, float32 (float64 if a score is float64).

        Raises:
            ValueError: If shapes do not fit.
        """
        return functional.kd_kl_loss(student, teacher, self.temperature)

    def extra_repr(self) -> str:
        """Describes the settings."""
        return f"temperature={self.temperature}"
