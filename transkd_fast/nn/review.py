"""Knowledge Review: brings a student's maps to the teacher's channels, each reviewed with what lies deeper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_MID_CHANNELS = 512


class Review(nn.ModuleList):
    """Attention-based fusion of all stages, from the deepest ("0") to the finest, each beside all deeper ones.

    Per stage x = BN(conv1x1(F)); the deepest stage passes x on, the others fuse it with the coarser stage's v:
    v = a_0 x + a_1 up(v), where (a_0, a_1) = sigmoid(conv1x1([x, up(v)])) are two weights per pixel; each returns
    BN(conv3x3(v)). Where CSF weighs channels, this weighs pixels.

    Args:
        in_channels: Student channels, fine to coarse.
        out_channels: Teacher channels, fine to coarse.
        mid_channels: Width of the fused maps; default the deepest stage's, at most 512.

    Raises:
        ValueError: If the channel lists are empty or differ in length.

    Source: Chen et al., distilling knowledge via knowledge review (arXiv 2104.09044), section 3.3.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], mid_channels: int | None = None
    ) -> None:
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                "Review: expected in_channels and out_channels to have one entry per stage,"
                f" got {list(in_channels)} and {list(out_channels)}"
            )
        mid = min(in_channels[-1], MOST_MID_CHANNELS) if mid_channels is None else mid_channels
        stages = reversed(list(zip(in_channels, out_channels, strict=True)))
        super().__init__(_Fusion(c_in, mid, c_out, attends=i > 0) for i, (c_in, c_out) in enumerate(stages))
        self.in_channels = tuple(in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Fuses the maps of all stages.

        Args:
            maps: Student maps, fine to coarse, shapes [B, C_m, H_m, W_m].

        Returns:
            Maps with the teacher's channels, fine to coarse, shapes [B, C'_m, H_m, W_m].

        Raises:
            ValueError: If the number of maps or their channels do not fit.
        """
        if [t.dim() for t in maps] != [4] * len(self) or tuple(t.shape[1] for t in maps) != self.in_channels:
            raise ValueError(
                f"Review: expected {len(self)} maps [B, C, H, W] with channels {list(self.in_channels)}, fine to"
                f" coarse, got shapes {[list(t.shape) for t in maps]}"
            )
        outputs: list[Tensor] = []
        fused: Tensor | None = None
        for stage, x in zip(self, reversed(maps), strict=True):
            output, fused = stage(x, fused)
            outputs.insert(0, output)
        return outputs


class _Fusion(nn.Module):
    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, attends: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.attention = nn.Conv2d(2 * mid_channels, 2, kernel_size=1) if attends else None
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        if self.attention is not None and coarser is not None:
            coarser = F.interpolate(coarser, size=x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, coarser], dim=1)).sigmoid()
            x = weights[:, :1] * x + weights[:, 1:] * coarser
        return self.conv2(x), x
