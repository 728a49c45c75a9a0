"""All that is trained beside the student: CSF, PEA and HCL of variant Base, forward and backward, at 512 x 1024.

From random stage outputs of SegFormer-B0 and B2, so that no encoder takes part. Published: the same modules in eager,
their maps and projections stored, and the published losses of them; on both sides the convolutions are torch's.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, DTYPES, KERNELS_OF, Case, Problem, difference_of
from harness.precision import full_fp32
from torch import Tensor, nn

from transkd_fast import StageOutputs, TransKD, backends, use_backend
from transkd_fast.ops.pea import STAGE_WEIGHTS
from transkd_fast.reference.legacy import hcl_by_height

STUDENT, TEACHER = (32, 64, 160, 256), (64, 128, 320, 512)
HEIGHT, WIDTH = 512, 1024
SIZES = {"base": (HEIGHT, WIDTH)}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
CASES = {"cpu": [("base", 2)], "cuda": [("base", 8), ("base", 2)]}
OPS = ("csf", "hcl_bn", "pea")
UPSTREAM = 0.37
# The samples' means differ by this, as those of images do: the squeeze batch norms normalise over the samples.
SAMPLE_SPREAD = 0.3
# Per dtype of losses and of all gradients at once. Autocast rounds what goes in and out of the convolutions.
TOLERANCE = {"fp32": (1e-5, 1e-3), "bf16": (2e-2, 1e-1), "fp16": (5e-3, 3e-2)}


class Given(nn.Module):
    """A student whose outputs are at hand."""

    def __init__(self, outputs: StageOutputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor | None) -> StageOutputs:
        return self.outputs


def published_losses(model: TransKD, teacher: StageOutputs) -> list[Tensor]:
    """The losses as the published training computes them."""
    with use_backend("eager"):
        output = model(None)
    hcl = [hcl_by_height(s, t) for s, t in zip(output.fused, teacher.features, strict=True)]
    pea = [F.mse_loss(s, t) for s, t in zip(output.projected, teacher.embeddings, strict=True)]
    return [sum(hcl), sum(weight * term for weight, term in zip(STAGE_WEIGHTS, pea, strict=True))]


def our_losses(model: TransKD, teacher: StageOutputs, backend: str) -> list[Tensor]:
    """The losses as the trainer computes them."""
    with use_backend(backend):
        return list(model(None, teacher).losses.values())


def outputs_of(channels: tuple[int, ...], random: Callable[..., Tensor], batch: int, layout: str) -> StageOutputs:
    sizes = [(HEIGHT // stride, WIDTH // stride) for stride in (4, 8, 16, 32)]
    maps = [
        random(batch, c, *hw) + SAMPLE_SPREAD * random(batch, c, 1, 1) for c, hw in zip(channels, sizes, strict=True)
    ]
    tokens = [random(batch, hw[0] * hw[1], c) for c, hw in zip(channels, sizes, strict=True)]
    return StageOutputs([m.contiguous(memory_format=LAYOUTS[layout]) for m in maps], tokens, None)


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


def with_(outputs: StageOutputs, function: Callable[[Tensor], Tensor]) -> StageOutputs:
    return StageOutputs([function(t) for t in outputs.features], [function(t) for t in outputs.embeddings], None)


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
@full_fp32()
def test_head(device, size, batch, layout, dtype, measure):
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    storage = DTYPES[dtype]
    student, teacher = (
        with_(outputs_of(channels, random, batch, layout), lambda t: t.to(storage)) for channels in (STUDENT, TEACHER)
    )
    torch.manual_seed(0)
    model = TransKD(nn.Identity(), STUDENT, TEACHER).to(device)

    def head(outputs: StageOutputs) -> TransKD:
        """A model of its own on leaves of its own, so that gradients and statistics stay apart."""
        own = copy.deepcopy(model)
        own.student = Given(with_(outputs, lambda t: t.detach().clone().requires_grad_()))
        return own

    def leaves_of(own: TransKD) -> list[Tensor]:
        outputs = own.student.outputs
        return [*outputs.features, *outputs.embeddings, *own.parameters()]

    problem = Problem(
        op="head",
        size=size,
        batch=batch,
        shape=f"{batch}x3x{HEIGHT}x{WIDTH}",
        dtype=dtype,
        layout=layout,
        device=torch.device(device),
        graph=True,
    )
    exact = head(with_(student, torch.Tensor.double)).double()
    losses = our_losses(exact, with_(teacher, torch.Tensor.double), "eager")
    gradients = torch.autograd.grad(sum(losses), leaves_of(exact), torch.tensor(UPSTREAM, device=device).double())
    truth = [loss.detach() for loss in losses], torch.cat([gradient.flatten() for gradient in gradients])
    del exact, losses, gradients

    def case(name: str, losses_of: Callable[[TransKD], list[Tensor]]) -> Case:
        own = head(student)
        leaves, upstream = leaves_of(own), torch.tensor(UPSTREAM, device=device)

        def terms() -> list[Tensor]:
            with torch.autocast(device, storage, enabled=dtype != "fp32"):
                return losses_of(own)

        def backward(loss: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, leaves, upstream)

        def check() -> str | None:
            losses = terms()
            gradient = torch.cat([each.flatten() for each in backward(torch.stack(losses).sum())])
            of_loss, of_gradient = TOLERANCE[dtype]
            return difference_of(
                {
                    "hcl": (losses[0], truth[0][0], of_loss),
                    "pea": (losses[1], truth[0][1], of_loss),
                    "gradient": (gradient, truth[1], of_gradient),
                }
            )

        others = [*teacher.features, *teacher.embeddings, *own.buffers()]
        return Case(problem, name, lambda: torch.stack(terms()).sum(), backward, check, leaves, others)

    cases = [case("published", lambda own: published_losses(own, teacher))]
    for backend in KERNELS_OF[device]:
        if all(backends.why_not(op, backend) is None for op in OPS):
            cases.append(case(backend, lambda own, b=backend: our_losses(own, teacher, b)))
    measure(cases, rounds=12, warmup=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_with_default_malloc(layout, measure_with_default_malloc):
    measure_with_default_malloc(f"test_head[cpu-base-batch_2-{layout}]")
