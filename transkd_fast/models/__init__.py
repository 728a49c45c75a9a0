"""Backbones that return StageOutputs, and strict loading of their weights."""

from transkd_fast.models.describe import describe
from transkd_fast.models.outputs import StageOutputs
from transkd_fast.models.registry import MODELS, create, known
from transkd_fast.models.segformer import (
    SegFormer,
    segformer_b0,
    segformer_b1,
    segformer_b2,
    segformer_b3,
    segformer_b4,
    segformer_b5,
)
from transkd_fast.models.weights import LoadReport, WeightsError, load_weights

__all__ = [
    "MODELS",
    "LoadReport",
    "SegFormer",
    "StageOutputs",
    "WeightsError",
    "create",
    "describe",
    "known",
    "load_weights",
    "segformer_b0",
    "segformer_b1",
    "segformer_b2",
    "segformer_b3",
    "segformer_b4",
    "segformer_b5",
]
