"""Distillation methods by name, as settings of ``distill``, so that they differ in nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from transkd_fast.train.settings import DistillConfig

CUSTOM = "custom"
ALL = [1, 2, 3, 4]


class Method(NamedTuple):
    """A method.

    Args:
        what: what it trains the student by, in a few words.
        keys: the keys of ``distill`` that it stands for; others given for them contradict it.
        defaults: its paper's settings, which count where no others are given.
    """

    what: str
    keys: dict[str, Any]
    defaults: dict[str, Any] = {}


def _keys(
    features: str | None = None,
    fusion: str = "csf",
    embeddings: list[int] | None = None,
    logits: str | None = None,
    variant: str = "base",
) -> dict[str, Any]:
    return {
        "enabled": features is not None or embeddings is not None or logits is not None,
        "variant": variant,
        "fusion": fusion,
        "feature_loss": features,
        "embeddings": embeddings or [],
        "logits": logits is not None,
        "logit_loss": logits or "kd_kl",
    }


METHODS = {
    "none": Method("labels alone", _keys()),
    # Liu et al., structured knowledge distillation (arXiv 1903.04197), section 3.2, pixel-wise: T = 1, factor 10.
    "kd": Method(
        "class scores, softmaxes over classes per pixel",
        _keys(logits="kd_kl"),
        {"logit_temperature": 1.0, "logit_weight": 10.0},
    ),
    # Shu et al. (arXiv 2011.13256), section 4.1, on the class scores: T = 4, factor 3.
    "cwd": Method(
        "class scores, softmaxes over pixels per class",
        _keys(logits="cwd"),
        {"logit_temperature": 4.0, "logit_weight": 3.0},
    ),
    # Chen et al. (arXiv 2104.09044), section 3.3.
    "review": Method("features through Knowledge Review's fusion, HCL", _keys("hcl", fusion="review")),
    "csf": Method("features through CSF, HCL", _keys("hcl")),
    "pea": Method("patch embeddings through PEA", _keys(embeddings=ALL)),
    "transkd-base": Method("CSF with HCL, and PEA", _keys("hcl", embeddings=ALL)),
    "transkd-gl": Method(
        "the same, the last embedding through the GL-Mixer", _keys("hcl", embeddings=ALL, variant="gl")
    ),
    "transkd-ea": Method("the same, with embedding assistants", _keys("hcl", embeddings=ALL, variant="ea")),
}


def contradictions(distill: DistillConfig, given: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """What contradicts the method among the keys that somebody gave.

    Args:
        distill: the settings.
        given: names of the keys that were given.

    Returns:
        Per key, what the method stands for and what was given.
    """
    if distill.method == CUSTOM:
        return {}
    keys = METHODS[distill.method].keys
    return {
        key: (value, getattr(distill, key))
        for key, value in keys.items()
        if key in given and getattr(distill, key) != value
    }


def apply(distill: DistillConfig, given: Collection[str]) -> None:
    """Sets the keys that the method stands for, and its paper's settings where no others were given.

    Args:
        distill: the settings; changed.
        given: names of the keys that were given.
    """
    if distill.method == CUSTOM:
        return
    method = METHODS[distill.method]
    for key, value in method.keys.items():
        setattr(distill, key, list(value) if isinstance(value, list) else value)
    for key, value in method.defaults.items():
        if key not in given:
            setattr(distill, key, value)
