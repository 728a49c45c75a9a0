"""What keeps a training from going on with numbers that are not finite, and names where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from transkd_fast.train.tasks import DistillationTask, Task

NAMED = 3  # of the tensors that are not finite, in a message


def floating(model: nn.Module) -> dict[str, Tensor]:
    """The weights and running statistics of a network; an empty one is finite, and has no norm."""
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether each of some tensors has an element that is not finite, bool [n], without waiting for the device."""
    return ~torch.stack(torch._foreach_norm(list(tensors), math.inf)).isfinite()


def broken_names(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not finite."""
    return names_of(state, not_finite(state.values())) if state else []


def names_of(state: dict[str, Tensor], broken: Tensor) -> list[str]:
    """Names of the tensors that a bool [n] marks."""
    return [name for name, is_broken in zip(state, broken.tolist(), strict=True) if is_broken]


def broken_first(state: dict[str, Tensor], sums: dict[str, Tensor]) -> Tensor:
    """Says what is not finite while every loss and gradient still was, without waiting for the device.

    Afterwards it is too late to tell: one gradient that is not finite reaches every weight through the clipped norm.
    """
    broken = not_finite(state.values())
    return broken & torch.stack(list(sums.values())).isfinite().all() if sums else broken


def broken_in_teacher(task: Task) -> list[str]:
    """Names of the teacher's tensors that are not finite, which no step changes."""
    if not isinstance(task, DistillationTask):
        return []
    return [f"the teacher's {name}" for name in broken_names(floating(task.teacher))]


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def broken_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the weights whose moments are not finite."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {
        f"{kind} of {names.get(id(parameter), 'a weight')}": tensor
        for parameter, moments in optimizer.state.items()
        for kind, tensor in moments.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()
    }
    return broken_names(state)


class Buffers:
    """Copies of a network's buffers, such as running statistics, which a forward pass changes before a step is skipped.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        self._copies = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Copy them."""
        for copy, buffer in zip(self._copies, self._buffers, strict=True):
            copy.copy_(buffer)

    def put_back(self) -> None:
        """Make them what they were when they were kept."""
        for copy, buffer in zip(self._copies, self._buffers, strict=True):
            buffer.copy_(copy)


@torch.no_grad()
def first_not_finite(task: Task, forward: Callable[[], Any], images: Tensor, terms: dict[str, Tensor]) -> str:
    """Name the first tensor of a step that is not finite, in the order in which they are computed.

    Args:
        task: the task, its gradients still those of the step.
        forward: repeats the forward pass.
        images: what went in.
        terms: the loss terms.

    Returns:
        A phrase for a message.
    """
    if not images.isfinite().all():
        return "the images"
    found: list[str] = []
    networks = {"": task.model} | ({"teacher.": task.teacher} if isinstance(task, DistillationTask) else {})
    hooks = []
    for prefix, network in networks.items():
        for name, module in network.named_modules():

            def look(module: nn.Module, given: Any, output: Any, name: str = prefix + name) -> None:
                tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
                if not found and not all(bool(t.isfinite().all()) for t in tensors):
                    found.append(f"the output of {name or 'the network'}")

            hooks.append(module.register_forward_hook(look))
    network, task.network = task.network, task.model  # hooks are not seen by a compiled one
    counts = task.cross_entropy.counts
    try:
        forward()
    finally:
        task.network, task.cross_entropy.counts = network, counts
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    for name, term in terms.items():
        if name not in ("loss", "grad_norm") and not term.isfinite():
            return f"the loss {name}"
    gradients = [(name, p.grad) for name, p in task.model.named_parameters() if p.grad is not None]
    broken = [name for name, gradient in reversed(gradients) if not gradient.isfinite().all()]
    return f"the gradient of {broken[0]}" if broken else "the gradients' norm"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a GPU or for torch's allocator on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
