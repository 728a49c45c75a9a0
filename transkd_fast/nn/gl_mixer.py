"""The GL-Mixer module: self-attention and a gated convolution over the same tokens, mixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.nn._parameters import weight_and_bias
from transkd_fast.ops._checks import check_floating, check_not_empty, check_shape


class SelfAttention(nn.Module):
    """Multi-head self-attention, the mixer's global branch; the query, key and value layer has no bias.

    Args:
        dim: Channels C.
        num_heads: Number of heads; must divide C. Default 8.

    Raises:
        ValueError: If the heads do not divide the channels.

    Source: TransKD section III-D.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"SelfAttention: expected num_heads to divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over the tokens.

        Args:
            x: Tokens, shape [B, N, C].

        Returns:
            Tokens of the same shape.

        Raises:
            ValueError: If x has another shape.
        """
        check_shape("SelfAttention", "x", x, "B", "N", self.proj.in_features)
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, channels))


class GLMixer(nn.Module):
    """Global-local context mixer: w_att attention(e) + w_conv (conv_a(e) * sigmoid(conv_b(e))) (+ e).

    The convolutions are computed from their parameters without calling the modules, so their hooks do not run.

    Args:
        dim: Channels C.
        num_heads: Attention heads; default 8.
        residual: Whether e is added; default no.

    Raises:
        ValueError: If the heads do not divide the channels.

    Source: TransKD section III-D. Both mixing scalars start at 1.
    """

    def __init__(self, dim: int, num_heads: int = 8, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.attention = SelfAttention(dim, num_heads)
        self.conv_a = nn.Conv1d(dim, dim, kernel_size=3, padding=1)
        self.conv_b = nn.Conv1d(dim, dim, kernel_size=3, padding=1)
        self.attention_weight = nn.Parameter(torch.ones(1))
        self.conv_weight = nn.Parameter(torch.ones(1))

    def forward(self, e: Tensor) -> Tensor:
        """Mixes the tokens.

        Args:
            e: Embedding, shape [B, N, C].

        Returns:
            The mixed embedding, shape [B, N, C], in e's dtype.

        Raises:
            TypeError: If e is no floating-point tensor.
            ValueError: If e has another shape or is empty.
        """
        check_floating("GLMixer", e=e)
        check_shape("GLMixer", "e", e, "B", "N", self.conv_a.in_channels)
        check_not_empty("GLMixer", "e", e)
        return functional.gl_mixer(
            e,
            self.attention(e),
            *weight_and_bias(self.conv_a),
            *weight_and_bias(self.conv_b),
            self.attention_weight,
            self.conv_weight,
            self.residual,
        )
