"""Published variants and faults, kept for comparisons with the published code and its checkpoints only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STAGE_WEIGHTS = (0.1, 0.1, 0.5, 1.0)
NORMALISERS = ("channel", "spatial", "channel_mean", "none")
DIVERGENCES = ("kl", "mse")


def hcl_by_height(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes HCL with levels l left out when l >= height, whatever the width; windows then overlap.

    Args:
        student: Student map, shape [B, C, H, W].
        teacher: Teacher map of the same shape; a gradient flows into it if it requires one.

    Returns:
        The loss, 0-d, in the inputs' dtype.

    Source: the published code; `reference.hcl.hcl` looks at min(H, W).
    """
    loss = F.mse_loss(student, teacher)
    weight = total = 1.0
    for level in (4, 2, 1):
        if level >= student.shape[2]:
            continue
        weight /= 2
        total += weight
        pooled_s, pooled_t = (F.adaptive_avg_pool2d(t, (level, level)) for t in (student, teacher))
        loss = loss + weight * F.mse_loss(pooled_s, pooled_t)
    return loss / total


def hcl_feature_weighted(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sums `hcl_by_height` over stages with the weights 0.1, 0.1, 0.5, 1 (published as `hcl_feaw`).

    Args:
        student_maps: Four student maps, fine to coarse.
        teacher_maps: Four teacher maps of the same shapes.

    Returns:
        The loss, 0-d.

    Source: the published code.
    """
    terms = zip(STAGE_WEIGHTS, student_maps, teacher_maps, strict=True)
    return torch.stack([weight * hcl_by_height(s, t) for weight, s, t in terms]).sum()


def cwd(student: Tensor, teacher: Tensor, normaliser: str, divergence: str, temperature: float = 1.0) -> Tensor:
    """Computes the published CWD of maps, with every normaliser and divergence it has.

    kl takes the logarithm of the softmax, which gives inf and NaN where that underflows, and of raw values for
    channel_mean and none. mse ignores the temperature. none sees the first sample only.

    Args:
        student: Student map, shape [B, C, H, W].
        teacher: Teacher map of the same shape; no gradient flows into it.
        normaliser: "channel" (softmax over pixels), "spatial" (softmax over channels), "channel_mean" or "none".
        divergence: "kl" or "mse".
        temperature: Temperature T; divides both maps, and T^2 multiplies the loss, for kl only.

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: If the normaliser or the divergence is unknown.

    Source: the published code.
    """
    b, c, h, w = student.shape
    divisor = {"channel": b * c, "channel_mean": b * c, "spatial": b * h * w, "none": b * h * w}
    total = _cwd_sum(student.flatten(2), teacher.flatten(2), normaliser, divergence, temperature)
    return total / divisor[normaliser]


def cwd_embedding(
    student: Tensor, teacher: Tensor, normaliser: str, divergence: str, temperature: float = 1.0
) -> Tensor:
    """Computes the published CWD of tokens, which divides for channel and channel_mean only.

    Args:
        student: Student tokens, shape [B, N, C].
        teacher: Teacher tokens of the same shape; no gradient flows into them.
        normaliser: As in `cwd`, tokens being the pixels.
        divergence: "kl" or "mse".
        temperature: As in `cwd`.

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: If the normaliser or the divergence is unknown.

    Source: the published code.
    """
    total = _cwd_sum(student.transpose(1, 2), teacher.transpose(1, 2), normaliser, divergence, temperature)
    return total / (student.shape[0] * student.shape[2]) if normaliser in ("channel", "channel_mean") else total


def _cwd_sum(student: Tensor, teacher: Tensor, normaliser: str, divergence: str, temperature: float) -> Tensor:
    """Sums the divergence of normalised values, for student and teacher of shape [B, C, N]."""
    if normaliser not in NORMALISERS:
        raise ValueError(f"cwd: expected normaliser to be one of {NORMALISERS}, got {normaliser!r}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"cwd: expected divergence to be one of {DIVERGENCES}, got {divergence!r}")
    scale = temperature if divergence == "kl" else 1.0
    p_s = _normalise(student, normaliser, scale)
    p_t = _normalise(teacher.detach(), normaliser, scale)
    if divergence == "mse":
        return F.mse_loss(p_s, p_t, reduction="sum")
    return F.kl_div(p_s.log(), p_t, reduction="sum") * temperature**2


def _normalise(x: Tensor, normaliser: str, temperature: float) -> Tensor:
    if normaliser == "none":
        return x[0]
    if normaliser == "channel_mean":
        return (x / temperature).mean(dim=2)
    return (x / temperature).softmax(dim=2 if normaliser == "channel" else 1)


def embedding_stages(embed: int) -> tuple[tuple[int, ...], dict[int, float]]:
    """Translates the published option `embed` into the stages that are aligned and their loss weights.

    0 aligns none, 1 to 4 one stage with weight 1, 5 all four with 0.1, 0.1, 0.5, 1.

    Args:
        embed: The published option, 0 to 5.

    Returns:
        The stages, counted from 1, and each one's weight.

    Raises:
        ValueError: If `embed` is not 0 to 5.

    Source: the published code.
    """
    if embed not in range(6):
        raise ValueError(f"embedding_stages: expected embed to be 0 to 5, got {embed!r}")
    if embed == 5:
        return (1, 2, 3, 4), dict(zip((1, 2, 3, 4), STAGE_WEIGHTS, strict=True))
    stages = () if embed == 0 else (embed,)
    return stages, dict.fromkeys(stages, 1.0)


def projection_key(embed: int, stage: int) -> str:
    """Names the projection of a stage in a published checkpoint: a single aligned stage is stored as the first one.

    Args:
        embed: The published option, 1 to 5.
        stage: The stage, counted from 1.

    Returns:
        The module's key, such as "embed1_linearproject".

    Source: the published code.
    """
    return f"embed{stage if embed == 5 else 1}_linearproject"


def cross_entropy_2d(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Computes the training scripts' weighted cross-entropy, NaN where the summed class weights are 0.

    Args:
        logits: Class scores, shape [B, K, H, W].
        target: Class indices, shape [B, H, W], int64; the void class is ignored through its weight 0.
        weight: Class weights, shape [K].

    Returns:
        The loss, 0-d.

    Source: the published code (`CrossEntropyLoss2d`).
    """
    return F.nll_loss(logits.log_softmax(dim=1), target, weight)
