"""Scores at label size, against a count by hand and against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from transkd_fast.data import DataError
from transkd_fast.train.memory import peak_memory
from transkd_fast.train.metrics import SegmentationMeter

CPU = torch.device("cpu")
CLASSES = 6


def batches(seed=0, labels_size=(24, 40), logits_size=(6, 10), classes=CLASSES, occurring=range(CLASSES), count=3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([*occurring, 255])
    for _ in range(count):
        logits = torch.randn(2, classes, *logits_size, generator=generator)
        labels = values[torch.randint(len(values), (2, *labels_size), generator=generator)]
        yield logits, labels


def score(pairs, classes=CLASSES):
    meter = SegmentationMeter(classes, CPU)
    for logits, labels in pairs:
        meter.update(logits, labels)
    return meter.compute()


def predictions(logits, labels):
    return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)


def by_hand(pairs, classes=CLASSES):
    """IoU per class by counting in numpy; NaN where a class occurs neither in labels nor in predictions."""
    truth = np.concatenate([labels.numpy().ravel() for _, labels in pairs])
    guess = np.concatenate([predictions(*pair).numpy().ravel() for pair in pairs])
    guess, truth = guess[truth != 255], truth[truth != 255]
    iou = []
    for k in range(classes):
        union = np.sum((guess == k) | (truth == k))
        iou.append(np.sum((guess == k) & (truth == k)) / union if union else math.nan)
    return iou, float(np.mean(guess == truth)), len(truth)


@pytest.mark.parametrize(
    ("labels_size", "logits_size"), [((24, 40), (6, 10)), ((17, 23), (6, 10)), ((8, 8), (8, 8)), ((5, 7), (16, 16))]
)
def test_scores_by_hand(labels_size, logits_size):
    pairs = list(batches(1, labels_size, logits_size))
    scores = score(pairs)
    iou, accuracy, pixels = by_hand(pairs)
    np.testing.assert_allclose(scores.iou, iou, rtol=1e-12)
    assert scores.miou == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert scores.pixel_accuracy == pytest.approx(accuracy, rel=1e-12)
    assert scores.pixels == pixels
    assert scores.ignored == sum(int((labels == 255).sum()) for _, labels in pairs) > 0


def test_scores_of_a_drawn_case():
    logits = F.one_hot(torch.tensor([[[0, 0, 1, 1], [2, 2, 2, 0]]]), 4).permute(0, 3, 1, 2).float()
    labels = torch.tensor([[[0, 1, 1, 255], [2, 2, 0, 255]]])
    scores = score([(logits, labels)], 4)
    assert scores.iou[:3] == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    assert math.isnan(scores.iou[3])
    assert scores.miou == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3)
    assert (scores.pixel_accuracy, scores.pixels, scores.ignored) == (pytest.approx(4 / 6), 6, 2)


@pytest.mark.parametrize("occurring", [range(CLASSES), (0, 2, 5)])
def test_scores_agree_with_torchmetrics(occurring):
    pairs = list(batches(2, occurring=occurring))
    for logits, _ in pairs:  # class 4 is never predicted either, so that it is absent where the labels lack it
        logits[:, 4] = -100.0
    reference = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255)
    for logits, labels in pairs:
        reference.update(predictions(logits, labels), labels)
    scores = score(pairs)
    assert scores.miou == pytest.approx(reference.compute().item(), rel=1e-6)
    assert math.isnan(scores.iou[4]) == (4 not in occurring)


def test_absent_class_is_left_out_and_a_wrongly_predicted_one_is_not():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    perfect = F.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    assert score([(perfect, labels)], 3).miou == 1.0
    wrong = perfect.clone()
    wrong[0, 2, 0] = 9.0  # a row of 4 pixels is taken for class 2, which occurs in no label
    scores = score([(wrong, labels)], 3)
    assert scores.iou[0] == pytest.approx(12 / 16) and scores.iou[2] == 0.0 and math.isnan(scores.iou[1])
    assert scores.miou == pytest.approx((12 / 16 + 0) / 2)


def test_what_is_predicted_at_ignored_pixels_does_not_count():
    (logits, labels), *_ = batches(3, logits_size=(24, 40))
    other = logits.clone()
    other.movedim(1, -1)[labels == 255] = torch.randn(int((labels == 255).sum()), CLASSES)
    assert not torch.equal(predictions(logits, labels), predictions(other, labels))
    assert score([(logits, labels)]) == score([(other, labels)])


def test_logits_beyond_the_classes_take_no_part():
    pairs = list(batches(4, classes=CLASSES + 2))
    for logits, _ in pairs:
        logits[:, CLASSES:] += 5.0
    assert score(pairs) == score([(logits[:, :CLASSES], labels) for logits, labels in pairs])


def test_batches_add_up():
    pairs = list(batches(5))
    whole = [(torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs]))]
    assert score(pairs) == score(whole)


def test_low_precision_logits_are_compared_in_float32():
    pairs = list(batches(6, count=1))
    rounded = [(logits.bfloat16(), labels) for logits, labels in pairs]
    assert score(rounded) == score([(logits.float(), labels) for logits, labels in rounded])


def test_logits_are_not_stored_at_label_size():
    classes, height, width = 32, 128, 256
    logits, labels = torch.randn(2, classes, 32, 64), torch.randint(classes, (2, height, width))
    meter = SegmentationMeter(classes, CPU)
    meter.update(logits, labels)
    _, peak = peak_memory(lambda: meter.update(logits, labels), CPU)
    # The confusion matrix takes its classes as int64, pixel by pixel.
    assert peak < 4 * classes * 2 * height * width / 2


def test_nothing_but_ignored_pixels_is_an_error():
    pairs = [(logits, torch.full_like(labels, 255)) for logits, labels in batches(7)]
    with pytest.raises(DataError, match="expected at least one labelled pixel"):
        score(pairs)


def test_the_published_protocol_is_a_second_number_of_its_own():
    pairs = list(batches(5, (24, 40), (6, 10)))
    scores = score(pairs)
    # A label of every fourth pixel: rows 2, 6, 10, ... as the centres fall.
    quarters = torch.cat([labels[:, 2::4, 2::4].flatten() for _, labels in pairs])
    guesses = torch.cat([logits.argmax(1).flatten() for logits, _ in pairs])
    expected = MulticlassJaccardIndex(CLASSES, ignore_index=255)(guesses, quarters)
    assert scores.miou_stride4 == pytest.approx(expected.item(), rel=1e-6)
    assert scores.miou_stride4 != scores.miou
