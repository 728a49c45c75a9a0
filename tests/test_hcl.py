"""hcl on every backend that can run here, against the fp64 reference, golden values and finite differences."""

import itertools
import math

import golden_io
import pytest
import torch
import torch.nn.functional as F
from kernels_here import device_of, interpreted
from op_checks import OpChecks, compiled, each
from op_description import LAYOUTS, Cases, Op, assert_same, random, relative

import transkd_fast
from transkd_fast import backends
from transkd_fast.functional import hcl_loss
from transkd_fast.ops._registration import raw_op
from transkd_fast.ops.hcl import hcl_stage
from transkd_fast.reference.hcl import hcl as hcl_reference


def make(shape, dtype=torch.float32, layout="nchw", offset=0.0):
    return {name: random(shape, dtype, layout, offset) for name in ("student", "teacher")}


def call(inputs, backend):
    return hcl_stage(inputs["student"], inputs["teacher"], backend=backend)


def raw_calls(inputs, backend):
    """Two stages that differ in size and dtype."""
    students, teachers = ([inputs[name], inputs[name][:, :, :4].bfloat16()] for name in ("student", "teacher"))
    weights = [1.0, 0.5], [0.5, 0.25, 0.125]
    loss, tables = raw_op("hcl_fwd", backend)(students, teachers, *weights)
    yield "hcl_fwd", (students, teachers, *weights)
    yield "hcl_bwd", (loss, students, teachers, tables, *weights)


FEW = [(2, 3, 9, 7), (3, 33, 6, 6), (2, 5, 8, 12), (2, 7, 3, 4), (1, 2, 1, 9)]
HCL = Op(
    name="hcl",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=("student", "teacher"),
    saves=("student", "teacher"),
    mixed=(
        {"student": torch.bfloat16, "teacher": torch.float32},
        {"student": torch.float32, "teacher": torch.float16},
        {"student": torch.float16, "teacher": torch.bfloat16},
    ),
    cases=Cases(
        # Divisible by 4 and not, levels left out by height or width, overlapping windows, 1 x n, channels off the
        # vector width.
        every=[
            (2, 64, 32, 64),
            (2, 3, 128, 256),
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
            (1, 2, 30, 5001),
            (1, 5000, 6, 5),
        ],
        some=[*FEW, (2, 64, 32, 64), (1, 5, 17, 25), (1, 2, 30, 5001), (1, 5000, 6, 5)],
        few=FEW,
    ),
    sizes=Cases(
        every=[(1, 2, height, width) for height in range(1, 40) for width in (1, 2, 3, 4, 5, 6, 7, 8, 12, 33)],
        some=[(1, 2, height, width) for height in (2, 5, 9) for width in (1, 3, 5, 6, 7, 8)],
        few=[(1, 2, height, width) for height in (2, 5, 9) for width in (1, 3, 5, 6, 7, 8)],
    ),
    tiny=(2, 3, 6, 5),
    even=(2, 8, 10, 12),
    odd=(2, 5, 9, 13),
    medium=(2, 16, 32, 64),
    large=(2, 48, 65, 97),
)


class TestHCL(OpChecks):
    op = HCL

    @each("shape layout", list(itertools.product([(1, 64, 190, 192), (1, 60, 190, 193)], HCL.layouts)), few=[])
    def test_maps_larger_than_a_cache(self, shape, layout, backend):
        """Above 8 MB the CPU kernel stores past the cache, where 16 bytes fit."""
        self.op.check(self.op.make(shape, layout=layout, backend=backend), backend)

    @each("dtype", [(torch.float64,), (torch.float32,)], eager=True)
    def test_golden_values(self, dtype, backend):
        cases = [
            c for c in golden_io.load("losses")["cases"] if c["kind"] == "hcl" and c["S"].shape[3] >= c["S"].shape[2]
        ]
        assert len(cases) >= 8
        if interpreted(backend):
            cases = sorted(cases, key=lambda case: case["S"].numel())[:2]
        names = {"output 0": "loss", "gradient of student": "grad_S", "gradient of teacher": "grad_T"}
        for case in cases:
            inputs = {
                "student": case["S"].to(device_of(backend), dtype),
                "teacher": case["T"].to(device_of(backend), dtype),
            }
            values, limit = self.op.run(inputs, backend, upstream=1.0), golden_io.tolerance(case, dtype)
            for name, golden in names.items():
                true = torch.as_tensor(case["f64"][golden], dtype=torch.float64)
                assert relative(values[name], true) < limit, case["name"]

    @each(
        "dtype layout",
        list(itertools.product([torch.float32, torch.bfloat16], HCL.layouts)),
        few=[(torch.float32, "nchw")],
    )
    def test_a_large_mean_costs_no_digits(self, dtype, layout, backend):
        inputs = make((2, 8, 8, 16) if interpreted(backend) else (2, 8, 16, 32), dtype, layout, offset=1000.0)
        self.op.check({name: m.to(device_of(backend)) for name, m in inputs.items()}, backend)

    @each(
        "dtype layout",
        list(itertools.product([torch.bfloat16, torch.float16], HCL.layouts)),
        few=[(torch.float16, "nchw")],  # bfloat16: see Op.limit
    )
    def test_halves_round_like_torch(self, dtype, layout, backend):
        """On 1 x 1 maps the gradient is 2 (s - t): every bit pattern of the type goes in, rounding comes out."""
        step = 61 if interpreted(backend) else 1
        patterns = torch.arange(0, 2**16, step, dtype=torch.int32).to(torch.int16).view(dtype)
        student = patterns.view(1, -1, 1, 1).contiguous(memory_format=LAYOUTS[layout])
        inputs = {
            "student": student.to(device_of(backend)),
            "teacher": torch.zeros_like(student, device=device_of(backend)),
        }
        upstream = 0.7 * student.numel() / 2
        gradient = self.op.run(inputs, backend, ["student"], upstream)["gradient of student"].flatten().cpu()
        scale = torch.tensor(upstream, dtype=torch.float32) * (2 / student.numel())
        expected = (scale * patterns.float()).to(dtype)
        finite = expected.isfinite()
        assert torch.equal(gradient[finite], expected[finite])
        assert torch.equal(gradient[~finite].isnan(), expected[~finite].isnan())

    @each()
    def test_one_map_in_two_stages_compiles(self, backend):
        """torch.compile takes no Function with the same tensor twice among its inputs."""

        def twice(inputs, backend):
            student, teacher = inputs["student"], inputs["teacher"]
            return hcl_loss([student, student], [teacher, teacher], stage_weights=(1.0, 0.5), backend=backend)

        inputs = self.op.make(self.op.odd, backend=backend)
        assert_same(
            self.op.run(inputs, backend, call=compiled(twice, backend="aot_eager")),
            self.op.run(inputs, backend, call=twice),
        )

    @each(eager=True)
    def test_stages_are_summed_with_their_weights(self, backend):
        pairs = [self.op.make(shape, backend=backend) for shape in ((2, 4, 16, 16), (2, 6, 8, 8), (2, 8, 4, 4))]
        students, teachers = [p["student"] for p in pairs], [p["teacher"] for p in pairs]
        single = [hcl_reference(s.double(), t.double()).item() for s, t in zip(students, teachers, strict=True)]
        assert hcl_loss(students, teachers, backend=backend).item() == pytest.approx(sum(single), rel=1e-6)
        weighted = hcl_loss(students, teachers, (0.1, 0.5, 2.0), backend=backend).item()
        assert weighted == pytest.approx(0.1 * single[0] + 0.5 * single[1] + 2 * single[2], rel=1e-6)

    @each(eager=True)
    def test_gradients_of_a_subset_of_weighted_stages(self, backend):
        shapes, weights = ((2, 4, 16, 16), (2, 6, 8, 8), (2, 8, 4, 6)), (0.1, 0.5, 2.0)
        pairs = [self.op.make(shape, backend=backend) for shape in shapes]
        inputs = {f"{name} {m}": pair[name] for m, pair in enumerate(pairs, start=1) for name in pair}

        def call(inputs, backend):
            students, teachers = ([inputs[f"{name} {m}"] for m in (1, 2, 3)] for name in ("student", "teacher"))
            return hcl_loss(students, teachers, weights, backend)

        def by_hand(inputs, backend):
            stages = zip(weights, (1, 2, 3), strict=True)
            return sum(w * hcl_reference(inputs[f"student {m}"], inputs[f"teacher {m}"]) for w, m in stages)

        wanted = ["student 1", "student 3", "teacher 2"]
        values = self.op.run(inputs, backend, wanted, call=call)
        assert {name for name in values if name.startswith("gradient")} == {f"gradient of {name}" for name in wanted}
        self.op.compare(values, self.op.truth(inputs, wanted, call=by_hand), backend)

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        forward, backward = raw_op("hcl_fwd", backend), raw_op("hcl_bwd", backend)
        student, teacher = self.op.make((1, 2, 6, 6), backend=backend).values()
        levels = [0.5, 0.25, 0.125]
        with pytest.raises(RuntimeError, match="differ in dimension 2"):
            forward([student], [teacher[:, :, 1:].contiguous()], [1.0], levels)
        with pytest.raises(RuntimeError, match="both maps contiguous or both channels-last"):
            forward([student], [teacher.contiguous(memory_format=torch.channels_last)], [1.0], levels)
        with pytest.raises(RuntimeError, match="as many teachers and weights as students"):
            forward([student], [teacher], [1.0, 1.0], levels)
        with pytest.raises(RuntimeError, match="3 level weights"):
            forward([student], [teacher], [1.0], levels[:2])
        with pytest.raises(RuntimeError, match="float64 does not mix"):
            forward([student], [teacher.double()], [1.0], levels)
        loss, tables = forward([student], [teacher], [1.0], levels)
        with pytest.raises(RuntimeError, match="expected the tables"):
            backward(loss, [student], [teacher], [tables[0][:, :1].contiguous()], [1.0], levels)

    @each(
        "shape weights",
        list(itertools.product([(2, 3, 9, 7), (2, 5, 3, 4), (2, 3, 1, 5)], [(0.0, 0.0, 0.0), (2.0, 0.0, 0.3)])),
        few=[((2, 3, 9, 7), (2.0, 0.0, 0.3)), ((2, 5, 3, 4), (2.0, 0.0, 0.3))],
    )
    def test_levels_have_the_weights_that_are_asked_for(self, shape, weights, backend):
        """The n-th level that is used has the n-th weight."""

        def call(inputs, backend):
            return hcl_loss([inputs["student"]], [inputs["teacher"]], backend=backend, level_weights=weights)

        def by_hand(inputs, backend):
            difference = inputs["student"] - inputs["teacher"]
            used = [level for level in (4, 2, 1) if level < min(shape[2:])]
            terms = [
                w * F.adaptive_avg_pool2d(difference, n).square().mean() for n, w in zip(used, weights, strict=False)
            ]
            return (difference.square().mean() + sum(terms)) / (1 + sum(weights[: len(used)]))

        inputs = self.op.make(shape, backend=backend)
        self.op.compare(self.op.run(inputs, backend, call=call), self.op.truth(inputs, call=by_hand), backend)


@pytest.mark.parametrize("weights", [(0.5, 0.25), (0.5, -0.25, 0.125), (0.5, math.nan, 0.1), (0.5, math.inf, 0.1)])
def test_level_weights_are_three_finite_numbers(weights):
    with pytest.raises(ValueError, match="hcl_loss: expected level_weights to be 3 finite numbers >= 0"):
        hcl_loss([torch.zeros(1, 2, 8, 8)], [torch.zeros(1, 2, 8, 8)], level_weights=weights)


def test_student_maps_are_resized_where_asked_for():
    students = [random((2, 3, *size)).requires_grad_() for size in ((8, 12), (5, 6))]
    teachers = [random((2, 3, *size)) for size in ((8, 12), (9, 13))]
    with pytest.raises(ValueError, match=r"stage 2: expected teacher .* resize_student=True resizes the student's map"):
        hcl_loss(students, teachers)
    resized = F.interpolate(students[1], (9, 13), mode="bilinear", align_corners=False)
    losses = [hcl_loss(students, teachers, resize_student=True), hcl_loss([students[0], resized], teachers)]
    gradients = [torch.autograd.grad(loss, students) for loss in losses]
    assert losses[0] == losses[1] and all(map(torch.equal, *gradients))


def test_reference_is_pooling_written_out():
    student, teacher = make((2, 3, 9, 7), torch.float64).values()
    expected, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        weight /= 2
        total += weight
        pooled = [F.adaptive_avg_pool2d(m, level) for m in (student, teacher)]
        expected = expected + weight * F.mse_loss(*pooled)
    torch.testing.assert_close(hcl_reference(student, teacher), expected / total, rtol=1e-14, atol=0)


def test_float64_beside_float32_is_passed_over_and_refused():
    student, teacher = make((1, 2, 4, 4), torch.float64).values()
    teacher = teacher.float()
    assert backends.choose("hcl", (student, teacher)) == "eager"
    with pytest.raises(transkd_fast.BackendError, match="float64 maps do not mix"):
        hcl_stage(student, teacher, backend="cpu")


@pytest.mark.parametrize(
    "students, teachers, weights, error, message",
    [
        ([], [], None, ValueError, "at least one stage"),
        ([(1, 2, 4, 4)], [], None, ValueError, "teacher_maps to have 1 entries"),
        ([(1, 2, 4, 4)], [(1, 2, 4, 4)], (1, 1), ValueError, "stage_weights to have 1 entries"),
        (
            [(1, 2, 4, 4)] * 2,
            [(1, 2, 4, 4), (1, 2, 4, 5)],
            None,
            ValueError,
            r"stage 2: expected teacher .* \[1, 2, 4, 4\]",
        ),
        ([(1, 2, 4, 4)], [(1, 2, 4, 4)], ("x",), ValueError, "stage_weights to be finite numbers"),
        ([(2, 4, 4)], [(2, 4, 4)], None, ValueError, r"stage 1: expected student to have shape \[B, C, H, W\]"),
        ([(0, 2, 4, 4)], [(0, 2, 4, 4)], None, ValueError, "at least one element"),
    ],
)
def test_bad_shapes(students, teachers, weights, error, message):
    with pytest.raises(error, match=message):
        hcl_loss([torch.zeros(s) for s in students], [torch.zeros(s) for s in teachers], weights)


def test_bad_types():
    maps = torch.zeros(1, 2, 4, 4)
    for resize in (False, True):
        with pytest.raises(TypeError, match="hcl_loss: stage 1: expected teacher to be a tensor, got None"):
            hcl_loss([maps], [None], resize_student=resize)
        with pytest.raises(TypeError, match="hcl_loss: stage 1: expected student to be float16"):
            hcl_loss([maps.int()], [torch.zeros(1, 2, 6, 6)], resize_student=resize)
        with pytest.raises(ValueError, match="hcl_loss: stage 1: expected student to have at least one element"):
            hcl_loss([maps[:0]], [torch.zeros(0, 2, 6, 6)], resize_student=resize)
    with pytest.raises(TypeError, match=r"expected teacher to be float16, .*got torch.int64"):
        hcl_stage(maps, maps.long())
    with pytest.raises(TypeError, match="expected student to be a tensor, got list"):
        hcl_stage([maps], maps)
    with pytest.raises(ValueError, match="expected teacher on cpu like student, got meta"):
        hcl_stage(maps, maps.to("meta"))
