"""Models by name, as configurations and the command line give them."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from transkd_fast.models import segformer

STAGES = 4
MODELS: dict[str, Callable[..., nn.Module]] = {
    "segformer_b0": segformer.segformer_b0,
    "segformer_b1": segformer.segformer_b1,
    "segformer_b2": segformer.segformer_b2,
    "segformer_b3": segformer.segformer_b3,
    "segformer_b4": segformer.segformer_b4,
    "segformer_b5": segformer.segformer_b5,
}


TIMM = "timm:"


def known(name: str) -> bool:
    """Whether `create` may know a name: one of MODELS, "timm:NAME", or "package.module:factory".

    Args:
        name: The name.

    Returns:
        Whether it has one of these forms; timm's name or the factory may still be wrong.
    """
    module, separator, attribute = name.partition(":")
    return name in MODELS or bool(separator and module and attribute)


def create(name: str, num_classes: int = 20, **options: Any) -> nn.Module:
    """Builds a model that returns StageOutputs, with freshly initialised weights.

    Args:
        name: One of MODELS, e.g. "segformer_b0"; "timm:NAME" for a hierarchical backbone of timm with a Semantic-FPN
            decoder; or "package.module:factory", a function of your own that takes num_classes (and the options that
            it names) and returns a module with `channels`, four, fine to coarse.
        num_classes: Number of logits K.
        **options: Further arguments of the model, e.g. drop_path_rate.

    Returns:
        The model, in training mode, fp32 on the default device.

    Raises:
        ImportError: If timm, or the factory's module, cannot be imported.
        ValueError: If the name is not known, or a factory's module has no `channels`.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, **options)
    if not known(name):
        raise ValueError(
            f"models.create: expected one of {', '.join(MODELS)}, timm:NAME or package.module:factory, got {name!r}"
        )
    if name.startswith(TIMM):
        from transkd_fast.models.timm_backbone import TimmBackbone

        return TimmBackbone(name.removeprefix(TIMM), num_classes, **options)
    return _own(name, num_classes, options)


def _own(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    # The folder that a command is run from is not on the path of an installed program.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    factory = getattr(importlib.import_module(module_name), attribute, None)
    if not callable(factory):
        raise ValueError(f"model {name}: expected a function {attribute} in {module_name}, found none")
    takes = inspect.signature(factory).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if not free and "num_classes" not in takes:
        raise ValueError(
            f"model {name}: expected a function that takes num_classes, got {attribute}({', '.join(takes)})"
        )
    model = factory(num_classes=num_classes, **{key: value for key, value in options.items() if free or key in takes})
    channels = getattr(model, "channels", None)
    if not isinstance(model, nn.Module) or not isinstance(channels, (tuple, list)) or len(channels) != STAGES:
        raise ValueError(
            f"model {name}: expected a torch.nn.Module with channels, {STAGES} numbers from fine to coarse, got"
            f" {type(model).__name__} with channels {channels!r}"
        )
    if not hasattr(model, "num_classes"):
        model.num_classes = num_classes  # type: ignore[assignment]
    return model
