"""pea on the patch embeddings of SegFormer-B0 and B2 at 512 x 1024: all four stages, and the two large ones."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, DTYPES, Problem, gradient_case, kernels_that_run
from harness.precision import full_fp32

from transkd_fast import functional
from transkd_fast.ops.pea import STAGE_WEIGHTS
from transkd_fast.reference.pea import as_tokens, pea

# Per stage height and width, the student's channels, the teacher's.
STAGES = [(128, 256, 32, 64), (64, 128, 64, 128), (32, 64, 160, 320), (16, 32, 256, 512)]
ASSISTED = "stages 1-4 with assistants"
SIZES = {"stages 1-4": STAGES, "stages 1-2": STAGES[:2], ASSISTED: STAGES}
# Tokens are maps whose channels come last. Assistants are made as tokens, so they are measured with tokens alone.
LAYOUTS = ("channels_last", "nchw")
UPSTREAM = 0.37
LOSS_SCALE = 2**16  # without one, float16 has no room for the gradients of a mean
# Sizes and batches in the order in which they run: where time is short, on a GPU, the judged ones come first.
CASES = {
    "cpu": [("stages 1-4", 2), (ASSISTED, 2)],
    "cuda": [("stages 1-4", 8), ("stages 1-2", 8), ("stages 1-4", 2), (ASSISTED, 8)],
}


def published(xs, weights, biases, targets, stage_weights, assistants=(), projection_scales=(), assistant_scales=()):
    """The published projections and losses, in their inputs' dtype; maps are flattened and transposed to tokens."""
    projections = [F.linear(as_tokens(x), weight, bias) for x, weight, bias in zip(xs, weights, biases, strict=True)]
    if assistants:
        terms = zip(projection_scales, projections, assistant_scales, map(as_tokens, assistants), strict=True)
        projections = [f_p * projection + f_a * assistant for f_p, projection, f_a, assistant in terms]
    terms = zip(stage_weights, projections, targets, strict=True)
    return sum(weight * F.mse_loss(projection, as_tokens(target)) for weight, projection, target in terms)


def flat(inputs):
    return [tensor for tensors in inputs.values() for tensor in tensors]


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in (LAYOUTS[:1] if size == ASSISTED else LAYOUTS)
    ]


def least_work(xs, targets, weights, assisted):
    """The bytes and FLOPs that any way must move and compute.

    Forward: read x, target and assistant, write the gradients of x and, which is the residual, of the assistant;
    three products. Backward: read these gradients and write them anew, multiplied by the upstream one.
    """
    large = [*xs, *targets] if assisted else xs
    gradients = sum(t.nbytes for t in large)
    read = sum(t.nbytes for t in (*xs, *targets)) + (sum(t.nbytes for t in targets) if assisted else 0)
    products = sum(x.numel() // weight.shape[1] * weight.numel() for x, weight in zip(xs, weights, strict=True))
    return {
        "least_bytes": {"forward": read + gradients, "backward": 2 * gradients},
        "least_flops": {"forward": 3 * 2 * products, "backward": 0},
    }


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
@full_fp32()
def test_pea(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def embedding(height, width, channels):
        map_like = random(batch, channels, height, width)
        return (map_like if layout == "nchw" else map_like.flatten(2).transpose(1, 2).contiguous()).to(DTYPES[dtype])

    stages = SIZES[size]
    inputs = {"xs": [embedding(height, width, channels) for height, width, channels, _ in stages]}
    targets, assistants = (
        [embedding(height, width, channels) for height, width, _, channels in stages] for _ in range(2)
    )
    if size == ASSISTED:
        inputs["assistants"] = assistants
    maps = sum(map(len, inputs.values()))
    inputs["weights"] = [random(c_out, c_in) / c_in**0.5 for _, _, c_in, c_out in stages]
    inputs["biases"] = [random(c_out) / 8 for *_, c_out in stages]
    if size == ASSISTED:
        for name, first in (("projection_scales", 0.1), ("assistant_scales", 0.5)):
            inputs[name] = [torch.full((1,), first + m / 10, device=device) for m in range(len(stages))]
    leaves = flat(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    stage_weights = STAGE_WEIGHTS[: len(stages)]
    scale = LOSS_SCALE if dtype == "fp16" else 1
    upstream = torch.tensor(scale * UPSTREAM, device=device, dtype=torch.float64)

    exact = {name: [t.detach().double().requires_grad_() for t in tensors] for name, tensors in inputs.items()}
    value = pea(**exact, targets=[target.double() for target in targets], stage_weights=stage_weights)
    truth = value.detach(), torch.autograd.grad(value, flat(exact), upstream)

    functions = {
        "eager": partial(functional.pea_loss, backend="eager"),
        "compiled": torch.compile(pea, fullgraph=True, dynamic=False),
    }
    if dtype == "fp32":  # the published losses compute in their inputs' dtype
        functions["published"] = published
    for backend in kernels_that_run("pea", [*leaves, *targets]):
        functions[backend] = partial(functional.pea_loss, backend=backend)

    problem = Problem(
        op="pea",
        size=size,
        batch=batch,
        shape="+".join(f"{batch}x{height * width}x{c_in}-{c_out}" for height, width, c_in, c_out in stages),
        dtype=dtype,
        layout=layout,
        device=torch.device(device),
        products=True,
        **least_work(inputs["xs"], targets, inputs["weights"], size == ASSISTED),
    )
    cases = []
    for name, function in functions.items():
        call = partial(function, **inputs, targets=targets, stage_weights=stage_weights)
        cases.append(gradient_case(problem, name, call, leaves, targets, truth, upstream, len(leaves) - maps))
    measure(cases, rounds=30, warmup=3)
