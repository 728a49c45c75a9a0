"""One training step, SegFormer-B2 to B0, 512 x 1024, batch 2, fp32: the published handling of the teacher beside ours.

Published: the teacher runs with gradients and with its decoder, which the losses never use; its features are not
detached, so that the backward goes through the teacher's whole encoder. Encoder, attention and cross-entropy are this
project's on both sides: the ratio shows what follows from the handling, the decoder's order and the kernels alone.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, Case, Problem, difference_of
from harness.precision import full_fp32
from torch import Tensor, nn

from transkd_fast import backends, functional, models
from transkd_fast.models.segformer import LinearFuse
from transkd_fast.ops.pea import STAGE_WEIGHTS
from transkd_fast.reference.legacy import hcl_by_height
from transkd_fast.train.tasks import DistillationTask
from transkd_fast.transkd import TransKD

BATCH, HEIGHT, WIDTH = 2, 512, 1024
LOSS_TOLERANCE = 1e-5
# Over all of the student's gradients at once: the squeeze batch norm of two values makes a few of them ill-conditioned.
GRADIENT_TOLERANCE = 1e-3

Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]


class PublishedFuse(LinearFuse):
    """The decoder's fusion in the published order: project every stage, upsample, concatenate, then convolve."""

    def forward(self, features: Sequence[Tensor], projections: Sequence[nn.Linear]) -> Tensor:
        size = features[0].shape[2:]
        maps = [
            linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for x, linear in zip(features, projections, strict=True)
        ]
        maps = maps[:1] + [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:]]
        return F.relu(self.bn(self.conv(torch.cat(maps[::-1], dim=1))))


def with_published_decoder(model: models.SegFormer) -> models.SegFormer:
    fuse = PublishedFuse(model.linear_fuse.conv.out_channels)
    fuse.load_state_dict(model.linear_fuse.state_dict())
    model.linear_fuse = fuse
    return model


class PublishedTask:
    """The losses as the published training computes them."""

    def __init__(self, model: TransKD, teacher: models.SegFormer) -> None:
        self.model, self.teacher = model, teacher.eval()
        with_published_decoder(model.student)
        with_published_decoder(teacher)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with backends.use_backend("eager"):
            teacher = self.teacher(images)
            output = self.model(images)
            hcl = [hcl_by_height(s, t) for s, t in zip(output.fused, teacher.features, strict=True)]
            pea = [
                weight * F.mse_loss(s, t)
                for weight, s, t in zip(STAGE_WEIGHTS, output.projected, teacher.embeddings, strict=True)
            ]
            ce = functional.seg_ce_loss(output.logits, labels)
        return {"ce": ce, "hcl": sum(hcl), "pea": sum(pea)}


def losses_and_gradient(losses: Losses, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss terms, and the gradient of all the model's parameters as one vector."""
    torch.manual_seed(1)  # the same dropout and stochastic depth in every case
    terms = losses(images, labels)
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(model.parameters()))
    return {**terms, "gradient": torch.cat([gradient.flatten() for gradient in gradients])}


def step_case(
    backend: str, losses: Losses, model: nn.Module, images: Tensor, labels: Tensor, expected: dict[str, Tensor]
) -> Case:
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)

    def forward() -> Tensor:
        return torch.stack(list(losses(images, labels).values())).sum()

    def backward(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def check() -> str | None:
        got = losses_and_gradient(losses, model, images, labels)
        tolerances = dict.fromkeys(expected, LOSS_TOLERANCE) | {"gradient": GRADIENT_TOLERANCE}
        return difference_of({name: (got[name], expected[name], tolerances[name]) for name in expected})

    shape = f"{BATCH}x3x{HEIGHT}x{WIDTH}"
    problem = Problem("step b2-b0", f"{HEIGHT} x {WIDTH}", BATCH, shape, "fp32", "nchw", images.device)
    return Case(problem, backend, forward, backward, check, list(model.parameters()), [images, labels])


@pytest.mark.parametrize("device", DEVICES)
@full_fp32()
def test_step(device, measure):
    torch.manual_seed(0)
    teacher = models.segformer_b2().to(device)
    student = models.segformer_b0()
    model = TransKD(student, student.channels, teacher.channels).to(device)
    images = torch.rand(BATCH, 3, HEIGHT, WIDTH, device=device)
    labels = torch.randint(student.num_classes, (BATCH, HEIGHT, WIDTH), device=device)

    published = PublishedTask(copy.deepcopy(model), copy.deepcopy(teacher))
    ours = DistillationTask(model, teacher)
    expected = losses_and_gradient(published.losses, published.model, images, labels)
    cases = [
        step_case("published", published.losses, published.model, images, labels, expected),
        step_case("ours", ours.losses, ours.model, images, labels, expected),
    ]
    measure(cases, rounds=3, warmup=1)
