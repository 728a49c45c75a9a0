"""State dicts in the names and shapes of the published checkpoints, written out from the list of their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from transkd_fast.models import SegFormer

B0 = ((32, 64, 160, 256), (2, 2, 2, 2), 256)
TINY = ((8, 16, 24, 32), (1, 1, 1, 1), 16)
TEACHER = (64, 128, 320, 512)
TINY_TEACHER = (16, 24, 32, 40)
SR = (8, 4, 2, 1)


def tiny_segformer(num_classes: int = 5, drop_path_rate: float = 0.1) -> SegFormer:
    channels, depths, decoder = TINY
    return SegFormer(channels, depths, decoder, (1, 2, 3, 4), num_classes=num_classes, drop_path_rate=drop_path_rate)


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, so that nothing that is mixed up stays hidden; variances stay positive."""
    generator = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = 0.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.3
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 3 * scale * noise)
    return network.eval()


def _linear(prefix: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": shape} | ({f"{prefix}.bias": shape[:1]} if bias else {})


def _norm(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def _batch_norm(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
    statistics = {f"{prefix}.{name}": (channels,) for name in ("running_mean", "running_var")}
    return _norm(prefix, channels) | statistics | {f"{prefix}.num_batches_tracked": ()}


def _patch_embed(prefix: str, inputs: int, outputs: int, m: int) -> dict[str, tuple[int, ...]]:
    side = 7 if m == 0 else 3
    return _linear(f"{prefix}.proj", outputs, inputs, side, side) | _norm(f"{prefix}.norm", outputs)


def network_shapes(size: tuple, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a SegFormer file."""
    channels, depths, decoder = size
    shapes: dict[str, tuple[int, ...]] = {}
    for m, (c, depth) in enumerate(zip(channels, depths, strict=True)):
        shapes |= _patch_embed(f"patch_embed{m + 1}", (3, *channels)[m], c, m)
        for i in range(depth):
            block = f"block{m + 1}.{i}."
            shapes |= _norm(block + "norm1", c) | _norm(block + "norm2", c)
            shapes |= _linear(block + "attn.q", c, c) | _linear(block + "attn.kv", 2 * c, c)
            shapes |= _linear(block + "attn.proj", c, c)
            if SR[m] > 1:
                shapes |= _linear(block + "attn.sr", c, c, SR[m], SR[m]) | _norm(block + "attn.norm", c)
            shapes |= _linear(block + "mlp.fc1", 4 * c, c) | _linear(block + "mlp.fc2", c, 4 * c)
            shapes |= _linear(block + "mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
        shapes |= _norm(f"norm{m + 1}", c) | _linear(f"linear_c{m + 1}.proj", decoder, c)
    shapes |= _linear("linear_fuse.conv", decoder, 4 * decoder, 1, 1, bias=False)
    return shapes | _batch_norm("linear_fuse.bn", decoder) | _linear("linear_pred", num_classes, decoder, 1, 1)


def transkd_shapes(variant: str, size: tuple, teacher: tuple, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a TransKD file; mid width 64, squeeze width 32."""
    channels = size[0]
    shapes = {f"student.{key}": shape for key, shape in network_shapes(size, num_classes).items()}
    for number, m in enumerate(reversed(range(4))):
        prefix = f"skfs.{number}."
        shapes |= _linear(prefix + "conv1.0", 64, channels[m], 1, 1, bias=False) | _batch_norm(prefix + "conv1.1", 64)
        shapes |= _linear(prefix + "conv2.0", teacher[m], 64, 3, 3, bias=False)
        shapes |= _batch_norm(prefix + "conv2.1", teacher[m])
        if number:
            shapes |= _linear(prefix + "fc.0", 32, 64, 1, 1, bias=False) | _batch_norm(prefix + "fc.1", 32)
            shapes |= _linear(prefix + "fc1.0", 32, 64, 1, 1, bias=False)
            shapes |= _linear(prefix + "fcs.0", 64, 32, 1, 1) | _linear(prefix + "fcs.1", 64, 32, 1, 1)
        shapes |= _linear(f"embed{m + 1}_linearproject", teacher[m], channels[m])
    if variant == "gl":
        c = channels[3]
        shapes |= {"atten_weight": (1,), "conv_weight": (1,)} | _linear("attn4.qkv", 3 * c, c, bias=False)
        shapes |= _linear("attn4.proj", c, c) | _linear("conv1", c, c, 3) | _linear("conv2", c, c, 3)
    if variant == "ea":
        for m in range(4):
            shapes |= _patch_embed(f"patch_embed{m + 1}", (3, *channels)[m], teacher[m], m)
        shapes |= {f"fuse_weights.{i}": (1,) for i in range(8)}
    return shapes


def state_of(shapes: dict[str, tuple[int, ...]], device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def tensor(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64, device=device)
        return torch.rand(shape, generator=generator).to(device)

    return {key: tensor(key, shape) for key, shape in shapes.items()}
