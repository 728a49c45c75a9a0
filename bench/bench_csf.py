"""csf on the maps of SegFormer's stages 1 to 3 at 512 x 1024, both its batch norms in training."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, DTYPES, Problem, copy_case, gradient_case, kernels_that_run
from harness.precision import full_fp32
from torch import nn

from transkd_fast import functional
from transkd_fast.functional import BatchNorm
from transkd_fast.reference.csf import csf

CHANNELS, SQUEEZED = 64, 32
SIZES = {"stage 1": (128, 256), "stage 2": (64, 128), "stage 3": (32, 64)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Sizes and batches in the order in which they run: where time is short, on a GPU, the large ones come first. At stage 3
# and batch 2 there is next to nothing to read: what is left is launches.
CASES = {
    "cpu": [(size, 2) for size in SIZES],
    "cuda": [("stage 1", 8), ("stage 1", 2), ("stage 3", 2)],
}
# The samples' means differ by this, as those of images do: the squeeze normalises over the samples.
SAMPLE_SPREAD = 0.03


class PublishedFusion(nn.Module):
    """The published fusion as plain modules in their own dtype, from the batch norm of the 1 x 1 convolution on.

    As in selective-kernel networks, both branches are stacked before they are summed, weighted and summed again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.fc = nn.Sequential(nn.Conv2d(CHANNELS, SQUEEZED, 1, bias=False), nn.BatchNorm2d(SQUEEZED), nn.ReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(SQUEEZED, CHANNELS, 1) for _ in range(2))

    def forward(self, z, y):
        x = self.bn(z)
        y = F.interpolate(y, size=x.shape[2:], mode="nearest")
        branches = torch.stack([x, y], dim=1)
        squeezed = self.fc(branches.sum(dim=1).mean(dim=(2, 3), keepdim=True))
        attention = torch.stack([head(squeezed) for head in self.fcs], dim=1).softmax(dim=1)
        return (branches * attention).sum(dim=1)


def batch_norm(weight, bias, dtype):
    return BatchNorm(
        weight,
        bias,
        torch.zeros_like(weight, dtype=dtype, requires_grad=False),
        torch.ones_like(weight, dtype=dtype, requires_grad=False),
        torch.zeros((), dtype=torch.int64, device=weight.device),
    )


def arguments(leaves):
    """What csf is called with, and of it what it updates in place."""
    z, y, weight, bias, fc_weight, fc_bn_weight, fc_bn_bias, weight_0, bias_0, weight_1, bias_1 = leaves
    bn, fc_bn = batch_norm(weight, bias, weight.dtype), batch_norm(fc_bn_weight, fc_bn_bias, weight.dtype)
    return (z, y, bn, fc_weight, fc_bn, ((weight_0, bias_0), (weight_1, bias_1))), [*bn[2:5], *fc_bn[2:5]]


def published(leaves):
    """The published fusion with the same parameters, its leaves, and what it updates in place."""
    module = PublishedFusion().to(leaves[0].device)
    parameters = list(module.parameters())
    with torch.no_grad():
        for parameter, value in zip(parameters, leaves[2:], strict=True):
            parameter.copy_(value.view_as(parameter))
    return partial(module, *leaves[:2]), [*leaves[:2], *parameters], list(module.buffers())


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
@full_fp32()
def test_csf(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    height, width = SIZES[size]
    fine, coarse = (batch, CHANNELS, height, width), (batch, CHANNELS, height // 2, width // 2)
    z, y, upstream = (
        (random(*shape) + SAMPLE_SPREAD * random(batch, CHANNELS, 1, 1)).to(
            DTYPES[dtype], memory_format=LAYOUTS[layout]
        )
        for shape in (fine, coarse, fine)
    )
    leaves = [
        *(z, y, 1 + random(CHANNELS) / 8, random(CHANNELS) / 8, random(SQUEEZED, CHANNELS) / CHANNELS**0.5),
        *(1 + random(SQUEEZED) / 8, random(SQUEEZED) / 8),
        *(random(*shape) / SQUEEZED**0.5 for shape in ((CHANNELS, SQUEEZED), (CHANNELS,)) * 2),
    ]
    for leaf in leaves:
        leaf.requires_grad_()

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    given, after = arguments(exact)
    value = csf(*given)
    truth = value.detach(), torch.autograd.grad(value, exact, upstream.double())

    functions = {
        "eager": partial(functional.csf, backend="eager"),
        "compiled": torch.compile(csf, fullgraph=True, dynamic=False),
    }
    for backend in kernels_that_run("csf", leaves):
        functions[backend] = partial(functional.csf, backend=backend)

    problem = Problem(
        op="csf",
        size=size,
        batch=batch,
        shape="+".join("x".join(map(str, shape)) for shape in (fine, coarse)),
        dtype=dtype,
        layout=layout,
        device=z.device,
        # Forward: both maps twice, once for their means, and the result. Backward: the gradient and z twice, y once,
        # and the gradients of z and y.
        least_bytes={"forward": 3 * z.nbytes + 2 * y.nbytes, "backward": 5 * z.nbytes + 2 * y.nbytes},
        graph=True,
    )
    cases = []
    for name, function in functions.items():
        given, changed = arguments(leaves)
        call = partial(function, *given)
        pairs = list(zip(changed, after, strict=True))
        cases.append(
            gradient_case(problem, name, call, leaves, changed, truth, upstream, len(leaves) - 2, changed=pairs)
        )
    if dtype == "fp32":  # the published modules compute in their inputs' dtype
        for name in ("published", "published compiled"):
            call, own, changed = published(leaves)
            if name == "published compiled":
                call = partial(torch.compile(call.func, fullgraph=True, dynamic=False), *call.args)
            gradients = [gradient.view_as(leaf) for gradient, leaf in zip(truth[1], own, strict=True)]
            pairs = list(zip(changed, after, strict=True))
            case = (call, own, changed, (truth[0], gradients), upstream, len(own) - 2)
            cases.append(gradient_case(problem, name, *case, changed=pairs))
    measure([*cases, copy_case(problem)], rounds=60, warmup=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_csf_with_default_malloc(layout, measure_with_default_malloc):
    measure_with_default_malloc(f"test_csf[cpu-stage_1-batch_2-{layout}]")
