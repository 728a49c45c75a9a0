"""CWD, channel-wise distillation: per channel, the KL divergence of two distributions over pixels."""

from __future__ import annotations

from torch import Tensor

from transkd_fast.reference._common import compute_dtype, without_autocast


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T^2 / (B C) * sum over (sample, channel) of KL(softmax(t / T) || softmax(s / T)), over pixels.

    Args:
        student: Map [B, C, H, W], or tokens [B, N, C] which are taken as pixels; any floating dtype.
        teacher: Same shape; its dtype may differ. No gradient flows into it.
        temperature: Temperature T.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Source: Shu et al., channel-wise knowledge distillation for dense prediction, equation 4.
    """
    dtype = compute_dtype(student, teacher)
    pixels = 1 if student.dim() == 3 else 2
    channels = student.shape[2] if student.dim() == 3 else student.shape[1]
    with without_autocast(student):
        # Logarithms of softmax underflow to -inf, log_softmax does not.
        log_p_s = (student.to(dtype).flatten(2) / temperature).log_softmax(dim=pixels)
        log_p_t = (teacher.detach().to(dtype).flatten(2) / temperature).log_softmax(dim=pixels)
        divergence = (log_p_t.exp() * (log_p_t - log_p_s)).sum()
        return divergence * (temperature**2 / (student.shape[0] * channels))
