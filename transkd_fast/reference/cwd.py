"""CWD, channel-wise distillation, and its sibling over classes: KL divergences of softmaxes."""

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
    tokens = student.dim() == 3
    channels = student.shape[2] if tokens else student.shape[1]
    divergence = _divergence(student, teacher, temperature, dim=1 if tokens else 2)
    return divergence * (temperature**2 / (student.shape[0] * channels))


def kd_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T^2 / (B N) * sum over (sample, pixel) of KL(softmax(t / T) || softmax(s / T)), over channels.

    Args:
        student: Class scores [B, K, H, W], or tokens [B, N, K]; any floating dtype.
        teacher: Same shape; its dtype may differ. No gradient flows into it.
        temperature: Temperature T.

    Returns:
        The loss, 0-d, float32 (float64 if an input is float64).

    Source: Hinton et al., distilling the knowledge in a neural network, section 2; per pixel.
    """
    tokens = student.dim() == 3
    pixels = student.shape[1] if tokens else student.shape[2:].numel()
    divergence = _divergence(student, teacher, temperature, dim=2 if tokens else 1)
    return divergence * (temperature**2 / (student.shape[0] * pixels))


def _divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    dtype = compute_dtype(student, teacher)
    with without_autocast(student):
        # Logarithms of softmax underflow to -inf, log_softmax does not.
        log_p_s = (student.to(dtype).flatten(2) / temperature).log_softmax(dim)
        log_p_t = (teacher.detach().to(dtype).flatten(2) / temperature).log_softmax(dim)
        p_t = log_p_t.exp()
        # Where the teacher's probability is 0, the term's limit is 0, also beside an infinite logarithm.
        return (p_t * (log_p_t - log_p_s)).where(p_t != 0, 0).sum()
