"""How precisely matrix products of float32 operands may be computed."""

from __future__ import annotations

import torch
from torch import Tensor


def _switch() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result sets, which would import all of torch._dynamo here. torch.compile guards
# the switch by itself and compiles anew where it changes.
_switch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_allowed(tensor: Tensor) -> bool:
    """Says whether products of this tensor's float32 elements may run in TF32.

    They may where torch's own may, and under autocast, which would round the operands further. There an activation is
    float32 only because it comes out of a normalisation.

    Args:
        tensor: an operand; only float32 on CUDA knows TF32.

    Returns:
        Whether ``torch.backends.cuda.matmul``, which ``torch.set_float32_matmul_precision`` sets too, or autocast on
        CUDA allows it.
    """
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    return torch.is_autocast_enabled("cuda") or _switch()
