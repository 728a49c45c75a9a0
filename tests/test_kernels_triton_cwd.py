"""What is particular to the Triton kernels: plans, softmaxes in many parts, many stages per launch, far offsets.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small views.
"""

import math

import pytest
import torch
from kernels_here import device_of, interpreted

from transkd_fast import backends

if backends.why_not("cwd", "triton") is not None:
    pytest.skip(backends.why_not("cwd", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _cwd_plan
from transkd_fast.kernels import cwd as kernels

DEVICE = device_of("triton")
STRIDED, CONTIGUOUS = 1, 2
axes = pytest.mark.parametrize("dim", [STRIDED, CONTIGUOUS])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
if interpreted("triton"):
    # The interpreter cuts bfloat16 off where the compiled kernel rounds.
    TOLERANCE[torch.bfloat16] *= 2
UPSTREAM = 37.0


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even small views into many parts, as large views are cut on a GPU."""
    values = {"PROGRAMS": 10**6, "STEPS": 1, "THREADS": 8, "THREAD_ELEMENTS": 2, "NARROW": 4, "WIDE_COLUMNS": 4}
    for name, value in (values | {"MERGED_PARTS": 2, "MERGED_SOFTMAXES": 4}).items():
        monkeypatch.setattr(_cwd_plan, name, value)
    monkeypatch.setattr(kernels, "TOTAL_BLOCK", 4)
    _cwd_plan._plan.cache_clear()
    yield
    _cwd_plan._plan.cache_clear()


def make(shape, student_dtype=torch.float32, teacher_dtype=None):
    views = [torch.randn(shape, dtype=torch.float64) * 2 for _ in range(2)]
    dtypes = (student_dtype, teacher_dtype or student_dtype)
    return [v.to(DEVICE, dtype) for v, dtype in zip(views, dtypes, strict=True)]


def run(students, teachers, dims, weights, temperature=2.0):
    loss, statistics = kernels.cwd_fwd(students, teachers, dims, weights, temperature)
    grad = torch.tensor(UPSTREAM, dtype=loss.dtype, device=DEVICE)
    gradients = kernels.cwd_bwd(grad, students, teachers, statistics, dims, weights, temperature)
    return loss, statistics, gradients


def truth(students, teachers, dims, weights, temperature=2.0):
    students = [s.double().cpu().requires_grad_() for s in students]
    loss = torch.zeros((), dtype=torch.float64)
    for s, t, dim, weight in zip(students, teachers, dims, weights, strict=True):
        log_p_s, log_p_t = ((x.double().cpu() / temperature).log_softmax(dim) for x in (s, t))
        loss = loss + weight * (log_p_t.exp() * (log_p_t - log_p_s)).sum()
    return loss.detach(), torch.autograd.grad(loss * UPSTREAM, students)


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item()


def check(students, teachers, dims, weights, temperature=2.0):
    true_loss, true_gradients = truth(students, teachers, dims, weights, temperature)
    loss, statistics, gradients = run(students, teachers, dims, weights, temperature)
    assert relative(loss, true_loss) < min(TOLERANCE[students[0].dtype], TOLERANCE[torch.float32])
    for m, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        assert gradients[m].dtype == student.dtype and gradients[m].shape == student.shape
        assert relative(gradients[m], true_gradients[m]) < TOLERANCE[student.dtype]
        for row, view in ((0, student), (2, teacher)):
            maximum = view.to(loss.dtype).amax(dims[m])
            assert torch.equal(statistics[m][:, row], maximum)
            below = (view.double() - maximum.double().unsqueeze(dims[m])) / temperature
            assert relative(statistics[m][:, row + 1], below.exp().sum(dims[m]).log().cpu()) < 2e-6


@pytest.mark.parametrize("shape", [(2, 40, 20), (1, 29, 13)], ids=str)
@axes
def test_softmaxes_in_many_parts(shape, dim, small_plans):
    (student, teacher), weights = make(shape), [0.7]
    (stage,) = _cwd_plan.plan_of([student], [teacher], [dim], weights, 2.0).stages
    assert stage.parts > 1 and stage.programs > stage.parts
    check([student], [teacher], [dim], weights)


def test_stages_of_all_kinds_share_a_launch():
    """Five stages make two launches; dtypes, axes and alignments differ within one."""
    kinds = [
        ((2, 8, 64), torch.bfloat16, torch.bfloat16, CONTIGUOUS),
        ((2, 48, 8), torch.float32, torch.float16, STRIDED),
        ((2, 5, 19), torch.float16, torch.float32, STRIDED),
        ((2, 19, 6), torch.bfloat16, torch.float32, CONTIGUOUS),
        ((1, 7, 15), torch.float32, torch.float32, CONTIGUOUS),
    ]
    pairs = [make(*kind[:3]) for kind in kinds]
    students, teachers, dims = [p[0] for p in pairs], [p[1] for p in pairs], [kind[3] for kind in kinds]
    plan = _cwd_plan.plan_of(students, teachers, dims, [1.0] * 5, 2.0)
    assert [len(launch.tiles) for launch in plan.launches] == [4, 1]
    check(students, teachers, dims, [0.1, 0.25, -2.0, 1.0, 0.5])


def launches_of(monkeypatch, call):
    names = []
    for name in ("part_kernel", "merge_kernel", "total_kernel", "backward_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                names.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Counted(kernel, name))
    call()
    return names


@pytest.mark.parametrize("merged", [False, True])
def test_launches_are_few(merged, monkeypatch, request):
    if merged:
        request.getfixturevalue("small_plans")
    pairs = [make((1, 20, 8)) for _ in range(4)]
    students, teachers = [p[0] for p in pairs], [p[1] for p in pairs]
    names = launches_of(monkeypatch, lambda: run(students, teachers, [1, 2, 1, 2], [1.0] * 4))
    assert names == ["part_kernel", *["merge_kernel"] * merged, "total_kernel", "backward_kernel"]


@axes
def test_the_real_maps_are_cut_into_parts_that_fill_a_large_gpu(dim):
    pairs = [(64, 32768), (128, 8192), (320, 2048), (512, 512)]
    views = [torch.empty((2, *(p if dim == 2 else p[::-1])), dtype=torch.bfloat16, device="meta") for p in pairs]
    plan = _cwd_plan.plan_of(views, views, [dim] * 4, [1.0] * 4, 1.0)
    assert len(plan.launches) == 1 and plan.launches[0].programs >= 528
    assert plan.stages[0].programs >= 256
    assert plan.workspace < 0.05 * 2 * sum(map(math.prod, ((2, *p) for p in pairs)))
    for stage in plan.stages:
        assert stage.tile[0] == (8 if dim == CONTIGUOUS else 4) and math.prod(stage.tile[1:]) <= 2048


@triton.jit
def entries_kernel(counts, sizes, TILE: tl.constexpr):
    """Counts, for every entry, the programs and steps that take it."""
    COLUMNS: tl.constexpr = TILE[2]
    STEP: tl.constexpr = TILE[1] * TILE[2]
    pid = tl.program_id(0)
    if len(TILE) == 3:
        row, _, first, last = kernels._place_in_rows(pid, sizes, TILE)
        for begin in range(first, last, COLUMNS):
            offsets, mask = kernels._tile_of_rows(row, begin, sizes, TILE)
            tl.store(counts + offsets, tl.load(counts + offsets, mask=mask, other=0) + 1, mask=mask)
    else:
        sample, column, _, first, last = kernels._place_in_columns(pid, sizes, TILE)
        for begin in range(first, last, STEP):
            offsets, mask = kernels._tile_of_columns(sample, column, begin, sizes, TILE)
            tl.store(counts + offsets, tl.load(counts + offsets, mask=mask, other=0) + 1, mask=mask)


@pytest.mark.parametrize("shape", [(2, 19, 8), (3, 5, 33), (1, 70, 6), (1, 1, 1)], ids=str)
@axes
def test_every_entry_is_taken_once(shape, dim, small_plans):
    view = torch.empty(shape)
    (stage,) = _cwd_plan.plan_of([view], [view], [dim], [1.0], 1.0).stages
    counts = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    entries_kernel[(stage.programs,)](counts, stage.sizes, TILE=stage.tile)
    assert (counts == 1).all()


@triton.jit
def far_rows_kernel(out, pid, begin, sizes, TILE: tl.constexpr):
    row, _, _, _ = kernels._place_in_rows(pid, sizes, TILE)
    offsets, _ = kernels._tile_of_rows(row, begin, sizes, TILE)
    tl.store(out, tl.max(offsets))


@triton.jit
def far_columns_kernel(out, pid, begin, sizes, TILE: tl.constexpr):
    sample, column, _, _, _ = kernels._place_in_columns(pid, sizes, TILE)
    offsets, _ = kernels._tile_of_columns(sample, column, begin, sizes, TILE)
    tl.store(out, tl.max(offsets))


def test_offsets_go_beyond_32_bits():
    """The last entry of a view of 2^33 elements, from the program that takes it, without the view."""
    batch, rows, columns = shape = (2, 2**16, 2**16)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    far_rows_kernel[(1,)](out, batch * rows // 2 * 4 - 1, columns - 16, (*shape, 2**10, 4), TILE=(8, 2, 16))
    assert out.item() == math.prod(shape) - 1
    far_columns_kernel[(1,)](out, batch * columns // 16 * 4 - 1, rows - 8, (*shape, 2**11, 4), TILE=(8, 2, 4, 16))
    assert out.item() == math.prod(shape) - 1


@axes
def test_a_student_beyond_the_range_counts_where_the_teacher_does(dim, small_plans):
    """Differences of the student overflow; they have no weight where the teacher's probability is 0."""
    student, teacher = (torch.zeros((1, 12, 12), device=DEVICE) for _ in range(2))
    first, last = ((slice(None),) * dim + (end,) for end in (0, -1))
    student[first], student[last], teacher[first] = 3e38, -3e38, 1e4
    loss, _, (gradient,) = run([student], [teacher], [dim], [1.0])
    assert loss.isfinite() and gradient.isfinite().all()
    teacher[last] = 1e4
    assert run([student], [teacher], [dim], [1.0])[0] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@axes
def test_nan_and_inf_come_out_where_they_do_in_eager(dim, bad, small_plans):
    for poisoned in (0, 1):
        views = make((1, 9, 12))
        views[poisoned][0, 3, 2] = bad
        loss, _, (gradient,) = run([views[0]], [views[1]], [dim], [1.0])
        _, (true,) = truth([views[0]], [views[1]], [dim], [1.0])
        # Minus infinity of a teacher is a probability of 0.
        assert loss.isfinite() == (poisoned == 1 and bad < 0)
        assert torch.equal(gradient.isfinite().cpu(), true.isfinite())


@axes
def test_equal_views_give_zero_in_any_cut(dim, small_plans):
    student, _ = make((1, 9, 20))
    loss, _, (gradient,) = run([student], [student.clone()], [dim], [1.0])
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("temperature, scale", [(1e-3, 1e4), (1e3, 1e4), (1e-3, 1e-3)])
@axes
def test_extreme_logits_and_temperatures(dim, temperature, scale, small_plans):
    student, teacher = (view * scale for view in make((1, 6, 20)))
    check([student], [teacher], [dim], [1.0], temperature)


@axes
def test_nothing_uninitialised_is_read(dim, small_plans):
    student, teacher = make((1, 9, 20))
    expected = run([student], [teacher], [dim], [1.0])
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        loss, (statistics,), (gradient,) = run([student], [teacher], [dim], [1.0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected[0]) and torch.equal(statistics, expected[1][0])
    assert torch.equal(gradient, expected[2][0])


def test_calls_with_other_values_share_a_plan():
    plans = [_cwd_plan.plan_of([s], [t], [1], [1.0], 2.0) for s, t in (make((1, 2, 5)), make((1, 2, 5)))]
    assert plans[0] is plans[1]
    views = [torch.zeros(1, 2, 5)]
    assert _cwd_plan.plan_of(views, views, [1], [1.0], 3.0) is not plans[0]
    assert _cwd_plan.plan_of(views, views, [2], [1.0], 2.0) is not plans[0]


ZEROS = torch.zeros(1, 6, 4)


@pytest.mark.parametrize(
    "students, teachers, dims, weights, temperature, message",
    [
        ([], [], [], [], 1.0, "at least one, got 0 students"),
        ([ZEROS], [ZEROS], [1], [1.0, 1.0], 1.0, "got 1 students, 1 teachers, 1 dims and 2 weights"),
        (
            [ZEROS],
            [ZEROS[:, 1:].contiguous()],
            [1],
            [1.0],
            1.0,
            r"teacher of stage 1 .* \[1, 6, 4\] .* got \[1, 5, 4\]",
        ),
        ([ZEROS, ZEROS[0]], [ZEROS, ZEROS[0]], [1, 1], [1.0, 1.0], 1.0, r"student of stage 2 as a view \[B, M, N\]"),
        ([ZEROS], [ZEROS.transpose(1, 2)], [1], [1.0], 1.0, "teacher of stage 1 contiguous, .*call .contiguous"),
        ([ZEROS.double()], [ZEROS], [1], [1.0], 1.0, "float64 does not mix"),
        (
            [ZEROS.int()],
            [ZEROS.int()],
            [1],
            [1.0],
            1.0,
            "expected student of stage 1 to be float32, .* got torch.int32",
        ),
        (
            [ZEROS],
            [ZEROS.to("meta")],
            [1],
            [1.0],
            1.0,
            "teacher of stage 1 on the device of stage 1's student, got meta",
        ),
        ([ZEROS], [ZEROS], [3], [1.0], 1.0, "dims of stage 1 to be 1 or 2, got 3"),
        ([ZEROS], [ZEROS], [1], [1.0], 0.0, "temperature to be positive and finite, got 0.0"),
        ([ZEROS[:, :0]], [ZEROS[:, :0]], [1], [1.0], 1.0, "at least one element"),
    ],
)
def test_views_that_do_not_fit_are_refused(students, teachers, dims, weights, temperature, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.cwd_fwd(students, teachers, dims, weights, temperature)


def test_statistics_that_do_not_fit_are_refused():
    student, teacher = make((1, 6, 4))
    loss, (kept,) = kernels.cwd_fwd([student], [teacher], [1], [1.0], 1.0)
    for grad, statistics, message in (
        (loss, [kept[:, :2]], "expected the statistics that cwd_fwd made"),
        (loss, [kept.double()], "expected the statistics that cwd_fwd made"),
        (loss, [], "expected statistics of every stage, got 0 for 1"),
        (loss.double(), [kept], "expected a scalar grad of torch.float32"),
        (kept, [kept], "expected a scalar grad"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.cwd_bwd(grad, [student], [teacher], statistics, [1], [1.0], 1.0)
