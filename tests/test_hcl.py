"""hcl on every backend that can run here, against the fp64 reference, golden values and finite differences."""

import itertools
import math

import golden_io
import pytest
import torch
import torch.nn.functional as F
from kernels_here import device_of, interpreted, kernels_of

import transkd_fast
from transkd_fast import backends
from transkd_fast.functional import hcl_loss
from transkd_fast.ops._registration import raw_op
from transkd_fast.ops.hcl import hcl_stage
from transkd_fast.reference.hcl import hcl as hcl_reference

KERNELS = kernels_of("hcl")
BACKENDS = ["eager", *KERNELS]
UPSTREAM = 0.37

# Divisible by 4 and not, levels left out by height or width, overlapping windows, 1 x n, channels off the vector width.
SHAPES = [
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
]
SMALL_SHAPES = [(2, 3, 9, 7), (3, 33, 6, 6), (2, 5, 8, 12), (2, 7, 3, 4), (1, 2, 1, 9)]
# Rounding of the result's dtype, times a margin for sums over thousands of values.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
backend_names = pytest.mark.parametrize("backend", BACKENDS)
kernel_names = pytest.mark.parametrize("backend", KERNELS)


def over(names, cases, few, backends=KERNELS):
    """Parametrizes with all cases and backends; with a few for Triton's interpreter, which takes a second per call."""
    arguments = [(*case, b) for b in backends for case in (few if interpreted(b) else cases)]

    def name_of(value):
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None

    return pytest.mark.parametrize([*names.split(), "backend"], arguments, ids=name_of)


def make(shape, dtype=torch.float32, layout="nchw", offset=0.0, backend="cpu"):
    """Two maps, on the backend's device."""
    # Distinct values are needed in half precision too, where randn alone would repeat the same few.
    maps = [(torch.randn(shape, dtype=torch.float64) + offset).to(dtype) for _ in range(2)]
    return [m.to(device_of(backend)).contiguous(memory_format=LAYOUTS[layout]) for m in maps]


def run(student, teacher, backend, upstream=UPSTREAM, teacher_grad=True):
    """Loss and gradients, computed on the backend's device and brought back to the CPU."""
    student = student.to(device_of(backend)).detach().requires_grad_()
    teacher = teacher.to(device_of(backend)).detach().requires_grad_(teacher_grad)
    loss = hcl_stage(student, teacher, backend=backend)
    (loss * upstream).backward()
    return loss.detach().cpu(), student.grad.cpu(), teacher.grad.cpu() if teacher_grad else None


def tolerance(dtype, backend):
    # Triton's interpreter cuts bfloat16 off where the compiled kernel rounds.
    return 2 * TOLERANCE[dtype] if dtype == torch.bfloat16 and interpreted(backend) else TOLERANCE[dtype]


def relative(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def test_the_kernels_that_can_run_here_do():
    assert "cpu" in KERNELS, backends.why_not("hcl", "cpu")
    assert "triton" in KERNELS, backends.why_not("hcl", "triton")
    if torch.cuda.is_available() and transkd_fast.build_info()["extensions"]["_C_cuda"]["loaded"]:
        assert "cuda" in KERNELS, backends.why_not("hcl", "cuda")


@over(
    "shape dtype layout",
    list(itertools.product(SHAPES, TOLERANCE, LAYOUTS)),
    [
        *itertools.product(
            [(2, 3, 9, 7), (3, 33, 6, 6), (2, 5, 8, 12), (2, 7, 3, 4), (1, 2, 1, 9)], [torch.float32], LAYOUTS
        ),
        *itertools.product([(2, 3, 9, 7)], [torch.bfloat16, torch.float16, torch.float64], LAYOUTS),
    ],
    BACKENDS,
)
def test_value_and_gradients(shape, layout, dtype, backend):
    student, teacher = make(shape, dtype, layout)
    # An upstream gradient like a loss scaler's keeps float16 gradients out of the subnormal range.
    upstream = UPSTREAM * math.prod(shape)
    truth = run(student.double(), teacher.double(), "eager", upstream)
    loss, grad_student, grad_teacher = run(student, teacher, backend, upstream)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, truth[0]) < min(TOLERANCE[dtype], TOLERANCE[torch.float32])
    for gradient, true in ((grad_student, truth[1]), (grad_teacher, truth[2])):
        assert gradient.dtype == dtype
        assert relative(gradient, true) < tolerance(dtype, backend)
    if backend in KERNELS:
        assert grad_student.stride() == student.stride()


@over("shape layout", list(itertools.product([(1, 64, 190, 192), (1, 60, 190, 193)], LAYOUTS)), [])
def test_maps_larger_than_a_cache(shape, layout, backend):
    """Above 8 MB the CPU kernel stores past the cache, where 16 bytes fit."""
    student, teacher = make(shape, layout=layout)
    truth = run(student.double(), teacher.double(), "eager")
    for value, true in zip(run(student, teacher, backend), truth, strict=True):
        assert relative(value, true) < TOLERANCE[torch.float32]


def test_reference_is_pooling_written_out():
    student, teacher = make((2, 3, 9, 7), torch.float64)
    expected, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        weight /= 2
        total += weight
        pooled = [F.adaptive_avg_pool2d(m, level) for m in (student, teacher)]
        expected = expected + weight * F.mse_loss(*pooled)
    torch.testing.assert_close(hcl_reference(student, teacher), expected / total, rtol=1e-14, atol=0)


@backend_names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(dtype, backend):
    cases = [c for c in golden_io.load("losses")["cases"] if c["kind"] == "hcl" and c["S"].shape[3] >= c["S"].shape[2]]
    assert len(cases) >= 8
    if interpreted(backend):
        cases = sorted(cases, key=lambda case: case["S"].numel())[:2]
    for case in cases:
        loss, grad_student, grad_teacher = run(case["S"].to(dtype), case["T"].to(dtype), backend, upstream=1.0)
        limit = golden_io.tolerance(case, dtype)
        for value, name in ((loss, "loss"), (grad_student, "grad_S"), (grad_teacher, "grad_T")):
            assert relative(value, torch.as_tensor(case["f64"][name], dtype=torch.float64)) < limit, case["name"]


@kernel_names
@layouts
def test_gradcheck(layout, backend):
    student, teacher = make((2, 3, 6, 5), torch.float64, layout, backend=backend)
    arguments = (student.requires_grad_(), teacher.requires_grad_())
    fast = interpreted(backend)  # one direction instead of one per element
    assert torch.autograd.gradcheck(lambda s, t: hcl_stage(s, t, backend=backend), arguments, fast_mode=fast)


@over("dtype layout", list(itertools.product([torch.float32, torch.bfloat16], LAYOUTS)), [(torch.float32, "nchw")])
def test_a_large_mean_costs_no_digits(layout, dtype, backend):
    student, teacher = make((2, 8, 8, 16) if interpreted(backend) else (2, 8, 16, 32), dtype, layout, offset=1000.0)
    truth = run(student.double(), teacher.double(), "eager")
    loss, gradient, _ = run(student, teacher, backend)
    assert relative(loss, truth[0]) < TOLERANCE[torch.float32]
    assert relative(gradient, truth[1]) < tolerance(dtype, backend)


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)]


@over(
    "student_dtype teacher_dtype layout",
    [(*dtypes, layout) for dtypes in MIXED for layout in LAYOUTS],
    [(*MIXED[0], "nchw"), (*MIXED[1], "channels_last")],
)
def test_mixed_dtypes(student_dtype, teacher_dtype, layout, backend):
    student, teacher = make((2, 6, 10, 12), torch.float32, layout)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    truth = run(student.double(), teacher.double(), "eager", 100.0)
    loss, grad_student, grad_teacher = run(student, teacher, backend, 100.0)
    assert relative(loss, truth[0]) < TOLERANCE[torch.float32]
    assert relative(grad_student, truth[1]) < tolerance(student_dtype, backend)
    assert relative(grad_teacher, truth[2]) < tolerance(teacher_dtype, backend)


def test_float64_beside_float32_is_passed_over_and_refused():
    student, teacher = make((1, 2, 4, 4), torch.float64)
    teacher = teacher.float()
    assert backends.choose("hcl", (student, teacher)) == "eager"
    with pytest.raises(transkd_fast.BackendError, match="float64 maps do not mix"):
        hcl_stage(student, teacher, backend="cpu")


@kernel_names
@pytest.mark.parametrize(
    "view",
    [
        lambda m: m[:, :, ::2, 1:],
        lambda m: m[:, 1:3],
        lambda m: m.transpose(2, 3),
        lambda m: m[:1].expand(3, -1, -1, -1),
        lambda m: m.permute(0, 2, 3, 1).reshape(2, -1, 4).view(2, 10, 12, 4).permute(0, 3, 1, 2)[:, :, 2:],
    ],
)
def test_views(view, backend):
    student, teacher = (view(m) for m in make((2, 4, 10, 12)))
    truth = run(student.double(), teacher.double(), "eager")
    result = run(student, teacher, backend)
    for value, true in zip(result, truth, strict=True):
        assert relative(value, true) < TOLERANCE[torch.float32]


@kernel_names
def test_layouts_may_differ(backend):
    student, teacher = make((2, 6, 10, 12))
    teacher = teacher.contiguous(memory_format=torch.channels_last)
    for s, t in ((student, teacher), (teacher, student)):
        truth = run(s.double().contiguous(), t.double().contiguous(), "eager")
        for value, true in zip(run(s, t, backend), truth, strict=True):
            assert relative(value, true) < TOLERANCE[torch.float32]


@kernel_names
@layouts
def test_only_the_gradients_asked_for(layout, backend):
    student, teacher = make((2, 3, 8, 8), layout=layout, backend=backend)
    assert run(student, teacher, backend, teacher_grad=False)[2] is None
    teacher.requires_grad_()
    hcl_stage(student, teacher, backend=backend).backward()
    assert teacher.grad is not None and student.grad is None


def saved_bytes(function):
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(saved.values())


@kernel_names
def test_saves_the_maps_as_they_are_and_a_small_table(backend):
    student, teacher = make((2, 16, 32, 64), backend=backend)
    student.requires_grad_()
    _, saved = saved_bytes(lambda: hcl_stage(student, teacher, backend=backend))
    maps = 2 * student.numel() * student.element_size()
    assert maps < saved < 1.01 * maps


@kernel_names
def test_saves_nothing_where_no_gradient_is_asked_for(backend):
    student, teacher = make((2, 4, 8, 8), backend=backend)
    assert saved_bytes(lambda: hcl_stage(student, teacher, backend=backend))[1] == 0
    student.requires_grad_()
    with torch.no_grad():
        loss, saved = saved_bytes(lambda: hcl_stage(student, teacher, backend=backend))
    assert saved == 0 and not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(hcl_stage(student, teacher, backend=backend), loss)


@kernel_names
def test_a_second_backward_gives_the_same_gradient(backend):
    student, teacher = make((2, 5, 9, 13), backend=backend)
    loss = hcl_stage(student.requires_grad_(), teacher, backend=backend)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


@kernel_names
def test_double_backward_is_refused(backend):
    student, teacher = make((1, 2, 6, 6), backend=backend)
    loss = hcl_stage(student.requires_grad_(), teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="hcl: second derivatives are not supported"):
        gradient.sum().backward()
    # A penalty on the gradient must not pass for a constant either.
    loss = hcl_stage(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="hcl: second derivatives are not supported"):
        (student.square().sum() + gradient.norm()).backward()


@over(
    "dtype layout",
    list(itertools.product([torch.float32, torch.bfloat16], LAYOUTS)),
    [(torch.float32, "nchw"), (torch.bfloat16, "channels_last")],
)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(dtype, layout, backend):
    student, teacher = make((2, 5, 9, 13) if interpreted(backend) else (2, 48, 65, 97), dtype, layout)
    first = run(student, teacher, backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7) if backend == "cpu" else (threads,):
            torch.set_num_threads(count)
            for value, again in zip(first, run(student, teacher, backend), strict=True):
                assert torch.equal(value, again)
    finally:
        torch.set_num_threads(threads)


@kernel_names
@layouts
def test_nothing_uninitialised_is_read(layout, backend):
    student, teacher = make((2, 6, 9, 11), layout=layout)
    expected = run(student, teacher, backend)
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(5).isnan().all()
        for value, true in zip(run(student, teacher, backend), expected, strict=True):
            assert torch.equal(value, true)
    finally:
        torch.use_deterministic_algorithms(False)


@over(
    "bad dtype layout",
    list(itertools.product([math.nan, math.inf, -math.inf], [torch.float32, torch.bfloat16, torch.float16], LAYOUTS)),
    [(math.nan, torch.float32, "nchw"), (math.inf, torch.bfloat16, "channels_last")],
)
def test_nan_and_inf_come_out(bad, dtype, layout, backend):
    student, teacher = make((1, 3, 8, 8), dtype, layout)
    student[0, 1, 2, 3] = bad
    loss, gradient, _ = run(student, teacher, backend)
    assert not loss.isfinite()
    assert not gradient[0, 1, 2, 3].isfinite()
    assert gradient[0, [0, 2]].isfinite().all()


@over(
    "dtype layout",
    list(itertools.product([torch.bfloat16, torch.float16], LAYOUTS)),
    [(torch.float16, "nchw")],  # see tolerance() about bfloat16
)
def test_halves_round_like_torch(dtype, layout, backend):
    """On 1 x 1 maps the gradient is 2 (s - t): every bit pattern of the storage type goes in, rounding comes out."""
    step = 61 if interpreted(backend) else 1
    patterns = torch.arange(0, 2**16, step, dtype=torch.int32).to(torch.int16).view(dtype)
    student = patterns.view(1, -1, 1, 1).contiguous(memory_format=LAYOUTS[layout])
    zero = torch.zeros_like(student)
    upstream = 0.7 * student.numel() / 2
    gradient = run(student, zero, backend, upstream, teacher_grad=False)[1].flatten()
    scale = torch.tensor(upstream, dtype=torch.float32) * (2 / student.numel())
    expected = (scale * patterns.float()).to(dtype)
    finite = expected.isfinite()
    assert torch.equal(gradient[finite], expected[finite])
    assert torch.equal(gradient[~finite].isnan(), expected[~finite].isnan())


@kernel_names
def test_raw_ops_pass_opcheck(backend):
    forward, backward = raw_op("hcl_fwd", backend), raw_op("hcl_bwd", backend)
    for layout in ["nchw"] if interpreted(backend) else LAYOUTS:
        shapes = (((2, 3, 9, 7), torch.float32), ((2, 5, 4, 4), torch.bfloat16))
        students, teachers = zip(*(make(*shape, layout, backend=backend) for shape in shapes), strict=True)
        weights = [1.0, 0.5]
        loss, tables = forward(students, teachers, weights)
        torch.library.opcheck(forward.default, (students, teachers, weights))
        torch.library.opcheck(backward.default, (loss, students, teachers, tables, weights))


@kernel_names
def test_fakes_agree_with_the_kernel_on_every_size(backend):
    widths = (1, 3, 5, 6, 7, 8) if interpreted(backend) else (1, 2, 3, 4, 5, 6, 7, 8, 12, 33)
    for height in (2, 5, 9) if interpreted(backend) else range(1, 40):
        maps = [torch.zeros(1, 2, height, width, device=device_of(backend)) for width in widths]
        results = []
        for stages in (maps, [m.to("meta") for m in maps]):
            loss, tables = raw_op("hcl_fwd", backend)(stages, stages, [1.0] * len(widths))
            results.append([loss.shape, *(table.shape for table in tables)])
        assert results[0] == results[1], height


@kernel_names
def test_raw_ops_repeat_the_contract(backend):
    forward, backward = raw_op("hcl_fwd", backend), raw_op("hcl_bwd", backend)
    student, teacher = make((1, 2, 6, 6), backend=backend)
    with pytest.raises(RuntimeError, match="differ in dimension 2"):
        forward([student], [teacher[:, :, 1:].contiguous()], [1.0])
    with pytest.raises(RuntimeError, match="both maps contiguous or both channels-last"):
        forward([student], [teacher.contiguous(memory_format=torch.channels_last)], [1.0])
    with pytest.raises(RuntimeError, match="as many teachers and weights as students"):
        forward([student], [teacher], [1.0, 1.0])
    with pytest.raises(RuntimeError, match="float64 does not mix"):
        forward([student], [teacher.double()], [1.0])
    loss, tables = forward([student], [teacher], [1.0])
    with pytest.raises(RuntimeError, match="expected the tables"):
        backward(loss, [student], [teacher], [tables[0][:, :1].contiguous()], [1.0])


@kernel_names
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, backend):
    def step(s, t):
        return hcl_loss([s, s], [t, t], stage_weights=(1.0, 0.5), backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 4, 9, 13), (2, 4, 8, 16)):
        student, teacher = make(shape, backend=backend)
        results = []
        for function in (step, compiled):
            s = student.clone().requires_grad_()
            loss = function(s, teacher)
            loss.backward()
            results.append((loss.detach(), s.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [name for name in KERNELS if name == "cpu" or device_of(name) == "cuda"])
def test_auto_is_a_kernel_also_inside_a_compiled_graph(backend):
    student, teacher = make((1, 2, 8, 8), backend=backend)
    graphs = []

    def collect(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(lambda s, t: hcl_loss([s], [t]), fullgraph=True, backend=collect)(student, teacher)
    assert "hcl_fwd" in graphs[0]


@backend_names
def test_autocast_changes_nothing(backend):
    student, teacher = make((2, 4, 9, 13), backend=backend)
    plain = run(student, teacher, backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        for value, true in zip(run(student, teacher, backend), plain, strict=True):
            assert value.dtype == true.dtype and torch.equal(value, true)


@backend_names
def test_stages_are_summed_with_their_weights(backend):
    pairs = [make(shape, backend=backend) for shape in ((2, 4, 16, 16), (2, 6, 8, 8), (2, 8, 4, 4))]
    students, teachers = [p[0] for p in pairs], [p[1] for p in pairs]
    single = [hcl_reference(s.double(), t.double()).item() for s, t in pairs]
    assert hcl_loss(students, teachers, backend=backend).item() == pytest.approx(sum(single), rel=1e-6)
    weighted = hcl_loss(students, teachers, (0.1, 0.5, 2.0), backend=backend).item()
    assert weighted == pytest.approx(0.1 * single[0] + 0.5 * single[1] + 2 * single[2], rel=1e-6)


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
        ([(2, 4, 4)], [(2, 4, 4)], None, ValueError, r"stage 1: expected student to have shape \[B, C, H, W\]"),
        ([(0, 2, 4, 4)], [(0, 2, 4, 4)], None, ValueError, "at least one element"),
    ],
)
def test_bad_shapes(students, teachers, weights, error, message):
    with pytest.raises(error, match=message):
        hcl_loss([torch.zeros(s) for s in students], [torch.zeros(s) for s in teachers], weights)


def test_bad_types():
    maps = torch.zeros(1, 2, 4, 4)
    with pytest.raises(TypeError, match=r"expected teacher to be float16, .*got torch.int64"):
        hcl_stage(maps, maps.long())
    with pytest.raises(TypeError, match="expected student to be a tensor, got list"):
        hcl_stage([maps], maps)
    with pytest.raises(ValueError, match="expected teacher on cpu like student, got meta"):
        hcl_stage(maps, maps.to("meta"))
