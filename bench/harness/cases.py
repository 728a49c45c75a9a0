"""What a bench gives to be measured: ways to compute one thing, with the check that stands before any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transkd_fast import backends

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS_OF = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

# Largest max-norm relative difference to fp64 that a case may have. Losses and the gradients of parameters are computed
# in fp32 whatever the dtype, and some of the latter are ill-conditioned; maps and their gradients are rounded to it.
VALUE_TOLERANCE = 1e-5
PARAMETER_TOLERANCE = 1e-4
MAP_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
# Where matrix products take operands of the dtype, whatever comes of them is rounded before and after.
PRODUCT_TOLERANCE = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 1.5e-3}


@dataclass(frozen=True)
class Problem:
    """What is computed; the cases of one comparison share it.

    Args:
        op: the op's name.
        size: short name of the sizes, by which `targets.toml` names them, e.g. "stage 1".
        batch: samples.
        shape: sizes of the inputs, as text.
        dtype: one of `DTYPES`.
        layout: memory layout of the maps, "nchw" or "channels_last".
        device: where it runs.
        least_bytes: per direction ("forward", "backward") the bytes that any way to compute it must read and write.
        least_flops: per direction the FLOPs likewise.
        graph: on CUDA, whether a replay of a graph of the whole call is timed too.
        products: whether kernels may round operands of matrix products to the dtype.
        statistics: whether the maps' gradients hold statistics of a batch, which torch's batch norm on CPU adds up in
            fp32 one value after the other; all but the kernels may then be as far off as the parameters' gradients.
    """

    op: str
    size: str
    batch: int
    shape: str
    dtype: str
    layout: str
    device: torch.device
    least_bytes: Mapping[str, int] = field(default_factory=dict)
    least_flops: Mapping[str, int] = field(default_factory=dict)
    graph: bool = False
    products: bool = False
    statistics: bool = False


@dataclass(frozen=True)
class Case:
    """One way to compute something.

    Args:
        problem: what.
        backend: how; a key of `rows.SOURCES`, "published", or one of the step's.
        forward: computes the result, a loss or a map, and keeps what the backward needs.
        backward: takes the result through the backward and whatever follows it.
        check: gives None if the results are right, else what is wrong; called first, a wrong case is not timed.
        leaves: tensors whose gradients are taken.
        others: other tensors that exist before the call; what is saved for backward beyond these and the leaves is the
            call's own.
    """

    problem: Problem
    backend: str
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]
    check: Callable[[], str | None]
    leaves: Sequence[Tensor]
    others: Sequence[Tensor]

    def run(self) -> None:
        self.backward(self.forward())


def gradient_case(
    problem: Problem,
    backend: str,
    function: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    others: Sequence[Tensor],
    truth: tuple[Tensor, Sequence[Tensor]],
    upstream: Tensor,
    parameters: int = 0,
    changed: Sequence[tuple[Tensor, Tensor]] = (),
) -> Case:
    """A case of an op that returns a loss or a map, checked against fp64.

    Args:
        problem: what is computed.
        backend: a key of `rows.SOURCES`.
        function: computes the result from `leaves` and `others`.
        leaves: inputs whose gradients are taken.
        others: the other inputs.
        truth: fp64 result and, for the upstream gradient, fp64 gradients of the leaves.
        upstream: upstream gradient on the problem's device: of a loss fp64, 0-d; of a map like the map.
        parameters: how many leaves, the last ones, are no maps but parameters.
        changed: tensors that the function updates in place, each with its fp64 value after the first call.
    """
    # No cast in the timed part.
    upstream_of = {upstream.dtype: upstream} if upstream.dim() else {d: upstream.to(d) for d in DTYPES.values()}
    least = PRODUCT_TOLERANCE[problem.dtype] if problem.products else 0.0
    map_tolerance, value_tolerance, parameter_tolerance = (
        max(least, tolerance) for tolerance in (MAP_TOLERANCE[problem.dtype], VALUE_TOLERANCE, PARAMETER_TOLERANCE)
    )
    if problem.statistics and backend not in KERNELS_OF[problem.device.type]:
        map_tolerance = max(map_tolerance, PARAMETER_TOLERANCE)
    start = [tensor.clone() for tensor, _ in changed]

    def backward(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, leaves, upstream_of[result.dtype])

    def check() -> str | None:
        for (tensor, _), before in zip(changed, start, strict=True):
            tensor.copy_(before)
        value = function()
        results = {"value": (value, truth[0], map_tolerance if value.dim() else value_tolerance)}
        for i, pair in enumerate(zip(backward(value), truth[1], strict=True)):
            tolerance = map_tolerance if i < len(leaves) - parameters else parameter_tolerance
            results[f"gradient {i}"] = (*pair, tolerance)
        for i, pair in enumerate(changed):
            results[f"changed tensor {i}"] = (*pair, VALUE_TOLERANCE)
        return difference_of(results)

    return Case(problem, backend, function, backward, check, leaves, others)


def copy_case(problem: Problem) -> Case:
    """A copy that reads and writes as many bytes as the problem must, in each direction, between the same two tensors.

    It meets the caches as the other cases leave them, which the large copy of `rates` does not.
    """
    counts = {mode: count // 2 for mode, count in problem.least_bytes.items()}
    source = torch.ones(max(counts.values()), dtype=torch.uint8, device=problem.device)
    target = torch.zeros_like(source)

    def copy(mode: str) -> Tensor:
        target[: counts[mode]].copy_(source[: counts[mode]])
        return source.new_empty(0)

    return Case(problem, "copy", lambda: copy("forward"), lambda _: copy("backward"), lambda: None, [source], [target])


def difference_of(results: Mapping[str, tuple[Tensor, Tensor, float]]) -> str | None:
    """What is off by more than it may be: per name a value, its truth and the tolerance; None if nothing is."""
    differences = {name: relative_difference(value, truth) for name, (value, truth, _) in results.items()}
    wrong = [f"{name} is off by {d:.1e}" for name, d in differences.items() if not d <= results[name][2]]
    return ", ".join(wrong) or None


def relative_difference(value: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest true value; NaN if either has one.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != truth.shape:
        raise ValueError(f"expected shape {list(truth.shape)}, got {list(value.shape)}")
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).abs().max() / truth.abs().max()).item()


def kernels_that_run(op: str, tensors: Sequence[Tensor]) -> list[str]:
    """The op's kernel backends that take these tensors here; Triton's interpreter is not one to be timed."""
    names = KERNELS_OF[tensors[0].device.type]
    return [name for name in names if backends.why_not(op, name, tensors) is None]
