"""hcl on the maps of SegFormer-B2 at 512 x 1024: stage by stage, and all stages together."""

from functools import partial

import pytest
import torch
from harness.cases import DEVICES, DTYPES, Problem, gradient_case, kernels_that_run

from transkd_fast import functional
from transkd_fast.reference.hcl import hcl
from transkd_fast.reference.legacy import hcl_by_height

MAPS = [(64, 128, 256), (128, 64, 128), (320, 32, 64), (512, 16, 32)]
SIZES = {**{f"stage {i}": MAPS[i - 1 : i] for i in (1, 2, 3, 4)}, "stages 1-4": MAPS}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
UPSTREAM = 0.37
# Sizes and batches in the order in which they run: where time is short, on a GPU, the judged ones come first. The later
# stages alone are a few microseconds each there and show nothing but launches.
CASES = {
    "cpu": [(size, 2) for size in SIZES],
    "cuda": [("stages 1-4", 8), ("stage 1", 8), ("stages 1-4", 2)],
}
# Per element of a map. Forward: read both; difference, square, sum of squares, sum. Backward: read both, write the
# gradient; difference, its multiple, plus the pooled levels' part, times upstream.
MOVED = {"forward": 2, "backward": 3}
FLOPS = {"forward": 4, "backward": 4}


def summed(loss, students, teachers):
    return torch.stack([loss(student, teacher) for student, teacher in zip(students, teachers, strict=True)]).sum()


def summed_hcl(students, teachers):
    return summed(hcl, students, teachers)


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
def test_hcl(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, *sizes) for sizes in SIZES[size]]
    students, teachers = (
        [
            torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
            for shape in shapes
        ]
        for _ in range(2)
    )
    for student in students:
        student.requires_grad_()
    upstream = torch.tensor(UPSTREAM, device=device, dtype=torch.float64)

    exact = [student.detach().double().requires_grad_() for student in students]
    value = summed(hcl, exact, [teacher.double() for teacher in teachers])
    truth = value.detach(), torch.autograd.grad(value, exact, upstream)

    functions = {
        "eager": partial(functional.hcl_loss, backend="eager"),
        "compiled": torch.compile(summed_hcl, fullgraph=True, dynamic=False),
    }
    if dtype == "fp32":  # the published loss computes in its inputs' dtype
        functions["published"] = partial(summed, hcl_by_height)
    for backend in kernels_that_run("hcl", [*students, *teachers]):
        functions[backend] = partial(functional.hcl_loss, backend=backend)

    elements = sum(student.numel() for student in students)
    problem = Problem(
        op="hcl",
        size=size,
        batch=batch,
        shape="+".join("x".join(map(str, shape)) for shape in shapes),
        dtype=dtype,
        layout=layout,
        device=students[0].device,
        least_bytes={mode: count * elements * students[0].element_size() for mode, count in MOVED.items()},
        least_flops={mode: count * elements for mode, count in FLOPS.items()},
    )
    cases = [
        gradient_case(problem, name, partial(function, students, teachers), students, teachers, truth, upstream)
        for name, function in functions.items()
    ]
    measure(cases, rounds=60, warmup=5)
