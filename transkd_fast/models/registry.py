"""Models by name, as configurations and the command line give them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from transkd_fast.models import segformer

MODELS: dict[str, Callable[..., nn.Module]] = {
    "segformer_b0": segformer.segformer_b0,
    "segformer_b1": segformer.segformer_b1,
    "segformer_b2": segformer.segformer_b2,
    "segformer_b3": segformer.segformer_b3,
    "segformer_b4": segformer.segformer_b4,
    "segformer_b5": segformer.segformer_b5,
}


def create(name: str, num_classes: int = 20, **options: Any) -> nn.Module:
    """Builds a model that returns StageOutputs, with freshly initialised weights.

    Args:
        name: One of MODELS, e.g. "segformer_b0".
        num_classes: Number of logits K.
        **options: Further arguments of the model, e.g. drop_path_rate.

    Returns:
        The model, in training mode, fp32 on the default device.

    Raises:
        ValueError: If the name is not known.
    """
    if name not in MODELS:
        raise ValueError(f"models.create: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](num_classes=num_classes, **options)
