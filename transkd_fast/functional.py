"""The ops under one roof, as functions."""

from transkd_fast.ops.csf import csf
from transkd_fast.ops.cwd import cwd_loss, kd_kl_loss
from transkd_fast.ops.gl_mixer import gl_mixer
from transkd_fast.ops.hcl import hcl_loss
from transkd_fast.ops.hcl_bn import hcl_bn_loss
from transkd_fast.ops.pea import pea_loss
from transkd_fast.ops.seg_ce import SegCE, seg_ce, seg_ce_loss, seg_predict
from transkd_fast.reference._common import BatchNorm

__all__ = [
    "BatchNorm",
    "SegCE",
    "csf",
    "cwd_loss",
    "gl_mixer",
    "hcl_bn_loss",
    "hcl_loss",
    "kd_kl_loss",
    "pea_loss",
    "seg_ce",
    "seg_ce_loss",
    "seg_predict",
]
