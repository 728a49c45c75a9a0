"""What a training writes for TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import quiet, rows, tiny_config

from transkd_fast import models
from transkd_fast.data import StreetScenes
from transkd_fast.train import ConfigError, TrainingError, board, load_config, train

# Two looks per epoch, and a last epoch that is evaluated after one that is not.
RUN = {"tensorboard": "true", "data__train_length": 6, "log_every": 2, "fit__epochs": 3, "fit__eval_every": 2}
CLASSES = StreetScenes.classes


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def events(folder):
    """Scalars as (step, value) by tag, and images as (step, pixels)."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    images = {}
    for tag in found.Tags()["images"]:
        shown = found.Images(tag)
        images[tag] = [(e.step, np.array(Image.open(io.BytesIO(e.encoded_image_string)))) for e in shown]
    return scalars, images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, network in tiny_run.MODELS.items():
            patch.setitem(models.MODELS, name, network)
        train(tiny_config(folder, **RUN), quiet)
    return folder


def test_the_board_says_what_the_metrics_say(run):
    for name, evaluated in (("teacher", [3]), ("student", [6, 9])):
        scalars, images = events(run / name)
        table = rows(run / name)
        steps = [step for epoch in range(len(table)) for step in (3 * epoch + 2, 3 * epoch + 3)]
        losses = ["loss", "ce", "grad_norm", "pixel_accuracy", "ignored"] + ["hcl", "pea"] * (name == "student")
        for tag in [f"train/{loss}" for loss in losses] + ["lr", "images_per_second"]:
            assert [step for step, _ in scalars[tag]] == steps, tag
            at_ends = [value for step, value in scalars[tag] if step % 3 == 0]
            if tag != "images_per_second":
                assert at_ends == pytest.approx([float(row[tag]) for row in table], rel=1e-6), tag
        kept = {f"iou/{c}": f"val/iou/{c}" for c in CLASSES} | {t: t for t in ("val/miou", "val/pixel_accuracy")}
        for tag, column in kept.items():
            there = [(int(r["step"]), float(r[column])) for r in table if r[column] not in ("", "nan")]
            assert scalars.get(tag, []) == [(step, pytest.approx(value, rel=1e-6)) for step, value in there], tag
        assert [step for step, _ in scalars["val/miou"]] == evaluated
        assert len(images) == 3 and all([s for s, _ in shown] == evaluated for shown in images.values())


def test_pictures_show_image_label_and_prediction(run):
    config = load_config(run / "config.yaml")
    scenes = StreetScenes(3, (64, 64), config.seed, "val")
    _, images = events(run / "student")
    assert set(images) == {f"frames/{scenes.name(i)}" for i in range(3)}
    state = torch.load(run / "student" / "last.pt", weights_only=True)["model"]
    student = tiny_run.TinyNet(len(CLASSES)).eval()
    student.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    palette = StreetScenes.palette.numpy().astype(float)
    for index in range(3):
        pixels, labels = scenes.load(index)
        with torch.no_grad():
            logits = student(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).logits
        predicted = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").argmax(1)[0].numpy()
        shown = images[f"frames/{scenes.name(index)}"][-1][1]
        assert shown.shape[1] == 3 * 64 + 8
        views = [shown[-64:, 68 * k : 68 * k + 64].astype(float) for k in range(3)]
        assert np.abs(views[0] - pixels).max() <= 1
        known = labels < len(palette)
        meant = np.where(known[..., None], (pixels + palette[labels * known]) / 2, pixels)
        assert np.abs(views[1] - meant).max() <= 1.5
        assert (np.abs(views[2] - (pixels + palette[predicted]) / 2).max(2) > 1.5).mean() < 0.01


def test_watching_changes_nothing(run, tmp_path):
    train(tiny_config(tmp_path / "plain", **(RUN | {"tensorboard": "false"})), quiet)
    assert not list((tmp_path / "plain").rglob("*tfevents*"))
    for name in ("teacher", "student"):
        states = [torch.load(f / name / "last.pt", weights_only=True) for f in (run, tmp_path / "plain")]
        assert tiny_run.same(states[0]["model"], states[1]["model"])
        assert tiny_run.same(states[0]["optimizer"], states[1]["optimizer"])


def kill(monkeypatch, call, number, before):
    """Ends a run the hard way at some call; where `before` the board hears of it, its events are lost."""
    real = getattr(board.Board, call)

    def killed(this, trainer, at, *rest):
        if trainer.name == "student" and at == number:
            if not before:
                real(this, trainer, at, *rest)
            raise KeyboardInterrupt
        real(this, trainer, at, *rest)

    monkeypatch.setattr(board.Board, call, killed)


@pytest.mark.parametrize(
    ("call", "number", "before", "every"),
    [
        ("epoch", 2, True, "null"),  # the checkpoint is written, the scores are not shown yet
        ("epoch", 2, False, "null"),
        ("step", 8, False, "null"),  # two steps are shown that come again
        ("step", 6, False, "2"),  # goes on within an epoch
    ],
)
def test_a_resumed_run_goes_on_without_doubled_or_lost_steps(run, tmp_path, monkeypatch, call, number, before, every):
    settings = RUN | {"checkpoint_every": every}
    with monkeypatch.context() as patch:
        kill(patch, call, number, before)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "run", **settings), quiet)
    train(tiny_config(tmp_path / "run", **settings, resume="true"), quiet)
    assert len(list((tmp_path / "run" / "student").glob("*tfevents*"))) == 2
    for name in ("teacher", "student"):
        scalars, images = events(tmp_path / "run" / name)
        wanted, pictures = events(run / name)
        scalars.pop("images_per_second"), wanted.pop("images_per_second")
        assert scalars == wanted
        assert {tag: [s for s, _ in shown] for tag, shown in images.items()} == {
            tag: [s for s, _ in shown] for tag, shown in pictures.items()
        }
        assert all(
            np.array_equal(a[1], b[1]) for tag in images for a, b in zip(images[tag], pictures[tag], strict=True)
        )


def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard: the package is missing; install it with .*\[train\]"):
        train(tiny_config(tmp_path / "run", **RUN), quiet)
    assert not (tmp_path / "run").exists()


def test_files_are_closed_where_a_run_fails(tmp_path, monkeypatch):
    closed = []
    real = board.Board.close
    monkeypatch.setattr(board.Board, "close", lambda self: (real(self), closed.append(self._writer))[0])
    monkeypatch.setattr("transkd_fast.train.loop.Trainer._finish_epoch", _refuse)
    with pytest.raises(TrainingError):
        train(tiny_config(tmp_path / "run", **RUN), quiet)
    assert closed[-1] is None and not math.isnan(events(tmp_path / "run" / "teacher")[0]["train/loss"][0][1])


def _refuse(*rest):
    raise TrainingError("enough")
