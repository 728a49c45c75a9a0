"""Fused kernels, modules and a trainer for distilling segmentation transformers with TransKD (arXiv 2202.13393)."""

from importlib import metadata as _metadata

import torch as _torch  # noqa: F401  first: the extensions link against torch's libraries without naming their folder

from transkd_fast import functional
from transkd_fast._extension import build_info
from transkd_fast.backends import BackendError, count_runs, use_backend
from transkd_fast.models.outputs import StageOutputs
from transkd_fast.nn import CSF, PEA, CWDLoss, EmbeddingAssistant, GLMixer, HCLLoss, KDLoss, SyncBatchNorm
from transkd_fast.transkd import TransKD, TransKDOutput

__version__ = _metadata.version("transkd_fast")

__all__ = [
    "CSF",
    "PEA",
    "BackendError",
    "CWDLoss",
    "EmbeddingAssistant",
    "GLMixer",
    "HCLLoss",
    "KDLoss",
    "StageOutputs",
    "SyncBatchNorm",
    "TransKD",
    "TransKDOutput",
    "build_info",
    "count_runs",
    "functional",
    "use_backend",
]
