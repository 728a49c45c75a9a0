"""What is particular to gl_mixer's Triton kernels: plans, tiles across samples, sums in parts, taps, far offsets.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the few tokens and channels.
"""

import math

import pytest
import torch
from kernels_here import device_of, interpreted

from transkd_fast import backends
from transkd_fast.reference.gl_mixer import gl_mixer as reference

if backends.why_not("gl_mixer", "triton") is not None:
    pytest.skip(backends.why_not("gl_mixer", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _gl_mixer_plan, _gl_mixer_products
from transkd_fast.kernels import gl_mixer as kernels

DEVICE = device_of("triton")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = _gl_mixer_plan.GRADIENTS
EVERYTHING = [True] * len(NAMES)
BACKWARD = ["gate_backward", "products", "merge"]
# batch, tokens, channels
SHAPES = [(3, 1, 1), (2, 2, 5), (3, 7, 10), (1, 45, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even a few tokens into many programs and parts, as many are cut on a GPU."""
    small = {"SMALLEST": 4, "PROGRAMS": 10**6, "ELEMENTS": 8, "CHANNELS": 4, "PARTS": 3, "MERGE_BLOCK": 8}
    small |= {"MERGE_PARTS": 2} | dict.fromkeys(("TENSOR_CORES", "FLOAT32", "FLOAT64"), (((4, 4),), 4, 4, 32))
    for name, value in small.items():
        monkeypatch.setattr(_gl_mixer_plan, name, value)
    _gl_mixer_plan._plan.cache_clear()
    yield
    _gl_mixer_plan._plan.cache_clear()


class Case:
    """One call: tokens, upstream gradient and parameters."""

    def __init__(self, shape=(2, 3, 5), dtype=F64, u_dtype=None, parameters=None, residual=True, tf32=False):
        def random(*shape, dtype=parameters or dtype, scale=1.0):
            return (torch.randn(shape, dtype=F64) * scale).to(dtype).to(DEVICE)

        channels = shape[2]
        self.e, self.u = random(*shape, dtype=dtype), random(*shape, dtype=u_dtype or dtype)
        self.grad = random(*shape, dtype=dtype)
        self.parameters = []
        for _ in range(2):
            self.parameters += [random(channels, channels, 3, scale=channels**-0.5), random(channels)]
        self.parameters += [random(1), random(1)]
        self.residual, self.tf32 = residual, tf32

    @property
    def arguments(self):
        return self.e, self.u, *self.parameters

    @property
    def plan(self):
        return _gl_mixer_plan.plan_of(*self.arguments, self.tf32)

    def forward(self, keep=True):
        return kernels.gl_mixer_fwd(*self.arguments, self.residual, keep, self.tf32)

    def backward(self, branches, wanted=EVERYTHING):
        tokens = self.grad, self.e, self.u, branches
        return kernels.gl_mixer_bwd(*tokens, *self.parameters, self.residual, wanted, self.tf32)

    def truth(self):
        """The output and all gradients, by the reference in float64."""
        leaves = [t.double().cpu().requires_grad_() for t in self.arguments]
        out = reference(*leaves, residual=self.residual)
        return out.detach(), torch.autograd.grad(out, leaves, self.grad.double().cpu())

    def check(self, tolerance=1e-12):
        true_out, true_gradients = self.truth()
        out, branches = self.forward()
        assert out.dtype == self.e.dtype and relative(out, true_out) < tolerance
        gradients = self.backward(branches)
        for name, gradient, true, of in zip(NAMES, gradients, true_gradients, self.arguments, strict=True):
            assert gradient.dtype == of.dtype and gradient.shape == of.shape, name
            assert relative(gradient, true) < tolerance, name


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


@shapes
def test_tiles_across_samples_and_several_programs(shape, small_plans):
    case = Case(shape, residual=shape[1] % 2 == 1)
    rows = shape[0] * shape[1]
    if rows > 4:
        assert case.plan.programs > 1 and case.plan.parts > 1 and case.plan.weight_parts(2)[1] > 1
        assert shape[0] == 1 or shape[1] % case.plan.tile[1]
    case.check()


@pytest.mark.parametrize(
    "settings, tolerance",
    [
        # The interpreter cuts bfloat16 off where the compiled kernel rounds.
        ({"shape": (2, 45, 66), "dtype": F16, "parameters": F32}, 2**-9),
        ({"shape": (2, 7, 10), "dtype": BF16, "u_dtype": F32, "parameters": F32}, 2**-5),
        ({"shape": (2, 7, 10), "dtype": F32, "tf32": True}, 1e-6 if interpreted("triton") else 1e-2),
        ({"shape": (2, 7, 10), "dtype": F32, "u_dtype": F16}, 2**-10),
        ({"shape": (1, 2, 16), "dtype": F64}, 1e-12),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_plans_as_they_are(settings, tolerance):
    Case(**settings).check(tolerance)


def test_parameters_of_any_dtype_get_gradients_of_theirs():
    case = Case((2, 3, 5), F32)
    dtypes = [F16, F64, F32, BF16, BF16, F16]
    case.parameters = [p.to(dtype) for p, dtype in zip(case.parameters, dtypes, strict=True)]
    case.check(2**-7)


def test_bfloat16_operands_are_multiplied_as_such():
    """The interpreter has no product of bfloat16: it would multiply the bits."""
    case = Case((1, 3, 5), BF16)
    assert case.plan.precision == ("widened" if interpreted("triton") else "ieee")
    assert Case((1, 3, 5), F16).plan.precision == "ieee"
    assert Case((1, 3, 5), F32, tf32=True).plan.precision == "tf32"
    assert Case((1, 3, 5), BF16, tf32=True).plan.precision == case.plan.precision


def test_samples_do_not_leak_into_each_other(small_plans):
    case = Case((3, 5, 4))
    out, branches = case.forward()
    de, du, *_ = case.backward(branches)
    for of in (case.e, case.u, case.grad):
        of[1] = 1e9
    other, branches = case.forward()
    other_de, other_du, *_ = case.backward(branches)
    for old, new in ((out, other), (de, other_de), (du, other_du)):
        assert torch.equal(old[::2], new[::2]) and not torch.equal(old[1], new[1])


@triton.jit
def taps_kernel(weight, out, channels, VECTOR: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, SIDE)
    for first in range(0, SIDE, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        taps = _gl_mixer_products.taps(weight, row, column, first, channels, tl.float32, COLUMNS, VECTOR)
        for t in tl.static_range(3):
            tl.store(out + (t * SIDE + row)[:, None] * SIDE + column[None, :], taps[t])


@pytest.mark.parametrize("channels, side", [(1, 4), (5, 8), (10, 16), (16, 16)])
def test_taps_are_sorted_and_zero_beyond_the_channels(channels, side):
    weight = torch.randn(channels, channels, 3, device=DEVICE)
    out = torch.full((3, side, side), math.nan, device=DEVICE)
    vector = channels & -channels
    taps_kernel[(1,)](weight, out, channels, VECTOR=vector, SIDE=side, COLUMNS=max(4, side // 2))
    expected = torch.zeros_like(out)
    expected[:, :channels, :channels] = weight.permute(2, 0, 1)
    assert torch.equal(out, expected)


def test_branches_are_what_the_backward_needs(small_plans):
    case = Case((2, 5, 6))
    tokens = case.e.transpose(1, 2)
    expected = [
        torch.nn.functional.conv1d(tokens, weight, bias, padding=1).transpose(1, 2)
        for weight, bias in (case.parameters[:2], case.parameters[2:4])
    ]
    out, branches = case.forward()
    assert branches.shape == (2, 5, 2, 6) and relative(branches, torch.stack(expected, 2).cpu()) < 1e-12
    same, empty = case.forward(keep=False)
    assert torch.equal(out, same) and empty.shape == (0,) and empty.dtype == F64
    assert Case(dtype=BF16).forward()[1].dtype == F32


def counted(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("mix", *BACKWARD):
        monkeypatch.setattr(kernels, f"{name}_kernel", Counted(name, getattr(kernels, f"{name}_kernel")))
    return launches


# What is wanted alone, and the launches that it needs.
NEEDED = {name: ["gate_backward", "merge"] for name in NAMES} | {
    "e": ["gate_backward", "products"],
    "u": ["gate_backward"],
    "conv_a_weight": BACKWARD,
    "conv_b_weight": BACKWARD,
}


def test_launches(monkeypatch):
    case = Case()
    launches = counted(monkeypatch)
    _, branches = case.forward()
    assert launches == ["mix"]
    launches.clear()
    everything = case.backward(branches)
    assert launches == BACKWARD
    launches.clear()
    assert case.backward(branches, [False] * len(NAMES)) == [] and launches == []
    for k, name in enumerate(NAMES):
        (gradient,) = case.backward(branches, [k == other for other in range(len(NAMES))])
        assert torch.equal(gradient, everything[k]) and launches == NEEDED[name], name
        launches.clear()


@pytest.mark.parametrize("wanted", ["11000000", "00100110", "00001001", "10010001"])
def test_what_is_not_wanted_changes_nothing_else(wanted, small_plans):
    case = Case((2, 3, 5))
    _, branches = case.forward()
    flags = [flag == "1" for flag in wanted]
    expected = [g for g, want in zip(case.backward(branches), flags, strict=True) if want]
    for gradient, true in zip(case.backward(branches, flags), expected, strict=True):
        assert torch.equal(gradient, true)


def test_only_what_the_gradient_needs_is_read(small_plans):
    case = Case((2, 3, 5))
    _, branches = case.forward()
    _, du, *_ = case.backward(branches)
    e, u = case.e, case.u
    case.e, case.u = torch.full_like(e, math.nan), torch.full_like(u, math.nan)
    (again,) = case.backward(torch.full_like(branches, math.nan), [name == "u" for name in NAMES])
    assert torch.equal(again, du)
    without_u = case.backward(branches, [name in ("conv_a_bias", "conv_weight") for name in NAMES])
    assert not any(gradient.isnan().any() for gradient in without_u)


def test_nothing_uninitialised_is_read_and_results_repeat(small_plans):
    case = Case((3, 3, 5))

    def run():
        out, branches = case.forward()
        return [out, branches, *case.backward(branches)]

    expected = run()
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_parts_are_merged_in_the_order_of_the_rows(small_plans):
    """In float32 a sum depends on its order: these are the sums of the parts, first to last."""
    case = Case((1, 12, 4), F32, residual=False)
    _, branches = case.forward()
    *_, db, _, _ = case.backward(branches)
    value, gate = branches[0].double().cpu().unbind(1)
    d = case.grad[0].double().cpu() * case.parameters[5].double().cpu() * value * gate.sigmoid() * (1 - gate.sigmoid())
    parts = d.float().split(case.plan.part_rows)
    assert len(parts) == case.plan.parts == 3
    # Two parts side by side, as MERGE_PARTS says, then the two.
    expected = parts[0].double().sum(0) + parts[2].double().sum(0) + parts[1].double().sum(0)
    assert (db.double().cpu() - expected).abs().max() < 1e-6


def test_inputs_are_left_alone_and_a_second_backward_gives_the_same(small_plans):
    case = Case((2, 3, 5))
    _, branches = case.forward()
    inputs = [case.grad, branches, *case.arguments]
    copies = [t.clone() for t in inputs]
    first, second = case.backward(branches), case.backward(branches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@shapes
def test_only_inputs_are_read_and_only_outputs_are_written(shape, monkeypatch):
    """Inputs and outputs lie misaligned between guards: NaN to be read, a mark to be overwritten."""
    guard, mark = 40, -7.0
    memories = []

    def between_guards(of, fill):
        memory = torch.full((of.numel() + 2 * guard + 1,), fill, dtype=of.dtype, device=DEVICE)
        return memory, memory[guard + 1 : guard + 1 + of.numel()].view(of.shape)

    def guarded_empty_like(of):
        memories.append((*between_guards(of, mark), of.numel()))
        return memories[-1][1]

    case = Case(shape)
    for name in ("e", "u", "grad"):
        of = getattr(case, name)
        setattr(case, name, between_guards(of, math.nan)[1].copy_(of))
    case.parameters = [between_guards(p, math.nan)[1].copy_(p) for p in case.parameters]
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty_like", guarded_empty_like)
        _, branches = case.forward()
        case.backward(branches)
    assert len(memories) == 1 + len(NAMES)
    for memory, _, count in memories:
        assert (torch.cat([memory[: guard + 1], memory[guard + 1 + count :]]) == mark).all()
        assert not memory[guard + 1 : guard + 1 + count].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("where", ["e", "u"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_come_out_where_they_do_in_eager(where, bad, small_plans):
    case = Case((2, 5, 3))
    getattr(case, where)[1, 0, 2] = bad
    true_out, true_gradients = case.truth()
    out, branches = case.forward()
    for value, true in zip([out, *case.backward(branches)], [true_out, *true_gradients], strict=True):
        assert torch.equal(value.cpu().isfinite(), true.isfinite())


@pytest.mark.parametrize("gate", [90.0, 3e38])  # e^90 is beyond float32
def test_gates_far_open_or_shut_stay_finite(gate):
    case = Case((1, 4, 2), F32)
    case.parameters[3] = torch.tensor([gate, -gate], device=DEVICE)
    true_out, true_gradients = case.truth()
    out, branches = case.forward()
    for value, true in zip([out, *case.backward(branches)], [true_out, *true_gradients], strict=True):
        assert (value.double().cpu() - true).abs().max() <= 1e-6 * true.abs().max() + 1e-36


@triton.jit
def far_kernel(out, row, channel, width, sizes):
    lane = tl.arange(0, 2)
    at, _inside = _gl_mixer_products.tokens_at(row + lane, 0, row + 2, channel + lane, width, sizes, 8)
    tl.store(out + lane[:, None] * 2 + lane[None, :], at)


@pytest.mark.parametrize("width", [1, 2])
def test_offsets_go_beyond_32_bits(width):
    """The last entries of 2^26 rows of 128 channels, without them."""
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    far_kernel[(1,)](out, 2**26 - 2, 126, width, (2**26, 2**26, 128))
    assert out[3].item() == (2**26 - 1) * 128 * width + 127


# Embed 4 at 512 x 1024, and what no network has.
PLANNED = [(8, 512, 256), (2, 512, 256), (1, 1, 1), (2, 45, 66), (3, 7, 160), (1, 2**20 + 1, 5), (2**20, 2, 3)]


@pytest.mark.parametrize("shape", PLANNED, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("weight_itemsize", [2, 4])
@pytest.mark.parametrize("tf32", [False, True])
def test_plans_keep_the_promises_the_kernels_rely_on(shape, dtype, weight_itemsize, tf32):
    plan = _gl_mixer_plan._plan(shape, dtype, weight_itemsize, tf32, False)
    rows, _, channels = plan.sizes
    for vector, *sides in (plan.tile, plan.weight_tile, plan.pass_tile):
        assert channels % vector == 0
        assert all(side > 0 and side & (side - 1) == 0 for side in sides)
    assert min(plan.tile[1:] + plan.weight_tile[1:]) >= 16
    shared = _gl_mixer_plan.shared_bytes(*plan.tile[1:], dtype.itemsize, weight_itemsize)
    assert shared <= _gl_mixer_plan.SHARED
    assert plan.part_rows % plan.pass_tile[1] == 0 and plan.parts <= _gl_mixer_plan.PARTS
    assert (plan.parts - 1) * plan.part_rows < rows <= plan.parts * plan.part_rows
    for branches in (1, 2):
        programs, parts, part_rows = plan.weight_parts(branches)
        assert part_rows % plan.weight_tile[3] == 0 and (parts - 1) * part_rows < rows <= parts * part_rows
        tiles = math.ceil(channels / plan.weight_tile[1]) * math.ceil(channels / plan.weight_tile[2])
        assert programs == branches * tiles * parts < 2**31
    assert plan.weight_parts(0) == (0, 0, 0) and plan.programs < 2**31


@pytest.mark.parametrize("shape", PLANNED[:2], ids=str)
@pytest.mark.parametrize("dtype, tf32", [(BF16, False), (F32, True), (F32, False)])
def test_real_sizes_fill_a_gpu_with_whole_vectors(shape, dtype, tf32):
    plan = _gl_mixer_plan._plan(shape, dtype, 4, tf32, False)
    assert plan.tile[0] == 16 and plan.programs >= 96 and plan.weight_parts(2)[0] >= 96
    assert plan.pass_programs >= 128


def test_calls_with_other_values_share_a_plan():
    assert Case().plan is Case().plan


E = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"e": E[0]}, r"expected e as tokens \[B, N, C\] with at least one element, got shape \[5, 4\]"),
        ({"e": E[:0], "u": E[:0]}, "with at least one element"),
        ({"u": E[:1]}, r"expected u of e's shape \[2, 5, 4\], got \[1, 5, 4\]"),
        ({"u": E.double()}, "float64 does not mix with other dtypes, got e of torch.float32 and u of torch.float64"),
        ({"e": E.int()}, "expected float32, float64, bfloat16 or float16, got e of torch.int32"),
        ({"u": torch.zeros(2, 4, 5).mT}, r"expected u contiguous, got shape \[2, 5, 4\].*call .contiguous"),
        ({"u": E.to("meta")}, "expected u on e's device cpu, got meta"),
        ({"conv_a_weight": torch.zeros(4, 4, 1)}, r"expected conv_a_weight to have shape \[4, 4, 3\], got \[4, 4, 1\]"),
        ({"conv_b_weight": torch.zeros(4, 3, 4).mT}, "expected conv_b_weight contiguous"),
        ({"conv_b_bias": torch.zeros(3)}, r"expected conv_b_bias to have shape \[4\], got \[3\]"),
        ({"attention_weight": torch.zeros(2)}, r"expected attention_weight with one element, got \[2\]"),
        ({"conv_weight": torch.zeros(1).int()}, "got conv_weight of torch.int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    parameters = [torch.zeros(4, 4, 3), torch.zeros(4)] * 2 + [torch.zeros(1)] * 2
    arguments = dict(zip(NAMES, [E, E, *parameters], strict=True)) | change
    with pytest.raises(RuntimeError, match=f"^gl_mixer: .*{message}|^gl_mixer: {message}"):
        kernels.gl_mixer_fwd(*arguments.values(), False, True, False)


def test_tokens_too_many_for_32_bits_are_refused():
    e = torch.empty((2, 2**29 + 1, 1), device="meta")
    parameters = [torch.empty(1, 1, 3, device="meta"), torch.empty(1, device="meta")] * 2
    parameters += [torch.empty(1, device="meta")] * 2
    with pytest.raises(RuntimeError, match=r"gl_mixer: expected at most 1073741824 tokens in all.*eager"):
        kernels.gl_mixer_fwd(e, e, *parameters, False, True, False)


def test_what_does_not_fit_the_forward_is_refused():
    case = Case(dtype=F32)
    _, branches = case.forward()

    def backward(grad=case.grad, branches=branches, wanted=EVERYTHING):
        tokens = grad, case.e, case.u, branches
        return kernels.gl_mixer_bwd(*tokens, *case.parameters, True, wanted, False)

    calls = [
        ({"grad": case.grad[:1]}, "expected grad of e's shape"),
        ({"grad": case.grad.half()}, "expected grad of e's dtype torch.float32, got torch.float16"),
        ({"branches": branches[:, :, 0]}, "expected the branches that gl_mixer_fwd kept"),
        ({"branches": branches.double()}, r"contiguous torch.float32 of shape \[2, 3, 2, 5\]"),
        ({"branches": branches.new_empty(0)}, r"got shape \[0\]"),
        ({"wanted": EVERYTHING[1:]}, "expected 8 flags of wanted gradients, got 7"),
    ]
    for change, message in calls:
        with pytest.raises(RuntimeError, match=f"^gl_mixer: .*{message}|^gl_mixer: {message}"):
            backward(**change)
