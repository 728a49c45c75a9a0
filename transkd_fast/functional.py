"""The ops under one roof, as functions."""

from transkd_fast.ops.csf import csf
from transkd_fast.ops.cwd import cwd_loss
from transkd_fast.ops.gl_mixer import gl_mixer
from transkd_fast.ops.hcl import hcl_loss
from transkd_fast.ops.pea import pea_loss
from transkd_fast.ops.seg_ce import seg_ce_loss
from transkd_fast.reference._common import BatchNorm

__all__ = ["BatchNorm", "csf", "cwd_loss", "gl_mixer", "hcl_loss", "pea_loss", "seg_ce_loss"]
