"""The op seg_ce against torch's interpolation and cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load
from torch.autograd import gradcheck

from transkd_fast.functional import seg_ce_loss
from transkd_fast.reference import seg_ce as reference


def arguments(size=(8, 12), classes=5, dtype=torch.float64, ignored=0.2):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (2, *size), generator=generator)
    labels[torch.rand(2, *size, generator=generator) < ignored] = 255
    weight = torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype) + 0.1
    return logits, labels, weight


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("size", [(8, 12), (3, 4), (7, 5), (2, 2)])
def test_agrees_with_interpolate_and_cross_entropy(size, weighted):
    logits, labels, weight = arguments(size)
    weight = weight if weighted else None
    up = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(up, labels, weight, ignore_index=255)
    torch.testing.assert_close(seg_ce_loss(logits, labels, weight), expected, rtol=1e-12, atol=0)


def test_golden_class_weights():
    case = load("losses")["ce"]
    logits = case["logits"].double().requires_grad_()
    weight = torch.tensor(case["class_weight"], dtype=torch.float64)
    # Void is class 19 of weight 0 there; ignoring it is the same.
    for ignore_index in (255, 19):
        logits.grad = None
        loss = seg_ce_loss(logits, case["target"], weight, ignore_index)
        loss.backward()
        compare({"loss": loss, "grad": logits.grad}, case["f64"], 1e-9)


@pytest.mark.parametrize("weighted", (False, True))
def test_gradcheck(weighted):
    logits, labels, weight = arguments((5, 6))
    weight = weight if weighted else None
    assert gradcheck(lambda t: reference.seg_ce(t, labels, weight), [logits.requires_grad_()])


@pytest.mark.parametrize("weighted", (False, True))
def test_all_pixels_ignored_gives_zero(weighted):
    logits, labels, weight = arguments(ignored=2.0)
    logits.requires_grad_()
    loss = seg_ce_loss(logits, labels, weight if weighted else None)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_weightless_classes_give_zero():
    logits, labels, weight = arguments()
    assert seg_ce_loss(logits, torch.zeros_like(labels), weight * (torch.arange(5) > 0)).item() == 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_logits_are_computed_in_float32(dtype):
    logits, labels, weight = arguments(dtype=dtype)
    loss = seg_ce_loss(logits, labels, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, seg_ce_loss(logits.float(), labels, weight.float()), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(seg_ce_loss(logits, labels, weight), loss, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32))
def test_label_dtypes_agree(dtype):
    logits, labels, weight = arguments()
    expected = seg_ce_loss(logits, labels, weight)
    torch.testing.assert_close(seg_ce_loss(logits, labels.to(dtype), weight), expected, rtol=0, atol=0)


LOGITS, LABELS = torch.zeros(2, 5, 3, 4), torch.zeros(2, 8, 12, dtype=torch.long)
BAD = {
    "label too large": ((LOGITS, LABELS + 5), ValueError, r"labels in \[0, 5\) or ignore_index 255, got 5"),
    "negative label": ((LOGITS, LABELS - 1), ValueError, "got -1"),
    "labels of floats": ((LOGITS, LABELS.float()), TypeError, "expected labels to be an integer tensor"),
    "labels no tensor": ((LOGITS, None), TypeError, "got NoneType"),
    "labels' batch": ((LOGITS, LABELS[:1]), ValueError, r"expected labels to have shape \[2, H, W\]"),
    "one-hot labels": ((LOGITS, LABELS[:, None]), ValueError, "expected labels"),
    "logits without a batch": ((LOGITS[0], LABELS), ValueError, "expected logits"),
    "logits of integers": ((LOGITS.long(), LABELS), TypeError, "expected logits"),
    "weight's length": ((LOGITS, LABELS, torch.ones(4)), ValueError, "expected weight"),
    "empty labels": ((LOGITS, LABELS[:, :0]), ValueError, "at least one element"),
    "empty batch": ((LOGITS[:0], LABELS[:0]), ValueError, "at least one element"),
    "labels on another device": ((LOGITS, LABELS.to("meta")), ValueError, "expected labels on cpu"),
}


@pytest.mark.parametrize(("args", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        seg_ce_loss(*args)
