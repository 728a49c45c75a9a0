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

BACKENDS = ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Sizes that take the 16-byte loads and sizes that cannot.
MAPS = ((2, 8, 8, 16), (1, 5, 9, 13), (2, 16, 3, 4))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
UPSTREAM = 0.37


@dataclass(frozen=True)
class Call:
    """One call of an op: its inputs on the CPU, those with gradients first, and the function of them."""

    inputs: Sequence[Tensor]
    leaves: int
    function: Callable[[Sequence[Tensor], str], Tensor]
    tolerance: float

    def run(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in inputs[: self.leaves]]
        result = self.function(inputs, backend)
        upstream = torch.tensor(UPSTREAM, dtype=result.dtype).to(result.device)
        return [t.detach().cpu().double() for t in (result, *torch.autograd.grad(result, leaves, upstream))]

    def difference(self, backend: str, device: str) -> float:
        """The largest max-norm relative difference to eager fp64."""
        got = self.run([tensor.detach().to(device) for tensor in self.inputs], backend)
        true = self.run([tensor.detach().double() for tensor in self.inputs], "eager")
        worst = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, true, strict=True)]
        return max(worst) if all(value == value for value in worst) else float("nan")


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


CALLS: dict[str, Callable[[], Iterator[Call]]] = {"hcl": hcl}


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
