"""Calls every op forward and backward, on small and awkward sizes, on the GPU backends: what sanitizers watch.

Inputs are made, and results compared with eager fp64, on the CPU: torch's own kernels stay out of the picture, and a
filter by kernel names, which makes initcheck blind for what other kernels initialised, is not needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transkd_fast import backends, functional
from transkd_fast.functional import BatchNorm

BACKENDS = ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Sizes that take the 16-byte loads and sizes that cannot.
MAPS = ((2, 8, 8, 16), (1, 5, 9, 13), (2, 16, 3, 4))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Where operands of matrix products are rounded to bfloat16 too. Triton's interpreter cuts them off instead.
PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
UPSTREAM = 0.37


@dataclass(frozen=True)
class Call:
    """One call of an op: its inputs on the CPU and the function of them.

    Args:
        inputs: tensors; those with gradients first, those that the op updates in place last.
        leaves: how many have gradients.
        function: of (inputs, backend): a loss or a map.
        tolerance: largest max-norm relative difference to eager fp64.
        changed: how many the op updates in place.
    """

    inputs: Sequence[Tensor]
    leaves: int
    function: Callable[[Sequence[Tensor], str], Tensor]
    tolerance: float
    changed: int = 0

    def run(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in inputs[: self.leaves]]
        result = self.function(inputs, backend)
        upstream = fixed_like(result) if result.dim() else torch.tensor(UPSTREAM)
        upstream = upstream.to(result.dtype).to(result.device)
        results = [result, *torch.autograd.grad(result, leaves, upstream), *inputs[len(inputs) - self.changed :]]
        return [tensor.detach().cpu().double() for tensor in results]

    def difference(self, backend: str, device: str) -> float:
        """The largest max-norm relative difference to eager fp64."""
        got = self.run([tensor.detach().clone().to(device) for tensor in self.inputs], backend)
        exact = [t.detach().double() if t.is_floating_point() else t.clone() for t in self.inputs]
        worst = [_relative(value, true) for value, true in zip(got, self.run(exact, "eager"), strict=True)]
        return max(worst) if all(value == value for value in worst) else float("nan")


def fixed_like(output: Tensor) -> Tensor:
    """Upstream gradients on the CPU that every dtype holds exactly."""
    return torch.randint(-8, 9, output.shape, generator=torch.Generator().manual_seed(1)) / 8


def _relative(value: Tensor, true: Tensor) -> float:
    scale = true.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # where the truth is zero, only zero agrees
    return ((value - true).abs().max() / scale).item()


def hcl() -> Iterator[Call]:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            maps = [torch.randn(shape).to(dtype, memory_format=layout) for shape in MAPS * 2]
            yield Call(
                maps,
                len(MAPS),
                lambda m, backend: functional.hcl_loss(m[: len(MAPS)], m[len(MAPS) :], backend=backend),
                TOLERANCE[dtype],
            )


def hcl_bn() -> Iterator[Call]:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield hcl_bn_call(dtype, layout)


def hcl_bn_call(dtype: torch.dtype, layout: torch.memory_format) -> Call:
    """In training, with batch statistics alone, and in evaluation."""
    stages = len(MAPS)

    def function(inputs: Sequence[Tensor], backend: str) -> Tensor:
        us, weights, biases, teachers = (inputs[k * stages : (k + 1) * stages] for k in range(4))
        mean, var, frozen_mean, frozen_var, count = inputs[4 * stages :][-5:]
        bns = [
            BatchNorm(weights[0], biases[0], mean, var, count),
            BatchNorm(weights[1], biases[1], None, None),
            BatchNorm(weights[2], biases[2], frozen_mean, frozen_var, training=False),
        ]
        return functional.hcl_bn_loss(us, teachers, bns, backend=backend)

    inputs = [torch.randn(shape).to(dtype, memory_format=layout) for shape in MAPS]
    inputs += [first + torch.randn(shape[1]) / 8 for first in (1, 0) for shape in MAPS]
    teachers = [torch.randn(shape).to(dtype, memory_format=layout) for shape in MAPS]
    statistics = [torch.randn(shape[1]) if k == 0 else 1 + torch.rand(shape[1]) for shape in MAPS[::2] for k in (0, 1)]
    return Call([*inputs, *teachers, *statistics, torch.tensor(3)], 3 * stages, function, TOLERANCE[dtype], changed=5)


def cwd() -> Iterator[Call]:
    """Over pixels and over classes."""
    count = len(MAPS)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            maps = [torch.randn(shape).to(dtype, memory_format=layout) for shape in MAPS * 2]
            yield Call(
                maps,
                count,
                lambda m, backend: functional.cwd_loss(m[:count], m[count:], 2.0, backend=backend),
                TOLERANCE[dtype],
            )
            yield Call(
                maps[::count],
                1,
                lambda m, backend: functional.kd_kl_loss(m[0], m[1], 2.0, backend=backend),
                TOLERANCE[dtype],
            )


# Size of the logits and of the labels: larger by a whole number and not, smaller, equal.
SCALES = (((2, 19, 6, 8), (24, 32)), ((1, 5, 5, 7), (13, 9)), ((2, 2, 9, 6), (4, 3)), ((1, 20, 4, 4), (4, 4)))


def seg_ce() -> Iterator[Call]:
    def function(inputs: Sequence[Tensor], backend: str) -> Tensor:
        logits, labels, weight = inputs
        functional.seg_predict(logits.detach(), (labels.shape[1], labels.shape[2]), backend)
        return functional.seg_ce_loss(logits, labels, weight, backend=backend)

    for dtype in DTYPES:
        for layout in LAYOUTS:
            chosen = SCALES if (dtype, layout) in zip(DTYPES, LAYOUTS, strict=False) else SCALES[:1]
            for shape, size in chosen:
                logits = torch.randn(shape).to(dtype, memory_format=layout)
                labels = torch.randint(shape[1] + 1, (shape[0], *size))
                labels = labels.where(labels < shape[1], 255)
                yield Call([logits, labels, 0.5 + torch.rand(shape[1])], 1, function, TOLERANCE[dtype])


# Fine and coarse map, the squeeze's channels, and whether in training: twice the size with 16-byte loads, any ratio
# without them, a single sample (the squeeze then takes its running statistics), and a coarse map that is the finer one.
FUSIONS = (
    ((3, 16, 8, 16), (4, 8), 8, True),
    ((4, 5, 9, 13), (5, 7), 3, True),
    ((1, 8, 8, 8), (4, 4), 4, True),
    ((3, 6, 3, 4), (5, 9), 4, False),
)


def csf() -> Iterator[Call]:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            # The awkward sizes in one layout per dtype: Triton compiles each of them.
            chosen = FUSIONS if (dtype, layout) in zip(DTYPES, LAYOUTS, strict=False) else FUSIONS[:1]
            for shape, coarse, squeezed, training in chosen:
                maps = [torch.randn(s).to(dtype, memory_format=layout) for s in (shape, (*shape[:2], *coarse))]
                yield csf_call(maps, squeezed, training)


def csf_call(maps: Sequence[Tensor], squeezed: int, training: bool) -> Call:
    channels = maps[0].shape[1]

    def norm(count: int) -> list[Tensor]:
        return [torch.randn(count), 1 + torch.rand(count), torch.tensor(3)]

    parameters = [torch.randn(s) for s in (channels, channels, (squeezed, channels), squeezed, squeezed)]
    parameters += [torch.randn(s) for s in ((channels, squeezed), channels) * 2]

    def function(inputs: Sequence[Tensor], backend: str) -> Tensor:
        z, y, weight, bias, fc_weight, fc_bn_weight, fc_bn_bias, *heads = inputs[:11]
        bn = BatchNorm(weight, bias, *inputs[11:14], training)
        # The cumulative average reads its counter on the device.
        fc_bn = BatchNorm(fc_bn_weight, fc_bn_bias, *inputs[14:], training, momentum=None)
        return functional.csf(z, y, bn, fc_weight, fc_bn, (tuple(heads[:2]), tuple(heads[2:])), backend)

    inputs = [*maps, *parameters, *norm(channels), *norm(squeezed)]
    return Call(inputs, 11, function, TOLERANCE[maps[0].dtype], changed=6)


# Per stage height and width, the student's channels, the teacher's: what fills tiles, and what does not.
ALIGNMENTS = (
    ((4, 8, 16, 32), (4, 20, 64, 128), (2, 2, 96, 144)),
    ((5, 9, 10, 34), (1, 7, 34, 5), (1, 1, 5, 80)),
)


def pea() -> Iterator[Call]:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            # The awkward sizes, with assistants, in one layout per dtype: Triton compiles each of them.
            yield pea_call(ALIGNMENTS[0], False, dtype, layout)
            if (dtype, layout) in zip(DTYPES, LAYOUTS, strict=False):
                yield pea_call(ALIGNMENTS[1], True, dtype, layout)


def pea_call(
    stages: Sequence[tuple[int, int, int, int]], assisted: bool, dtype: torch.dtype, layout: torch.memory_format
) -> Call:
    count = len(stages)

    def maps(place: int) -> list[Tensor]:
        shapes = [(2, stage[place], *stage[:2]) for stage in stages]
        return [torch.randn(shape).to(dtype, memory_format=layout) for shape in shapes]

    weights = [torch.randn(stage[3], stage[2]) * stage[2] ** -0.5 for stage in stages]
    inputs = [*maps(2), *weights, *(torch.randn(stage[3]) for stage in stages)]
    if assisted:
        inputs += [*maps(3), *(1 + torch.rand(1) / 8 for _ in range(2 * count))]

    def function(inputs: Sequence[Tensor], backend: str) -> Tensor:
        xs, weights, biases, *terms, targets = (inputs[k : k + count] for k in range(0, len(inputs), count))
        return functional.pea_loss(xs, weights, biases, targets, [1.0] * count, *terms, backend=backend)

    return Call([*inputs, *maps(3)], len(inputs), function, PRODUCT_TOLERANCE[dtype])


# Several samples within a tile, and several tiles within a sample.
TOKENS = ((3, 7, 10), (2, 70, 34))


def gl_mixer() -> Iterator[Call]:
    def function(inputs: Sequence[Tensor], backend: str) -> Tensor:
        e, u, weight_a, bias_a, weight_b, bias_b, attention_weight, conv_weight = inputs
        scalars = attention_weight, conv_weight
        return functional.gl_mixer(e, u, weight_a, bias_a, weight_b, bias_b, *scalars, residual=True, backend=backend)

    for dtype in DTYPES:
        for batch, tokens, channels in TOKENS:
            inputs = [torch.randn(batch, tokens, channels).to(dtype) for _ in range(2)]
            shapes: list[tuple[int, ...]] = [(channels, channels, 3), (channels,)] * 2
            inputs += [torch.randn(shape) * (3 * channels) ** -0.5 for shape in shapes]
            yield Call([*inputs, torch.ones(1), torch.ones(1)], 8, function, PRODUCT_TOLERANCE[dtype])


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "csf": csf,
    "cwd": cwd,
    "gl_mixer": gl_mixer,
    "hcl": hcl,
    "hcl_bn": hcl_bn,
    "pea": pea,
    "seg_ce": seg_ce,
}


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(description="Call every op on its GPU backends, and compare with eager fp64.")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one (default: all)")
    chosen = parser.parse_args(argv).backend
    torch.manual_seed(0)
    wrong, ran = 0, 0
    for op in backends.table():
        for backend in [chosen] if chosen else BACKENDS:
            reason = backends.why_not(op, backend)
            if reason is not None:
                print(f"{op} {backend}: {reason}")
                continue
            device = "cpu" if backend == "triton" and backends.interpreting_triton() else "cuda"
            for call in CALLS[op]():
                difference = call.difference(backend, device)
                agrees = difference <= call.tolerance
                ran, wrong = ran + 1, wrong + (not agrees)
                shown = f"{op} {backend} {str(call.inputs[0].dtype).removeprefix('torch.')}"
                print(f"{shown}: off by {difference:.1e}, {'agrees' if agrees else 'DISAGREES'}")
    print(f"{ran} calls, {wrong} of them wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
