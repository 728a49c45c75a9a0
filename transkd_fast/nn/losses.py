"""The distillation losses as modules, over the maps of all stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.ops._checks import check_length
from transkd_fast.ops.cwd import check_temperature


class HCLLoss(nn.Module):
    """Hierarchical context loss, summed over stages.

    Args:
        stage_weights: One weight per stage; default 1 each.

    Source: TransKD section III-B.
    """

    def __init__(self, stage_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.stage_weights = None if stage_weights is None else tuple(stage_weights)

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Computes the loss.

        Args:
            student_maps: One map [B, C_m, H_m, W_m] per stage, any floating dtype.
            teacher_maps: Maps of the same shapes.

        Returns:
            The loss, 0-d, float32 (float64 if a map is float64).

        Raises:
            ValueError: If shapes or numbers of stages do not fit.
        """
        return functional.hcl_loss(student_maps, teacher_maps, self.stage_weights)

    def extra_repr(self) -> str:
        """Describes the settings."""
        return f"stage_weights={self.stage_weights}"


class CWDLoss(nn.Module):
    """Channel-wise distillation loss, summed over stages.

    Args:
        temperature: Temperature T > 0; default 1.
        stage_weights: One weight per stage; default 1 each.

    Raises:
        ValueError: If the temperature is not positive and finite.

    Source: Shu et al., channel-wise knowledge distillation for dense prediction.
    """

    def __init__(self, temperature: float = 1.0, stage_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        check_temperature("CWDLoss", temperature)
        self.temperature = temperature
        self.stage_weights = None if stage_weights is None else tuple(stage_weights)

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Computes the loss.

        Args:
            student_maps: One map [B, C_m, H_m, W_m] or tokens [B, N_m, C_m] per stage, any floating dtype.
            teacher_maps: Maps or tokens of the same shapes; no gradient flows into them.

        Returns:
            The loss, 0-d, float32 (float64 if a map is float64).

        Raises:
            ValueError: If shapes or numbers of stages do not fit.
        """
        stages = len(student_maps)
        if stages == 0:
            raise ValueError("CWDLoss: expected student_maps to have at least one stage, got none")
        weights = (1.0,) * stages if self.stage_weights is None else self.stage_weights
        check_length("CWDLoss", "teacher_maps", teacher_maps, stages, "student_maps")
        check_length("CWDLoss", "stage_weights", weights, stages, "student_maps")
        terms = zip(weights, student_maps, teacher_maps, strict=True)
        return torch.stack([weight * functional.cwd_loss(s, t, self.temperature) for weight, s, t in terms]).sum()

    def extra_repr(self) -> str:
        """Describes the settings."""
        return f"temperature={self.temperature}, stage_weights={self.stage_weights}"
