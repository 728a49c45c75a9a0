"""gl_mixer on the stage-4 embeddings of SegFormer-B0 at 512 x 1024: the op alone, and the module with its attention."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness.cases import DEVICES, DTYPES, Problem, gradient_case, kernels_that_run
from harness.precision import full_fp32
from torch import nn

from transkd_fast import functional
from transkd_fast.nn import GLMixer, SelfAttention
from transkd_fast.reference.gl_mixer import gl_mixer

TOKENS, CHANNELS, HEADS = 16 * 32, 256, 8
OP, WHOLE = "stage 4", "stage 4 with attention"
LAYOUTS = ("channels_last",)  # tokens
# In the order in which they run: where time is short, on a GPU, the judged ones come first.
CASES = {
    "cpu": [(OP, 2), (WHOLE, 2)],
    "cuda": [(OP, 8), (OP, 2), (WHOLE, 8), (WHOLE, 2)],
}


class PublishedAttention(nn.Module):
    """The published self-attention: scores, softmax and weighted sum one by one."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, x):
        batch, tokens, channels = x.shape
        size = channels // self.num_heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * size**-0.5
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, channels))


def published(e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight):
    """The published mix, in its inputs' dtype: tokens are transposed for the two convolutions, and back."""
    x = e.transpose(1, 2)
    value, gate = F.conv1d(x, conv_a_weight, conv_a_bias, padding=1), F.conv1d(x, conv_b_weight, conv_b_bias, padding=1)
    return attention_weight * u + conv_weight * (value * gate.sigmoid()).transpose(1, 2)


def whole(attention, mix, e, parameters):
    """The mixer with its attention, in e's dtype as autocast does it."""
    with torch.autocast(e.device.type, dtype=e.dtype, enabled=e.dtype in (torch.bfloat16, torch.float16)):
        return mix(e, attention(e), *parameters)


def parameters_of(mixer):
    convolutions = (mixer.conv_a.weight, mixer.conv_a.bias, mixer.conv_b.weight, mixer.conv_b.bias)
    return [*convolutions, mixer.attention_weight, mixer.conv_weight]


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


def least_work(e, mixer, size):
    """The bytes and FLOPs that any way must move and compute.

    Forward: read e and what attention gave, write the mix; one product over three tokens for both convolutions.
    Backward: read the gradient and both inputs, write both gradients; two products. Parameters are read in both and
    their gradients written. With attention only e is an input.
    """
    parameters = mixer.parameters() if size == WHOLE else parameters_of(mixer)
    weights = sum(parameter.nbytes for parameter in parameters)
    maps = 1 if size == WHOLE else 2
    rows = e.shape[0] * TOKENS
    products = rows * 3 * CHANNELS * 2 * CHANNELS
    if size == WHOLE:
        products += rows * CHANNELS * (3 * CHANNELS + CHANNELS + 2 * TOKENS)
    return {
        "least_bytes": {
            "forward": (maps + 1) * e.nbytes + weights,
            "backward": (2 * maps + 1) * e.nbytes + 2 * weights,
        },
        "least_flops": {"forward": 2 * products, "backward": 4 * products},
    }


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
@full_fp32()
def test_gl_mixer(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)

    def random(like=None):
        tensor = torch.randn(batch, TOKENS, CHANNELS, generator=generator, device=device)
        return (tensor if like is None else like + tensor).to(DTYPES[dtype])

    torch.manual_seed(0)
    mixer = GLMixer(CHANNELS, HEADS).to(device)
    exact_mixer = copy.deepcopy(mixer).double()
    maps = [random().requires_grad_() for _ in range(1 if size == WHOLE else 2)]
    exact_maps = [t.detach().double().requires_grad_() for t in maps]

    def leaves_of(maps, mixer):
        return [*maps, *(mixer.parameters() if size == WHOLE else parameters_of(mixer))]

    def call(mix, maps, mixer, attention=None, compiler=lambda function: function):
        if size == WHOLE:
            return partial(compiler(whole), attention or mixer.attention, mix, *maps, parameters_of(mixer))
        return partial(compiler(mix), *maps, *parameters_of(mixer))

    value = call(gl_mixer, exact_maps, exact_mixer)()
    # Near the mix itself: else the mixing scalars' gradients, sums over all of it, would cancel.
    upstream = random(value.detach().float())
    truth = value.detach(), torch.autograd.grad(value, leaves_of(exact_maps, exact_mixer), upstream.double())

    compiler = partial(torch.compile, fullgraph=True, dynamic=False)
    leaves = leaves_of(maps, mixer)
    calls = {
        "eager": call(partial(functional.gl_mixer, backend="eager"), maps, mixer),
        "compiled": call(gl_mixer, maps, mixer, compiler=compiler),
    }
    if dtype == "fp32":  # the published modules compute in their inputs' dtype
        calls["published"] = call(published, maps, mixer, PublishedAttention(mixer.attention))
    for backend in kernels_that_run("gl_mixer", leaves):
        calls[backend] = call(partial(functional.gl_mixer, backend=backend), maps, mixer)

    problem = Problem(
        op="gl_mixer",
        size=size,
        batch=batch,
        shape="x".join(map(str, maps[0].shape)),
        dtype=dtype,
        layout=layout,
        device=torch.device(device),
        products=True,
        **least_work(maps[0], mixer, size),
    )
    cases = [
        gradient_case(problem, name, function, leaves, [], truth, upstream, len(leaves) - len(maps))
        for name, function in calls.items()
    ]
    measure(cases, rounds=30, warmup=3)
