"""The PEA module: projects a student's patch embeddings to the teacher's channels and compares them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.nn._parameters import weight_and_bias
from transkd_fast.ops.pea import STAGE_WEIGHTS


class PEA(nn.ModuleList):
    """Patch embedding alignment: one linear layer per stage.

    Args:
        in_channels: Student channels, fine to coarse.
        out_channels: Teacher channels, fine to coarse.

    Raises:
        ValueError: If the channel lists are empty or differ in length.

    Source: TransKD section III-B.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                "PEA: expected in_channels and out_channels to have one entry per stage,"
                f" got {list(in_channels)} and {list(out_channels)}"
            )
        super().__init__(nn.Linear(c_in, c_out) for c_in, c_out in zip(in_channels, out_channels, strict=True))

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Projects the embeddings.

        Args:
            xs: Student embeddings, fine to coarse, shapes [B, N_m, C_m].

        Returns:
            Projections, fine to coarse, shapes [B, N_m, C'_m].

        Raises:
            ValueError: If the number of embeddings is not that of the stages.
        """
        if len(xs) != len(self):
            raise ValueError(f"PEA: expected {len(self)} embeddings, got {len(xs)}")
        return [linear(x) for linear, x in zip(self, xs, strict=True)]

    def loss(
        self, xs: Sequence[Tensor], targets: Sequence[Tensor], stage_weights: Sequence[float] = STAGE_WEIGHTS
    ) -> Tensor:
        """Computes the weighted sum of the projections' mean-squared errors, without keeping the projections.

        Args:
            xs: Student embeddings, fine to coarse, tokens [B, N_m, C_m] or maps.
            targets: Teacher embeddings, fine to coarse, tokens [B, N_m, C'_m] or maps.
            stage_weights: One weight per stage; default 0.1, 0.1, 0.5, 1.

        Returns:
            The loss, 0-d, float32 (float64 if an embedding is float64).

        Raises:
            ValueError: If shapes or numbers of stages do not fit.
        """
        if len(xs) != len(self):
            raise ValueError(f"PEA: expected {len(self)} embeddings, got {len(xs)}")
        weights, biases = zip(*map(weight_and_bias, self), strict=True)
        return functional.pea_loss(xs, weights, biases, targets, stage_weights)
