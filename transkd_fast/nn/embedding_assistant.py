"""The embedding assistant of variant EA: a second patch embedding per stage, straight to the teacher's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from transkd_fast.ops._checks import check_floating, check_shape


class PatchEmbedding(nn.Module):
    """Overlapping patch embedding: convolution and layer norm.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the tokens.
        patch_size: Side of a patch in pixels, odd.
        stride: Distance of patches in pixels.

    Source: TransKD, variant EA; layer norm eps 1e-5.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int, stride: int) -> None:
        super().__init__()
        # A channels-last weight makes the output channels-last, which viewed as tokens is contiguous.
        self.proj = nn.Conv2d(in_channels, out_channels, patch_size, stride, padding=patch_size // 2).to(
            memory_format=torch.channels_last
        )
        self.norm = nn.LayerNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds the patches of a map.

        Args:
            x: Map, shape [B, C_in, H, W].

        Returns:
            Tokens, shape [B, N, C_out], N = ceil(H / stride) * ceil(W / stride), row-major.
        """
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))

    def tokens_of(self, x: Tensor) -> int:
        """Counts the tokens that a map gives.

        Args:
            x: Map, shape [B, C_in, H, W].

        Returns:
            N.
        """
        rows, columns = ((n - 1) // s + 1 for n, s in zip(x.shape[2:], self.proj.stride, strict=True))
        return rows * columns


class EmbeddingAssistant(nn.Module):
    """Embeds the image (stage 1) and the student's maps 1 to 3 (stages 2 to 4) to the teacher's channels.

    Its eight scalars `projection_scales` and `assistant_scales` weigh PEA's projections and these embeddings:
    f_m * projection_m + f_{m+4} * assistant_m.

    Args:
        in_channels: Student channels, fine to coarse.
        out_channels: Teacher channels, fine to coarse.
        image_channels: Channels of the image; default 3.

    Raises:
        ValueError: If the channel lists are empty or differ in length.

    Source: TransKD, variant EA. The scalars start at 0.1, 0.2, ..., projections first.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], image_channels: int = 3) -> None:
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                "EmbeddingAssistant: expected in_channels and out_channels to have one entry per stage,"
                f" got {list(in_channels)} and {list(out_channels)}"
            )
        super().__init__()
        first = PatchEmbedding(image_channels, out_channels[0], patch_size=7, stride=4)
        channels = zip(in_channels[:-1], out_channels[1:], strict=True)
        self.embeddings = nn.ModuleList([first, *(PatchEmbedding(*pair, patch_size=3, stride=2) for pair in channels)])
        stages = len(self.embeddings)
        self.projection_scales = nn.ParameterList(torch.full((1,), 0.1 * (m + 1)) for m in range(stages))
        self.assistant_scales = nn.ParameterList(torch.full((1,), 0.1 * (m + 1 + stages)) for m in range(stages))

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Embeds the image and the maps.

        Args:
            images: Raw images, shape [B, image_channels, H, W].
            features: Student maps, fine to coarse; the coarsest is not used.

        Returns:
            Tokens per stage, fine to coarse, shapes [B, N_m, C'_m].

        Raises:
            TypeError: If the image or a map is no floating-point tensor.
            ValueError: If the number of maps is not that of the stages, or one has another shape.
        """
        stages = len(self.embeddings)
        if len(features) != stages:
            raise ValueError(f"EmbeddingAssistant: expected {stages} maps, fine to coarse, got {len(features)}")
        inputs = {"images": images} | {f"features[{m}]": x for m, x in enumerate(features[:-1])}
        for m, (embed, (name, x)) in enumerate(zip(self.embeddings, inputs.items(), strict=True)):
            where = f"EmbeddingAssistant: stage {m + 1}"
            check_floating(where, **{name: x})
            check_shape(where, name, x, "B", cast(PatchEmbedding, embed).proj.in_channels, "H", "W")
        return [embed(x) for embed, x in zip(self.embeddings, inputs.values(), strict=True)]
