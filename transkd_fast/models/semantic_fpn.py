"""Semantic FPN: a light decoder for the four maps of any hierarchical backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True)
    )


class SemanticFPN(nn.Module):
    """Feature pyramid whose levels are brought to stride 4 by convolutions and doublings, added up, and classified.

    Args:
        in_channels: Channels of the four maps, fine to coarse, strides 4, 8, 16, 32.
        num_classes: Number of logits K.
        pyramid_channels: Width of the pyramid; default 256.
        channels: Width of the levels at stride 4; default 128.
        dropout: Rate of whole channels left out before the classifier; default 0.1.

    Source: Kirillov et al., panoptic feature pyramid networks (arXiv 1901.02446), section 3; widths as PVT uses it
        (arXiv 2102.12122, section 5.3).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        pyramid_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, pyramid_channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(pyramid_channels, pyramid_channels, 3, padding=1) for _ in in_channels)
        # Level i is doubled i times, each time after a convolution; the finest one has a convolution too.
        self.levels = nn.ModuleList(
            nn.ModuleList(_block(pyramid_channels if k == 0 else channels, channels) for k in range(max(1, i)))
            for i in range(len(in_channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Classifies.

        Args:
            maps: Maps of the four stages, fine to coarse, [B, C_m, H_m, W_m].

        Returns:
            Logits, [B, K, H_1, W_1].
        """
        pyramid = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(pyramid) - 1, 0, -1):
            pyramid[i - 1] = pyramid[i - 1] + F.interpolate(pyramid[i], size=pyramid[i - 1].shape[2:], mode="nearest")
        total: Tensor | None = None
        levels: Any = self.levels
        for i, (smooth, blocks, x) in enumerate(zip(self.smooth, levels, pyramid, strict=True)):
            x = smooth(x)
            for k, block in enumerate(blocks):
                x = block(x)
                if i > 0:
                    size = maps[i - 1 - k].shape[2:]
                    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        return self.classifier(self.dropout(total))
