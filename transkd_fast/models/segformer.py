"""SegFormer: hierarchical transformer encoder with overlapping patch embeddings, and an all-MLP decoder.

Parameter names are those of the published checkpoints. Activations stay channels-last from the image on, so that
tokens [B, N, C] and maps [B, C, H, W] are views of one another and no layout is ever copied.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd_fast.models.outputs import StageOutputs

MIN_IMAGE_SIZE = 32


def _tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Views tokens [B, H*W, C] as a channels-last map [B, C, H, W]."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _map_to_tokens(maps: Tensor) -> Tensor:
    """Views a channels-last map [B, C, H, W] as tokens [B, H*W, C]."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _upsample(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tells whether a call of the module does what its class does, and nothing else that a caller could notice."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    # Some libraries wrap a module by assigning its `forward`.
    return type(module) is kind and not hooked and "forward" not in vars(module)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    device_type = tensor.device.type
    # Dynamo of torch 2.11 cannot trace the question; where it compiles, autocast exists.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch per sample and rescales the ones kept.

    Args:
        rate: Probability of dropping the branch, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drops samples of x [B, N, C] in training mode; the identity in eval mode."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Shows the rate in the module's repr."""
        return f"rate={self.rate}"


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: strided convolution, then LayerNorm over channels.

    Args:
        in_channels: Channels of the incoming map.
        embed_dim: Channels of the tokens.
        patch_size: Kernel size of the convolution; its padding is half of it.
        stride: Stride of the convolution.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Embeds a channels-last map [B, C_in, H, W]; returns tokens [B, N, C] and their height and width."""
        x = self.proj(x)
        height, width = x.shape[-2:]
        return self.norm(_map_to_tokens(x)), height, width


class Attention(nn.Module):
    """Multi-head self-attention whose keys and values come from a spatially reduced map.

    Args:
        dim: Token channels, a multiple of num_heads.
        num_heads: Attention heads.
        sr_ratio: Kernel size and stride of the reducing convolution; 1 leaves keys and values at full length.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attends over tokens [B, N, C] of a height x width map; returns [B, N, C]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.sr_ratio > 1:
            x = self.norm(_map_to_tokens(self.sr(_tokens_to_map(x, height, width))))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        x = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution on tokens, which tells the MLP where a token lies.

    Args:
        dim: Token channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Convolves tokens [B, N, C] of a height x width map; returns [B, N, C]."""
        return _map_to_tokens(self.dwconv(_tokens_to_map(x, height, width)))


class Mlp(nn.Module):
    """Mix-FFN: Linear, 3x3 depthwise convolution, GELU, Linear.

    Args:
        dim: Token channels in and out.
        hidden_dim: Channels between the two Linears.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps tokens [B, N, C] of a height x width map to [B, N, C]."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), height, width)))


class Block(nn.Module):
    """Pre-norm transformer block: attention and Mix-FFN, each with a residual and stochastic depth.

    Args:
        dim: Token channels.
        num_heads: Attention heads.
        sr_ratio: Spatial reduction of keys and values.
        mlp_ratio: Hidden width of the Mix-FFN over dim.
        drop_path: Probability of dropping each of the two branches.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Maps tokens [B, N, C] of a height x width map to [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x), height, width))


class LinearFuse(nn.Module):
    """Projects every stage to the decoder width, upsamples, concatenates, and fuses by 1x1 convolution, BN and ReLU.

    Projection and 1x1 convolution act on channels, bilinear upsampling on pixels, and all three are linear; so they
    commute, and stage m needs one product with (its columns of the convolution) @ (its projection) at its own
    resolution. The concatenated map is never formed, and the decoder takes 8 (B1) to 22 (B2) times fewer
    multiplications; results differ from the published order by rounding only.

    Folding reads the weights of the projections and the convolution without calling these modules. Where one of them
    is more than its weights (it has hooks, pruning included, or is quantized, adapted or replaced), all are called, in
    the published order.

    Args:
        channels: Width of the decoder.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, features: Sequence[Tensor], projections: Sequence[nn.Linear]) -> Tensor:
        """Fuses four maps [B, C_m, H_m, W_m], fine to coarse, into one [B, channels, H_1, W_1]."""
        plain_conv = _is_plain(self.conv, nn.Conv2d) and self.conv.bias is None
        if plain_conv and all(_is_plain(p, nn.Linear) and p.bias is not None for p in projections):
            fused = self._fuse_folded(features, projections)
        else:
            fused = self._fuse_published(features, projections)
        return F.relu(self.bn(fused))

    def _fuse_folded(self, features: Sequence[Tensor], projections: Sequence[nn.Linear]) -> Tensor:
        # The published concatenation runs from the coarsest stage to the finest.
        columns = self.conv.weight.flatten(1).chunk(4, dim=1)[::-1]
        # Under autocast the folded weights are rounded once, as the published ones are, not before and after.
        with _without_autocast(self.conv.weight):
            folded = [(c @ p.weight, c @ p.bias) for c, p in zip(columns, projections, strict=True)]
        stages = [
            _tokens_to_map(F.linear(_map_to_tokens(x), weight, bias), *x.shape[-2:])
            for x, (weight, bias) in zip(features, folded, strict=True)
        ]
        fused = stages[0]
        for stage in stages[1:]:
            fused = fused + _upsample(stage, fused)
        return fused

    def _fuse_published(self, features: Sequence[Tensor], projections: Sequence[nn.Linear]) -> Tensor:
        stages = [
            _tokens_to_map(projection(_map_to_tokens(x)), *x.shape[-2:])
            for x, projection in zip(features, projections, strict=True)
        ]
        stages = stages[:1] + [_upsample(stage, stages[0]) for stage in stages[1:]]
        return self.conv(torch.cat(stages[::-1], dim=1))


class SegFormer(nn.Module):
    """SegFormer for semantic segmentation, returning what distillation needs beside the logits.

    Args:
        channels: Channels of the four stages, fine to coarse.
        depths: Blocks per stage.
        decoder_channels: Width of the all-MLP decoder.
        num_heads: Attention heads per stage.
        sr_ratios: Spatial reduction of keys and values per stage.
        mlp_ratio: Hidden width of the Mix-FFN over the stage's channels.
        num_classes: Number of logits K.
        in_channels: Channels of the images.
        drop_path_rate: Stochastic-depth rate of the last block; it grows linearly from 0 over the depth.
        dropout: Rate of the channel dropout before the classifier.

    Raises:
        ValueError: If a per-stage list does not have four entries, or a number is out of range.

    Source:
        Xie et al., "SegFormer", NeurIPS 2021, sections 3.1 and 3.2; layer norm epsilons, rates and names as the
        checkpoints published with TransKD fix them.
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        decoder_channels: int,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: int = 4,
        num_classes: int = 20,
        in_channels: int = 3,
        drop_path_rate: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        per_stage = {"channels": channels, "depths": depths, "num_heads": num_heads, "sr_ratios": sr_ratios}
        for name, values in per_stage.items():
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"SegFormer: expected {name} to hold 4 positive numbers, got {list(values)}")
        for dim, heads in zip(channels, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"SegFormer: expected channels to be multiples of num_heads, got {dim} and {heads}")
        for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
            if count < 1:
                raise ValueError(f"SegFormer: expected {name} to be at least 1, got {count}")
        for name, rate in (("drop_path_rate", drop_path_rate), ("dropout", dropout)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"SegFormer: expected {name} in [0, 1), got {rate}")
        self.channels = tuple(channels)
        self.num_classes = num_classes
        self.in_channels = in_channels

        incoming = (in_channels, *channels[:3])
        for m in range(4):
            patch_size, stride = (7, 4) if m == 0 else (3, 2)
            self.add_module(f"patch_embed{m + 1}", PatchEmbed(incoming[m], channels[m], patch_size, stride))
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        for m in range(4):
            blocks = [Block(channels[m], num_heads[m], sr_ratios[m], mlp_ratio, next(rates)) for _ in range(depths[m])]
            self.add_module(f"block{m + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{m + 1}", nn.LayerNorm(channels[m], eps=1e-6))
        for m in reversed(range(4)):
            self.add_module(f"linear_c{m + 1}", nn.ModuleDict({"proj": nn.Linear(channels[m], decoder_channels)}))
        self.linear_fuse = LinearFuse(decoder_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(decoder_channels, num_classes, 1)
        self.apply(_init_weights)

    def forward(self, images: Tensor, features_only: bool = False) -> StageOutputs:
        """Computes stage maps, stage embeddings and, unless features_only, the logits.

        Args:
            images: RGB in [0, 1], [B, in_channels, H, W], floating point, H and W at least 32 (any value, odd too).
            features_only: Leave out the decoder; logits are None. What a teacher needs.

        Returns:
            StageOutputs; the features are channels-last views of the normalised tokens.

        Raises:
            TypeError: If images are not floating point.
            ValueError: If images have the wrong rank or channel count, or are smaller than 32 pixels.
        """
        self._check_images(images)
        x = images.contiguous(memory_format=torch.channels_last)
        features: list[Tensor] = []
        embeddings: list[Tensor] = []
        for m in range(1, 5):
            tokens, height, width = getattr(self, f"patch_embed{m}")(x)
            embeddings.append(tokens)
            for block in getattr(self, f"block{m}"):
                tokens = block(tokens, height, width)
            x = _tokens_to_map(getattr(self, f"norm{m}")(tokens), height, width)
            features.append(x)
        return StageOutputs(features, embeddings, None if features_only else self._decode(features))

    def _decode(self, features: list[Tensor]) -> Tensor:
        projections = [getattr(self, f"linear_c{m}")["proj"] for m in range(1, 5)]
        return self.linear_pred(self.dropout(self.linear_fuse(features, projections)))

    def _check_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"SegFormer: expected images of a floating dtype in [0, 1], got {images.dtype}; "
                "convert them, e.g. images.float() / 255"
            )
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"SegFormer: expected images to have shape [B, {self.in_channels}, H, W], got {list(images.shape)}"
            )
        if min(images.shape[-2:]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"SegFormer: expected images of at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, "
                f"got {images.shape[-2]} x {images.shape[-1]}; resize or pad them"
            )


class Variant(NamedTuple):
    """What tells one published SegFormer from another."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    decoder_channels: int


VARIANTS = {
    "b0": Variant((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": Variant((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "b2": Variant((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "b3": Variant((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "b4": Variant((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "b5": Variant((64, 128, 320, 512), (3, 6, 40, 3), 768),
}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _build(variant: str, num_classes: int, options: dict[str, Any]) -> SegFormer:
    config = VARIANTS[variant]
    return SegFormer(config.channels, config.depths, config.decoder_channels, num_classes=num_classes, **options)


def segformer_b0(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B0 (3.72 M parameters at 20 classes); options are those of SegFormer."""
    return _build("b0", num_classes, options)


def segformer_b1(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B1 (13.68 M parameters at 20 classes); options are those of SegFormer."""
    return _build("b1", num_classes, options)


def segformer_b2(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B2 (27.36 M parameters at 20 classes); options are those of SegFormer."""
    return _build("b2", num_classes, options)


def segformer_b3(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B3; options are those of SegFormer."""
    return _build("b3", num_classes, options)


def segformer_b4(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B4; options are those of SegFormer."""
    return _build("b4", num_classes, options)


def segformer_b5(num_classes: int = 20, **options: Any) -> SegFormer:
    """SegFormer-B5; options are those of SegFormer."""
    return _build("b5", num_classes, options)
