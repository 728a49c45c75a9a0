"""What is particular to seg_ce's Triton kernels: cells, programs, workspaces, launches, far offsets, contracts.

Where there is no GPU they run in Triton's interpreter, at milliseconds per program, hence the small maps.
"""

import itertools
import math

import pytest
import torch
from kernels_here import device_of

from transkd_fast import backends
from transkd_fast.reference import seg_ce as reference

if backends.why_not("seg_ce", "triton") is not None:
    pytest.skip(backends.why_not("seg_ce", "triton"), allow_module_level=True)

import triton
import triton.language as tl
from transkd_fast.kernels import _seg_ce_axes, _seg_ce_plan
from transkd_fast.kernels import seg_ce as kernels

DEVICE = device_of("triton")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KERNELS = ("loss_kernel", "gradient_kernel", "finish_kernel", "scale_kernel", "predict_kernel")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
UPSTREAM = 0.37


@pytest.fixture
def small_plans(monkeypatch):
    """Plans that cut even small maps into many programs, as large ones are cut on a GPU."""
    for name, value in {
        "LANES": 4,
        "ROWS": 2,
        "STRIP": 4,
        "CLASSES": 2,
        "FEWEST_CLASSES": 2,
        "SOURCE_ROWS": 2,
        "FEWEST_SOURCE_ROWS": 2,
        "SUM_BLOCK": 4,
        "ADD_BLOCK": 16,
        "SCALE_BLOCK": 16,
    }.items():
        monkeypatch.setattr(_seg_ce_plan, name, value)
    _seg_ce_plan._plan.cache_clear()
    yield
    _seg_ce_plan._plan.cache_clear()


class Case:
    """Logits of a shape and labels of a size, a fifth of them ignored and one out of range."""

    def __init__(self, shape, size, dtype=F64, layout=torch.contiguous_format, weighted=True):
        logits = torch.randn(shape, dtype=F64).to(DEVICE, dtype)
        self.logits = logits.contiguous(memory_format=layout)
        self.labels = torch.randint(shape[1], (shape[0], *size), device=DEVICE)
        self.labels[torch.rand(self.labels.shape, device=DEVICE) < 0.2] = 255
        self.labels[0, -1, -1] = shape[1]
        self.weight = torch.rand(shape[1], dtype=F64).to(DEVICE, F64 if dtype == F64 else F32) if weighted else None

    def forward(self, keep=True):
        return kernels.seg_ce_fwd(self.logits, self.labels, self.weight, 255, keep)

    def run(self):
        loss, counts, total, kept = self.forward()
        grad = torch.tensor(UPSTREAM, dtype=loss.dtype, device=DEVICE)
        code = _seg_ce_plan.DTYPES.index(self.logits.dtype)
        prediction = kernels.seg_ce_predict(self.logits, *self.labels.shape[1:])
        return loss, counts, total, kept, kernels.seg_ce_bwd(grad, total, kept, code), prediction

    def truth(self):
        logits = self.logits.detach().cpu().double().requires_grad_()
        weight = None if self.weight is None else self.weight.cpu().double()
        loss, counts = reference.seg_ce(logits, self.labels.cpu(), weight)
        (gradient,) = torch.autograd.grad(loss * UPSTREAM, logits)
        prediction = reference.seg_predict(logits.detach(), *self.labels.shape[1:])
        return loss.detach(), counts, gradient, prediction

    def check(self, tolerance=1e-13):
        loss, counts, _, _, gradient, prediction = self.run()
        true_loss, true_counts, true_gradient, true_prediction = self.truth()
        assert relative(loss, true_loss) < tolerance
        assert torch.equal(counts.cpu(), true_counts)
        assert relative(gradient, true_gradient) < tolerance
        assert gradient.dtype == self.logits.dtype and gradient.stride() == self.logits.stride()
        assert torch.equal(prediction.cpu(), true_prediction)

    def plan(self):
        return _seg_ce_plan.plan_of(self.logits, self.labels, self.weight, 255)


def relative(value, true):
    return ((value.double().cpu() - true).abs().max() / true.abs().max()).item()


AXES = [(1, 1), (1, 7), (7, 1), (5, 5), (3, 4), (4, 3), (3, 12), (8, 20), (20, 8), (31, 2), (2, 90), (13, 130)]


@triton.jit
def axis_kernel(cells, firsts, fractions, source, target, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(firsts + lane, _seg_ce_axes.first_of(lane - 2, source, target, AXIS))
    cell = _seg_ce_axes.cell_of(lane, source, target, AXIS)
    tl.store(cells + lane, cell)
    tl.store(fractions + lane, _seg_ce_axes.fraction_of(lane, cell, source, target, tl.float64, AXIS))


@pytest.mark.parametrize("source, target", [*AXES, (2**15, 2**16 - 5)], ids=str)
def test_cells_hold_every_label_pixel_once_and_lie_where_it_does(source, target):
    """The last sizes need 64 bits on the way, and are looked at in their first pixels only."""
    block = 256
    axis = _seg_ce_plan._axis(source, target)
    assert axis[1] == (source == 2**15)
    cells, firsts = (torch.empty(block, dtype=torch.int32, device=DEVICE) for _ in range(2))
    fractions = torch.empty(block, dtype=F64, device=DEVICE)
    axis_kernel[(1,)](cells, firsts, fractions, source, target, AXIS=axis, BLOCK=block)
    label = torch.arange(min(target, block), dtype=F64)
    position = (((2 * label + 1) * source - target) / (2 * target)).clamp(min=0)
    assert torch.equal(cells.cpu()[: len(label)].double(), position.floor())
    assert (fractions.cpu()[: len(label)] - position.frac()).abs().max() < 1e-13
    firsts = firsts.cpu()[2:]
    for cell in range(min(source, 60)):
        own = [i for i in range(len(label)) if int(position[i]) == cell]
        assert list(range(min(firsts[cell], len(label)), min(firsts[cell + 1], len(label)))) == own
    if source < 250:
        assert firsts[source] == target


def test_the_longest_cell():
    for source, target in itertools.product(range(1, 14), range(1, 60)):
        label = torch.arange(target)
        cells = ((2 * label + 1) * source - target).clamp(min=0) // (2 * target) if source != target else label
        longest = torch.bincount(cells).max().item()
        assert longest <= _seg_ce_plan.longest_cell(source, target) <= longest + 1, (source, target)


REAL = [(batch, classes, 128, 256) for batch in (2, 8) for classes in (2, 19, 150)]


@pytest.mark.parametrize("shape", [*REAL, (1, 1, 1, 1), (3, 41, 7, 300), (1, 20, 4000, 3)], ids=str)
@pytest.mark.parametrize("size", [(512, 1024), (1, 1), (45, 77), (128, 256), (3, 5000)], ids=str)
def test_plans_take_every_label_row_column_cell_and_class_once(shape, size):
    plan = _seg_ce_plan._plan(shape, size, BF16)
    batch, classes, height, width = shape
    rows, columns = plan.tile
    per_strip, strips, chunks = plan.cut
    longest = _seg_ce_plan.longest_cell(height, size[0])
    assert (strips - 1) * per_strip < longest <= strips * per_strip
    assert (chunks - 1) * columns < size[1] <= chunks * columns
    assert plan.programs == batch * height * strips * chunks
    block, cells, per_cell = plan.source_tile
    source_rows, source_strips, source_chunks, class_blocks = plan.source_cut
    assert (source_strips - 1) * source_rows < height <= source_strips * source_rows
    assert (source_chunks - 1) * cells < width <= source_chunks * cells
    assert (class_blocks - 1) * block < classes <= class_blocks * block
    assert plan.source_programs == batch * source_strips * source_chunks * class_blocks
    assert all(side & (side - 1) == 0 for side in (rows, columns, block, cells, per_cell))
    assert max(rows * columns // _seg_ce_plan.ROWS, cells * per_cell) <= _seg_ce_plan.LANES
    if size == (512, 1024) and shape in REAL:
        assert (rows, strips, per_cell) == (4, 1, 4), "no lane is idle but in the first cells"
        assert plan.programs >= 2048 and plan.source_programs >= 128 * batch
        # Eager holds at least the scores, their logarithms of softmax, and the gradients of both.
        ours = batch * 4 * (2 * classes * height * width + 2 * size[0] * size[1])
        eager = 4 * batch * 4 * classes * size[0] * size[1]
        assert ours < eager / (8 if classes > 2 else 2)


@pytest.mark.parametrize(
    "shape, size, layout",
    [
        ((2, 3, 3, 5), (7, 11), torch.contiguous_format),
        ((1, 5, 6, 9), (4, 5), torch.channels_last),
        ((1, 2, 2, 3), (21, 3), torch.contiguous_format),
    ],
    ids=str,
)
def test_many_programs_and_tiles_that_end_inside(shape, size, layout, small_plans):
    case = Case(shape, size, layout=layout)
    plan = case.plan()
    assert plan.programs > _seg_ce_plan.SUM_BLOCK
    assert plan.cut[1] > 1 or all(cut > 1 for cut in (plan.cut[2], *plan.source_cut[1:]))
    assert plan.adds > 1 or shape[3] == size[1]
    case.check()


@pytest.mark.parametrize(
    "shape, size", [((1, 3, 1, 1), (5, 300)), ((1, 2, 1, 4), (1, 9)), ((2, 3, 4, 1), (9, 2))], ids=str
)
def test_axes_of_one_pixel_and_large_ratios(shape, size):
    Case(shape, size, weighted=False).check()


def test_a_single_class_has_no_loss():
    loss, _, total, _, gradient, _ = Case((1, 1, 2, 2), (3, 5), weighted=False).run()
    assert loss == 0 and total > 0 and not gradient.any()


@pytest.mark.parametrize("dtype, tolerance", [(F32, 1e-6), (F16, 2e-3), (BF16, 2e-2)], ids=str)
def test_storage_types(dtype, tolerance):
    case = Case((1, 3, 4, 5), (9, 11), dtype)
    case.labels = case.labels.to(torch.int16)
    loss, counts, _, kept, gradient, _ = case.run()
    true_loss, true_counts, true_gradient, _ = case.truth()
    assert loss.dtype == kept.dtype == F32 and gradient.dtype == dtype
    assert relative(loss, true_loss) < 1e-6 and torch.equal(counts.cpu(), true_counts)
    assert relative(gradient, true_gradient) < tolerance


@pytest.mark.parametrize(
    "bad, size",
    [(math.nan, (5, 8)), (math.inf, (3, 4)), (math.inf, (3, 9)), (-math.inf, (3, 4)), (-math.inf, (5, 8))],
    ids=str,
)
def test_what_is_not_finite_reaches_what_it_reaches_in_torch(bad, size, small_plans):
    """At the second column the pixels of fraction 0 before it are touched too."""
    case = Case((1, 2, 3, 4), size)
    case.logits[0, 1, 1, 1] = bad
    loss, counts, _, _, gradient, prediction = case.run()
    true_loss, true_counts, true_gradient, true_prediction = case.truth()
    assert torch.equal(loss.isfinite().cpu(), true_loss.isfinite())
    assert torch.equal(gradient.isfinite().cpu(), true_gradient.isfinite())
    assert torch.equal(counts.cpu(), true_counts) and torch.equal(prediction.cpu(), true_prediction)


def test_large_logits_reach_no_lane_without_a_label_pixel():
    """Its weight is 0, but 0 times the exponential of 1000 is NaN."""
    case = Case((1, 3, 3, 3), (5, 7), F32)
    case.logits *= 1000
    gradient = case.run()[4]
    assert relative(gradient, case.truth()[2]) < 1e-3


def test_the_first_of_equal_scores_and_the_first_nan_are_chosen():
    logits = torch.zeros(1, 4, 1, 4, device=DEVICE)
    logits[0, 2, 0, 1] = 1.0
    logits[0, 1:3, 0, 2] = math.nan
    logits[0, :, 0, 3] = -math.inf
    assert kernels.seg_ce_predict(logits, 1, 4).flatten().tolist() == [0, 2, 1, 0]
    labels = torch.tensor([[[0, 2, 2, 0]]], device=DEVICE)
    assert kernels.seg_ce_fwd(logits, labels, None, 255, False)[1].tolist() == [4, 3, 0, 0]


def test_labels_beyond_32_bits_are_out_of_range():
    case = Case((1, 3, 2, 2), (2, 2), weighted=False)
    case.labels[0] = torch.tensor([[2**32, 1], [-1, -(2**40)]])
    assert kernels.seg_ce_fwd(case.logits, case.labels, None, -(2**40), True)[1].tolist()[::2] == [1, 1]
    case.labels = torch.tensor([[[255, 0], [1, 156]]], dtype=torch.uint8, device=DEVICE)
    counts = kernels.seg_ce_fwd(case.logits, case.labels, None, -100, True)[1].tolist()
    assert (counts[0], *counts[2:]) == (2, 0, 2)


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
    case, launches = Case((1, 3, 2, 3), (4, 5)), counted(monkeypatch)
    case.run()
    assert launches == ["loss_kernel", "gradient_kernel", "finish_kernel", "predict_kernel", "scale_kernel"]
    launches.clear()
    expected = case.forward()[:3]
    launches.clear()
    *without, kept = case.forward(keep=False)
    assert launches == ["loss_kernel", "finish_kernel"] and kept.numel() == 0
    assert all(torch.equal(one, other) for one, other in zip(without, expected, strict=True))


@pytest.mark.parametrize("size", [(5, 7), (3, 2)], ids=str)
def test_nothing_uninitialised_is_read_and_results_repeat(size, small_plans):
    case = Case((1, 3, 3, 4), size, F32)
    expected = case.run()
    torch.use_deterministic_algorithms(True)  # with it, torch fills every fresh tensor with NaN
    try:
        assert torch.empty(5).isnan().all()
        again = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(expected, again, strict=True):
        assert not one.isnan().any() and torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_only_the_tensors_are_read_and_only_results_are_written(layout, monkeypatch, small_plans):
    """Logits, labels and results lie misaligned between guards: NaN or a class to be read, a mark to be overwritten."""
    guard, mark, memories = 300, -7, []

    def between_guards(of, fill, dtype=None):
        memory = torch.full((of.numel() + 2 * guard + 1,), fill, dtype=dtype or of.dtype, device=DEVICE)
        return memory, torch.as_strided(memory, of.shape, of.stride(), guard + 1)

    def guarded_empty_like(of, dtype=None):
        memories.append((*between_guards(of, mark, dtype), of.numel()))
        return memories[-1][1]

    case = Case((1, 3, 3, 5), (5, 9), layout=layout)
    truth = case.truth()
    case.logits = between_guards(case.logits, math.nan)[1].copy_(case.logits)
    case.labels = between_guards(case.labels, 0)[1].copy_(case.labels)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty_like", guarded_empty_like)
        loss, counts, _, _, gradient, _ = case.run()
    assert len(memories) == 3  # kept, what goes to the right, the gradient
    for memory, _, count in memories:
        assert (torch.cat([memory[: guard + 1], memory[guard + 1 + count :]]) == mark).all()
        assert not memory.isnan().any()
    assert relative(loss, truth[0]) < 1e-13 and torch.equal(counts.cpu(), truth[1])
    assert relative(gradient, truth[2]) < 1e-13


def test_inputs_and_what_is_kept_are_left_alone():
    case = Case((1, 3, 2, 3), (4, 5))
    loss, _, total, kept, _, _ = case.run()
    tensors = [case.logits, case.labels, case.weight, total, kept]
    copies = [t.clone() for t in tensors]
    case.run()
    first, second = (kernels.seg_ce_bwd(loss, total, kept, 3) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_weights_that_sum_up_to_nothing_give_zero_and_nan_gives_nan(value):
    case = Case((1, 3, 2, 3), (4, 5))
    case.weight.fill_(value)
    loss, _, total, _, gradient, _ = case.run()
    if math.isnan(value):
        assert loss.isnan() and total.isnan() and gradient.isnan().all()
    else:
        assert loss == 0 and total <= 0 and torch.equal(gradient, torch.zeros_like(gradient))


@triton.jit
def far_kernel(out, logits, sample, y, column, strides, sizes, AXES: tl.constexpr):
    rows = kernels._rows(logits, sample.to(tl.int64), y, strides, sizes, AXES)
    left, right, _ = kernels._columns(column + tl.arange(0, 2), strides[3], sizes, tl.float32, AXES)
    base = logits.to(tl.int64)
    # Both loads take one byte per element.
    tl.store(out + tl.arange(0, 2), tl.sum((rows[0] + left).to(tl.int64), axis=0) - base)
    tl.store(out + 2 + tl.arange(0, 2), tl.sum((rows[1] + right).to(tl.int64), axis=0) - base)


def test_offsets_go_beyond_32_bits():
    """The last label pixels of the last of 64 samples of 19 x 2^13 x 2^14, without them; channels-last rows too."""
    batch, classes, height, width = 64, 19, 2**13, 2**14
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    base = torch.zeros(1, dtype=torch.int8, device=DEVICE)
    sizes = (classes, height, width, 2 * height, 2 * width)
    axes = _seg_ce_plan._axis(height, 2 * height), _seg_ce_plan._axis(width, 2 * width)
    plane = height * width
    for strides in ((classes * plane, plane, width, 1), (classes * plane, 1, classes * width, classes)):
        place = (batch - 1, height - 2, 2 * width - 4)
        far_kernel[(1,)](out, base, *place, strides, sizes, AXES=axes)
        first = place[0] * strides[0] + place[1] * strides[2] + (width - 3) * strides[3]
        # Label pixels 2 w - 4 and 2 w - 3 lie in cells w - 3 and w - 2.
        below = first + strides[2] + strides[3]
        assert out.tolist() == [first, first + strides[3], below, below + strides[3]]
    far = torch.empty(1, dtype=torch.int8, device="meta").expand(2, 2, 2**15, 2**15)
    assert _seg_ce_plan._plan(tuple(far.shape), (2**16, 2**16), F32).axes == ((False, True), (False, True))


def test_calls_with_other_values_share_a_plan():
    assert Case((1, 3, 2, 3), (4, 5)).plan() is Case((1, 3, 2, 3), (4, 5)).plan()


def changed(name, value):
    def change(case):
        setattr(case, name, value(getattr(case, name)))

    return change


BAD = [
    (changed("logits", lambda t: t[0]), r"expected logits \[B, K, h, w\].*got shape \[3, 2, 3\]"),
    (changed("logits", lambda t: t[:, :0]), "at least one element"),
    (changed("logits", lambda t: t.int()), "expected float32, float64, bfloat16 or float16 logits, got torch.int32"),
    (changed("logits", lambda t: t.transpose(2, 3)), "expected a contiguous or channels-last map.*call .contiguous"),
    (changed("labels", lambda t: t[:, None]), r"expected labels \[B, H, W\].*got shape \[2, 1, 4, 5\]"),
    (changed("labels", lambda t: t[:, :0]), "expected labels.*at least one element"),
    (changed("labels", lambda t: t.float()), "expected uint8, int16, int32 or int64 labels, got torch.float32"),
    (changed("labels", lambda t: t[:1]), r"expected labels to have shape \[2, H, W\], got \[1, 4, 5\]"),
    (changed("labels", lambda t: t[:, :, ::2]), "expected labels contiguous.*call .contiguous"),
    (changed("labels", lambda t: t.to("meta")), "expected labels on .* like the logits, got meta"),
    (changed("weight", lambda t: t[:2]), r"expected weight to have shape \[3\].*got shape \[2\]"),
    (changed("weight", lambda t: t.int()), "expected weight .* floating dtype, got .*int32"),
    (changed("weight", lambda t: t.repeat(2)[::2]), "expected weight contiguous"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_tensors_that_do_not_fit_are_refused(change, message):
    case = Case((2, 3, 2, 3), (4, 5))
    change(case)
    with pytest.raises(RuntimeError, match=f"^seg_ce: .*{message}"):
        case.forward()


def test_other_arguments_that_do_not_fit_are_refused():
    case = Case((1, 3, 2, 3), (4, 5))
    with pytest.raises(RuntimeError, match=r"^seg_ce: expected ignore_index outside the classes \[0, 3\), got 2"):
        kernels.seg_ce_fwd(case.logits, case.labels, None, 2, True)
    with pytest.raises(RuntimeError, match=r"^seg_ce_predict: expected a height and width .* got 0 and 5$"):
        kernels.seg_ce_predict(case.logits, 0, 5)
    with pytest.raises(RuntimeError, match=r"^seg_ce_predict: expected logits"):
        kernels.seg_ce_predict(case.logits[0], 4, 5)
    loss, _, total, kept = case.forward()
    for arguments, message in (
        ((loss.float(), total, kept, 0), "expected a scalar grad of torch.float64"),
        ((loss, total.expand(2), kept, 0), "expected a scalar total"),
        ((loss, total, kept[0], 0), "expected what seg_ce_fwd kept"),
        ((loss, total, kept.half(), 0), "expected what seg_ce_fwd kept"),
        ((loss, total, kept.transpose(2, 3), 0), "expected a contiguous or channels-last map"),
        ((loss, total, kept, 4), "expected a dtype code of 0 to 3, got 4"),
    ):
        with pytest.raises(RuntimeError, match=f"^seg_ce_bwd: {message}"):
            kernels.seg_ce_bwd(*arguments)
