"""seg_ce on every backend that can run here, against torch's interpolation and cross-entropy in fp64."""

import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load
from kernels_here import device_of
from op_checks import OpChecks, each
from op_description import Cases, Op, random

from transkd_fast.functional import seg_ce, seg_ce_loss, seg_predict
from transkd_fast.ops._registration import raw_op
from transkd_fast.reference import seg_ce as reference

IGNORED = 255


class Case(NamedTuple):
    classes: int
    size: tuple[int, int]  # of the logits
    labels: tuple[int, int]
    batch: int = 2


def make(case, dtype=torch.float32, layout="nchw", ignored=0.2):
    classes, size, label_size, batch = case
    logits = random((batch, classes, *size), dtype, layout)
    labels = torch.randint(classes, (batch, *label_size))
    labels[torch.rand(batch, *label_size) < ignored] = IGNORED
    weight = torch.rand(classes, dtype=torch.float64) + 0.1
    return {"logits": logits, "labels": labels, "weight": weight.to(torch.promote_types(dtype, torch.float32))}


def call(inputs, backend):
    result = seg_ce(inputs["logits"], inputs["labels"], inputs["weight"], IGNORED, backend)
    return result.loss, result.counts


def unweighted(inputs, backend):
    return seg_ce(inputs["logits"], inputs["labels"], None, IGNORED, backend)


def raw_calls(inputs, backend):
    logits = inputs["logits"]
    yield "seg_ce_fwd", (logits, inputs["labels"], inputs["weight"], IGNORED, False)
    forward = logits, inputs["labels"].to(torch.uint8), None, IGNORED, True
    yield "seg_ce_fwd", forward
    loss, _, total, kept = raw_op("seg_ce_fwd", backend)(*forward)
    yield "seg_ce_bwd", (loss, total, kept, 2)
    yield "seg_ce_predict", (logits, 7, 9)


# Larger labels by whole and other ratios, equal, smaller, one row or column; classes off the vector width.
FEW = [Case(5, (3, 4), (8, 12)), Case(19, (4, 5), (7, 11)), Case(2, (6, 9), (4, 3))]
SEG_CE = Op(
    name="seg_ce",
    inputs=make,
    call=call,
    raw_calls=raw_calls,
    leaves=("logits",),
    saves=(),
    mixed=(
        {"logits": torch.bfloat16, "weight": torch.float64},
        {"logits": torch.float16, "weight": torch.bfloat16},
    ),
    cases=Cases(
        every=[
            Case(19, (16, 32), (64, 128)),
            *FEW,
            Case(20, (9, 13), (9, 13)),
            Case(41, (5, 40), (61, 123)),
            Case(150, (6, 7), (13, 30)),
            Case(3, (33, 20), (16, 10)),
            Case(19, (1, 1), (9, 40), 1),
            Case(7, (1, 9), (1, 35)),
            Case(7, (9, 1), (30, 1)),
            Case(4, (2, 3), (100, 2), 3),
        ],
        some=[*FEW, Case(19, (16, 32), (64, 128)), Case(150, (6, 7), (13, 30))],
        few=FEW,
    ),
    sizes=Cases(
        every=[Case(3, (h, 4), (n, 5)) for h in (1, 2, 5) for n in (1, 3, 8)],
        some=[Case(3, (h, 4), (n, 5)) for h in (1, 5) for n in (1, 8)],
        few=[Case(3, (h, 4), (n, 5)) for h in (1, 5) for n in (1, 8)],
    ),
    tiny=Case(3, (3, 2), (5, 6)),
    even=Case(8, (4, 8), (16, 32)),
    odd=Case(5, (5, 7), (13, 18)),
    medium=Case(19, (8, 8), (16, 16)),
    large=Case(19, (48, 40), (191, 160)),
    eager_tolerance={torch.float32: 5e-6},  # torch rounds the source positions of float32
)
SIZES = [(8, 12), (3, 4), (7, 5), (2, 2), (1, 1)]


class TestSegCE(OpChecks):
    op = SEG_CE

    # What it keeps is the gradient, which has the logits' size in float32, not the logits.
    test_saves_no_more_than_it_needs = None

    @each("layout", [(layout,) for layout in SEG_CE.layouts])
    def test_keeps_no_more_than_the_gradient(self, layout, backend):
        inputs = self.op.make(self.op.medium, torch.bfloat16, layout, backend)
        saved = {}

        def pack(tensor):
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(self.op.prepared(inputs), backend)
        assert sum(saved.values()) <= 4 * inputs["logits"].numel() + 64

    @each("layout", [(layout,) for layout in SEG_CE.layouts], few=[("nchw",)], eager=True)
    def test_without_class_weights(self, layout, backend):
        for case in FEW[:2]:
            self.op.check(self.op.make(case, layout=layout, backend=backend), backend, call=unweighted)

    @each("dtype", [(d,) for d in (torch.uint8, torch.int16, torch.int32)], eager=True)
    def test_label_dtypes_agree(self, dtype, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        expected = self.op.run(inputs, backend)
        values = self.op.run(inputs | {"labels": inputs["labels"].to(dtype)}, backend)
        assert all(torch.equal(values[name], value) for name, value in expected.items())

    @each("ignore_index", [(-100,), (-1,), (5,)], eager=True)
    def test_any_ignore_index_outside_the_classes(self, ignore_index, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        expected = call(inputs, backend)
        labels = inputs["labels"].where(inputs["labels"] != IGNORED, ignore_index)
        result = seg_ce(inputs["logits"], labels, inputs["weight"], ignore_index, backend)
        assert torch.equal(result.loss, expected[0]) and torch.equal(result.counts, expected[1])

    @each(eager=True)
    def test_labels_out_of_range_are_counted_and_left_out(self, backend):
        """Inside a compiled graph and on a GPU; the raw op is what both run."""
        inputs = self.op.make(self.op.odd, backend=backend)
        wrong = inputs["labels"].clone()
        wrong[0, 1, :4] = torch.tensor([5, -1, 300, -(2**40)])
        ignored = wrong.clone()
        ignored[0, 1, :4] = IGNORED
        leaves = [inputs["logits"].clone().requires_grad_() for _ in range(2)]
        if backend == "eager":
            results = [
                reference.seg_ce(leaf, t, inputs["weight"], IGNORED)
                for leaf, t in zip(leaves, (wrong, ignored), strict=True)
            ]
            gradients = [torch.autograd.grad(r[0], leaf)[0] for r, leaf in zip(results, leaves, strict=True)]
        else:
            outputs = [
                raw_op("seg_ce_fwd", backend)(inputs["logits"], t, inputs["weight"], IGNORED, True)
                for t in (wrong, ignored)
            ]
            results, gradients = [(out[0], out[1]) for out in outputs], [out[3] for out in outputs]
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(gradients[0], gradients[1])
        counts = [result[1].tolist() for result in results]
        assert counts[0][3] == 4 and counts[1][3] == 0
        assert counts[0][:2] == counts[1][:2] and counts[0][2] == counts[1][2] - 4

    @each("layout", [(layout,) for layout in SEG_CE.layouts], eager=True)
    def test_all_pixels_ignored_gives_zero(self, layout, backend):
        torch.manual_seed(0)
        inputs = {name: t.to(device_of(backend)) for name, t in make(self.op.odd, layout=layout, ignored=2.0).items()}
        for function in (call, unweighted):
            values = self.op.run(inputs, backend, call=function)
            assert values["output 0"] == 0 and not values["gradient of logits"].any()
            assert values["output 1"].tolist() == [0, 0, 2 * 13 * 18, 0]

    @each(eager=True)
    def test_only_weightless_classes_give_zero(self, backend):
        inputs = self.op.make(self.op.odd, backend=backend)
        inputs["labels"] = torch.zeros_like(inputs["labels"])
        inputs["weight"][0] = 0
        values = self.op.run(inputs, backend)
        assert values["output 0"] == 0 and not values["gradient of logits"].any()

    @each("layout", [(layout,) for layout in SEG_CE.layouts], few=[("nchw",)], eager=True)
    def test_a_weight_that_is_nan_is_not_hidden(self, layout, backend):
        inputs = self.op.make(self.op.odd, layout=layout, backend=backend)
        inputs["weight"][3] = torch.nan
        values = self.op.run(inputs, backend)
        assert values["output 0"].isnan() and values["gradient of logits"].isnan().any()

    @each(
        "layout dtype",
        [(layout, dtype) for layout in SEG_CE.layouts for dtype in (torch.float32, torch.float64)],
        few=[("nchw", torch.float32)],
        eager=True,
    )
    def test_large_logits(self, layout, dtype, backend):
        """Ratios of 2 and 4 weigh by sixteenths, so that float32 interpolates these values exactly."""
        inputs = self.op.make(Case(19, (4, 8), (16, 16)), dtype, layout, backend)
        inputs["logits"] = (inputs["logits"] * 4000).clamp(-1e4, 1e4).round()
        values = self.op.check(inputs, backend)
        assert all(value.isfinite().all() for value in values.values())

    @each("size layout", list(itertools.product(SIZES, SEG_CE.layouts)), few=[((7, 5), "nchw"), ((2, 2), "nchw")])
    def test_predicts_the_class_of_the_highest_score(self, size, layout, backend):
        logits = self.op.make(Case(5, (3, 4), size), torch.float64, layout, backend)["logits"]
        expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
        assert torch.equal(seg_predict(logits, size, backend), expected)

    @each("dtype", [(torch.float32,), (torch.bfloat16,), (torch.float16,)], few=[(torch.float32,)], eager=True)
    def test_the_first_of_equal_scores_wins_and_nan_is_highest(self, dtype, backend):
        logits = torch.zeros(1, 4, 3, 3, dtype=dtype, device=device_of(backend))
        logits[0, 1:3, 0, 0] = 1
        logits[0, 2, 2, 2] = torch.nan
        classes = torch.zeros(3, 3, dtype=torch.int64)
        classes[0, 0], classes[2, 2] = 1, 2
        assert torch.equal(seg_predict(logits, (3, 3), backend)[0].cpu(), classes)
        counts = seg_ce(logits, classes[None].to(logits.device), backend=backend).counts
        assert counts.tolist() == [9, 9, 0, 0]

    @each()
    def test_raw_ops_repeat_the_contract(self, backend):
        logits, labels, weight = self.op.make(self.op.odd, backend=backend).values()
        forward, backward = raw_op("seg_ce_fwd", backend), raw_op("seg_ce_bwd", backend)
        with pytest.raises(RuntimeError, match=r"seg_ce: expected labels"):
            forward(logits, labels[:1].contiguous(), None, IGNORED, True)
        with pytest.raises(RuntimeError, match=r"seg_ce: expected .*labels"):
            forward(logits, labels.float(), None, IGNORED, True)
        with pytest.raises(RuntimeError, match=r"seg_ce: expected .*weight"):
            forward(logits, labels, weight[:2].contiguous(), IGNORED, True)
        with pytest.raises(RuntimeError, match=r"seg_ce: expected .*contiguous"):
            forward(logits[:, :, 1:], labels, None, IGNORED, True)
        with pytest.raises(RuntimeError, match=r"seg_ce: expected .*ignore_index"):
            forward(logits, labels, None, 2, True)
        with pytest.raises(RuntimeError, match="seg_ce_predict: expected a height and width"):
            raw_op("seg_ce_predict", backend)(logits, 0, 4)
        loss, _, total, kept = forward(logits, labels, None, IGNORED, True)
        with pytest.raises(RuntimeError, match=r"seg_ce_bwd: expected .*grad"):
            backward(loss.double(), total, kept, 0)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("size", SIZES)
def test_reference_agrees_with_interpolate_and_cross_entropy(size, weighted):
    logits, labels, weight = make(Case(5, (3, 4), size), torch.float64).values()
    labels[0, 0, 0] = 1
    weight = weight if weighted else None
    up = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(up, labels, weight, ignore_index=IGNORED)
    loss, counts = reference.seg_ce(logits, labels, weight, IGNORED)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    valid = labels != IGNORED
    right = (up.argmax(1) == labels) & valid
    assert counts.tolist() == [valid.sum(), right.sum(), (~valid).sum(), 0]


@pytest.mark.parametrize("backend", ("eager", None))
def test_golden_class_weights(backend):
    """Void is class 19 of weight 0 there; ignored under another number it is the same."""
    case = load("losses")["ce"]
    weight = torch.tensor(case["class_weight"], dtype=torch.float64)
    for target in (case["target"], case["target"].where(case["target"] != 19, 255)):
        logits = case["logits"].double().requires_grad_()
        loss = seg_ce_loss(logits, target, weight, backend=backend)
        loss.backward()
        compare({"loss": loss, "grad": logits.grad}, case["f64"], 1e-9)


LOGITS, LABELS = torch.zeros(2, 5, 3, 4), torch.zeros(2, 8, 12, dtype=torch.long)
BAD = {
    "label too large": ((LOGITS, LABELS + 5), ValueError, r"labels in \[0, 5\) or ignore_index 255, got 5 \(192 pix"),
    "negative label": ((LOGITS, LABELS - 1), ValueError, "got -1"),
    "labels of floats": ((LOGITS, LABELS.float()), TypeError, "expected labels to be a tensor of uint8, int16"),
    "labels no tensor": ((LOGITS, None), TypeError, "got NoneType"),
    "labels' batch": ((LOGITS, LABELS[:1]), ValueError, r"expected labels to have shape \[2, H, W\]"),
    "one-hot labels": ((LOGITS, LABELS[:, None]), ValueError, "expected labels"),
    "logits without a batch": ((LOGITS[0], LABELS), ValueError, "expected logits"),
    "logits of integers": ((LOGITS.long(), LABELS), TypeError, "expected logits"),
    "weight's length": ((LOGITS, LABELS, torch.ones(4)), ValueError, "expected weight"),
    "ignore_index no number": ((LOGITS, LABELS, None, 255.5), ValueError, "whole number outside the classes"),
    "ignore_index a class": (
        (LOGITS, LABELS, None, 4),
        ValueError,
        r"outside the classes \[0, 5\), got 4",
    ),
    "empty labels": ((LOGITS, LABELS[:, :0]), ValueError, "at least one element"),
    "empty batch": ((LOGITS[:0], LABELS[:0]), ValueError, "at least one element"),
    "labels on another device": ((LOGITS, LABELS.to("meta")), ValueError, "expected labels on cpu"),
}


@pytest.mark.parametrize("backend", ("eager", None))
@pytest.mark.parametrize(("args", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(args, error, message, backend):
    for function in (partial(seg_ce, backend=backend), partial(seg_ce_loss, backend=backend)):
        with pytest.raises(error, match=message):
            function(*args)


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, -1), 5, (2.5, 3)])
def test_predicting_at_a_bad_size(size):
    with pytest.raises(ValueError, match="seg_predict: expected size"):
        seg_predict(LOGITS, size)
