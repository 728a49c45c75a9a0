"""Any hierarchical backbone of timm, with a Semantic-FPN decoder."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from transkd_fast.models.outputs import StageOutputs
from transkd_fast.models.semantic_fpn import STRIDES, SemanticFPN

_logger = logging.getLogger(__name__)
PREFIX = "timm:"  # of the names that the registry knows
# What turns pixels or a finer stage's tokens into a stage's tokens, by class.
_EMBEDDING_CLASSES = ("PatchEmbed", "PatchMerging")


class TimmBackbone(nn.Module):
    """A timm backbone with maps of strides 4, 8, 16 and 32, its patch embeddings where it has any, and logits.

    Patch embeddings are the outputs of its modules whose class name says PatchEmbed or PatchMerging and whose shapes
    are those of the stages; a backbone in which not all four are found gives none, and `embedding_stages` is 0. Where
    the backbone normalises before it merges patches, as Swin does, they are taken after the merge, without a norm of
    their own. Images are normalised inside, as the backbone's pretraining did.

    Args:
        name: Name of the model in timm, e.g. "pvt_v2_b2".
        num_classes: Number of logits K; default 20.
        drop_path_rate: Rate of stochastic depth; default 0.
        pretrained: Whether timm loads its weights, from its cache or the hub; default no.

    Raises:
        ImportError: If timm is missing.
        ValueError: If timm does not know the name, or the backbone has no maps of these strides.

    Source: PyTorch Image Models, features_only interface.
    """

    mean: Tensor
    std: Tensor
    backbone: Any  # whose class timm chooses

    def __init__(self, name: str, num_classes: int = 20, drop_path_rate: float = 0.0, pretrained: bool = False) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"model {PREFIX}{name} needs the package timm; pip install timm") from error
        # Windowed backbones else take images of one size only.
        options: dict[str, Any] = {"strict_img_size": False, "drop_path_rate": drop_path_rate}
        while not hasattr(self, "backbone"):
            try:
                self.backbone = timm.create_model(name, features_only=True, pretrained=pretrained, **options)
            except (RuntimeError, TypeError) as error:
                refused = [option for option in options if f"'{option}'" in str(error)]
                if not isinstance(error, TypeError) or not refused:
                    message = f"model {PREFIX}{name}: timm cannot make it with features_only=True: {error}"
                    raise ValueError(message) from error
                options = {option: value for option, value in options.items() if option not in refused}
        if drop_path_rate and "drop_path_rate" not in options:
            _logger.warning("%s%s has no stochastic depth: drop_path=%s is not used", PREFIX, name, drop_path_rate)
        reductions, channels = self.backbone.feature_info.reduction(), self.backbone.feature_info.channels()
        places = {reduction: index for index, reduction in enumerate(reductions)}
        if not set(STRIDES) <= places.keys():
            raise ValueError(
                f"model {PREFIX}{name}: expected maps of strides {', '.join(map(str, STRIDES))}, got {reductions};"
                " TransKD needs a hierarchical backbone"
            )
        self._places = [places[stride] for stride in STRIDES]
        self.channels = tuple(channels[place] for place in self._places)
        self.num_classes = num_classes
        self.decoder = SemanticFPN(self.channels, num_classes)
        config = self.backbone.pretrained_cfg
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1), persistent=False)
        self._embedding_names = self._find_embeddings(config["input_size"])
        self.embedding_stages = len(self._embedding_names)

    def forward(self, images: Tensor, features_only: bool = False) -> StageOutputs:
        """Runs the network.

        Args:
            images: RGB images in [0, 1], [B, 3, H, W].
            features_only: Whether to leave out the decoder; default no.

        Returns:
            Features, patch embeddings (none where the backbone has none) and logits.
        """
        features, found = self._run(images, self._embedding_names)
        embeddings = [_tokens(found[name], c) for name, c in zip(self._embedding_names, self.channels, strict=False)]
        return StageOutputs(features, embeddings, None if features_only else self.decoder(features))

    def tapped(self) -> dict[str, str]:
        """What is taken of the backbone, for a report before training: a phrase per stage."""
        return {
            f"stage {m}": f"features of stride {stride}, {channels} channels; embedding "
            + (f"backbone.{self._embedding_names[m - 1]}" if self.embedding_stages else "none")
            for m, (stride, channels) in enumerate(zip(STRIDES, self.channels, strict=True), start=1)
        }

    def _run(self, images: Tensor, names: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        modules = dict(self.backbone.named_modules())

        def keep(name: str) -> Any:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                output = output[0] if isinstance(output, (tuple, list)) else output
                if isinstance(output, Tensor):
                    found[name] = output

            return modules[name].register_forward_hook(hook)

        handles = [keep(name) for name in names]
        try:
            maps = self.backbone((images - self.mean) / self.std)
        finally:
            for handle in handles:
                handle.remove()
        maps = [maps[place] for place in self._places]
        # Some backbones give [B, H, W, C].
        return [
            x.permute(0, 3, 1, 2) if x.shape[1] != c and x.shape[-1] == c else x
            for x, c in zip(maps, self.channels, strict=True)
        ], found

    @torch.no_grad()
    def _find_embeddings(self, input_size: tuple[int, int, int]) -> list[str]:
        """Names of the four stages' embedding modules, or none."""
        candidates = [
            name
            for name, module in self.backbone.named_modules()
            if any(kind in type(module).__name__ for kind in _EMBEDDING_CLASSES)
        ]
        training = self.training
        self.eval()
        features, found = self._run(torch.zeros(1, *input_size), candidates)
        self.train(training)
        names: list[str] = []
        for x in features:
            tokens = math.prod(x.shape[2:])
            fits = [
                name
                for name in candidates
                if name in found and name not in names and _is_tokens(found[name], tokens, x.shape[1])
            ]
            if not fits:
                return []
            names.append(fits[0])
        return names


def _is_tokens(x: Tensor, tokens: int, channels: int) -> bool:
    if x.dim() == 3:
        return x.shape[1:] == (tokens, channels)
    return x.dim() == 4 and channels in (x.shape[1], x.shape[3]) and x[0].numel() == tokens * channels


def _tokens(x: Tensor, channels: int) -> Tensor:
    """[B, N, C], whichever way the module gives its tokens."""
    if x.dim() == 3:
        return x
    return x.flatten(1, 2) if x.shape[3] == channels else x.flatten(2).transpose(1, 2)
