"""What the autograd Functions of all ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

OptionalTensor = TypeVar("OptionalTensor", Tensor, "Tensor | None")


def distinct(tensors: Sequence[OptionalTensor]) -> list[OptionalTensor]:
    """Replaces repeated tensors by views, since torch.compile takes no Function with the same one twice.

    Args:
        tensors: inputs of a Function; None stays.

    Returns:
        The same values; while compiling, each tensor once.
    """
    if not torch.compiler.is_compiling():
        return list(tensors)
    result: list[OptionalTensor] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in result):
            tensor = tensor.view_as(tensor)
        result.append(tensor)
    return result


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes a gradient on; differentiating it is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.op}: second derivatives are not supported by the fused kernels; use backend='eager' for them"
        )


class _Witness(torch.autograd.Function):
    """An empty tensor that depends on its inputs; nothing ever flows through it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.inputs = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * int(ctx.inputs)


def witness(*tensors: Tensor) -> Tensor | None:
    """Makes a stand-in for inputs that a Function does not save, to be saved and given to `first_derivative`.

    Args:
        *tensors: inputs of the Function.

    Returns:
        An empty tensor that keeps none of them alive; None while compiling, where no second derivative exists.
    """
    return None if torch.compiler.is_compiling() else _Witness.apply(*tensors)


def first_derivative(op: str, gradient: Tensor, *sources: Tensor | None) -> Tensor:
    """Marks a gradient that a kernel computed, so that a second derivative raises instead of being silently zero.

    ``once_differentiable`` does so only where the upstream gradient requires grad; the gradient of a loss also depends
    on its inputs.

    Args:
        op: name of the op, for the message.
        gradient: what the backward returns.
        *sources: the tensors that it was computed from, or a `witness` of them.

    Returns:
        The gradient; under ``create_graph=True`` with a node that raises when it is differentiated.
    """
    return _FirstDerivativeOnly.apply(op, gradient, *sources) if torch.is_grad_enabled() else gradient
