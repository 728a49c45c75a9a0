"""The CUDA kernels of hcl, run on the CPU, against the fp64 reference: loss, tables, gradients of both maps.

The driver fills every output and the workspace with NaNs before the launches.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from cuda_on_cpu import runner

from transkd_fast.reference.hcl import LEVEL_WEIGHTS, LEVELS, hcl

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 2**-8, F16: 2**-10}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Divisible by 4 and not, levels left out by height or width, overlapping windows, 1 x n, channels off the vector width.
SHAPES = [
    (2, 24, 16, 32),
    (2, 3, 64, 128),
    (1, 5, 17, 25),
    (3, 33, 6, 6),
    (2, 17, 5, 5),
    (2, 20, 5, 7),
    (2, 7, 4, 4),
    (2, 8, 3, 4),
    (2, 3, 9, 2),
    (2, 3, 2, 9),
    (2, 3, 1, 9),
    (2, 3, 9, 1),
    (1, 1, 1, 1),
    (1, 2, 30, 1001),
    (1, 700, 6, 5),
]
FEW = [(1, 8, 8, 32), (1, 72, 8, 8), (1, 3, 9, 7)]
CUTTING = (
    "launch",
    "blocks",
    "shared_bytes",
    "channels_last",
    "vector",
    "group_planes",
    "cell_parts",
    "strips",
    "cuts",
    "lanes",
)
# As the launcher does it; then blocks so small that cells, and strips of them, go to blocks of their own.
TUNINGS = {"usual": {}, "cells": {"least_elements": 256}, "strips": {"least_elements": 16, "blocks": 10**6}}


def make(shapes, dtypes=(F32, F32), layout="nchw", offset=0.0):
    """Maps of students and of teachers, and weights that bring the gradients of all stages to one size."""
    students, teachers = (
        [
            (torch.randn(shape, dtype=F64) + offset).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            for shape in shapes
        ]
        for dtype in dtypes
    )
    weights = [(0.5 + 0.1 * m) * math.prod(shape) for m, shape in enumerate(shapes)]
    return students, teachers, weights


def run(students, teachers, weights, upstream=0.37, build="plain", seed=0, misaligned=(0, 0), **tuning):
    maps = {}
    for name, tensors, shift in zip(("student", "teacher"), (students, teachers), misaligned, strict=True):
        maps.update({f"{name}{m}": runner.Misaligned(tensor, shift) for m, tensor in enumerate(tensors)})
    defines = () if build == "plain" else ("HCL_FEW_TYPES",)
    inputs = {**maps, "weights": list(map(float, weights)), "upstream": upstream, **tuning}
    return runner.run("hcl", inputs, build=build, seed=seed, defines=defines)


def cutting(result):
    return [dict(zip(CUTTING, row, strict=True)) for row in result["cutting"].tolist()]


def cells_of(height, width):
    """The rectangles that the borders of all pooling windows cut a plane into."""
    axes = []
    for size in (height, width):
        levels = [level for level in LEVELS if level < min(height, width)]
        borders = {0, size} | {b for n in levels for i in range(n) for b in (i * size // n, -(-(i + 1) * size // n))}
        axes.append(list(itertools.pairwise(sorted(borders))))
    return list(itertools.product(*axes))


def truth(students, teachers, weights, upstream=0.37, level_weights=LEVEL_WEIGHTS):
    exact = [[map_.double().requires_grad_() for map_ in maps] for maps in (students, teachers)]
    loss = sum(weight * hcl(s, t, level_weights) for s, t, weight in zip(*exact, weights, strict=True))
    result = {"loss": loss.detach()}
    gradients = torch.autograd.grad(loss * upstream, [*exact[0], *exact[1]])
    for m, (s, t, weight) in enumerate(zip(*exact, weights, strict=True)):
        result[f"student_gradient{m}"] = gradients[m]
        result[f"teacher_gradient{m}"] = gradients[m + len(weights)]
        # What the gradient has besides the full-resolution term is one number per plane and cell.
        (full,) = torch.autograd.grad((s - t).square().mean(), s)
        used = [level for level in LEVELS if level < min(s.shape[2:])]
        full = full * weight / (1 + sum(level_weights[: len(used)]))
        pooled = (gradients[m] / upstream - full).detach()
        cells = [pooled[:, :, top:bottom, left:right] for (top, bottom), (left, right) in cells_of(*s.shape[2:])]
        result[f"table{m}"] = torch.stack([cell.mean((2, 3)) for cell in cells], dim=1)
    return result


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


def check(result, students, teachers, weights, upstream=0.37, level_weights=LEVEL_WEIGHTS):
    expected = truth(students, teachers, weights, upstream, level_weights)
    compute = F64 if students[0].dtype == F64 else F32
    assert result["loss"].dtype == compute and relative(result["loss"], expected["loss"]) < TOLERANCE[compute]
    for m, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        for name, dtype in (("student_gradient", student.dtype), ("teacher_gradient", teacher.dtype)):
            gradient = result[f"{name}{m}"]
            assert gradient.dtype == dtype
            assert relative(gradient, expected[f"{name}{m}"]) < TOLERANCE[dtype], (name, m)
        # The table is a part of the gradient; its own size may be next to nothing.
        error = (result[f"table{m}"].double() - expected[f"table{m}"]).abs().max() * upstream
        assert error < TOLERANCE[compute] * expected[f"student_gradient{m}"].abs().max(), m


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@layouts
def test_one_stage_plain(shape, layout):
    maps = make([shape], layout=layout)
    check(run(*maps), *maps)


@pytest.mark.parametrize("level_weights", [(1.0, 2.0, 3.0), (0.0, 0.5, 0.0)], ids=str)
def test_the_levels_that_are_used_have_the_first_of_the_level_weights_plain(level_weights):
    maps = make([(2, 3, 16, 32), (2, 4, 9, 4), (1, 5, 3, 2), (1, 5, 1, 9)])
    check(run(*maps, level_weights=level_weights), *maps, level_weights=level_weights)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@layouts
def test_many_stages_plain(layout, dtype):
    maps = make(SHAPES, (dtype, dtype), layout)
    result = run(*maps)
    check(result, *maps)
    stages = cutting(result)
    assert max(Counter(row["launch"] for row in stages).values()) == 8, "expected more stages than a launch can take"
    assert {row["vector"] for row in stages} == ({0} if dtype == F64 else {0, 1})


@pytest.mark.parametrize("dtypes", list(itertools.permutations((F32, BF16, F16), 2)), ids=str)
@layouts
def test_mixed_dtypes_plain(layout, dtypes):
    maps = make(FEW, dtypes, layout)
    result = run(*maps)
    check(result, *maps)
    assert {row["vector"] for row in cutting(result)} == {0, 1}


def test_stages_may_differ_in_layout_and_dtype_plain():
    kinds = itertools.product(LAYOUTS, ((F32, F32), (BF16, BF16), (F16, F32)))
    students, teachers, weights = [], [], []
    for layout, dtypes in kinds:
        stages = make(FEW[:2], dtypes, layout)
        for into, values in zip((students, teachers, weights), stages, strict=True):
            into += values
    result = run(students, teachers, weights)
    check(result, students, teachers, weights)
    assert len({row["launch"] for row in cutting(result)}) >= 6


@pytest.mark.parametrize("tuning", TUNINGS)
@layouts
def test_every_way_of_cutting_plain(layout, tuning):
    maps = make([(1, 4, 16, 32), (1, 40, 8, 8), (2, 5, 9, 14)], layout=layout)
    result = run(*maps, **TUNINGS[tuning])
    check(result, *maps)
    stages = cutting(result)
    if tuning == "usual":
        assert all(row["cell_parts"] == row["strips"] == 1 and row["group_planes"] > 1 for row in stages)
    elif tuning == "cells":
        assert any(row["cell_parts"] > 1 for row in stages)
    else:
        assert any(row["strips"] > 1 for row in stages) and any(row["cuts"] > 1 for row in stages)


@pytest.mark.parametrize("tuning", TUNINGS)
@layouts
def test_the_order_of_blocks_and_threads_does_not_matter_plain(layout, tuning):
    maps = make(FEW, layout=layout)
    first = run(*maps, **TUNINGS[tuning])
    for seed in (1, 2):
        again = run(*maps, seed=seed, **TUNINGS[tuning])
        assert again.keys() == first.keys()
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("build", ["plain", "asan"])
@pytest.mark.parametrize("student, teacher, table", [(4, 0, 0), (0, 8, 0), (0, 0, 4)])
@layouts
def test_misaligned_bases_are_read_one_by_one(layout, student, teacher, table, build):
    maps = make(FEW[:1], layout=layout)
    assert [row["vector"] for row in cutting(run(*maps))] == [1]
    result = run(*maps, build=build, misaligned=(student, teacher), table_misalignment=table)
    check(result, *maps)
    assert [row["vector"] for row in cutting(result)] == [0]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@layouts
def test_a_large_mean_costs_no_digits_plain(layout, dtype):
    maps = make(FEW, (dtype, dtype), layout, offset=1000.0)
    check(run(*maps), *maps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@layouts
def test_nan_and_inf_come_out_plain(layout, bad):
    for dtype, tuning in itertools.product((F32, BF16, F16), TUNINGS.values()):
        students, teachers, weights = make([(1, 8, 8, 8), (1, 3, 6, 5)], (dtype, dtype), layout)
        students[1][0, 1, 2, 3] = bad
        result = run(students, teachers, weights, **tuning)
        assert not result["loss"].isfinite()
        gradient = result["student_gradient1"]
        assert not gradient[0, 1, 2, 3].isfinite()
        assert gradient[0, [0, 2]].isfinite().all() and result["student_gradient0"].isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2**16), (1, 64, 1, 2**10)], ids=str)
@layouts
def test_halves_round_like_torch_plain(layout, shape, dtype):
    """One row has no levels; its gradient is scale (s - t): every bit pattern goes in, rounding comes out."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    student = patterns.view(shape).contiguous(memory_format=LAYOUTS[layout])
    result = run([student], [torch.zeros_like(student)], [1.0], upstream=0.35 * 2**16)
    scale = torch.tensor(0.35 * 2**16, dtype=F32) * (2 / 2**16)
    expected, gradient = (scale * patterns.float()).to(dtype), result["student_gradient0"].reshape(-1)
    finite = expected.isfinite()
    assert torch.equal(gradient[finite], expected[finite])
    assert torch.equal(gradient[~finite].isnan(), expected[~finite].isnan())


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("build", ["asan", "tsan"])
@layouts
def test_sanitizers_find_nothing(layout, build, dtype, tuning):
    maps = make([(1, 2, 8, 16), (1, 72, 5, 6), (1, 3, 5, 7)], (dtype, dtype), layout)
    if build == "asan" and tuning == "usual":
        maps = [a + b for a, b in zip(maps, make(SHAPES[6:13], (dtype, dtype), layout), strict=True)]
    check(run(*maps, build=build, **TUNINGS[tuning]), *maps)


def plan(shapes, dtype=BF16, channels_last=False, **tuning):
    numbers = [int(size) for shape in shapes for size in shape]
    result = runner.run(
        "hcl", {"shapes": numbers, "type": torch.zeros(1, dtype=dtype), "channels_last": int(channels_last), **tuning}
    )
    return cutting(result), result["workspace_bytes"].item()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [2, 8])
def test_the_maps_of_segformer_b2_take_one_launch_that_fills_a_gpu_plain(batch, channels_last, dtype):
    shapes = [(batch, 64, 128, 256), (batch, 128, 64, 128), (batch, 320, 32, 64), (batch, 512, 16, 32)]
    stages, workspace = plan(shapes, dtype, channels_last)
    assert {(row["launch"], row["vector"]) for row in stages} == {(0, 1)}
    assert 4 * 132 <= stages[0]["blocks"] <= 16 * 132
    assert workspace < 0.01 * 2 * sum(map(math.prod, shapes)) * dtype.itemsize


@pytest.mark.parametrize("sums", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_size_fits_into_the_shared_memory_of_a_block_plain(channels_last, dtype, sums):
    """Also with as many sums of every cell as hcl_bn takes."""
    shapes = [
        (b, c, h, w) for b in (1, 64) for c in (1, 3, 64, 4096) for h in (1, 5, 7, 128, 719) for w in (3, 8, 1023)
    ]
    for tuning in TUNINGS.values():
        for row in plan(shapes, dtype, channels_last, sums=sums, **tuning)[0]:
            assert row["shared_bytes"] <= 48 * 1024 - 256


@pytest.mark.parametrize(
    "shape, what", [((1, 1, 2**16, 2**15), "pixels"), ((2**16, 2**15, 1, 1), "planes"), ((2**10, 2**13, 720, 960), "")]
)
def test_calls_too_large_for_32_bit_counts_are_refused_plain(shape, what):
    if what:
        with pytest.raises(runner.KernelError, match=rf"hcl: expected fewer than 2\^31 {what}.*split the batch"):
            plan([shape])
    else:
        assert plan([shape])[0][0]["blocks"] < 2**31
