"""What is particular to csf's Triton kernels: parts, windows, tiles, the program between the passes, far offsets.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small maps.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from kernels_here import device_of

from transkd_fast import backends
from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.csf import csf as csf_reference

if backends.why_not("csf", "triton") is not None:
    pytest.skip(backends.why_not("csf", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _csf_plan, _csf_tiles
from transkd_fast.kernels import csf as kernels

DEVICE = device_of("triton")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KERNELS = ("reduce", "attention", "fuse", "backward_reduce", "attention_backward", "backward")
CACHES = (_csf_plan._plan, _csf_plan._flat_tiles, _csf_plan.attention_tiles)
# Of z and y: neighbouring stages, the same with odd sizes, any ratios, one coarse pixel, more coarse pixels than fine.
SIZES = [((6, 8), (3, 4)), ((5, 7), (3, 4)), ((7, 9), (3, 2)), ((4, 11), (1, 1)), ((3, 4), (5, 9))]
sizes = pytest.mark.parametrize("hw, coarse_hw", SIZES, ids=str)
NO_STATISTICS = [None] * 6


@pytest.fixture
def small_tiles(monkeypatch):
    """Plans that cut even small maps into many programs and steps, as large maps are cut on a GPU."""
    small = {"THREADS": 16, "SUM_LOADS": 1, "MAP_LOADS": 1, "NARROW_COLUMNS": 2, "NARROW_CHANNELS": 2}
    small |= {"WIDE_CHANNELS": 2, "WIDE_WINDOWS": 2}
    small |= {"ATTENTION_ELEMENTS": 16, "ATTENTION_CHANNELS": 2, "ATTENTION_PARTS": 2}
    for name, value in small.items():
        monkeypatch.setattr(_csf_plan, name, value)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


class Case:
    """One call: maps, upstream gradient, parameters and statistics."""

    def __init__(self, batch=2, mid=3, squeezed=4, hw=(6, 8), coarse_hw=(3, 4), dtype=F64, layout="nchw", **settings):
        def random(*shape):
            return torch.randn(shape, dtype=F64).to(DEVICE)

        def maps(height, width, offset=0.0):
            values = (random(batch, mid, height, width) + offset).to(dtype)
            return values.contiguous(memory_format=LAYOUTS[layout])

        self.norm, self.fc_norm = settings.pop("norm", 3), settings.pop("fc_norm", 3)
        self.momentum, self.affine = settings.pop("momentum", 0.1), settings.pop("affine", True)
        self.parts = settings.pop("parts", 1)
        self.z, self.y = maps(*hw, settings.pop("offset", 0.0)), maps(*coarse_hw)
        assert not settings, settings
        self.grad = maps(*hw)
        bn, fc_bn = ([random(n), random(n)] if self.affine else [None, None] for n in (mid, squeezed))
        if self.fc_norm == 0:
            fc_bn = [None, None]
        heads = [random(mid, squeezed), random(mid), random(mid, squeezed), random(mid)]
        self.parameters = [*bn, random(squeezed, mid), *fc_bn, *heads]
        self.statistics = []
        for channels in (mid, squeezed):
            counter = torch.tensor(4, device=DEVICE)
            self.statistics += [random(channels), random(channels).abs() + 0.5, counter]

    @property
    def settings(self):
        return self.norm, self.momentum, 1e-5, self.fc_norm, self.momentum, 1e-5

    def fused(self, sums=None, first=0, parameters=None):
        sums = kernels.csf_reduce(self.z, self.y, self.parts) if sums is None else sums
        return kernels.csf_fuse(
            self.z, self.y, sums, first, parameters or self.parameters, *self.statistics, *self.settings
        )

    def gradients(self, state, sums=None, first=0, wanted=None):
        sums = self.gradient_sums(state) if sums is None else sums
        wanted = wanted or [True, True, *(p is not None for p in self.parameters)]
        maps = self.grad, self.z, self.y
        return kernels.csf_bwd_apply(*maps, sums, state, first, self.parameters, self.norm, self.fc_norm, wanted)

    def gradient_sums(self, state):
        return kernels.csf_bwd_reduce(self.grad, self.z, self.y, state, self.parts)

    def truth(self):
        """v, all gradients and the new statistics, by the reference in float64."""
        inputs = [None if t is None else t.double().cpu().contiguous() for t in (self.z, self.y, *self.parameters)]
        inputs = [None if t is None else t.clone().requires_grad_() for t in inputs]
        z, y, weight, bias, fc, fc_weight, fc_bias, *heads = inputs
        statistics = [t.cpu().clone() for t in self.statistics]

        def batch_norm(weight, bias, kind, statistics):
            tracked = [None] * 3 if kind == 2 else statistics
            return BatchNorm(weight, bias, *tracked, kind != 1, self.momentum) if kind else None

        bn = batch_norm(weight, bias, self.norm, statistics[:3])
        fc_bn = batch_norm(fc_weight, fc_bias, self.fc_norm, statistics[3:])
        v = csf_reference(z, y, bn, fc, fc_bn, (tuple(heads[:2]), tuple(heads[2:])))
        gradients = torch.autograd.grad(v, [t for t in inputs if t is not None], self.grad.double().cpu())
        return v.detach(), gradients, statistics

    def check(self, tolerance=1e-10):
        true_v, true_gradients, true_statistics = self.truth()
        v, state = self.fused()
        assert relative(v, true_v) < tolerance
        for gradient, true in zip(self.gradients(state), true_gradients, strict=True):
            assert relative(gradient, true) < tolerance
        for statistic, true in zip(self.statistics, true_statistics, strict=True):
            assert relative(statistic, true) < tolerance


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


def sources(fine, coarse):
    """Which coarse index each fine one reads, asked of torch, which for float64 takes another rule now and then."""
    indices = torch.arange(coarse, dtype=F32)[None, None]
    return F.interpolate(indices, size=fine, mode="nearest")[0, 0].long()


def of_parts(plane_values, parts):
    """Each part's values, of maps [B, M, H, W]."""
    flat = plane_values.flatten(2)
    length = math.ceil(math.ceil(flat.shape[2] / parts) / 64) * 64
    return [flat[:, :, p * length : (p + 1) * length] for p in range(parts)]


def window_pixels(hw, coarse_hw):
    rows, columns = (torch.bincount(sources(f, c), minlength=c) for f, c in zip(hw, coarse_hw, strict=True))
    return rows[:, None] * columns[None, :]


PARTS_OF = [((12, 16), (6, 8), 2), ((11, 13), (6, 7), 3), ((14, 9), (5, 2), 2), ((9, 8), (1, 1), 5)]


@layouts
@pytest.mark.parametrize("hw, coarse_hw, parts", PARTS_OF, ids=str)
@pytest.mark.parametrize("dtype, offset", [(F64, 0.0), (F32, 1000.0)], ids=str)
def test_sums_of_each_part(hw, coarse_hw, parts, dtype, offset, layout, small_tiles):
    case = Case(batch=1, hw=hw, coarse_hw=coarse_hw, dtype=dtype, layout=layout, offset=offset)
    sums = kernels.csf_reduce(case.z, case.y, parts).cpu()
    assert sums.shape == (1, parts, 3, 3) and sums.dtype == F64
    tolerance = {F64: 1e-13, F32: 2e-6}[dtype]
    weighted = case.y.double().cpu() * window_pixels(hw, coarse_hw)
    for p, (z, y) in enumerate(zip(of_parts(case.z.double().cpu(), parts), of_parts(weighted, parts), strict=True)):
        mean, squares, of_y = sums[:, p].unbind(1)
        if z.shape[2]:
            # The spread of z is 1, so that an error of the mean counts as it is.
            assert (mean - z.mean(2)).abs().max() < tolerance / math.sqrt(z.shape[2])
            assert relative(squares, ((z - z.mean(2, keepdim=True)) ** 2).sum(2)) < tolerance
        else:
            assert not mean.any() and not squares.any()
        assert (of_y - y.sum(2)).abs().max() < tolerance * weighted.abs().max()


@layouts
@pytest.mark.parametrize("hw, coarse_hw, parts", PARTS_OF, ids=str)
def test_gradient_sums_of_each_part(hw, coarse_hw, parts, layout, small_tiles):
    case = Case(batch=1, hw=hw, coarse_hw=coarse_hw, layout=layout, offset=50.0, parts=parts)
    g, z, y = (m.cpu() for m in (case.grad, case.z, case.y))
    sums = case.gradient_sums(z.mean((0, 2, 3)).repeat(2).to(DEVICE)).cpu()
    up = F.interpolate(y, size=hw, mode="nearest")
    terms = (g, g * (z - z.mean((0, 2, 3), keepdim=True)), g * up)
    expected = torch.stack([torch.stack([part.sum(2) for part in of_parts(t, parts)], 1) for t in terms], 2)
    assert relative(sums, expected) < 1e-13


@triton.jit
def starts_kernel(out, scale, coarse, fine, RULE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, _csf_tiles.start(lane, scale, coarse, fine, RULE), mask=lane <= coarse)


def test_windows_are_those_of_nearest_interpolation():
    pairs = [(fine, coarse) for fine in range(1, 24) for coarse in range(1, 24, 3)]
    pairs += [(2999, 1000), (4189, 2095), (4190, 2095), (2**20 + 7, 1021), (3 * 2**20, 1023), (2**24 + 5, 100)]
    for fine, coarse in pairs:
        rule = 0 if _csf_plan.doubled(fine, coarse) else _csf_plan.search_steps(fine)
        out = torch.full((coarse + 1,), -1, dtype=torch.int32, device=DEVICE)
        block = triton.next_power_of_2(coarse + 1)
        starts_kernel[(1,)](out, _csf_plan.scale_of(fine, coarse), coarse, fine, RULE=rule, BLOCK=block)
        expected = torch.searchsorted(sources(fine, coarse), torch.arange(coarse + 1))
        assert torch.equal(out.cpu().long(), expected), (fine, coarse)


def test_sources_are_halves_only_where_the_plan_says_so():
    """In float32 the rule fails for 2 n - 1 pixels from n = 2095 on."""
    for coarse in (1, 2, 3, 64, 500, 1023, _csf_plan.LARGEST_EXACT_ODD):
        for fine in (2 * coarse - 1, 2 * coarse):
            assert _csf_plan.doubled(fine, coarse)
            assert torch.equal(sources(fine, coarse), torch.arange(fine) // 2)
    assert not torch.equal(sources(4189, 2095), torch.arange(4189) // 2)
    for fine, coarse in ((4189, 2095), (5, 2), (4, 4), (7, 3), (3, 5)):
        assert not _csf_plan.doubled(fine, coarse)


@sizes
@layouts
def test_several_programs_per_plane_and_steps_per_program(hw, coarse_hw, layout, small_tiles):
    case = Case(batch=3, mid=3, squeezed=3, hw=hw, coarse_hw=coarse_hw, layout=layout)
    plan = _csf_plan.plan_of(case.z, case.y)
    assert plan.flat_programs > 3 and plan.window_programs >= (3 if coarse_hw == (1, 1) else 6)
    held, of_sums, _, of_layer, _, of_heads, _ = _csf_plan.attention_tiles(3, 3, 3, 1)
    assert held >= 3 and of_sums < 3 and of_layer < 3 and of_heads < 3
    case.check()


def test_random_sizes_ratios_and_settings(small_tiles):
    generator = random.Random(0)
    for _ in range(5):
        hw = generator.randint(1, 8), generator.randint(2, 9)
        coarse_hw = generator.choice(
            [tuple(-(-n // 2) for n in hw), (generator.randint(1, 6), generator.randint(1, 9))]
        )
        Case(
            batch=generator.randint(3, 4),
            mid=generator.randint(1, 4),
            squeezed=generator.randint(1, 4),
            hw=hw,
            coarse_hw=coarse_hw,
            layout=generator.choice(list(LAYOUTS)),
            norm=generator.choice([1, 2, 3]),
            fc_norm=generator.choice([0, 1, 2, 3]),
            momentum=generator.choice([0.1, None]),
            affine=generator.random() < 0.7,
        ).check()


def test_state_holds_what_the_backward_needs():
    case = Case(batch=3, mid=4, squeezed=5, hw=(16, 12), coarse_hw=(8, 6), parts=2)
    z, y = case.z.cpu(), case.y.cpu()
    weight, bias, fc, _, _, *heads = (p.cpu() for p in case.parameters)
    gamma, beta = (p.cpu() for p in case.parameters[3:5])
    _, state = case.fused()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    centre = z.mean((2, 3)) - mean
    pooled = weight / (var + 1e-5).sqrt() * centre + bias + F.interpolate(y, size=(16, 12)).mean((2, 3))
    s = pooled @ fc.T
    fc_invstd = 1 / (s.var(0, correction=0) + 1e-5).sqrt()
    squeezed = (s - s.mean(0)) * fc_invstd
    r = (gamma * squeezed + beta).relu()
    logit = r @ (heads[0] - heads[2]).T + heads[1] - heads[3]
    expected = [mean, 1 / (var + 1e-5).sqrt(), fc_invstd, logit, pooled, centre, squeezed]
    sections = state.cpu().split([t.numel() for t in expected])
    assert state.dtype == F64 and len(sections) == len(expected)
    for section, true in zip(sections, expected, strict=True):
        assert relative(section.view_as(true), true) < 1e-12


@layouts
def test_shares_of_two_processes_make_up_the_whole(layout):
    """Each process has a part of the batch, all sums, and gives its own maps and its share of the gradients."""
    whole = Case(batch=3, hw=(8, 10), coarse_hw=(4, 5), layout=layout, parts=2)
    true_v, (true_dz, true_dy, *true_shares), true_statistics = whole.truth()
    before = [t.clone() for t in whole.statistics]
    sums = kernels.csf_reduce(whole.z, whole.y, 2)
    states, outs, own_cases = [], [], []
    for own in (slice(0, 1), slice(1, 3)):
        case = Case(batch=1, hw=(8, 10), coarse_hw=(4, 5), layout=layout, parts=2)
        case.z, case.y, case.grad = (m[own] for m in (whole.z, whole.y, whole.grad))
        case.parameters, case.statistics = whole.parameters, [t.clone() for t in before]
        v, state = case.fused(sums, own.start)
        assert all(relative(t, true) < 1e-12 for t, true in zip(case.statistics, true_statistics, strict=True))
        states.append(state)
        outs.append(v)
        own_cases.append((case, own.start))
    assert torch.equal(states[0], states[1]) and relative(torch.cat(outs), true_v) < 1e-12
    grad_sums = torch.cat([case.gradient_sums(state) for (case, _), state in zip(own_cases, states, strict=True)])
    ours = [case.gradients(states[0], grad_sums, first) for case, first in own_cases]
    assert relative(torch.cat([g[0] for g in ours]), true_dz) < 1e-10
    assert relative(torch.cat([g[1] for g in ours]), true_dy) < 1e-10
    for one, other, true in zip(ours[0][2:], ours[1][2:], true_shares, strict=True):
        assert relative(one + other, true) < 1e-10


@pytest.mark.parametrize("norm, fc_norm", [(1, 1), (2, 2), (3, 0)])
def test_settings_without_affine_parameters(norm, fc_norm):
    Case(batch=3, norm=norm, fc_norm=fc_norm, affine=False).check()


def test_parameters_and_statistics_of_any_dtype_are_read_and_written_as_they_are():
    case = Case(batch=4, dtype=F32)
    dtypes = [BF16, F16, F32, F16, BF16, BF16, F32, F16, F64]
    case.parameters = [p.to(dtype) for p, dtype in zip(case.parameters, dtypes, strict=True)]
    kinds = [BF16, F32, torch.int64, F16, BF16, torch.int64]
    case.statistics = [t.to(dtype) for t, dtype in zip(case.statistics, kinds, strict=True)]
    true_v, true_gradients, true_statistics = case.truth()
    v, state = case.fused()
    for statistic, true, dtype in zip(case.statistics, true_statistics, kinds, strict=True):
        assert statistic.dtype == dtype and relative(statistic, true.double()) < 2**-7
    assert v.dtype == F32 and relative(v, true_v) < 2e-6
    gradients = case.gradients(state)
    # The interpreter cuts bfloat16 off where the compiled kernel rounds.
    tolerance = {BF16: 2**-7, F16: 2**-10, F32: 2e-6, F64: 2e-6}
    for gradient, true, dtype in zip(gradients, true_gradients, [F32, F32, *dtypes], strict=True):
        assert gradient.dtype == dtype and relative(gradient, true) < tolerance[dtype]


def counted(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(kernels, f"{name}_kernel", Counted(name, getattr(kernels, f"{name}_kernel")))
    return launches


def test_launches(monkeypatch):
    case = Case()
    launches = counted(monkeypatch)
    _, state = case.fused()
    sums = case.gradient_sums(state)
    case.gradients(state, sums)
    assert launches == list(KERNELS)
    launches.clear()
    assert len(case.gradients(state, sums, wanted=[False, False, *[True] * 9])) == 9
    assert launches == ["attention_backward"]


def test_what_is_not_wanted_changes_nothing_else():
    case = Case()
    _, state = case.fused()
    sums = case.gradient_sums(state)
    everything = case.gradients(state, sums)
    choices = [[k == chosen for k in range(11)] for chosen in range(11)]
    for wanted in [*choices, [k % 2 == 0 for k in range(11)]]:
        expected = [g for g, want in zip(everything, wanted, strict=True) if want]
        for gradient, true in zip(case.gradients(state, sums, wanted=wanted), expected, strict=True):
            assert torch.equal(gradient, true)


@layouts
def test_running_statistics_leave_z_unread_in_the_backward(layout):
    case = Case(norm=1, layout=layout)
    _, state = case.fused()
    sums = case.gradient_sums(state)
    expected = case.gradients(state, sums)
    case.z = torch.full_like(case.z, math.nan)
    assert all(torch.equal(g, true) for g, true in zip(case.gradients(state, sums), expected, strict=True))


@layouts
def test_a_large_mean_costs_no_digits(layout):
    case = Case(batch=3, hw=(16, 24), coarse_hw=(8, 12), dtype=F32, layout=layout, offset=1000.0)
    true_v, true_gradients, _ = case.truth()
    v, state = case.fused()
    assert relative(v, true_v) < 5e-7
    for gradient, true in zip(case.gradients(state), true_gradients, strict=True):
        assert relative(gradient, true) < 2e-6


@sizes
@layouts
@pytest.mark.parametrize("where", ["z", "y"])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
def test_nan_and_inf_come_out_where_they_do_in_eager(where, hw, coarse_hw, layout):
    case = Case(hw=hw, coarse_hw=coarse_hw, layout=layout, norm=1, fc_norm=1)
    bad = math.nan if hw[0] % 2 else math.inf
    getattr(case, where)[0, 1, -1, -1] = bad
    true_v, (true_dz, true_dy, *_), _ = case.truth()
    v, state = case.fused()
    dz, dy, *_ = case.gradients(state)
    for value, true in ((v, true_v), (dz, true_dz), (dy, true_dy)):
        assert torch.equal(value.cpu().isfinite(), true.isfinite())


@sizes
@layouts
def test_only_the_maps_are_read_and_only_gradients_and_v_are_written(hw, coarse_hw, layout, monkeypatch):
    """Maps and outputs lie misaligned between guards: NaN to be read, a mark to be overwritten."""
    guard, mark = 40, -7.0
    memories = []

    def between_guards(of, fill):
        memory = torch.full((of.numel() + 2 * guard + 1,), fill, dtype=of.dtype, device=DEVICE)
        return memory, torch.as_strided(memory, of.shape, of.stride(), guard + 1)

    def guarded_empty_like(of):
        memories.append((*between_guards(of, mark), of.numel()))
        return memories[-1][1]

    case = Case(batch=3, hw=hw, coarse_hw=coarse_hw, layout=layout)
    for name in ("z", "y", "grad"):
        m = getattr(case, name)
        setattr(case, name, between_guards(m, math.nan)[1].copy_(m))
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty_like", guarded_empty_like)
        _, state = case.fused()
        case.gradients(state)
    assert len(memories) == 1 + 11
    for memory, _, count in memories:
        assert (torch.cat([memory[: guard + 1], memory[guard + 1 + count :]]) == mark).all()
        assert not memory[guard + 1 : guard + 1 + count].isnan().any()
    for name in ("z", "y", "grad"):
        setattr(case, name, getattr(case, name).clone())
    case.check()


@layouts
def test_nothing_uninitialised_is_read_and_results_repeat(layout, small_tiles):
    case = Case(batch=3, hw=(5, 9), coarse_hw=(3, 4), layout=layout, parts=2)
    before = [t.clone() for t in case.statistics]

    def run():
        for statistic, old in zip(case.statistics, before, strict=True):
            statistic.copy_(old)
        v, state = case.fused()
        return [v, state, *case.gradients(state), *(t.clone() for t in case.statistics)]

    expected = run()
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_inputs_are_left_alone():
    case = Case()
    inputs = [case.z, case.y, case.grad, *case.parameters]
    copies = [t.clone() for t in inputs]
    _, state = case.fused()
    sums = case.gradient_sums(state)
    inputs, copies = [*inputs, state, sums], [*copies, state.clone(), sums.clone()]
    case.gradients(state, sums)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_statistics_that_are_not_tracked_are_left_alone():
    case = Case(norm=2, fc_norm=1)
    before = [t.clone() for t in case.statistics]
    case.fused()
    assert all(torch.equal(a, b) for a, b in zip(case.statistics, before, strict=True))


@triton.jit
def far_kernel(out, sample, channel, row, column, sizes, LAST: tl.constexpr):
    channels, height, width = sizes
    lane = tl.arange(0, 2)
    sample = sample.to(tl.int64)
    at, _ = _csf_tiles.offsets_at(sample, channel + lane, row + lane, column + lane, channels, height, width, 8, LAST)
    flat = _csf_tiles.flat_offsets(
        sample, channel + lane, (row + lane) * width + column + lane, channels, height * width, LAST, 8
    )
    place = lane[:, None] * 2 + lane[None, :]
    tl.store(out + place, at)
    tl.store(out + 4 + place, flat)


@pytest.mark.parametrize("last", [0, 1])
def test_offsets_go_beyond_32_bits(last):
    """The last pixels of a map of 2^33 elements, without the map."""
    sizes = (512, 512, 512)
    out = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    far_kernel[(1,)](out, 63, 510, 510, 510, sizes, LAST=last)
    assert out[3].item() == out[7].item() == 2**33 - 1


# Stages 1 to 3 at 512 x 1024, the same with odd sizes, and what no network has.
SHAPES = [
    ((8, 64, 128, 256), (64, 128)),
    ((2, 64, 64, 128), (32, 64)),
    ((2, 64, 32, 64), (16, 32)),
    ((2, 64, 127, 255), (64, 128)),
    ((2, 63, 90, 120), (23, 31)),
    ((1, 1, 1, 1), (1, 1)),
    ((1, 3, 7, 2**20 + 1), (3, 1)),
    ((1, 2**16 + 1, 2, 3), (1, 2)),
    ((2**12, 3, 5, 5), (7, 9)),
]
DTYPES = [(BF16, BF16), (F32, F32), (BF16, F32), (F32, F16), (F64, F64)]


@pytest.mark.parametrize("shape, coarse_hw", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, coarse_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_plans_keep_the_promises_the_kernels_rely_on(shape, coarse_hw, dtype, coarse_dtype, last):
    plan = _csf_plan._plan(shape, (*shape[:2], *coarse_hw), dtype, coarse_dtype, last)
    (_, channels, height, width), (coarse_height, coarse_width) = shape, coarse_hw
    for parts in (1, 8):
        for loads in (_csf_plan.SUM_LOADS, _csf_plan.MAP_LOADS):
            (_, vector, block, taken, kept), (_, coarse_vector, coarse_block, coarse_taken, coarse_kept, _) = plan.flat(
                parts, loads
            )
            assert block == coarse_block and taken % kept == coarse_taken % coarse_kept == 0
            assert (channels if last else height * width) % vector == 0
            assert (channels if last else coarse_height * coarse_width) % coarse_vector == 0
            for length in (block, taken, kept, coarse_taken, coarse_kept):
                assert length > 0 and length & (length - 1) == 0
            assert max(taken, coarse_taken) * block * dtype.itemsize <= loads * 16 * _csf_plan.THREADS * 2
    _, vector, coarse_vector, block, rows, columns, wide, rule = plan.windows
    assert (channels if last else width) % vector == 0 and (channels if last else coarse_width) % coarse_vector == 0
    for length in (block, rows, columns, wide):
        assert length > 0 and length & (length - 1) == 0
    assert block * rows * columns * wide * dtype.itemsize <= 16 * _csf_plan.THREADS
    assert (rule == 0) == all(f in (2 * c - 1, 2 * c) for f, c in ((height, coarse_height), (width, coarse_width)))
    assert rule or wide == (1 if last else 2)
    assert plan.window_programs < 2**31 and plan.flat_programs < 2**31
    assert sum(plan.cut(8)[1:]) % 64 == 0 and 8 * plan.cut(8)[1] >= plan.pixels


@pytest.mark.parametrize("shape, coarse_hw", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("last", [False, True])
def test_real_stages_fill_a_gpu_with_whole_vectors(shape, coarse_hw, dtype, last):
    plan = _csf_plan._plan(shape, (*shape[:2], *coarse_hw), dtype, dtype, last)
    _, vector, *tile, wide, _ = plan.windows
    assert vector * dtype.itemsize == 16 and plan.flat(1, 4)[0][1] == vector
    # One 16-byte load of a map per thread and row of windows, so that y's entries are where they are needed.
    assert math.prod(tile[1:]) * wide == 16 // dtype.itemsize * _csf_plan.THREADS
    assert plan.window_programs >= 64
    assert plan.flat(1, 4)[1][5] == 4


def test_calls_with_other_values_share_a_plan():
    first, second = Case(), Case()
    assert _csf_plan.plan_of(first.z, first.y) is _csf_plan.plan_of(second.z, second.y)


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 100, 5000])
@pytest.mark.parametrize("channels, squeezed, parts", [(64, 32, 8), (1, 1, 1), (513, 7, 128)])
def test_tiles_between_the_passes_hold_all_samples_and_are_bounded(samples, channels, squeezed, parts):
    held, of_sums, of_parts, of_layer, inner, of_heads, inner_heads = tiles = _csf_plan.attention_tiles(
        samples, channels, squeezed, parts
    )
    assert held >= samples and all(t & (t - 1) == 0 and t > 0 for t in tiles)
    limit = max(_csf_plan.ATTENTION_ELEMENTS, held)
    assert max(held * of_sums, held * of_layer * inner, held * of_heads * inner_heads) <= limit
    assert of_parts <= _csf_plan.ATTENTION_PARTS


Z, Y = torch.zeros(2, 2, 6, 6), torch.zeros(2, 2, 3, 3)


@pytest.mark.parametrize(
    "z, y, message",
    [
        (Z, Y[:1], r"expected z \[B, M, H, W\] and y \[B, M, h, w\], got \[2, 2, 6, 6\] and \[1, 2, 3, 3\]"),
        (Z[0], Y, r"expected z \[B, M, H, W\]"),
        (Z[:0], Y[:0], "expected maps that are not empty"),
        (Z, Y.double(), "float64 does not mix with other dtypes, got z of torch.float32 and y of torch.float64"),
        (Z.int(), Y.int(), "expected float32, float64, bfloat16 or float16 maps, got torch.int32"),
        (Z[..., ::2], Y, "expected a contiguous or channels-last map.*call .contiguous"),
        (Z, Y.contiguous(memory_format=torch.channels_last), r"expected y \[B, M, h, w\] in z's layout"),
        (Z, Y.to("meta"), "expected y on z's device cpu, got meta"),
    ],
)
def test_maps_that_do_not_fit_are_refused(z, y, message):
    with pytest.raises(RuntimeError, match=f"csf: {message}"):
        kernels.csf_reduce(z, y, 1)


def test_planes_too_large_for_32_bits_are_refused():
    z = torch.empty((1, 1, 2**15, 2**15 + 1), device="meta")
    with pytest.raises(RuntimeError, match=r"expected at most 1073741824 pixels per sample and channel.*eager"):
        kernels.csf_reduce(z, z, 1)


def test_arguments_that_do_not_fit_are_refused():
    case = Case()
    sums = kernels.csf_reduce(case.z, case.y, 1)
    _, state = case.fused(sums)
    grad_sums = case.gradient_sums(state)

    def changed(k, value):
        return [value if i == k else p for i, p in enumerate(case.parameters)]

    def fuse(sums=sums, first=0, parameters=case.parameters, statistics=case.statistics, settings=case.settings):
        kernels.csf_fuse(case.z, case.y, sums, first, parameters, *statistics, *settings)

    def apply(grad=case.grad, sums=grad_sums, state=state, norm=3, wanted=(True,) * 11, parameters=case.parameters):
        kernels.csf_bwd_apply(grad, case.z, case.y, sums, state, 0, parameters, norm, 3, wanted)

    calls = [
        (lambda: kernels.csf_reduce(case.z, case.y, 0), "expected at least 1 part, got 0"),
        (lambda: fuse(sums.float()), r"expected contiguous float64 sums \[samples, parts, 3, 3\]"),
        (lambda: fuse(first=1), "expected sums of the samples from 1 on for a batch of 2, got those of 2 samples"),
        (lambda: fuse(parameters=case.parameters[:8]), "expected 9 parameters, got 8"),
        (lambda: fuse(parameters=changed(2, None)), r"expected the squeeze layer's weight \[L, M\], got None"),
        (lambda: fuse(parameters=changed(5, None)), r"expected heads\[0\] weight \[3, 4\], got None"),
        (lambda: fuse(parameters=changed(0, sums[0, 0, 0, :2])), r"expected weight contiguous, \[3\].*got shape \[2\]"),
        (lambda: fuse(statistics=NO_STATISTICS), "expected the batch norm's running_mean .3., got None"),
        (
            lambda: fuse(settings=(4, *case.settings[1:])),
            "expected the batch norm's kind of normalisation to be 1 to 3",
        ),
        (
            lambda: fuse(
                statistics=[*case.statistics[:2], None, *case.statistics[3:]], settings=(3, None, *case.settings[2:])
            ),
            "expected the batch norm's counter with momentum None",
        ),
        (lambda: fuse(statistics=[*case.statistics[:2], sums, *case.statistics[3:]]), "counter to be one int64"),
        (lambda: kernels.csf_bwd_reduce(case.grad.float(), case.z, case.y, state, 1), "expected grad like z"),
        (lambda: kernels.csf_bwd_reduce(case.grad, case.z, case.y, state[:4], 1), "expected the state that csf_fuse"),
        (lambda: apply(grad=case.grad[:1]), "expected grad like z"),
        (lambda: apply(state=state[:-1]), "expected the state that csf_fuse made, float64 of 36 entries"),
        (lambda: apply(norm=0), "kind of normalisation to be 1 to 3, got 0"),
        (lambda: apply(wanted=(True,) * 9), "expected 11 flags of wanted gradients, got 9"),
        (lambda: apply(parameters=changed(1, None)), "parameter 1 is None and has no gradient"),
    ]
    before = [t.clone() for t in case.statistics]
    for call, message in calls:
        with pytest.raises(RuntimeError, match=f"^csf: .*{message}|^csf: {message}"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(case.statistics, before, strict=True))
