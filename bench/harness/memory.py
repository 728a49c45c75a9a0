"""Memory of a case: the peak, what is saved for the backward, and what stays where no gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.cases import Case
from transkd_fast.train.memory import peak_memory

CUDA_BLOCK = 512  # the caching allocator hands out multiples of this


def peak_bytes(case: Case) -> int:
    """Most memory that tensors took at once in forward and backward, beyond what they took before."""
    return peak_memory(case.run, case.problem.device)[1]


def saved_for_backward(case: Case) -> tuple[int, int]:
    """What the forward keeps alive for the backward.

    Returns:
        Bytes in all, and the bytes that the forward allocated for it. The second is what is still allocated after the
        forward besides the loss, so that nothing can hide from autograd's hooks; only inputs come from the hooks.
    """
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*case.leaves, *case.others)}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in inputs:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, new = _kept(case.forward, case.problem.device)
    case.backward(loss)
    return sum(held.values()) + new, new


def kept_without_gradient(case: Case) -> int:
    """Bytes still allocated after a forward under no_grad, besides the loss."""
    with torch.no_grad():
        return _kept(case.forward, case.problem.device)[1]


def _kept(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        own = -(-result.untyped_storage().nbytes() // CUDA_BLOCK) * CUDA_BLOCK
        return result, torch.cuda.memory_allocated(device) - before - own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return result, allocated - result.untyped_storage().nbytes()
