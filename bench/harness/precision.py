"""Full fp32 on both sides of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_fp32() -> Iterator[None]:
    """Switch TF32 off, by default on for cuDNN's convolutions: who convolves and who multiplies matrices would differ.

    Not with `torch.backends.cudnn.flags`: what it is not told it sets too, and cuDNN is then off.
    """
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, before in zip(switches, allowed, strict=True):
            switch.allow_tf32 = before
