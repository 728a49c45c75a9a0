"""seg_ce: logits of 19 classes at 128 x 256 against labels at 512 x 1024, class weights and ignored pixels."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, DTYPES, Problem, gradient_case, kernels_that_run

from transkd_fast import functional

SIZES = {"19 classes": (19, (128, 256), (512, 1024))}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
UPSTREAM = 0.37
# Sizes and batches in the order in which they run, and the layouts: on CPU a call of eager takes a second, one of what
# it is compiled to several.
CASES = {"cpu": [("19 classes", 2)], "cuda": [("19 classes", 8), ("19 classes", 2)]}
LAYOUTS_ON = {"cpu": ("nchw",), "cuda": tuple(LAYOUTS)}
IGNORED = 255
REGION = 32  # label pixels: the side of the regions of one class that labels are made of


def plain(logits, labels, weight):
    """What a training without this op does; half precision is converted before it is upsampled, or digits are lost."""
    scores = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, weight, ignore_index=IGNORED)


def exactly(logits, labels, weight):
    return functional.seg_ce_loss(logits, labels, weight, IGNORED, "eager")


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS_ON[device]
    ]


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
def test_seg_ce(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    classes, low, high = SIZES[size]
    logits = 3 * torch.randn(batch, classes, *low, generator=generator, device=device)
    logits = logits.to(DTYPES[dtype], memory_format=LAYOUTS[layout]).requires_grad_()
    regions = [batch, *(side // REGION for side in high)]
    labels = torch.randint(classes + 1, regions, generator=generator, device=device)
    labels = labels.where(labels < classes, IGNORED)
    for dim in (1, 2):
        labels = labels.repeat_interleave(REGION, dim)
    weight = 0.5 + torch.rand(classes, generator=generator, device=device)
    upstream = torch.tensor(UPSTREAM, device=device, dtype=torch.float64)

    exact = logits.detach().double().requires_grad_()
    value = exactly(exact, labels, weight.double())
    truth = value.detach(), torch.autograd.grad(value, exact, upstream)

    functions = {"eager": plain, "compiled": torch.compile(plain, fullgraph=True, dynamic=False)}
    for backend in kernels_that_run("seg_ce", [logits]):
        functions[backend] = partial(functional.seg_ce_loss, ignore_index=IGNORED, backend=backend)

    problem = Problem(
        op="seg_ce",
        size=size,
        batch=batch,
        shape=f"{batch}x{classes}x{low[0]}x{low[1]}-{high[0]}x{high[1]}",
        dtype=dtype,
        layout=layout,
        device=logits.device,
        # Forward: read logits and labels, write the gradient in fp32. Backward: read it, write it scaled.
        least_bytes={
            "forward": logits.nbytes + labels.nbytes + 4 * logits.numel(),
            "backward": logits.nbytes + 4 * logits.numel(),
        },
    )
    cases = [
        gradient_case(
            problem, name, partial(function, logits, labels, weight), [logits], [labels, weight], truth, upstream
        )
        for name, function in functions.items()
    ]
    measure(cases, rounds=4 if device == "cpu" else 30, warmup=1)
