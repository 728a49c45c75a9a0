"""cwd on every backend that can run here, against torch's KL divergence in fp64, golden values and differences."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load, tolerance
from kernels_here import device_of
from op_checks import OpChecks, each
from op_description import Cases, Op, random

from transkd_fast.functional import cwd_loss, kd_kl_loss
from transkd_fast.ops._registration import raw_op
from transkd_fast.reference import cwd as reference

# The published losses that have a meaning: over pixels ("channel") and over channels ("spatial"), KL.
GOLDEN = {
    case["name"]: case
    for case in load("losses")["cases"]
    if case.get("norm_type") in ("channel", "spatial") and case["divergence"] == "kl"
}
# The published code takes the logarithm of a softmax, which underflows there to -inf; of equal maps it leaves rounding.
WITHOUT_VALUE = ("underflow", "equal")


def make(shape, dtype=torch.float32, layout="nchw", offset=0.0):
    if len(shape) == 3:  # tokens have one layout
        return {name: random(shape, dtype) + offset for name in ("student", "teacher")}
    return {name: random(shape, dtype, layout, offset) for name in ("student", "teacher")}


def call(inputs, backend, temperature=2.0):
    return cwd_loss([inputs["student"]], [inputs["teacher"]], temperature, backend=backend)


def over_classes(inputs, backend, temperature=2.0):
    return kd_kl_loss(inputs["student"], inputs["teacher"], temperature, backend=backend)


FUNCTIONS = {"over pixels": call, "over classes": over_classes}


def raw_calls(inputs, backend):
    """Two stages that differ in axis, size and dtype."""
    views = [inputs[name].contiguous().flatten(2) for name in ("student", "teacher")]
    students, teachers = ([view, view[:, :, :4].contiguous().bfloat16()] for view in views)
    settings = [2, 1], [1.0, 0.5], 2.0
    yield "cwd_fwd", (students, teachers, *settings)
    loss, statistics = raw_op("cwd_fwd", backend)(students, teachers, *settings)
    yield "cwd_bwd", (loss, students, teachers, statistics, *settings)


FEW = [(2, 3, 9, 7), (3, 33, 6, 6), (2, 45, 7)]
CWD = Op(
    name="cwd",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=("student",),
    saves=("student", "teacher"),
    mixed=(
        {"student": torch.bfloat16, "teacher": torch.float32},
        {"student": torch.float32, "teacher": torch.float16},
        {"student": torch.float16, "teacher": torch.bfloat16},
    ),
    cases=Cases(
        every=[
            (2, 64, 32, 64),
            (2, 3, 128, 256),
            (3, 33, 6, 6),
            (1, 5, 17, 25),
            (2, 8, 3, 4),
            (2, 3, 1, 9),
            (1, 2, 30, 5001),
            (1, 5000, 6, 5),
            (2, 200, 19),
            (1, 7, 66),
        ],
        some=[*FEW, (2, 64, 32, 64), (1, 2, 30, 5001), (1, 5000, 6, 5)],
        few=FEW,
    ),
    sizes=Cases(
        every=[(2, 3, height, width) for height in (1, 2, 5, 8, 9) for width in (1, 3, 8, 12)],
        some=[(2, 3, height, width) for height in (2, 9) for width in (1, 8)],
        few=[(2, 3, height, width) for height in (2, 9) for width in (1, 8)],
    ),
    tiny=(2, 3, 4, 3),
    even=(2, 8, 10, 12),
    odd=(2, 5, 9, 13),
    medium=(2, 16, 32, 64),
    large=(2, 48, 65, 97),
    # torch's log_softmax adds float32 in one chain per lane; of 150 000 terms in the 8 lanes of AVX2 each logarithm is
    # off by 8e-6.
    eager_tolerance={torch.float32: 3e-5},
)
EXTREME = {
    "saturated": lambda s, t: (s * 1e4, t * 1e4),
    "one-hot teacher": lambda s, t: (s, t * 1e4),
    "one-hot student": lambda s, t: (s * 1e4, t),
    "a large offset": lambda s, t: (s + 3e4, t - 3e4),
}


class TestCWD(OpChecks):
    op = CWD

    @each(
        "temperature layout",
        list(itertools.product((0.01, 0.5, 4.0), CWD.layouts)),
        [(0.5, "nchw"), (4.0, "channels_last")],
    )
    def test_any_temperature(self, temperature, layout, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        self.op.check(inputs, backend, call=partial(call, temperature=temperature))

    @each("shape layout", list(itertools.product([(1, 64, 190, 192), (1, 65, 190, 193)], CWD.layouts)), few=[])
    def test_maps_larger_than_a_cache(self, shape, layout, backend):
        """Above 8 MB the CPU kernel stores past the cache, where 16 bytes fit."""
        self.op.check(self.op.make(shape, layout=layout, backend=backend), backend)

    @each("temperature layout", list(itertools.product((20.0, 50.0), CWD.layouts)), few=[(20.0, "nchw")])
    def test_high_temperatures(self, temperature, layout, backend):
        """Both softmaxes are nearly the same there: what is left of them is as exact as they are."""
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        run = partial(self.op.run, upstream=1.0, call=partial(call, temperature=temperature))
        values, truth = run(inputs, backend), self.op.truth(inputs, None, 1.0, partial(call, temperature=temperature))
        # A divergence is as exact as a logarithm of a sum, a gradient as the larger of the probabilities.
        p = (inputs["teacher"].cpu().double() / temperature).flatten(2).softmax(2)
        limits = {"output 0": temperature**2, "gradient of student": p.max() * temperature / p[..., 0].numel()}
        for name, scale in limits.items():
            assert (values[name].cpu().double() - truth[name]).abs().max() < 2e-6 * scale, name

    @each(
        "shape dtype layout",
        [
            *itertools.product([(2, 19, 16, 32), (2, 150, 5, 7), (3, 2, 9, 13)], [torch.float32], CWD.layouts),
            *itertools.product([(2, 19, 16, 32)], [torch.bfloat16, torch.float64], CWD.layouts),
            ((2, 40, 41), torch.float32, "nchw"),
        ],
        few=[((2, 19, 5, 7), torch.float32, layout) for layout in CWD.layouts],
        eager=True,
    )
    def test_over_classes(self, shape, dtype, layout, backend):
        self.op.check(self.op.make(shape, dtype, layout, backend), backend, call=over_classes)

    @each(
        "kind layout function",
        list(itertools.product(EXTREME, CWD.layouts, FUNCTIONS)),
        few=list(zip(EXTREME, itertools.cycle(CWD.layouts), itertools.cycle(FUNCTIONS))),
        eager=True,
    )
    def test_extreme_maps(self, kind, layout, function, backend):
        """Values that float32 holds exactly, so that its truth is that of fp64."""
        inputs = self.op.make((2, 5, 7, 9), layout=layout, backend=backend)
        exact = [(inputs[name] * 64).round() / 64 for name in ("student", "teacher")]
        student, teacher = EXTREME[kind](*exact)
        values = self.op.check({"student": student, "teacher": teacher}, backend, call=FUNCTIONS[function])
        assert values["output 0"].isfinite() and values["gradient of student"].isfinite().all()

    @each("layout function", list(itertools.product(CWD.layouts, FUNCTIONS)), eager=True)
    def test_equal_maps_give_zero(self, layout, function, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        inputs["teacher"] = inputs["student"] * 100
        inputs["student"] = inputs["student"] * 100
        values = self.op.run(inputs, backend, call=FUNCTIONS[function], upstream=1.0)
        assert values["output 0"].abs() < 1e-6 and values["gradient of student"].abs().max() < 1e-7

    @each(
        "name dtype",
        list(itertools.product(GOLDEN, [torch.float64, torch.float32])),
        few=[(name, torch.float32) for name in list(GOLDEN)[:4]],
        eager=True,
    )
    def test_golden_values(self, name, dtype, backend):
        case = GOLDEN[name]
        student, teacher = (case[name].to(device_of(backend), dtype).requires_grad_() for name in "ST")
        if case["norm_type"] == "channel":
            loss = cwd_loss([student], [teacher], case["temperature"], backend=backend)
        else:
            loss = kd_kl_loss(student, teacher, case["temperature"], backend=backend)
            if case["kind"] == "embedcwd":  # which has no mean over tokens
                loss = loss * student.shape[:2].numel()
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad is None
        if any(word in case["name"] for word in WITHOUT_VALUE):
            truth, exact = case["S"].double().requires_grad_(), case["T"].double()
            function = reference.cwd if case["norm_type"] == "channel" else reference.kd_kl
            true = function(truth, exact, case["temperature"])
            (gradient,) = torch.autograd.grad(true, truth)
            torch.testing.assert_close(loss.cpu().double(), true.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(student.grad.cpu().double(), gradient, rtol=1e-5, atol=1e-7)
            return
        actual = {"loss": loss.cpu(), "grad_S": student.grad.cpu(), "grad_T": teacher.grad}
        compare(actual, case["f64"], tolerance(case, dtype))

    @each(
        "bad layout function",
        list(itertools.product((torch.nan, torch.inf, -torch.inf), CWD.layouts, FUNCTIONS)),
        few=[(torch.nan, "nchw", "over pixels"), (-torch.inf, "nchw", "over pixels")],
        eager=True,
    )
    def test_a_teacher_that_is_not_finite(self, bad, layout, function, backend):
        """Minus infinity is a probability of 0, which adds nothing."""
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        inputs["teacher"][1, 2, 3, 4] = bad
        values = self.op.run(inputs, backend, call=FUNCTIONS[function])
        truth = self.op.truth(inputs, call=FUNCTIONS[function])
        for name, true in truth.items():
            assert torch.equal(values[name].isfinite().cpu(), true.isfinite()), name
        assert values["output 0"].isfinite() == (bad < 0)
        if bad < 0:
            self.op.compare(values, truth, backend)

    @each(eager=True)
    def test_stages_are_summed_with_their_weights(self, backend):
        shapes, weights = ((2, 4, 16, 16), (2, 60, 6), (2, 8, 5, 6)), (0.1, 0.5, 2.0)
        pairs = [self.op.make(shape, backend=backend) for shape in shapes]
        inputs = {f"{name} {m}": pair[name] for m, pair in enumerate(pairs) for name in pair}

        def together(inputs, backend):
            students, teachers = ([inputs[f"{name} {m}"] for m in range(3)] for name in ("student", "teacher"))
            return cwd_loss(students, teachers, 2.0, weights, backend)

        def by_hand(inputs, backend):
            terms = [reference.cwd(inputs[f"student {m}"], inputs[f"teacher {m}"], 2.0) for m in range(3)]
            return sum(weight * term for weight, term in zip(weights, terms, strict=True))

        wanted = ["student 0", "student 2"]
        values = self.op.run(inputs, backend, wanted, call=together)
        self.op.compare(values, self.op.truth(inputs, wanted, call=by_hand), backend)

    @each(eager=True)
    def test_no_gradient_flows_into_the_teacher(self, backend):
        for function in (call, over_classes):
            inputs = {name: t.requires_grad_() for name, t in self.op.make(self.op.odd, backend=backend).items()}
            function(inputs, backend).backward()
            assert inputs["teacher"].grad is None and inputs["student"].grad.abs().sum() > 0

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        forward, backward = raw_op("cwd_fwd", backend), raw_op("cwd_bwd", backend)
        student, teacher = (t.flatten(2) for t in self.op.make((1, 2, 6, 6), backend=backend).values())
        settings = [2], [1.0], 1.0
        with pytest.raises(RuntimeError, match=r"cwd: expected .*stage 1"):
            forward([student], [teacher[:, :, 1:].contiguous()], *settings)
        with pytest.raises(RuntimeError, match=r"cwd: expected .*contiguous"):
            forward([student.transpose(1, 2)], [teacher.transpose(1, 2)], *settings)
        with pytest.raises(RuntimeError, match="float64 does not mix"):
            forward([student], [teacher.double()], *settings)
        with pytest.raises(RuntimeError, match=r"cwd: expected .*1 or 2"):
            forward([student], [teacher], [0], [1.0], 1.0)
        with pytest.raises(RuntimeError, match=r"cwd: expected .*temperature"):
            forward([student], [teacher], [2], [1.0], 0.0)
        loss, statistics = forward([student], [teacher], *settings)
        with pytest.raises(RuntimeError, match=r"cwd_bwd: expected the statistics"):
            backward(loss, [student], [teacher], [statistics[0][:, :2].contiguous()], *settings)


@pytest.mark.parametrize("temperature", (1.0, 4.0, 0.5))
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 7), (2, 3, 1, 1), (2, 7, 3)])
def test_reference_agrees_with_kl_div(shape, temperature):
    maps = make(shape, torch.float64, offset=100).values()
    for function, over_pixels in ((reference.cwd, True), (reference.kd_kl, False)):
        dim = 2 if (len(shape) == 4) == over_pixels else 1
        log_p_s, log_p_t = ((t * 3 / temperature).flatten(2).log_softmax(dim) for t in maps)
        expected = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="sum")
        softmaxes = log_p_s.numel() // log_p_s.shape[dim]
        actual = function(*(t * 3 for t in maps), temperature)
        torch.testing.assert_close(actual, expected * temperature**2 / softmaxes, rtol=1e-12, atol=1e-14)


def test_tokens_are_pixels():
    student, teacher = make((2, 3, 4, 5), torch.float64).values()
    tokens = [t.flatten(2).transpose(1, 2) for t in (student, teacher)]
    for function in (kd_kl_loss, lambda s, t, temperature: cwd_loss([s], [t], temperature)):
        torch.testing.assert_close(function(*tokens, 2.0), function(student, teacher, 2.0), rtol=1e-12, atol=0)


def test_student_maps_are_resized_where_asked_for():
    student, teacher = random((2, 3, 5, 6)).requires_grad_(), random((2, 3, 9, 13))
    with pytest.raises(ValueError, match=r"stage 1: expected teacher .* resize_student=True resizes the student's map"):
        cwd_loss([student], [teacher])
    resized = F.interpolate(student, (9, 13), mode="bilinear", align_corners=False)
    assert torch.equal(cwd_loss([student], [teacher], resize_student=True), cwd_loss([resized], [teacher]))


ZEROS = torch.zeros(2, 3, 4, 4)
BAD = {
    "shapes": ((ZEROS, torch.zeros(2, 3, 4, 5)), {}, ValueError, r"expected teacher.*4, 4\]"),
    "two dimensions": ((torch.zeros(2, 3), torch.zeros(2, 3)), {}, ValueError, "expected student to be a map"),
    "empty": ((torch.zeros(2, 3, 0, 4),) * 2, {}, ValueError, "at least one element"),
    "integers": ((ZEROS, ZEROS.int()), {}, TypeError, "expected teacher"),
    "zero temperature": ((ZEROS,) * 2, {"temperature": 0.0}, ValueError, "temperature"),
    "negative temperature": ((ZEROS,) * 2, {"temperature": -1.0}, ValueError, "temperature"),
    "infinite temperature": ((ZEROS,) * 2, {"temperature": torch.inf}, ValueError, "temperature"),
    "temperature no number": ((ZEROS,) * 2, {"temperature": torch.tensor(1.0)}, ValueError, "temperature"),
    "device": ((ZEROS, torch.zeros(2, 3, 4, 4, device="meta")), {}, ValueError, "on cpu"),
}


@pytest.mark.parametrize(("tensors", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(tensors, options, error, message):
    with pytest.raises(error, match=f"kd_kl_loss: .*{message}"):
        kd_kl_loss(*tensors, **options)
    with pytest.raises(error, match=f"cwd_loss: .*{message}"):
        cwd_loss(*([tensor] for tensor in tensors), **options)


def test_bad_lists():
    with pytest.raises(TypeError, match="one map per stage, got a tensor"):
        cwd_loss(ZEROS, ZEROS)
    with pytest.raises(ValueError, match="at least one stage"):
        cwd_loss([], [])
    with pytest.raises(ValueError, match="teacher_maps to have 1 entries"):
        cwd_loss([ZEROS], [])
    with pytest.raises(ValueError, match="stage_weights to have 1 entries"):
        cwd_loss([ZEROS], [ZEROS], stage_weights=[1.0, 1.0])
