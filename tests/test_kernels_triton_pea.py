"""What is particular to pea's Triton kernels: plans, programs and strips, workspaces, launches, far offsets, contracts.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small stages.
"""

import itertools
import math

import pytest
import torch
from kernels_here import device_of

from transkd_fast import backends
from transkd_fast.reference.pea import pea as pea_reference

if backends.why_not("pea", "triton") is not None:
    pytest.skip(backends.why_not("pea", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _pea_plan, _pea_tiles
from transkd_fast.kernels import pea as kernels

DEVICE = device_of("triton")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KERNELS = ("stage_kernel", "finish_kernel", "scale_kernel")
REAL = [(32768, 32, 64), (8192, 64, 128), (2048, 160, 320), (512, 256, 512)]
UPSTREAM = 0.37


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even small stages into many programs, as large ones are cut on a GPU."""
    small = _pea_plan.Limits(16, 16, 2 * 16 * 16, 16, 1)
    for name in ("ROOMY", "MAPS", "TIGHT", "SCALAR", "DOUBLE"):
        monkeypatch.setattr(_pea_plan, name, small)
    monkeypatch.setattr(_pea_plan, "PROGRAMS", 16)
    monkeypatch.setattr(_pea_plan, "MERGE_STRIPS", 2)
    monkeypatch.setattr(_pea_plan, "MERGE_ELEMENTS", 1024)
    monkeypatch.setattr(_pea_plan, "SCALE_BLOCK", 256)
    monkeypatch.setattr(kernels, "SUM_BLOCK", 2)
    _pea_plan._plan.cache_clear()
    yield
    _pea_plan._plan.cache_clear()


def tokens(batch, length, channels, dtype, is_map):
    t = torch.randn(batch, length, channels, dtype=F64).to(DEVICE, dtype)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if is_map else t


class Case:
    """Stages (batch, tokens, C_in, C_out), everything wanted."""

    def __init__(self, *stages, dtype=F64, maps=(False, False, False), assisted=True):
        small = F64 if dtype == F64 else F32
        self.stages, self.assisted = stages, assisted
        self.xs = [tokens(b, n, c_in, dtype, maps[0]) for b, n, c_in, _ in stages]
        self.weights = [torch.randn(o, c, dtype=F64).to(DEVICE, small) for _, _, c, o in stages]
        self.biases = [torch.randn(o, dtype=F64).to(DEVICE, small) for _, _, _, o in stages]
        self.targets = [tokens(b, n, o, dtype, maps[1]) for b, n, _, o in stages]
        self.assistants, self.projections, self.mixes = [], [], []
        if assisted:
            self.assistants = [tokens(b, n, o, dtype, maps[2]) for b, n, _, o in stages]
            self.projections, self.mixes = (
                [torch.randn(1, dtype=F64).to(DEVICE, small) for _ in stages] for _ in range(2)
            )
        self.stage_weights = [0.25 * (m + 1) for m in range(len(stages))]
        self.wanted = [*[True] * 4, *[assisted] * 3] * len(stages)

    @property
    def lists(self):
        return self.xs, self.weights, self.biases, self.targets, self.assistants, self.projections, self.mixes

    def forward(self, tf32=False):
        return kernels.pea_fwd(*self.lists, self.stage_weights, self.wanted, tf32)

    def codes(self):
        codes = []
        for m in range(len(self.stages)):
            dtypes = [of_kind[m].dtype if of_kind else None for of_kind in self.lists[:5]]
            dtypes.append(self.weights[m].dtype if self.assisted else None)
            codes += [-1 if dtype is None else _pea_plan.DTYPES.index(dtype) for dtype in dtypes]
        return codes

    def run(self):
        loss, factors, kept = self.forward()
        grad = torch.tensor(UPSTREAM, dtype=loss.dtype, device=DEVICE)
        return loss, factors, kept, kernels.pea_bwd(grad, factors, kept, self.codes())

    def plan(self):
        return _pea_plan.plan_of(*self.lists, self.stage_weights, self.wanted, False, 90)

    def truth(self):
        lists = [[t.detach().cpu().double().requires_grad_() for t in of_kind] for of_kind in self.lists]
        extra = lists[4:] if self.assisted else ()
        loss = pea_reference(*lists[:4], self.stage_weights, *extra)
        (loss * UPSTREAM).backward()
        gradients = []
        for m in range(len(self.stages)):
            gradients += [of_kind[m].grad for of_kind in lists[:5] if of_kind]
            if self.assisted:
                gradients.append(torch.cat([lists[5][m].grad, lists[6][m].grad]))
        return loss.detach(), gradients

    def check(self, tolerance=1e-13):
        loss, _, _, gradients = self.run()
        true_loss, true_gradients = self.truth()
        assert relative(loss, true_loss) < tolerance
        for gradient, true in zip(gradients, true_gradients, strict=True):
            assert relative(gradient, true) < tolerance


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


def described(stage, dtype=BF16, maps=(False, False), assisted=False, wanted=(True,) * 3, arch=90, tf32=False):
    batch, length, c_in, c_out = stage
    shapes = [(batch, length, c_in), (batch, length, c_out), *[(batch, length, c_out)] * assisted]
    activations = tuple(
        _pea_plan.Described(shape, dtype, is_map) for shape, is_map in zip(shapes, (*maps, False), strict=False)
    )
    return _pea_plan._stage(activations, 4, (*wanted, False, *[assisted] * 3), tf32, arch)


ODD = [(1, 1, 1, 1), (2, 7, 5, 10), (3, 45, 66, 160), (2, 1, 600, 1), (1, 2**20 + 1, 3, 700)]


@pytest.mark.parametrize("stage", [(b, *real) for b in (2, 8) for real in REAL] + ODD, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("maps", [(False, False), (True, False)])
@pytest.mark.parametrize("arch", [80, 90])
def test_plans_take_every_token_and_channel_once(stage, dtype, maps, arch):
    batch, length, c_in, c_out = stage
    of_stage = described(stage, dtype, maps, arch=arch, tf32=True)
    taken, block, blocks, piece, pieces, groups, vector, of_x, of_target, _, _ = of_stage.tile
    assert all(side >= 16 and side & (side - 1) == 0 for side in (taken, block, piece))
    samples, length = (batch, length) if any(maps) else (1, batch * length)
    assert of_stage.tiles == samples * math.ceil(length / taken)
    assert (of_stage.strips - 1) * of_stage.per_strip < of_stage.tiles <= of_stage.strips * of_stage.per_strip
    sets = math.ceil(c_out / (block * blocks))
    assert of_stage.column_programs == of_stage.strips * sets * groups
    assert of_stage.row_programs in (0, of_stage.tiles * groups)
    if of_stage.row_programs == 0:
        assert sets == groups == 1, "programs that make dx need all channels"
    assert (groups - 1) * pieces * piece < c_in <= groups * pieces * piece
    assert of_stage.weight_entries == sets * block * blocks * groups * pieces * piece
    assert of_stage.stride >= of_stage.weight_entries + c_out and of_stage.stride % 4 == 0
    assert c_in % vector == 0 and (length if maps[0] else c_in) % of_x[1] == 0 and c_out % of_target[1] == 0
    assert of_x[2] == (length % taken == 0) and of_x[3] == (c_in == groups * pieces * piece)


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("stage", REAL, ids=str)
def test_real_stages_fill_a_gpu_with_whole_vectors(batch, stage):
    of_stage = described((batch, *stage))
    # Stage 4 of batch 2 has 1024 tokens only.
    assert of_stage.column_programs + of_stage.row_programs >= (64 if batch * stage[0] == 1024 else 100)
    assert of_stage.tile[7][:2] == of_stage.tile[8][:2] == (0, 8)
    assert (of_stage.row_programs == 0) == (stage in REAL[:2])
    partial_sums = of_stage.strips * of_stage.stride * 4
    assert partial_sums <= 9 * 2**20


@pytest.mark.parametrize(
    "maps, assisted",
    [((False, False, False), False), ((True, False, True), True), ((False, True, False), True)],
    ids=str,
)
def test_several_programs_strips_blocks_and_groups(maps, assisted, small_plans):
    case = Case((1, 41, 20, 20), (2, 25, 12, 20), maps=maps, assisted=assisted)
    wide, narrow = case.plan().stages
    assert (
        wide.tile[5] > 1
        and wide.strips > 1
        and wide.per_strip > 1
        and wide.row_programs > 1
        and wide.merge_programs > 1
    )
    assert narrow.row_programs == 0 and narrow.tile[2] > 1 and narrow.strips > narrow.merge_tile[0]
    case.check()


def test_stages_of_all_kinds_share_a_call():
    """Five stages make two finishing launches; layouts, sizes and dtypes differ."""
    case = Case((1, 5, 3, 4), (2, 6, 17, 2), (1, 1, 2, 1), (3, 2, 1, 20), (1, 4, 2, 3))
    case.xs[1] = case.xs[1].transpose(1, 2).contiguous().transpose(1, 2)
    case.assistants[3] = case.assistants[3].transpose(1, 2).contiguous().transpose(1, 2)
    case.check()
    case = Case((1, 5, 3, 4), (2, 6, 17, 2), dtype=F32)
    case.targets[0], case.xs[1] = case.targets[0].to(BF16), case.xs[1].to(F16)
    case.assistants[1] = case.assistants[1].to(F16)
    case.check(2e-2)


def counted(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    return launches


def test_launches(monkeypatch):
    launches = counted(monkeypatch)
    case = Case(*[(1, 3, 2, 3)] * 4)
    case.run()
    assert launches == ["stage_kernel"] * 4 + ["finish_kernel", "scale_kernel"]
    launches.clear()
    case.wanted = [False] * len(case.wanted)
    assert case.forward()[2] == [] and launches == ["stage_kernel"] * 4 + ["finish_kernel"]


def test_what_is_not_wanted_changes_nothing_else(small_plans):
    case = Case((1, 17, 20, 20))
    loss, _, everything = case.forward()
    for wanted in itertools.product([False, True], repeat=7):
        if sum(wanted) > 1:
            continue
        case.wanted = list(wanted)
        other, _, kept = case.forward()
        shared = (*wanted[:3], wanted[3] or wanted[4], wanted[5] or wanted[6])
        expected = [t for t, want in zip(everything, shared, strict=True) if want]
        # Strips are longer where no rows run beside them.
        assert relative(other, loss.double().cpu()) < 1e-14
        for one, true in zip(kept, expected, strict=True):
            assert relative(one, true.double().cpu()) < 1e-13


def test_nothing_uninitialised_is_read_and_results_repeat(small_plans):
    case = Case((2, 21, 20, 20), (1, 19, 5, 7), dtype=F32, maps=(True, False, False))
    expected = case.run()
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        again = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(expected[0], again[0]) and torch.equal(expected[1], again[1])
    for one, other in zip([*expected[2], *expected[3]], [*again[2], *again[3]], strict=True):
        assert not one.isnan().any() and torch.equal(one, other)


@pytest.mark.parametrize("maps", [(False, False, False), (True, True, True)], ids=str)
def test_only_the_tensors_are_read_and_only_results_are_written(maps, monkeypatch):
    """Activations and results lie misaligned between guards: NaN to be read, a mark to be overwritten."""
    guard, mark, memories = 40, -7.0, []

    def between_guards(of, fill, dtype=None):
        memory = torch.full((of.numel() + 2 * guard + 1,), fill, dtype=dtype or of.dtype, device=DEVICE)
        return memory, torch.as_strided(memory, of.shape, of.stride(), guard + 1)

    def guarded_empty_like(of, dtype=None):
        memories.append((*between_guards(of, mark, dtype), of.numel()))
        return memories[-1][1]

    case = Case((2, 18, 33, 35), dtype=F32, maps=maps)
    for of_kind in case.lists:
        of_kind[0] = between_guards(of_kind[0], math.nan)[1].copy_(of_kind[0])
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty_like", guarded_empty_like)
        case.run()
    assert len(memories) == 4 + 6
    for memory, _, count in memories:
        assert (torch.cat([memory[: guard + 1], memory[guard + 1 + count :]]) == mark).all()
        assert not memory.isnan().any()
    case.check(5e-6)


def test_inputs_and_what_is_kept_are_left_alone():
    case = Case((1, 5, 3, 4))
    loss, factors, kept, _ = case.run()
    tensors = [*itertools.chain(*case.lists), factors, *kept]
    copies = [t.clone() for t in tensors]
    case.run()
    kernels.pea_bwd(loss, factors, kept, case.codes())
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@triton.jit
def far_kernel(out, base, sample, first, channel, sizes, LAYOUT: tl.constexpr):
    pointers, _ = _pea_tiles.place(base, (sample.to(tl.int64), first), channel, sizes, LAYOUT, 16, 16)
    lane = tl.arange(0, 16)
    tl.store(out + lane[:, None] * 16 + lane[None, :], pointers.to(tl.int64, bitcast=True) - base.to(tl.int64))


@pytest.mark.parametrize("layout, length, channels", [(0, 2**20, 2**9), (1, 2**20, 2**9), (2, 2**26, 2**6)])
def test_offsets_go_beyond_32_bits(layout, length, channels):
    """The last tile of 64 samples, without them; only layout 2 allows a sample of 2^31 elements."""
    out = torch.zeros(16, 16, dtype=torch.int64, device=DEVICE)
    base = torch.zeros(1, dtype=torch.int8, device=DEVICE)
    far_kernel[(1,)](out, base, 63, length - 16, channels - 16, (length, channels), LAYOUT=(layout, 8, False, False))
    assert out[15, 15].item() == 64 * length * channels - 1
    assert (out[15, 15] - out[14, 15]).item() == (1 if layout else channels)


def test_calls_with_other_values_share_a_plan():
    first, second = Case((1, 5, 3, 4)), Case((1, 5, 3, 4))
    assert first.plan() is second.plan()


def changed(name, value):
    def change(case):
        getattr(case, name)[0] = value(getattr(case, name)[0])

    return change


BAD = [
    (lambda case: case.weights.pop(), r"expected as many weights.*got 1 xs and \(0, 1, 1, 1\)"),
    (lambda case: case.mixes.pop(), r"for none or all of 1 stages, got \(1, 1, 0\)"),
    (lambda case: case.wanted.pop(), "expected 7 flags of wanted gradients per stage, got 6"),
    (changed("xs", lambda x: x[0]), r"expected xs\[0\] to be \[B, N, C\] and not empty, got shape \[5, 3\]"),
    (changed("xs", lambda x: x[:, :0]), "not empty"),
    (changed("xs", lambda x: x.int()), r"expected xs\[0\] to be float32.*got torch.int32"),
    (
        changed("targets", lambda t: t[:, :4].contiguous()),
        r"expected targets\[0\] to have shape \[2, 5, C_out\].*got \[2, 4, 4\]",
    ),
    (changed("targets", lambda t: t[:, :, ::2]), r"weights\[0\] contiguous|dense tokens"),
    (changed("assistants", lambda t: t[..., :3].contiguous()), r"expected assistants\[0\] to have shape"),
    (changed("targets", lambda t: t.float()), "float64 does not mix with other dtypes"),
    (changed("weights", lambda t: t[:, :2]), r"expected weights\[0\] contiguous, \[4, 3\]"),
    (changed("weights", lambda t: t.t().contiguous().t()), r"expected weights\[0\] contiguous"),
    (changed("biases", lambda t: t[:3]), r"expected biases\[0\] contiguous, \[4\]"),
    (changed("projections", lambda t: torch.cat([t, t])), r"expected projection_scales\[0\] to have one"),
    (changed("targets", lambda t: t.to("meta")), "expected all tensors on one device"),
    (changed("xs", lambda x: x.repeat(1, 1, 2)[..., ::2]), "dense tokens or a dense map's view.*call .contiguous"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_tensors_that_do_not_fit_are_refused(change, message):
    case = Case((2, 5, 3, 4))
    change(case)
    with pytest.raises(RuntimeError, match=f"^pea: .*(?:{message})"):
        case.forward()


def test_a_gradient_of_a_missing_assistant_is_refused():
    case = Case((2, 5, 3, 4), assisted=False)
    case.wanted[4] = True
    with pytest.raises(RuntimeError, match="stage 1 has no assistant, but a gradient of one is wanted"):
        case.forward()


@pytest.mark.parametrize("shape", [(2, 2**30, 1), (1, 1, 2**14 + 1)], ids=str)
def test_sizes_too_large_for_32_bits_are_refused(shape):
    x = torch.empty(shape, device="meta")
    with pytest.raises(RuntimeError, match=r"expected at most 1073741824 tokens and 16384 channels.*eager"):
        kernels.pea_fwd([x], [x[0, :1]], [x[0, 0]], [x], [], [], [], [1.0], [False] * 7, False)


def test_arguments_of_the_backward_that_do_not_fit_are_refused():
    case = Case((1, 5, 3, 4))
    loss, factors, kept = case.forward()
    codes = case.codes()
    for arguments, message in (
        ((loss.float(), factors, kept, codes), "expected a scalar grad of torch.float64"),
        ((factors, factors, kept, codes), "expected a scalar grad"),
        ((loss, factors[0], kept, codes), "expected the factors that pea_fwd made"),
        ((loss, factors, kept[:-1], codes), "expected 5 kept tensors for these dtypes, got 4"),
        ((loss, factors, [*kept, loss], codes), "expected 5 kept tensors for these dtypes, got 6"),
        ((loss, factors, kept, codes[:5]), "expected 6 dtypes from -1 to 3 per stage"),
        ((loss, factors, kept, [4, *codes[1:]]), "expected 6 dtypes from -1 to 3 per stage"),
        ((loss, factors, [kept[0][..., ::2], *kept[1:]], codes), "expected kept tensors as pea_fwd made them"),
    ):
        with pytest.raises(RuntimeError, match=f"^pea_bwd: {message}"):
            kernels.pea_bwd(*arguments)
