"""cwd on the maps of SegFormer-B2 at 512 x 1024, and its sibling over classes on the scores of 19 classes."""

from functools import partial

import pytest
import torch
from harness.cases import DEVICES, DTYPES, Problem, gradient_case, kernels_that_run

from transkd_fast import functional
from transkd_fast.reference import cwd as reference
from transkd_fast.reference import legacy

MAPS = [(64, 128, 256), (128, 64, 128), (320, 32, 64), (512, 16, 32)]
SCORES = "19 classes per pixel"
SIZES = {"stage 1": MAPS[:1], "stages 1-4": MAPS, SCORES: [(19, 128, 256)]}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TEMPERATURE = 4.0
UPSTREAM = 0.37
# Sizes and batches in the order in which they run: where time is short, on a GPU, the judged ones come first.
CASES = {
    "cpu": [("stages 1-4", 2), (SCORES, 2)],
    "cuda": [("stages 1-4", 8), ("stage 1", 8), (SCORES, 8)],
}
# Reads and writes of a map. Forward: both. Backward: both, and the gradient.
MOVED = {"forward": 2, "backward": 3}


def over_classes(students, teachers, temperature, backend):
    return functional.kd_kl_loss(students[0], teachers[0], temperature, backend=backend)


def summed(students, teachers, temperature):
    return torch.stack([reference.cwd(s, t, temperature) for s, t in zip(students, teachers, strict=True)]).sum()


def reference_over_classes(students, teachers, temperature):
    return reference.kd_kl(students[0], teachers[0], temperature)


def published(students, teachers, temperature, normaliser):
    pairs = zip(students, teachers, strict=True)
    return sum(legacy.cwd(student, teacher, normaliser, "kl", temperature) for student, teacher in pairs)


def parameters(devices):
    return [
        pytest.param(device, size, batch, layout, id=f"{device}-{size.replace(' ', '_')}-batch_{batch}-{layout}")
        for device in devices
        for size, batch in CASES[device]
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("device", "size", "batch", "layout"), parameters(DEVICES))
def test_cwd(device, size, batch, layout, dtype, measure):
    if device == "cpu":  # more shapes than torch recompiles a function for
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, *sizes) for sizes in SIZES[size]]
    students, teachers = (
        [
            (3 * torch.randn(shape, generator=generator, device=device)).to(
                DTYPES[dtype], memory_format=LAYOUTS[layout]
            )
            for shape in shapes
        ]
        for _ in range(2)
    )
    for student in students:
        student.requires_grad_()
    upstream = torch.tensor(UPSTREAM, device=device, dtype=torch.float64)
    op, truth_of, normaliser = functional.cwd_loss, summed, "channel"
    if size == SCORES:
        op, truth_of, normaliser = over_classes, reference_over_classes, "spatial"

    exact = [student.detach().double().requires_grad_() for student in students]
    value = truth_of(exact, [teacher.double() for teacher in teachers], TEMPERATURE)
    truth = value.detach(), torch.autograd.grad(value, exact, upstream)

    functions = {
        "eager": partial(op, backend="eager"),
        "compiled": torch.compile(truth_of, fullgraph=True, dynamic=False),
    }
    if dtype == "fp32":  # the published losses compute in their inputs' dtype
        functions["published"] = partial(published, normaliser=normaliser)
    for backend in kernels_that_run("cwd", [*students, *teachers]):
        functions[backend] = partial(op, backend=backend)

    problem = Problem(
        op="cwd",
        size=size,
        batch=batch,
        shape="+".join("x".join(map(str, shape)) for shape in shapes),
        dtype=dtype,
        layout=layout,
        device=students[0].device,
        least_bytes={mode: count * sum(s.nbytes for s in students) for mode, count in MOVED.items()},
    )
    cases = []
    for name, function in functions.items():
        call = partial(function, students, teachers, temperature=TEMPERATURE)
        cases.append(gradient_case(problem, name, call, students, teachers, truth, upstream))
    measure(cases, rounds=20, warmup=3)
