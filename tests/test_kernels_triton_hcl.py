"""What is particular to the Triton kernels: cuts, plans, many programs per cell, many stages per launch, far offsets.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small maps.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from kernels_here import device_of, interpreted

from transkd_fast import backends
from transkd_fast.reference.hcl import hcl as hcl_reference

if backends.why_not("hcl", "triton") is not None:
    pytest.skip(backends.why_not("hcl", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _common, _hcl_cells, _hcl_plan
from transkd_fast.kernels import hcl as kernels

DEVICE = device_of("triton")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
if interpreted("triton"):
    # The interpreter cuts bfloat16 off where the compiled kernel rounds (seen in Triton 3.6 and 3.9).
    TOLERANCE[torch.bfloat16] *= 2
UPSTREAM = 0.37
LEVELS = (0.5, 0.25, 0.125)


def plan_of(students, teachers, weights):
    return _hcl_plan.plan_of("hcl", students, teachers, weights, LEVELS)


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even small maps into many programs, as large maps are cut on a GPU."""
    values = {"PROGRAMS": 10**6, "STEPS": 1, "WIDE_COLUMNS": 4, "NARROW_COLUMNS": 4, "WIDE_CHANNELS": 4}
    values |= {"NARROW_CHANNELS": 4, "POOL_CHANNELS": 2, "POOL_PARTS": 1}
    for name, value in values.items():
        monkeypatch.setattr(_hcl_plan, name, value)
    # Eight elements of float32.
    monkeypatch.setattr(_hcl_plan, "TILE_BYTES", 32)
    monkeypatch.setattr(kernels, "TOTAL_BLOCK", 4)
    _hcl_plan._plan.cache_clear()
    yield
    _hcl_plan._plan.cache_clear()


def make(shape, student_dtype=torch.float32, layout="nchw", teacher_dtype=None, offset=0.0):
    maps = [torch.randn(shape, dtype=torch.float64) + offset for _ in range(2)]
    dtypes = (student_dtype, teacher_dtype or student_dtype)
    return [
        m.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]) for m, dtype in zip(maps, dtypes, strict=True)
    ]


def truth(students, teachers, weights, upstream=UPSTREAM):
    students = [s.double().cpu().contiguous().requires_grad_() for s in students]
    loss = sum(
        weight * hcl_reference(s, t.double().cpu().contiguous())
        for s, t, weight in zip(students, teachers, weights, strict=True)
    )
    return loss.detach(), torch.autograd.grad(loss * upstream, students)


def run(students, teachers, weights, upstream=UPSTREAM):
    loss, tables = kernels.hcl_fwd(students, teachers, weights, LEVELS)
    grad = torch.tensor(upstream, dtype=loss.dtype, device=DEVICE)
    return loss, tables, kernels.hcl_bwd(grad, students, teachers, tables, weights, LEVELS)


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


def check(students, teachers, weights):
    # As a loss scaler does, this keeps float16 gradients out of the subnormal range.
    upstream = UPSTREAM * max(s.numel() for s in students)
    true_loss, true_gradients = truth(students, teachers, weights, upstream)
    loss, _, gradients = run(students, teachers, weights, upstream)
    assert relative(loss, true_loss) < min(TOLERANCE[students[0].dtype], TOLERANCE[torch.float32])
    for student, gradient, true in zip(students, gradients, true_gradients, strict=True):
        assert gradient.dtype == student.dtype and gradient.stride() == student.stride()
        assert relative(gradient, true) < TOLERANCE[student.dtype]


def test_borders_are_those_of_adaptive_pooling():
    for size in range(1, 70):
        pixels = torch.eye(size, dtype=torch.float64).unsqueeze(0)  # pooled, they show which pixel is in which window
        for split in (0, 1, 2, 4):
            expected = {0, size}
            for level in (1, 2, 4)[: split.bit_length()]:
                for window in F.adaptive_avg_pool1d(pixels, level)[0].T:
                    inside = window.nonzero()
                    expected |= {int(inside.min()), int(inside.max()) + 1}
            assert _hcl_plan.borders(size, split) == sorted(expected), (size, split)


@triton.jit
def edges_kernel(out, size, split, segments):
    k = tl.arange(0, 8)
    tl.store(out + k, _hcl_cells.edge(k, size, split, segments), mask=k <= segments)


def test_the_kernels_find_the_same_borders():
    sizes = {4: [*range(5, 22), 2**20 + 1, 2**20 + 2, 2**28 + 3], 2: [*range(3, 8), 2**28 + 1], 1: [2, 3, 4], 0: [1, 5]}
    for split, of_split in sizes.items():
        for size in of_split:
            expected = _hcl_plan.borders(size, split)
            out = torch.full((8,), -1, dtype=torch.int32, device=DEVICE)
            edges_kernel[(1,)](out, size, split, len(expected) - 1)
            assert out[: len(expected)].tolist() == expected, (size, split)


@triton.jit
def far_planes_kernel(out, pid, row, sizes, VECTOR: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    plane, column, _, _, _, _, _ = _hcl_cells.place_in_planes(pid, sizes, PLANES, COLUMNS)
    offsets, _, length = _hcl_cells.rows_of_planes(plane, column, sizes, VECTOR)
    at = tl.arange(0, PLANES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, tl.reshape(offsets + row.to(tl.int64) * length, [PLANES, COLUMNS]))


@triton.jit
def far_pixels_kernel(out, pid, pixel, sizes, VECTOR: tl.constexpr, CHANNELS: tl.constexpr):
    channel, _, corner, cell_width, _, _, _ = _hcl_cells.place_in_pixels(pid, sizes, CHANNELS)
    pixels = pixel + tl.arange(0, 1)
    offsets, _ = _hcl_cells.pixel_offsets(pixels, channel, corner, cell_width, sizes, VECTOR)
    tl.store(out + tl.arange(0, 1)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :], offsets)


def test_offsets_go_beyond_32_bits():
    """The last pixel of a map of 2^33 elements, from the program that takes it, without the map."""
    batch, channels, height, width = shape = (64, 512, 512, 512)
    sizes = (*shape, 4, 4, 4, 1)
    last = math.prod(shape) - 1
    out = torch.zeros(2 * 16, dtype=torch.int64, device=DEVICE)
    # One program takes 2 planes, the rows of one of the 4 bands, and one of the 32 chunks of 16 columns.
    programs = batch * channels // 2 * 4 * 32
    far_planes_kernel[(1,)](out, programs - 1, height - 1, sizes, VECTOR=8, PLANES=2, COLUMNS=16)
    assert out[-1].item() == last
    # One program takes one of the 16 cells and 16 channels.
    programs, pixel = batch * 16 * channels // 16, (height // 4) * (width // 4) - 1
    far_pixels_kernel[(1,)](out, programs - 1, pixel, sizes, VECTOR=8, CHANNELS=16)
    assert out[15].item() == last


@layouts
@pytest.mark.parametrize("shape", [(1, 6, 8, 8), (1, 3, 4, 9), (1, 5, 3, 10)], ids=str)
def test_several_programs_per_cell(shape, layout, small_plans):
    students, teachers = ([m] for m in make(shape, layout=layout))
    (stage,) = plan_of(students, teachers, [0.7]).stages
    launch = plan_of(students, teachers, [0.7]).launches[0]
    assert stage.parts > launch.pool_tile[2] and stage.programs > stage.table_shape[0] * stage.table_shape[1]
    check(students, teachers, [0.7])


@layouts
def test_planes_share_a_program(layout):
    students, teachers = ([m] for m in make((3, 11, 4, 4), layout=layout))
    check(students, teachers, [1.0])


def test_stages_of_all_kinds_share_a_launch():
    """Five stages make two launches; dtypes, layouts and alignments differ within one."""
    kinds = [
        ((2, 8, 12, 16), torch.bfloat16, "nchw", torch.bfloat16),
        ((2, 8, 6, 8), torch.float32, "channels_last", torch.float16),
        ((2, 5, 3, 4), torch.float16, "nchw", torch.float32),
        ((2, 3, 1, 2), torch.bfloat16, "channels_last", torch.float32),
        ((1, 7, 5, 3), torch.float32, "nchw", torch.float32),
    ]
    pairs = [make(*kind) for kind in kinds]
    students, teachers = [p[0] for p in pairs], [p[1] for p in pairs]
    plan = plan_of(students, teachers, [1.0] * 5)
    assert len(plan.launches) == 2
    ends = [*plan.partial_at[1:], plan.losses_at]
    for stage, begin, end in zip(plan.stages, plan.partial_at, ends, strict=True):
        assert begin % 4 == 0 and end - begin >= math.prod(stage.table_shape) * stage.parts
    check(students, teachers, [0.1, 0.25, -2.0, 1.0, 0.5])


def test_random_shapes_dtypes_and_layouts():
    generator = random.Random(0)
    pairs = [(a, b) for a in TOLERANCE for b in TOLERANCE if (a == torch.float64) == (b == torch.float64)]
    for _ in range(10):
        shape = [generator.randint(*limits) for limits in ((1, 2), (1, 5), (1, 8), (1, 12))]
        dtypes = generator.choice(pairs)
        layout = generator.choice(list(LAYOUTS))
        student, teacher = make(shape, dtypes[0], layout, dtypes[1])
        weight = generator.choice([1.0, 0.1, 3.0])
        check([student], [teacher], [weight])


@layouts
def test_a_large_mean_costs_no_digits(layout):
    students, teachers = ([m] for m in make((1, 4, 8, 4), torch.bfloat16, layout, offset=1000.0))
    check(students, teachers, [1.0])


@layouts
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_come_out_where_they_belong(bad, layout):
    student, teacher = make((1, 3, 4, 8), layout=layout)
    student[0, 1, 2, 3] = bad
    loss, (table,), (gradient,) = run([student], [teacher], [1.0])
    assert not loss.isfinite() and not gradient[0, 1, 2, 3].isfinite()
    assert table[:, :, [0, 2]].isfinite().all() and gradient[:, [0, 2]].isfinite().all()
    # Maps of one row have no pooled terms, so not even the plane is touched.
    student, teacher = make((1, 2, 1, 8), layout=layout)
    student[0, 1, 0, 3] = bad
    loss, (table,), (gradient,) = run([student], [teacher], [1.0])
    assert not loss.isfinite() and table.isfinite().all()
    assert gradient.isfinite().sum() == gradient.numel() - 1


@layouts
@pytest.mark.parametrize("shape", [(1, 4, 8, 16), (1, 3, 3, 5)], ids=str)
def test_only_the_maps_are_read_and_only_the_gradient_is_written(shape, layout, monkeypatch):
    """Maps and gradient lie misaligned between guards: NaN to be read, a mark to be overwritten."""
    guard, mark = 40, -7.0

    def between_guards(of, fill):
        memory = torch.full((of.numel() + 2 * guard + 1,), fill, device=DEVICE)
        return memory, torch.as_strided(memory, of.shape, of.stride(), guard + 1)

    maps = []
    for m in make(shape, layout=layout):
        _, inner = between_guards(m, math.nan)
        maps.append(inner.copy_(m))
    memory, gradient = between_guards(maps[0], mark)
    monkeypatch.setattr(kernels.torch, "empty_like", lambda _: gradient)
    check([maps[0]], [maps[1]], [1.0])
    outside = torch.cat([memory[: guard + 1], memory[guard + 1 + gradient.numel() :]])
    assert (outside == mark).all()


@layouts
def test_nothing_uninitialised_is_read(layout, small_plans):
    students, teachers = ([m] for m in make((1, 3, 4, 9), layout=layout))
    expected = run(students, teachers, [0.5])
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        loss, (table,), (gradient,) = run(students, teachers, [0.5])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected[0]) and torch.equal(table, expected[1][0])
    assert torch.equal(gradient, expected[2][0])


def test_inputs_are_left_alone():
    students, teachers = ([m] for m in make((1, 3, 6, 9)))
    loss, tables = kernels.hcl_fwd(students, teachers, [0.5], LEVELS)
    inputs = [loss, *students, *teachers, *tables]
    copies = [tensor.clone() for tensor in inputs]
    kernels.hcl_bwd(loss, students, teachers, tables, [0.5], LEVELS)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    "shape",
    [
        (8, 64, 128, 256),
        (8, 512, 16, 32),
        (2, 64, 90, 120),
        (2, 320, 23, 30),
        (1, 1, 1, 1),
        (1, 3, 7, 2**20 + 1),
        (1, 2**16 + 1, 2, 3),
        (2**12, 3, 5, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [(2, 2), (4, 4), (2, 4), (8, 8)], ids=str)
@layouts
def test_plans_keep_the_promises_the_kernels_rely_on(shape, dtypes, layout):
    batch, channels, _, width = shape
    stage = _hcl_plan._stage(shape, layout == "channels_last", *dtypes, 1.0, LEVELS)
    vector, *tile = stage.tile
    row = channels if layout == "channels_last" else width
    assert row % vector == 0 and tile[-1] % vector == 0 and vector * dtypes[0] <= 16
    assert all(length & (length - 1) == 0 for length in tile)
    assert math.prod(tile) * dtypes[1] <= _hcl_plan.TILE_BYTES
    assert stage.parts * math.prod(stage.table_shape) <= math.prod(shape), "more partial sums than elements"
    blocks = math.ceil(row / tile[-1]) * stage.sizes[-1]  # chunks of a row times strips
    if layout == "channels_last":
        assert stage.programs == blocks * stage.table_shape[0] * stage.table_shape[1]
    else:
        assert stage.programs == blocks * stage.sizes[5] * math.ceil(batch * channels / tile[0])
    assert 1 <= stage.programs < 2**31


@layouts
@pytest.mark.parametrize("batch", [2, 8])
def test_real_maps_fill_a_large_gpu(batch, layout):
    shapes = [(batch, 64, 128, 256), (batch, 128, 64, 128), (batch, 320, 32, 64), (batch, 512, 16, 32)]
    stages = [_hcl_plan._stage(shape, layout == "channels_last", 2, 2, 1.0, LEVELS) for shape in shapes]
    assert stages[0].programs >= 1024
    assert all(stage.programs >= 128 for stage in stages)  # about the multiprocessors of an H100


def test_calls_with_other_values_share_a_plan():
    first, second = make((1, 2, 5, 5)), make((1, 2, 5, 5))
    plans = [plan_of([s], [t], [1.0]) for s, t in (first, second)]
    assert plans[0] is plans[1]
    assert plan_of([first[0]], [first[1]], [2.0]) is not plans[0]
    assert _hcl_plan.plan_of("hcl", [first[0]], [first[1]], [1.0], (0.5, 0.25, 0.1)) is not plans[0]


@pytest.mark.parametrize(
    "size, block", [(1, 1), (3, 4), (30, 32), (256, 256), (320, 64), (257, 64), (500, 512), (120, 128), (90, 128)]
)
def test_blocks_leave_few_lanes_idle(size, block):
    assert _common.block_of(size, 512, 64) == block


@pytest.mark.parametrize("size, itemsize, length", [(64, 2, 8), (64, 4, 4), (64, 8, 2), (12, 2, 4), (7, 4, 1)])
def test_vectors_divide_the_row(size, itemsize, length):
    assert _common.vector_length(size, itemsize) == length


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-9, -2.5, 0.0, 123456789.123])
def test_halves_carry_a_double_to_the_kernel(value):
    high, low = _common.halves(value)
    assert torch.tensor(high, dtype=torch.float32).item() == high
    rest = torch.tensor(low, dtype=torch.float32).double().item()
    assert high + rest == pytest.approx(value, rel=2e-14, abs=0)


ZEROS = torch.zeros(1, 2, 6, 6)


@pytest.mark.parametrize(
    "students, teachers, weights, message",
    [
        ([], [], [], "at least one, got 0 students"),
        ([ZEROS], [ZEROS], [1.0, 1.0], "got 1 students, 1 teachers and 2 weights"),
        (
            [ZEROS],
            [ZEROS[:, :, 1:].contiguous()],
            [1.0],
            r"differ in dimension 2, got \[1, 2, 6, 6\] and \[1, 2, 5, 6\]",
        ),
        ([ZEROS[0]], [ZEROS[0]], [1.0], r"expected maps \[B, C, H, W\]"),
        (
            [ZEROS],
            [ZEROS.contiguous(memory_format=torch.channels_last)],
            [1.0],
            "expected both maps contiguous or both",
        ),
        ([ZEROS[:, :, ::2]], [ZEROS[:, :, ::2]], [1.0], "expected a contiguous or channels-last map.*call .contiguous"),
        ([ZEROS.double()], [ZEROS], [1.0], "float64 does not mix"),
        ([ZEROS.int()], [ZEROS.int()], [1.0], "expected float32, float64, bfloat16 or float16 maps, got torch.int32"),
        ([ZEROS], [ZEROS.to("meta")], [1.0], r"expected all maps on one device, got \['cpu', 'meta'\]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(students, teachers, weights, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.hcl_fwd(students, teachers, weights, LEVELS)


def test_tables_that_do_not_fit_are_refused():
    student, teacher = make((1, 2, 6, 6))
    loss, (table,) = kernels.hcl_fwd([student], [teacher], [1.0], LEVELS)
    for grad, tables, message in (
        (loss, [table[:, :1]], "expected the tables that hcl_fwd made"),
        (loss, [table.double()], "expected the tables that hcl_fwd made"),
        (loss, [], "expected one table per stage, got 0 for 1"),
        (loss.double(), [table], "expected a scalar grad of torch.float32"),
        (table, [table], "expected a scalar grad"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.hcl_bwd(grad, [student], [teacher], tables, [1.0], LEVELS)
