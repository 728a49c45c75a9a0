"""Whole runs: what the run folder holds, what evaluation makes of it, what is refused before anything is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image
from tiny_run import RUN, camvid_folder, pattern, quiet, rows, same, snapshot, tiny_config, whole_run

from transkd_fast import models
from transkd_fast.data import DataError
from transkd_fast.models import WeightsError
from transkd_fast.train import (
    CheckpointError,
    ConfigError,
    evaluate_run,
    load_config,
    train,
)
from transkd_fast.train.checkpoint import load_checkpoint
from transkd_fast.train.loop import FitResult, Trainer
from transkd_fast.train.metrics import Scores
from transkd_fast.train.run import RunResult, _write_summary


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


# The run folder.


def test_an_existing_run_is_not_touched(uninterrupted):
    before = snapshot(uninterrupted)
    with pytest.raises(
        ConfigError, match=f"run_dir: {pattern(str(uninterrupted))} already holds files; set resume=true"
    ):
        train(tiny_config(uninterrupted, **RUN), quiet)
    assert snapshot(uninterrupted) == before


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="run_dir"):
            train(tiny_config(tmp_path, resume=resume), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_run_folder(tmp_path):
    (tmp_path / "run").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=f"run_dir: expected a folder.*{pattern(str(tmp_path / 'run'))}"):
            train(tiny_config(tmp_path / "run", resume=resume), quiet)
    assert (tmp_path / "run").read_text() == "precious"


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="run_dir: expected a run to resume"):
        train(tiny_config(tmp_path / "run", resume=True), quiet)
    assert not (tmp_path / "run").exists()


def test_what_a_run_folder_holds(uninterrupted):
    files = ("metrics.csv", "last.pt", "last.previous.pt", "best.pt")
    assert {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()} == {
        "config.yaml",
        "environment.json",
        "summary.json",
        *(f"{name}/{file}" for name in ("teacher", "student") for file in files),
    }
    assert load_config(uninterrupted / "config.yaml") == tiny_config(uninterrupted, **RUN)
    assert json.loads((uninterrupted / "environment.json").read_text())["build"]["extensions"]["_C"]["loaded"]


def test_metrics_file(uninterrupted):
    classes = load_checkpoint(uninterrupted / "student" / "last.pt")["classes"]
    common = ["epoch", "step", "lr", "images_per_second"]
    scores = ["val/miou", "val/pixel_accuracy", "val/miou_stride4", *(f"val/iou/{name}" for name in classes)]
    terms = {"teacher": ["loss", "ce"], "student": ["loss", "ce", "hcl", "pea"]}
    for name, epochs in (("teacher", 2), ("student", 3)):
        table = rows(uninterrupted / name)
        trained = (*terms[name], "grad_norm", "pixel_accuracy", "ignored")
        assert list(table[0]) == common + [f"train/{term}" for term in trained] + scores
        assert [(int(row["epoch"]), int(row["step"])) for row in table] == [(e, 2 * e) for e in range(1, epochs + 1)]
        for row in table:
            total = sum(float(row[f"train/{term}"]) for term in terms[name][1:])
            assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
            present = [float(row[f"val/iou/{c}"]) for c in classes if not math.isnan(float(row[f"val/iou/{c}"]))]
            assert float(row["val/miou"]) == pytest.approx(sum(present) / len(present))


def test_summary_agrees_with_the_metrics(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["student"]["miou"] == float(rows(uninterrupted / "student")[-1]["val/miou"])
    assert summary["teacher"]["miou"] == float(rows(uninterrupted / "teacher")[-1]["val/miou"])
    assert summary["student_best_miou"] == max(float(row["val/miou"]) for row in rows(uninterrupted / "student"))
    assert len(summary["student"]["iou"]) == len(summary["classes"]) == 10


def test_summary_of_an_absent_class_is_strict_json(tmp_path):
    scores = Scores(0.25, [0.25, math.nan], 0.5, 10, 2)
    fit = FitResult(scores, 0.25, 1.0, tmp_path / "last.pt", tmp_path / "best.pt")
    _write_summary(RunResult(tmp_path, scores, fit, scores, ("road", "sky")))
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["student"]["iou"] == summary["teacher"]["iou"] == summary["student_before"]["iou"] == [0.25, None]


@pytest.mark.parametrize(
    ("part", "name"),
    [("", "student"), ("student", "student"), ("student/last.pt", "student"), ("teacher", "teacher")],
)
def test_evaluating_a_run_gives_its_last_scores(part, name, uninterrupted):
    scores, classes = evaluate_run(uninterrupted / part, [], quiet)
    last = rows(uninterrupted / name)[-1]
    assert scores.miou == float(last["val/miou"])
    assert same(scores.iou, [float(last[f"val/iou/{c}"]) for c in classes])
    assert scores.pixels + scores.ignored == 3 * 64 * 64


def test_evaluating_the_best_checkpoint_gives_the_best_score(uninterrupted):
    scores, _ = evaluate_run(uninterrupted / "student" / "best.pt", [], quiet)
    assert scores.miou == max(float(row["val/miou"]) for row in rows(uninterrupted / "student"))


def test_evaluation_takes_overrides(uninterrupted):
    scores, _ = evaluate_run(uninterrupted, ["data.val_length=1", "fit.batch_size=1"], quiet)
    assert scores.pixels + scores.ignored == 64 * 64


def test_evaluation_on_other_classes_is_refused(uninterrupted, tmp_path):
    root = camvid_folder(tmp_path)
    overrides = ["data.name=camvid", f"data.root={root}", "data.train_length=null", "data.val_length=null"]
    with pytest.raises(CheckpointError, match=r"was trained on the 10 classes sky, .*; expected those of camvid: sky"):
        evaluate_run(uninterrupted, overrides, quiet)


def test_evaluation_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=pattern(str(tmp_path))):
        evaluate_run(tmp_path, [], quiet)


def test_evaluation_of_a_checkpoint_outside_its_run(uninterrupted, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "last.pt").write_bytes((uninterrupted / "student" / "last.pt").read_bytes())
    with pytest.raises(ConfigError, match=pattern(str(tmp_path / "config.yaml"))):
        evaluate_run(tmp_path / "x", [], quiet)


def test_a_teacher_with_weights_is_not_trained(uninterrupted, tmp_path):
    weights = uninterrupted / "teacher" / "last.pt"
    lines = []
    result = train(tiny_config(tmp_path / "run", teacher__weights=weights), lines.append)
    assert result.teacher.miou == float(rows(uninterrupted / "teacher")[-1]["val/miou"])
    assert any(line.startswith("teacher: ") and str(weights) in line for line in lines)
    assert not (tmp_path / "run" / "teacher" / "last.pt").exists()


def test_a_student_alone(tmp_path):
    result = train(tiny_config(tmp_path / "run", distill__enabled=False), quiet)
    assert result.teacher is None
    assert [key for key in rows(tmp_path / "run" / "student")[0] if key.startswith("train/")] == [
        "train/loss",
        "train/ce",
        "train/grad_norm",
        "train/pixel_accuracy",
        "train/ignored",
    ]
    assert not (tmp_path / "run" / "teacher").exists()
    assert evaluate_run(tmp_path / "run", [], quiet)[0].miou == result.student.scores.miou


# Bad input, before the first step and before anything is written.


def refused(config, error, match):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: pytest.fail("a step was made"))
        with pytest.raises(error, match=match):
            train(config, quiet)
    assert not Path(config.run_dir).exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_label(path, value):
    with Image.open(path) as label:
        width, height = label.size
    Image.new("L", (width, height), value).save(path)


BREAKAGES = {
    "image without label": (lambda root: next((root / "labels/train").iterdir()).unlink(), "1 image.*without a label"),
    "label without image": (lambda root: next((root / "images/val").iterdir()).unlink(), "1 label.*without an image"),
    "truncated image": (lambda root: truncate(sorted((root / "images/train").iterdir())[-1]), "expected a readable"),
    "truncated label": (lambda root: truncate(sorted((root / "labels/val").iterdir())[-1]), "expected a readable"),
    "label out of range": (
        lambda root: overwrite_label(sorted((root / "labels/train").iterdir())[-1], 77),
        "expected label values out of .*, got 77",
    ),
    "empty folder": (
        lambda root: [path.unlink() for path in (root / "images/train").iterdir()],
        "images/train: expected .* files, found none",
    ),
    "missing folder": (lambda root: (root / "labels").rename(root / "masks"), "labels/train: expected a folder"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_data(breakage, tmp_path):
    break_it, message = BREAKAGES[breakage]
    root = camvid_folder(tmp_path / "data")
    break_it(root)
    settings = {"data__name": "camvid", "data__root": root, "data__train_length": "null", "data__val_length": "null"}
    refused(tiny_config(tmp_path / "run", **settings), DataError, message)


def test_a_folder_of_real_files_trains(tmp_path):
    root = camvid_folder(tmp_path / "data")
    settings = {"data__name": "camvid", "data__root": root, "data__train_length": "null", "data__val_length": "null"}
    result = train(tiny_config(tmp_path / "run", **settings), quiet)
    assert len(result.classes) == 11 and math.isfinite(result.student.scores.miou)


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_that_are_all_ignored(split, tmp_path):
    root = camvid_folder(tmp_path / "data")
    for path in (root / "labels" / split).iterdir():
        overwrite_label(path, 11)
    settings = {"data__name": "camvid", "data__root": root, "data__train_length": "null", "data__val_length": "null"}
    with pytest.raises(DataError, match=f"{split}: expected labelled pixels, got only ignored ones"):
        train(tiny_config(tmp_path / "run", **settings), quiet)
    assert not (tmp_path / "run").exists()


def test_validation_labels_of_different_sizes_are_scored_one_by_one(tmp_path):
    root = camvid_folder(tmp_path / "data")
    for folder in ("images", "labels"):
        path = sorted((root / folder / "val").iterdir())[0]
        image = Image.open(path)
        image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)
    settings = {"data__name": "camvid", "data__root": root, "data__train_length": "null", "data__val_length": "null"}
    result = train(tiny_config(tmp_path / "run", **settings), quiet)
    again, _ = evaluate_run(tmp_path / "run", [], quiet)
    assert same(result.student.scores.iou, again.iou)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit__batch_size": 5}, "expected enough frames for one batch of 5, got a dataset of 4"),
        ({"teacher__fit__batch_size": 5}, "expected enough frames for one batch of 5, got a dataset of 4"),
        ({"student__num_classes": 9}, "student.num_classes: expected at least 10"),
        ({"teacher__num_classes": 2}, "teacher.num_classes: expected at least 10"),
        ({"fit__class_weights": [1, 2]}, "fit.class_weights: expected 10 factors"),
        ({"teacher__fit__class_weights": [1, 2]}, "teacher.fit.class_weights: expected 10 factors"),
        ({"data__name": "camvid"}, "data: camvid: expected root"),
        ({"data__root": "here"}, "data: street_scenes: expected no root"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there"),
        ({"device": "cuda:x"}, "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got 'cuda:x'"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    refused(tiny_config(tmp_path / "run", **settings), ConfigError, pattern(message))


def test_more_logits_than_classes_are_allowed(tmp_path):
    config = tiny_config(tmp_path / "run", student__num_classes=11, teacher__num_classes=12)
    result = train(config, quiet)
    assert len(result.student.scores.iou) == 10
    assert evaluate_run(tmp_path / "run", [], quiet)[0].miou == result.student.scores.miou


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_weights_that_do_not_fit(who, tmp_path):
    config = tiny_config(tmp_path / "run", **{f"{who}__weights": tmp_path / "none.pt"})
    refused(config, WeightsError, "found none")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    config = tiny_config(tmp_path / "run", **{f"{who}__weights": tmp_path / "other.pt"})
    refused(config, WeightsError, "does not fit")
