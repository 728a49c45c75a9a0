"""Modules over the ops: CSF, PEA, the GL-Mixer, the embedding assistant, losses, Knowledge Review, SyncBatchNorm."""

from transkd_fast.nn.csf import CSF
from transkd_fast.nn.embedding_assistant import EmbeddingAssistant, PatchEmbedding
from transkd_fast.nn.gl_mixer import GLMixer, SelfAttention
from transkd_fast.nn.losses import CWDLoss, HCLLoss, KDLoss
from transkd_fast.nn.pea import PEA
from transkd_fast.nn.review import Review
from transkd_fast.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "CSF",
    "PEA",
    "CWDLoss",
    "EmbeddingAssistant",
    "GLMixer",
    "HCLLoss",
    "KDLoss",
    "PatchEmbedding",
    "Review",
    "SelfAttention",
    "SyncBatchNorm",
]
