"""What is particular to hcl_bn's Triton kernels: parts and their merging, plans, launches, many stages, far offsets.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small maps.
"""

import itertools
import math

import pytest
import torch
from kernels_here import device_of, interpreted

from transkd_fast import backends
from transkd_fast.ops.hcl_bn import kept_shapes, stages_of
from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.hcl_bn import hcl_bn as hcl_bn_reference

if backends.why_not("hcl_bn", "triton") is not None:
    pytest.skip(backends.why_not("hcl_bn", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _hcl_bn_plan, _hcl_bn_statistics, _hcl_plan
from transkd_fast.kernels import hcl_bn as kernels

DEVICE = device_of("triton")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-12, F32: 3e-6, BF16: 2**-8, F16: 2**-10}
if interpreted("triton"):
    # The interpreter cuts bfloat16 off where the compiled kernel rounds (seen in Triton 3.6 and 3.9).
    TOLERANCE[BF16] *= 2
LEVELS = (0.5, 0.3, 0.1)
KERNELS = ("reduce", "statistics", "sum", "pool", "finish", "gradients", "backward")
RUNNING, BATCH, TRACKED = 1, 2, 3


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even small maps into many programs and steps, as large maps are cut on a GPU."""
    values = {"PROGRAMS": 10**6, "STEPS": 1, "WIDE_COLUMNS": 4, "NARROW_COLUMNS": 4, "WIDE_CHANNELS": 4}
    values |= {"NARROW_CHANNELS": 4, "POOL_CHANNELS": 2, "POOL_PARTS": 1}
    of_bn = {"RUN": 8, "WIDE_CHANNELS": 4, "SECTOR_BYTES": 16, "MOMENT_CHANNELS": 2, "MOMENT_ROWS": 2}
    of_bn |= {"GRADIENT_CHANNELS": 2, "GRADIENT_SAMPLES": 1}
    for module, changed in ((_hcl_plan, values), (_hcl_bn_plan, of_bn)):
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
        # Four elements of float64.
        monkeypatch.setattr(module, "TILE_BYTES", 32)
    monkeypatch.setattr(kernels, "TOTAL_BLOCK", 4)
    for cache in (_hcl_plan._plan, _hcl_bn_plan._reduce):
        cache.cache_clear()
    yield
    for cache in (_hcl_plan._plan, _hcl_bn_plan._reduce):
        cache.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name, in order."""
    launched = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(kernels, f"{name}_kernel", Counted(name, getattr(kernels, f"{name}_kernel")))
    return launched


class Stage:
    """One stage's maps, batch norm and settings."""

    def __init__(self, shape=(2, 3, 5, 8), dtype=F64, layout="nchw", **settings):
        def random(*size):
            return torch.randn(size, dtype=F64).to(DEVICE)

        channels = shape[1]
        teacher_dtype = settings.pop("teacher_dtype", dtype)
        self.norm, self.parts = settings.pop("norm", TRACKED), settings.pop("parts", 2)
        self.momentum, self.weight = settings.pop("momentum", 0.2), settings.pop("weight", 1.0)
        self.affine = [1 + random(channels) / 4, random(channels) / 4] if settings.pop("affine", True) else [None, None]
        offset = settings.pop("offset", 0.0)
        assert not settings, settings
        self.u = (3 * random(*shape) + offset).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        self.teacher = random(*shape).to(teacher_dtype).contiguous(memory_format=LAYOUTS[layout])
        self.running = [random(channels), random(channels).abs() + 0.5] if self.norm != BATCH else []
        self.counters = [torch.tensor(2, device=DEVICE)] if self.norm == TRACKED else []

    def truth(self):
        """The same in float64 on the CPU: (u, weight, bias), the loss, and the running statistics afterwards."""
        leaves = [None if t is None else t.double().cpu().requires_grad_() for t in (self.u, *self.affine)]
        running = [t.cpu().clone() for t in self.running] or [None, None]
        counter = self.counters[0].cpu().clone() if self.counters else None
        training = self.norm != RUNNING
        bn = BatchNorm(*leaves[1:], *running, counter, training, None if self.momentum < 0 else self.momentum, 1e-3)
        return leaves, hcl_bn_reference(leaves[0], self.teacher.double().cpu(), bn, LEVELS), [*running, counter]


def moments_of(stages):
    of_batch = [stage for stage in stages if stage.norm != RUNNING]
    taken = iter(kernels.hcl_bn_reduce([s.u for s in of_batch], [s.parts for s in of_batch]) if of_batch else [])
    return [s.u.new_empty((0, 3, s.u.shape[1]), dtype=F64) if s.norm == RUNNING else next(taken) for s in stages]


def forward(stages, moments=None):
    loss, *flats = kernels.hcl_bn_fwd(
        [s.u for s in stages],
        [s.teacher for s in stages],
        moments_of(stages) if moments is None else moments,
        [t for s in stages for t in s.affine],
        [t for s in stages for t in s.running],
        [t for s in stages for t in s.counters],
        [s.norm for s in stages],
        [s.momentum for s in stages],
        [1e-3] * len(stages),
        [s.weight for s in stages],
        LEVELS,
    )
    shapes = kept_shapes([s.u for s in stages])
    return loss, *(stages_of(flat, shapes_of) for flat, shapes_of in zip(flats, shapes, strict=True))


def backward(stages, grad, kept, means=(), wanted=None):
    if wanted is None:
        wanted = [t is not None for s in stages for t in (s.u, *s.affine)]
    return kernels.hcl_bn_bwd(
        grad,
        [s.u for s in stages],
        [s.teacher for s in stages],
        *kept,
        means,
        [t for s in stages for t in s.affine],
        [s.norm for s in stages],
        [s.weight for s in stages],
        LEVELS,
        wanted,
    )


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


def check(stages):
    """Loss, statistics afterwards and gradients against the reference."""
    # As a loss scaler does, this keeps float16 gradients out of the subnormal range.
    upstream = 0.1 * min(s.u.numel() for s in stages)
    truths = [s.truth() for s in stages]
    true_loss = sum(s.weight * loss for s, (_, loss, _) in zip(stages, truths, strict=True))
    true_loss.backward(torch.tensor(upstream, dtype=F64))
    loss, *kept = forward(stages)
    gradients = iter(backward(stages, torch.full_like(loss, upstream), kept))
    assert relative(loss, true_loss.detach()) < TOLERANCE[loss.dtype]
    for m, (stage, (leaves, _, afterwards)) in enumerate(zip(stages, truths, strict=True)):
        for tensor, leaf in zip((stage.u, *stage.affine), leaves, strict=True):
            if tensor is not None:
                gradient = next(gradients)
                assert gradient.dtype == tensor.dtype and gradient.stride() == tensor.stride(), m
                assert relative(gradient, leaf.grad) < max(TOLERANCE[tensor.dtype], TOLERANCE[loss.dtype]), m
        for found, true in zip((*stage.running, *stage.counters), afterwards, strict=False):
            assert relative(found, true) < TOLERANCE[loss.dtype], m


@layouts
def test_several_programs_per_cell_and_channel(layout, small_plans):
    shape = (2, 3, 3, 8) if layout == "nchw" else (1, 5, 3, 4)
    stage = Stage(shape, layout=layout, parts=3)
    planned = _hcl_plan._stage(shape, layout == "channels_last", 8, 8, 1.0, LEVELS)
    (reduce,) = _hcl_bn_plan.check_reduce([stage.u], [3])
    assert planned.parts > 1 and reduce.programs > 3
    check([stage])


def test_stages_of_all_kinds_share_a_launch(launches):
    """Dtypes, layouts, sizes and kinds of normalisation differ within one."""
    check(
        [
            Stage((2, 8, 6, 8), BF16, teacher_dtype=F32, parts=2),
            Stage((2, 5, 4, 4), F32, "channels_last", teacher_dtype=F16, norm=BATCH, weight=-2.0, parts=1),
            Stage((1, 3, 1, 9), F16, norm=RUNNING, weight=0.5),
            Stage((3, 9, 3, 2), F32, "channels_last", teacher_dtype=BF16, affine=False, momentum=-1.0, parts=3),
        ]
    )
    assert launches == list(KERNELS)


def test_a_fifth_stage_takes_another_launch(launches):
    check([Stage((1, 2, 2, 3), norm=RUNNING if m == 4 else TRACKED, weight=1.0 + m) for m in range(5)])
    assert [launches.count(name) for name in KERNELS] == [1, 2, 2, 2, 1, 2, 2]


def test_only_wanted_gradients_are_launched(launches):
    stages = [Stage((1, 2, 2, 3)), Stage((1, 3, 2, 3), norm=BATCH)]
    loss, *kept = forward(stages)
    every = backward(stages, loss, kept)
    for wanted, expected in (
        ([0, 0, 0, 0, 0, 0], []),
        ([0, 1, 0, 0, 0, 1], ["gradients"]),
        ([0, 0, 0, 1, 0, 1], ["gradients", "backward"]),
    ):
        launches.clear()
        found = backward(stages, loss, kept, wanted=list(map(bool, wanted)))
        assert launches == expected
        assert all(map(torch.equal, found, itertools.compress(every, wanted))) and len(found) == sum(wanted)


@layouts
@pytest.mark.parametrize("shape, parts", [((2, 5, 5, 7), 4), ((3, 3, 8, 8), 2), ((9, 2, 2, 4), 1)], ids=str)
def test_parts_hold_the_moments_of_their_values(shape, parts, layout):
    u = Stage(shape, F32, layout, offset=100.0).u
    (moments,) = kernels.hcl_bn_reduce([u], [parts])
    values = u.double().cpu().transpose(0, 1).flatten(1)  # [C, values], sample by sample
    length = math.ceil(math.ceil(values.shape[1] / 64) / parts) * 64
    assert moments.shape == (parts, 3, shape[1]) and moments.dtype == F64
    assert (moments[:, 0].sum(dim=0) == values.shape[1]).all()
    for p, (count, mean, squares) in enumerate(moments.cpu()):
        of_part = values[:, p * length : (p + 1) * length]
        assert (count == of_part.shape[1]).all()
        if of_part.shape[1] == 0:
            assert not mean.any() and not squares.any()
        else:
            assert relative(mean, of_part.mean(dim=1)) < 1e-8
            assert relative(squares, (of_part - of_part.mean(dim=1, keepdim=True)).square().sum(dim=1)) < 1e-6


@layouts
def test_moments_do_not_lose_digits_to_a_large_mean(layout, small_plans):
    """In many steps, each of which centres its values."""
    u = Stage((2, 3, 8, 8), F32, layout, offset=1e4).u
    (moments,) = kernels.hcl_bn_reduce([u], [1])
    variance, mean = torch.var_mean(u.double().cpu(), dim=(0, 2, 3), correction=0)
    assert relative(moments[0, 1], mean) < 1e-9 and relative(moments[0, 2] / 128, variance) < 1e-6


def test_rows_of_other_processes_are_merged(small_plans):
    """Their numbers of values differ, and one row is empty."""
    mine, others = Stage((1, 5, 2, 4), momentum=0.25), Stage((3, 5, 2, 4))
    (moments,) = kernels.hcl_bn_reduce([mine.u], [1])
    rows = torch.cat([moments, torch.zeros_like(moments), *kernels.hcl_bn_reduce([others.u], [2])])
    before = [t.clone() for t in mine.running]
    _, _, (state,), _ = forward([mine], [rows])
    values = torch.cat([mine.u, others.u])
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(state, torch.stack([mean, (variance + 1e-3).rsqrt()]), rtol=1e-12, atol=0)
    unbiased = values.var(dim=(0, 2, 3), correction=1)
    for found, old, new in zip(mine.running, before, (mean, unbiased), strict=True):
        torch.testing.assert_close(found, torch.lerp(old, new, 0.25), rtol=1e-12, atol=0)


@layouts
def test_means_of_a_group_take_the_place_of_our_own(layout):
    stage = Stage((2, 3, 4, 6), layout=layout)
    loss, *kept = forward([stage])
    sums, values = kept[2][0], stage.u.numel() / stage.u.shape[1]
    own = loss * sums.sum(dim=0) / values
    expected = backward([stage], loss, kept)
    for found, true in zip(backward([stage], loss, kept, [own]), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-14)
    mean, invstd = (row[:, None, None] for row in kept[1][0])
    more = torch.tensor([[0.3], [-0.2]], dtype=F64, device=DEVICE).expand(2, 3).contiguous()
    du = backward([stage], loss, kept, [own + more])[0]
    change = -stage.affine[0][:, None, None] * invstd * (0.3 - 0.2 * (stage.u - mean) * invstd)
    torch.testing.assert_close(du - expected[0], change, rtol=1e-10, atol=1e-12)


def test_sums_are_those_of_the_gradient_of_the_normalised_map():
    stage = Stage((2, 4, 3, 5), layout="channels_last")
    normalised = torch.nn.functional.batch_norm(stage.u.cpu(), None, None, training=True, eps=1e-3)
    x = normalised * stage.affine[0].cpu()[:, None, None] + stage.affine[1].cpu()[:, None, None]
    x.requires_grad_()
    identity = BatchNorm(None, None, torch.zeros(4).double(), torch.ones(4).double(), training=False, eps=0.0)
    (g,) = torch.autograd.grad(hcl_bn_reference(x, stage.teacher.cpu(), identity, LEVELS), x)
    _, _, _, (sums,) = forward([stage])
    expected = torch.stack([g.sum(dim=(2, 3)), (g * normalised).sum(dim=(2, 3))], dim=1)
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-10, atol=1e-13)


@layouts
def test_nothing_uninitialised_is_read_and_inputs_are_left_alone(layout, small_plans):
    stage = Stage((1, 3, 3, 5), F32, layout, parts=3)
    statistics = [*stage.running, *stage.counters]
    before = [t.clone() for t in statistics]

    def run():
        loss, *kept = forward([stage])
        inputs = [loss, stage.u, stage.teacher, *stage.affine, *(k[0] for k in kept)]
        copies = [t.clone() for t in inputs]
        gradients = backward([stage], loss, kept)
        assert all(map(torch.equal, inputs, copies))
        found = [t.clone() for t in (*copies, *gradients, *statistics)]
        for t, old in zip(statistics, before, strict=True):
            t.copy_(old)
        return found

    expected = run()
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        found = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))


@layouts
def test_only_the_maps_are_read(layout):
    """Maps lie misaligned between NaN."""
    stage = Stage((2, 3, 3, 5), F32, layout, parts=2)
    for name in ("u", "teacher"):
        maps = getattr(stage, name)
        memory = torch.full((maps.numel() + 81,), math.nan, device=DEVICE)
        setattr(stage, name, torch.as_strided(memory, maps.shape, maps.stride(), 41).copy_(maps))
    check([stage])


@layouts
def test_nan_stays_in_its_channel(layout):
    for norm in (TRACKED, RUNNING):
        stage = Stage((2, 3, 3, 4), F32, layout, norm=norm)
        stage.u[0, 1, 2, 3] = math.nan
        loss, *kept = forward([stage])
        du, of_weight, of_bias = backward([stage], loss.new_ones(()), kept)
        assert loss.isnan() and of_weight[1].isnan() and of_bias[1].isnan()
        if norm == TRACKED:
            assert du[:, 1].isnan().all() and stage.running[0][1].isnan() and stage.running[1][1].isnan()
        else:
            assert du[0, 1].isnan().any() and du[1, 1].isfinite().all() and kept[1][0].isfinite().all()
        assert du[:, [0, 2]].isfinite().all() and of_weight[[0, 2]].isfinite().all()
        assert all(t[[0, 2]].isfinite().all() for t in stage.running)


@triton.jit
def far_planes_kernel(out, begin, end, last_channel, sizes, TILE: tl.constexpr):
    channel = last_channel + tl.arange(0, 1)
    offsets, inside = _hcl_bn_statistics.in_planes(begin, end, channel, sizes, TILE)
    tl.store(out + tl.arange(0, TILE[2])[None, :], tl.where(inside, offsets, -1))


@triton.jit
def far_pixels_kernel(out, begin, end, last_channel, sizes, TILE: tl.constexpr):
    channel = last_channel + tl.arange(0, 1)
    offsets, inside = _hcl_bn_statistics.in_pixels(begin, end, channel, sizes, TILE)
    tl.store(out + tl.arange(0, TILE[1])[:, None], tl.where(inside, offsets, -1))


@pytest.mark.parametrize("shape", [(64, 512, 512, 512), (2, 3, 2**16, 2**15 - 1)], ids=str)
def test_offsets_go_beyond_32_bits(shape):
    """The last values of maps of 2^33 elements, and of planes of nearly 2^31 pixels, without the maps."""
    batch, channels, height, width = shape
    pixels, values = height * width, batch * height * width
    arguments = values - 8, values, channels - 1, (batch, channels, pixels)
    last = math.prod(shape) - 1
    out = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    far_planes_kernel[(1,)](out, *arguments, TILE=(8, 1, 16, pixels + 16 >= 2**31))
    assert out.tolist() == [*range(last - 7, last + 1), *[-1] * 8]
    far_pixels_kernel[(1,)](out, *arguments, TILE=(1, 16, 1))
    assert out.tolist() == [*range(last - 7 * channels, last + 1, channels), *[-1] * 8]


def test_a_tile_of_planes_goes_on_in_the_next_sample():
    out = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    far_planes_kernel[(1,)](out, 4, 18, 1, (3, 2, 6), TILE=(2, 1, 16, False))
    values = torch.arange(36).view(3, 2, 6)[:, 1].flatten()[4:18]
    assert out.tolist() == [*values.tolist(), -1, -1]


@layouts
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_plans_keep_the_promises_the_kernels_rely_on(dtype, batch, layout):
    shapes = [(batch, 64, 128, 256), (batch, 320, 32, 64), (batch, 512, 16, 32), (batch, 63, 127, 255)]
    parts = [16 * batch // 2, 4, 1, 7]
    maps = [torch.empty(s, dtype=dtype, device="meta").to(memory_format=LAYOUTS[layout]) for s in shapes]
    (launch,) = _hcl_bn_plan.check_reduce(maps, parts)
    programs = [end - begin for begin, end in itertools.pairwise([0, *launch.ends])]
    for shape, count, (_, length), tile, own in zip(shapes, parts, launch.cuts, launch.tiles, programs, strict=True):
        values, channels = math.prod(shape) // shape[1], shape[1]
        vector, *lengths = tile[:3]
        row, block = (channels, tile[2]) if layout == "channels_last" else (values // batch, tile[1])
        assert row % vector == 0 and lengths[-1] % vector == 0 and vector * dtype.itemsize <= 16
        assert length % vector == 0 and length * count >= values
        assert all(size & (size - 1) == 0 for size in lengths)
        assert math.prod(lengths) * dtype.itemsize <= _hcl_bn_plan.TILE_BYTES
        assert own == count * math.ceil(channels / block)
    assert programs[0] >= 4 * parts[0], "few programs with long rows of channels each"


def test_calls_with_other_values_share_a_plan():
    first, second = Stage(), Stage()
    assert _hcl_bn_plan.check_reduce([first.u], [2])[0] is _hcl_bn_plan.check_reduce([second.u], [2])[0]
    assert _hcl_bn_plan.check_reduce([first.u], [3])[0] is not _hcl_bn_plan.check_reduce([second.u], [2])[0]


U = torch.zeros(1, 2, 6, 6)


@pytest.mark.parametrize(
    "us, parts, message",
    [
        ([], [], "at least one map, got 0 maps"),
        ([U], [1, 1], "got 1 maps and 2 numbers of parts"),
        ([U], [0], "expected parts > 0, got 0"),
        ([U[0]], [1], r"expected u \[B, C, H, W\]"),
        ([U[:0]], [1], "at least one element"),
        ([U[:, :, ::2]], [1], "expected a contiguous or channels-last map.*call .contiguous"),
        ([U.int()], [1], "maps, got torch.int32"),
        ([U, U.double()], [1, 1], "float64 does not mix"),
        ([U, U.to("meta")], [1, 1], "all maps on one device"),
    ],
)
def test_maps_without_moments_are_refused(us, parts, message):
    with pytest.raises(RuntimeError, match=f"hcl_bn: .*{message}"):
        kernels.hcl_bn_reduce(us, parts)


ONES = torch.ones(2)
ARGUMENTS = {
    "us": [U],
    "teachers": [U],
    "moments": [torch.zeros(1, 3, 2, dtype=F64)],
    "affine": [ONES, ONES],
    "running": [ONES, ONES],
    "batches": [torch.tensor(0)],
    "norms": [TRACKED],
    "momenta": [0.1],
    "eps": [1e-5],
    "weights": [1.0],
    "level_weights": LEVELS,
}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("teachers", [], "got 1 us, 0 teachers and 1 weights"),
        ("teachers", [U[:, :, 1:].contiguous()], "differ in dimension 2"),
        ("teachers", [U.contiguous(memory_format=torch.channels_last)], "both maps contiguous or both channels-last"),
        ("teachers", [U.double()], "float64 does not mix"),
        ("level_weights", LEVELS[:2], "expected 3 level weights"),
        ("moments", [], "expected 1 moments, one tensor per stage, got 0"),
        ("moments", [torch.zeros(1, 2, 2, dtype=F64)], r"moments of stage 1 .*shape \[1, 3, 2\]"),
        ("moments", [torch.zeros(1, 3, 2)], "moments of stage 1 .*float64"),
        ("moments", [torch.zeros(0, 3, 2, dtype=F64)], "moments with at least one row"),
        ("affine", [ONES], "expected 2 affine parameters"),
        ("affine", [ONES, torch.ones(3)], "bias of stage 1 contiguous, floating, with 2 elements"),
        ("affine", [ONES.int(), ONES], "weight of stage 1 contiguous, floating"),
        ("running", [ONES], "expected 2 running statistics"),
        ("running", [ONES, torch.ones(2, 2)[:, 0]], "running variance of stage 1 contiguous"),
        ("batches", [], "expected 1 counters"),
        ("batches", [torch.zeros(())], "counter of stage 1 as one int64"),
        ("norms", [0], "kind of normalisation of 1 to 3, got 0"),
        ("norms", [], "expected 1 kinds of normalisation"),
        ("momenta", [], "expected 1 momenta"),
        ("eps", [], "expected 1 eps"),
    ],
)
def test_arguments_of_the_forward_that_do_not_fit_are_refused(name, value, message):
    with pytest.raises(RuntimeError, match=f"hcl_bn: .*({message})"):
        kernels.hcl_bn_fwd(**ARGUMENTS | {name: value})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("grad", torch.zeros((), dtype=F64), "hcl_bn_bwd: expected a scalar grad of torch.float32"),
        ("tables", [], "hcl_bn_bwd: expected one table per stage"),
        ("tables", [torch.zeros(1, 1, 2)], "hcl_bn_bwd: expected the tables that hcl_bn_fwd made"),
        ("states", [torch.zeros(2, 3, dtype=F64)], r"state of stage 1 .*shape \[2, 2\]"),
        ("sums", [torch.zeros(2, 2, 2, dtype=F64)], r"sums of stage 1 .*shape \[1, 2, 2\]"),
        ("means", [torch.zeros(2, 2)], "means of stage 1 contiguous, float64"),
        ("means", [torch.zeros(2, 2, dtype=F64)] * 2, "expected 1 means"),
        ("wanted", [True], "expected 3 flags of wanted gradients"),
        ("affine", [None, ONES], "hcl_bn_bwd: the weight of stage 1 is None and has no gradient"),
    ],
)
def test_arguments_of_the_backward_that_do_not_fit_are_refused(name, value, message):
    names = ("us", "teachers", "affine", "norms", "weights", "level_weights")
    cells = (len(_hcl_plan.borders(6, 4)) - 1) ** 2
    state = torch.zeros(2, 2, dtype=F64)
    arguments = {key: ARGUMENTS[key] for key in names} | {"grad": torch.zeros(()), "tables": [torch.zeros(1, cells, 2)]}
    arguments |= {"states": [state], "sums": [state[None]], "means": [], "wanted": [True] * 3}
    with pytest.raises(RuntimeError, match=message):
        kernels.hcl_bn_bwd(**arguments | {name: value})
