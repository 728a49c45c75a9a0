"""What a student or teacher returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StageOutputs(NamedTuple):
    """Outputs of a four-stage hierarchical network, fine to coarse.

    Args:
        features: One map per stage after its last norm, shapes [B, C_m, H / 2^(m+1), W / 2^(m+1)].
        embeddings: One patch embedding per stage after its norm, before the first block, shapes [B, N_m, C_m].
        logits: Class scores, shape [B, K, H / 4, W / 4]; None for a features-only forward.

    Source: TransKD section III.
    """

    features: list[Tensor]
    embeddings: list[Tensor]
    logits: Tensor | None
