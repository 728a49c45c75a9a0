"""hcl on the maps of SegFormer-B2 at 512 x 1024, batch 2: stage by stage, and all stages together."""

from functools import partial

import pytest
import torch
from harness import DEVICES, gradient_case

from transkd_fast import backends, functional
from transkd_fast.reference.hcl import hcl
from transkd_fast.reference.legacy import hcl_by_height

SHAPES = [(2, 64, 128, 256), (2, 128, 64, 128), (2, 320, 32, 64), (2, 512, 16, 32)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
UPSTREAM = 0.37


def summed(loss, students, teachers):
    return torch.stack([loss(student, teacher) for student, teacher in zip(students, teachers, strict=True)]).sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [*([shape] for shape in SHAPES), SHAPES], ids=["1", "2", "3", "4", "all"])
def test_hcl(shapes, layout, device, dtype, measure):
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    students, teachers = (
        [torch.randn(shape, generator=generator).to(device, dtype, memory_format=LAYOUTS[layout]) for shape in shapes]
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
        "compiled": torch.compile(partial(summed, hcl), fullgraph=True, dynamic=False),
    }
    if dtype == torch.float32:  # the published loss computes in its inputs' dtype
        functions["published"] = partial(summed, hcl_by_height)
    for backend in backends.BACKENDS[1:]:
        if backends.why_not("hcl", backend, [*students, *teachers]) is None:
            functions[backend] = partial(functional.hcl_loss, backend=backend)
    text = "+".join("x".join(map(str, shape)) for shape in shapes)
    cases = [
        gradient_case(
            "hcl", name, text, layout, partial(function, students, teachers), students, teachers, truth, upstream
        )
        for name, function in functions.items()
    ]
    measure(cases, rounds=60, warmup=5)
