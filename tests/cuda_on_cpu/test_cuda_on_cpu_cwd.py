"""The CUDA kernels of cwd, run on the CPU, against fp64: loss, statistics, gradients.

The driver fills every output and the workspace with NaNs before the launches.
"""

import itertools
import math

import pytest
import torch
from cuda_on_cpu import runner

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 2**-8, F16: 2**-10}
STRIDED, CONTIGUOUS = 1, 2
axes = pytest.mark.parametrize("dim", [STRIDED, CONTIGUOUS])
# Wide and scalar accesses, one entry, one softmax, fewer softmaxes or entries than threads, and more.
SHAPES = [(2, 19, 64), (1, 64, 40), (2, 5, 7), (1, 1, 1), (3, 1, 9), (1, 9, 1), (2, 3, 331), (1, 1300, 6), (1, 2, 9001)]
FEW = [(1, 24, 64), (2, 5, 63), (1, 70, 8)]
CUTTING = ("launch", "blocks", "strided", "vector", "lanes", "parts", "part_length", "groups", "length")
# As the launcher does it; then blocks so small that softmaxes are cut into parts.
TUNINGS = {"usual": {}, "parts": {"least_elements": 64, "blocks": 10**6}}


def make(shapes, dim, dtypes=(F32, F32), scale=2.0):
    students, teachers = ([(torch.randn(shape, dtype=F64) * scale).to(dtype) for shape in shapes] for dtype in dtypes)
    dims = [dim] * len(shapes) if isinstance(dim, int) else list(dim)
    # Losses and gradients of all stages of one size.
    softmaxes = [math.prod(shape) // shape[axis] for shape, axis in zip(shapes, dims, strict=True)]
    return students, teachers, dims, [(0.5 + 0.1 * m) / count for m, count in enumerate(softmaxes)]


def run(
    students,
    teachers,
    dims,
    weights,
    temperature=2.0,
    upstream=37.0,
    build="plain",
    seed=0,
    misaligned=(0, 0),
    **tuning,
):
    views = {}
    for name, tensors, shift in zip(("student", "teacher"), (students, teachers), misaligned, strict=True):
        views.update({f"{name}{m}": runner.Misaligned(tensor, shift) for m, tensor in enumerate(tensors)})
    defines = () if build == "plain" else ("CWD_FEW_TYPES",)
    settings = {"dims": dims, "weights": weights, "temperature": float(temperature), "upstream": upstream, **tuning}
    return runner.run("cwd", {**views, **settings}, build=build, seed=seed, defines=defines)


def cutting(result):
    return [dict(zip(CUTTING, row, strict=True)) for row in result["cutting"].tolist()]


def truth(students, teachers, dims, weights, temperature=2.0, upstream=37.0):
    students = [s.double().requires_grad_() for s in students]
    loss, statistics = torch.zeros((), dtype=F64), []
    for s, t, dim, weight in zip(students, teachers, dims, weights, strict=True):
        log_p_s, log_p_t = ((x.double() / temperature).log_softmax(dim) for x in (s, t))
        loss = loss + weight * (log_p_t.exp() * (log_p_t - log_p_s)).sum()
        of_both = []
        for x in (s.detach(), t.double()):
            maximum = x.amax(dim)
            of_both += [maximum, ((x - maximum.unsqueeze(dim)) / temperature).exp().sum(dim).log()]
        statistics.append(torch.stack(of_both, dim=1))
    return loss.detach(), statistics, torch.autograd.grad(loss * upstream, students)


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item()


def check(result, students, teachers, dims, weights, temperature=2.0):
    loss, statistics, gradients = truth(students, teachers, dims, weights, temperature)
    compute = F64 if students[0].dtype == F64 else F32
    assert result["loss"].dtype == compute and relative(result["loss"], loss) < TOLERANCE[compute]
    largest = max(gradient.abs().max() for gradient in gradients)
    for m, (student, gradient) in enumerate(zip(students, gradients, strict=True)):
        kept, made = result[f"statistics{m}"], result[f"gradient{m}"]
        assert kept.dtype == compute and relative(kept, statistics[m]) < TOLERANCE[compute], m
        assert made.dtype == student.dtype and made.isfinite().all()
        # A softmax of one entry has the gradient 0.
        error = (made.double() - gradient).abs().max() / max(gradient.abs().max(), largest * 1e-3)
        assert error < TOLERANCE[student.dtype], m


@pytest.mark.parametrize("tuning", TUNINGS)
@axes
def test_many_stages_plain(dim, tuning):
    views = make(SHAPES, dim)
    result = run(*views, **TUNINGS[tuning])
    check(result, *views)
    stages = cutting(result)
    assert {row["vector"] for row in stages} == {0, 1}
    assert any(row["parts"] > 8 for row in stages) == (tuning == "parts")


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_dtypes_and_axes_share_a_call_plain(dtypes):
    views = make([*FEW, *FEW], [STRIDED] * 3 + [CONTIGUOUS] * 3, dtypes)
    result = run(*views, least_elements=256)
    check(result, *views)
    assert {row["vector"] for row in cutting(result)} == ({0} if dtypes[0] == F64 else {0, 1})


def test_more_stages_than_a_launch_can_take_plain():
    views = make([(1, 2, 900 + m) for m in range(20)], CONTIGUOUS)
    result = run(*views, vectors=0, **TUNINGS["parts"])
    check(result, *views)
    assert result["launches"] == 6 and all(row["parts"] > 1 for row in cutting(result))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_order_of_blocks_and_threads_does_not_matter_plain(tuning):
    views = make([*FEW, *FEW], [STRIDED] * 3 + [CONTIGUOUS] * 3)
    first = run(*views, **TUNINGS[tuning])
    for seed in (1, 2):
        again = run(*views, seed=seed, **TUNINGS[tuning])
        assert again.keys() == first.keys()
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("student, teacher, statistics", [(4, 0, 0), (0, 8, 0), (0, 0, 4)])
@axes
def test_misaligned_bases_are_read_one_by_one(dim, student, teacher, statistics):
    views = make(FEW[:1], dim)
    assert [row["vector"] for row in cutting(run(*views, build="asan"))] == [1]
    result = run(*views, build="asan", misaligned=(student, teacher), statistics_misalignment=statistics)
    check(result, *views)
    assert [row["vector"] for row in cutting(result)] == [0]


@pytest.mark.parametrize("temperature, scale", [(1e-3, 1e4), (1e-3, 1e-3), (1e3, 1e4), (4.0, 1e4)])
@axes
def test_extreme_logits_and_temperatures_plain(dim, temperature, scale):
    views = make(FEW, dim, scale=scale)
    check(run(*views, temperature=temperature, least_elements=64), *views, temperature)


@axes
def test_equal_views_and_one_hot_teachers_plain(dim):
    students, teachers, dims, weights = make(FEW, dim)
    result = run(students, students, dims, weights, least_elements=64)
    assert result["loss"] == 0 and all(not result[f"gradient{m}"].any() for m in range(len(FEW)))
    teachers = [t * 1e4 for t in teachers]
    check(run(students, teachers, dims, weights, least_elements=64), students, teachers, dims, weights)


@pytest.mark.parametrize("tuning", TUNINGS)
@axes
def test_a_student_beyond_the_range_counts_where_the_teacher_does_plain(dim, tuning):
    """Differences of the student overflow; they have no weight where the teacher's probability is 0."""
    shape = (1, 40, 40)
    student, teacher = torch.zeros(shape), torch.zeros(shape)
    first, last = ((slice(None),) * dim + (end,) for end in (0, -1))
    student[first], student[last] = 3e38, -3e38
    teacher[first] = 1e4
    result = run([student], [teacher], [dim], [1.0], **TUNINGS[tuning])
    assert result["loss"].isfinite() and result["gradient0"].isfinite().all()
    teacher[last] = 1e4
    assert run([student], [teacher], [dim], [1.0], **TUNINGS[tuning])["loss"] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@axes
def test_nan_and_inf_come_out_where_they_do_in_eager_plain(dim, bad):
    for poisoned, tuning in itertools.product((0, 1), TUNINGS.values()):
        views = make([(1, 24, 40), (2, 5, 63)], dim)
        views[poisoned][1][0, 3, 2] = bad
        result = run(*views, **tuning)
        _, _, gradients = truth(*views)
        # Minus infinity of a teacher is a probability of 0.
        assert result["loss"].isfinite() == (poisoned == 1 and bad < 0)
        for m, gradient in enumerate(gradients):
            assert torch.equal(result[f"gradient{m}"].isfinite(), gradient.isfinite()), (poisoned, m)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("build", ["asan", "tsan"])
def test_sanitizers_find_nothing(build, tuning):
    shapes = [(1, 8, 64), (1, 300, 6)] if build == "tsan" else SHAPES
    views = make([*shapes, *shapes], [STRIDED] * len(shapes) + [CONTIGUOUS] * len(shapes), (BF16, F32))
    check(run(*views, build=build, **TUNINGS[tuning]), *views)


def plan(shapes, dims, dtype=BF16, **tuning):
    numbers = [int(size) for shape in shapes for size in shape]
    result = runner.run("cwd", {"shapes": numbers, "type": torch.zeros(1, dtype=dtype), "dims": dims, **tuning})
    return cutting(result), result["launches"].item(), result["workspace_bytes"].item()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("batch", [2, 8])
@axes
def test_the_maps_of_segformer_b2_take_two_launches_that_fill_a_gpu_plain(dim, batch, dtype):
    pairs = [(64, 32768), (128, 8192), (320, 2048), (512, 512)]
    shapes = [(batch, *(pair if dim == CONTIGUOUS else pair[::-1])) for pair in pairs]
    stages, launches, workspace = plan(shapes, [dim] * 4, dtype)
    assert launches == 2 and {row["vector"] for row in stages} == {1}
    assert 2 * 132 <= sum(row["blocks"] for row in stages) <= 16 * 132
    assert workspace < 0.05 * 2 * sum(map(math.prod, shapes)) * dtype.itemsize


@pytest.mark.parametrize("classes", [2, 19, 150])
@axes
def test_class_scores_need_no_parts_plain(dim, classes):
    (stage,), launches, _ = plan([(2, *((32768, classes) if dim == CONTIGUOUS else (classes, 32768)))], [dim])
    assert stage["parts"] == 1 and launches == 2 and stage["blocks"] >= 32


@axes
def test_parts_cover_every_entry_once_plain(dim):
    shapes = [(1, a, b) for a in (1, 2, 19, 1000, 32768) for b in (1, 8, 19, 1000, 32768)]
    for tuning in TUNINGS.values():
        for row in plan(shapes, [dim] * len(shapes), **tuning)[0]:
            assert (row["parts"] - 1) * row["part_length"] < row["length"] <= row["parts"] * row["part_length"]
            assert row["lanes"] & (row["lanes"] - 1) == 0 and row["lanes"] <= 128


def test_calls_too_large_for_32_bit_counts_are_refused_plain():
    for shape, dim, what in (((1, 1, 2**31), 2, "columns"), ((2**16, 2**15, 1), 2, "softmaxes")):
        with pytest.raises(runner.KernelError, match=rf"cwd: expected fewer than 2\^31 {what}.*split the batch"):
            plan([shape], [dim])
    assert plan([(2**10, 2**13, 720 * 960)], [2])[0][0]["blocks"] < 2**31
