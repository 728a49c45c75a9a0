"""hcl_bn, a batch norm in training and hcl, on the maps of SegFormer-B2 at 512 x 1024: all stages, and the first."""

from functools import partial

import pytest
import torch
from harness.cases import DEVICES, DTYPES, Problem, copy_case, gradient_case, kernels_that_run
from torch import nn

from transkd_fast import functional
from transkd_fast.functional import BatchNorm
from transkd_fast.reference.hcl_bn import hcl_bn
from transkd_fast.reference.legacy import hcl_by_height

MAPS = [(64, 128, 256), (128, 64, 128), (320, 32, 64), (512, 16, 32)]
SIZES = {"stage 1": MAPS[:1], "stages 1-4": MAPS}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
UPSTREAM = 0.37
# Sizes and batches in the order in which they run: where time is short, on a GPU, the judged ones come first.
CASES = {
    "cpu": [("stages 1-4", 2)],
    "cuda": [("stages 1-4", 8), ("stage 1", 8), ("stages 1-4", 2)],
}
# Reads and writes of a map. Forward: the student's for its statistics, then both. Backward: both, and the gradient.
MOVED = {"forward": 3, "backward": 3}


def batch_norm(weight, bias):
    dtype = {"dtype": weight.dtype, "device": weight.device}
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    return BatchNorm(weight, bias, torch.zeros(len(weight), **dtype), torch.ones(len(weight), **dtype), count)


def arguments(leaves):
    """The maps and batch norms of all stages, and what is updated in place."""
    stages = len(leaves) // 3
    bns = [batch_norm(*pair) for pair in zip(leaves[stages : 2 * stages], leaves[2 * stages :], strict=True)]
    return leaves[:stages], bns, [tensor for bn in bns for tensor in bn[2:5]]


def summed(us, teachers, bns):
    return torch.stack([hcl_bn(u, t, bn) for u, t, bn in zip(us, teachers, bns, strict=True)]).sum()


def published_loss(us, teachers, modules):
    return sum(hcl_by_height(bn(u), t) for u, t, bn in zip(us, teachers, modules, strict=True))


def published(leaves, teachers):
    """Batch norm modules and the published loss with the same parameters, the leaves, and what is updated in place."""
    stages = len(leaves) // 3
    modules = [nn.BatchNorm2d(u.shape[1]).to(u.device) for u in leaves[:stages]]
    with torch.no_grad():
        for i, bn in enumerate(modules):
            bn.weight.copy_(leaves[stages + i])
            bn.bias.copy_(leaves[2 * stages + i])
    own = [*leaves[:stages], *(bn.weight for bn in modules), *(bn.bias for bn in modules)]
    changed = [t for bn in modules for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]
    return partial(published_loss, leaves[:stages], teachers, modules), own, changed


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
def test_hcl_bn(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, *sizes) for sizes in SIZES[size]]
    us, teachers = (
        [
            torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
            for shape in shapes
        ]
        for _ in range(2)
    )
    leaves = [*us]
    for first in (1, 0):
        leaves += [first + torch.randn(s[1], generator=generator, device=device) / 8 for s in shapes]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.tensor(UPSTREAM, device=device, dtype=torch.float64)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    maps, bns, after = arguments(exact)
    value = summed(maps, [teacher.double() for teacher in teachers], bns)
    truth = value.detach(), torch.autograd.grad(value, exact, upstream)

    functions = {
        "eager": partial(functional.hcl_bn_loss, backend="eager"),
        "compiled": torch.compile(summed, fullgraph=True, dynamic=False),
    }
    for backend in kernels_that_run("hcl_bn", [*us, *teachers]):
        functions[backend] = partial(functional.hcl_bn_loss, backend=backend)

    problem = Problem(
        op="hcl_bn",
        size=size,
        batch=batch,
        shape="+".join("x".join(map(str, shape)) for shape in shapes),
        dtype=dtype,
        layout=layout,
        device=us[0].device,
        least_bytes={mode: count * sum(u.nbytes for u in us) for mode, count in MOVED.items()},
        statistics=True,
    )
    calls = {}
    for name, function in functions.items():
        maps, bns, changed = arguments(leaves)
        calls[name] = partial(function, maps, teachers, bns), leaves, changed
    if dtype == "fp32":  # the published modules compute in their inputs' dtype
        calls["published"] = published(leaves, teachers)
    cases = []
    for name, (call, own, changed) in calls.items():
        pairs = list(zip(changed, after, strict=True))
        others = [*teachers, *changed]
        count = len(own) - len(us)
        cases.append(gradient_case(problem, name, call, own, others, truth, upstream, count, changed=pairs))
    measure([*cases, copy_case(problem)], rounds=30, warmup=3)
