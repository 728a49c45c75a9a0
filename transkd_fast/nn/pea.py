"""The PEA module: projects a student's patch embeddings to the teacher's channels and compares them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.nn._parameters import weight_and_bias
from transkd_fast.ops._checks import check_floating
from transkd_fast.ops.pea import STAGE_WEIGHTS
from transkd_fast.reference.pea import as_tokens


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
            xs: Student embeddings, fine to coarse, tokens [B, N_m, C_m] or maps [B, C_m, H_m, W_m].

        Returns:
            Projections, fine to coarse, tokens [B, N_m, C'_m].

        Raises:
            TypeError: If an embedding is no floating-point tensor.
            ValueError: If the number of embeddings is not that of the stages, or one has other channels.
        """
        self._check(xs)
        return [linear(as_tokens(x)) for linear, x in zip(self, xs, strict=True)]

    def loss(
        self,
        xs: Sequence[Tensor],
        targets: Sequence[Tensor],
        stage_weights: Sequence[float] = STAGE_WEIGHTS,
        assistants: Sequence[Tensor] | None = None,
        projection_scales: Iterable[Tensor] | None = None,
        assistant_scales: Iterable[Tensor] | None = None,
        target_grad: bool = False,
    ) -> Tensor:
        """Computes sum_m w_m mean((P_m - T_m)^2) of the projections P, or of f_p P + f_a A with assistants.

        The projections are not kept; the layers are not called, so that their hooks do not run.

        Args:
            xs: Student embeddings, fine to coarse, tokens [B, N_m, C_m] or maps [B, C_m, H_m, W_m].
            targets: Teacher embeddings, fine to coarse, tokens [B, N_m, C'_m] or maps; without a gradient, but for
                `target_grad`.
            stage_weights: One weight w_m per stage; default 0.1, 0.1, 0.5, 1.
            assistants: Terms A, as `EmbeddingAssistant` gives them: tokens [B, N_m, C'_m] or maps; default none.
            projection_scales: Scalars f_p, `EmbeddingAssistant.projection_scales`; given exactly when `assistants` is.
            assistant_scales: Scalars f_a, `EmbeddingAssistant.assistant_scales`; likewise.
            target_grad: Whether targets may require a gradient and then get one; default no: a teacher is frozen.

        Returns:
            The loss, 0-d, float32 (float64 if an embedding is float64).

        Raises:
            TypeError: If an embedding or a scalar is no floating-point tensor.
            ValueError: If shapes or numbers of stages do not fit, or a target requires a gradient without
                `target_grad`.
        """
        self._check(xs)
        weights, biases = zip(*map(weight_and_bias, self), strict=True)
        return functional.pea_loss(
            xs,
            weights,
            biases,
            targets,
            stage_weights,
            assistants,
            None if projection_scales is None else list(projection_scales),
            None if assistant_scales is None else list(assistant_scales),
            target_grad=target_grad,
        )

    def _check(self, xs: Sequence[Tensor]) -> None:
        if len(xs) != len(self):
            raise ValueError(f"PEA: expected {len(self)} embeddings, one per stage, got {len(xs)}")
        for m, (linear, x) in enumerate(zip(self, xs, strict=True)):
            check_floating("PEA", **{f"xs[{m}]": x})
            channels = cast(nn.Linear, linear).in_features
            if x.dim() not in (3, 4) or x.shape[2 if x.dim() == 3 else 1] != channels:
                raise ValueError(
                    f"PEA: stage {m + 1}: expected xs[{m}] to be tokens [B, N, {channels}] or a map"
                    f" [B, {channels}, H, W], got shape {list(x.shape)}"
                )
