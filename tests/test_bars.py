"""Progress bars: whatever goes over all frames, or takes its time over a few batches, shows how far it is."""

from __future__ import annotations

import pytest
import tiny_run
from tiny_run import camvid_folder, quiet, tiny_config

from transkd_fast import models
from transkd_fast.train import TrainingError, loop, preflight, run, train, verify, verify_config


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is shown: its text, and over how many things it went to the end."""
    found = []

    class Bar(loop.tqdm):
        def __init__(self, iterable=None, desc=None, **more):
            super().__init__(iterable, desc, **(more | {"disable": True}))
            self.text, self.over = desc, more.get("total") if iterable is None else len(iterable)

        def __iter__(self):
            yield from super().__iter__()
            found.append((self.text, self.over))

        def __exit__(self, *rest):
            found.append((self.text, self.over))
            return super().__exit__(*rest)

    for module in (loop, preflight, run, verify):
        monkeypatch.setattr(module, "tqdm", Bar)
    return found


def test_a_run_shows_how_far_it_is(tmp_path, bars):
    root = camvid_folder(tmp_path / "data", train=4, val=3)
    more = {"data__name": "camvid", "data__root": root, "data__train_length": "null", "data__val_length": "null"}
    train(tiny_config(tmp_path / "run", **more), quiet)
    teacher, student = (
        [(f"{name} {epoch}/{of}", 2), (f"{name} evaluation", 2)]
        for name, epoch, of in (("teacher", 1, 1), ("student", 1, 2))
    )
    before = [("student evaluation", 2)]
    second = [("student 2/2", 2), ("student evaluation", 2)]
    assert bars == [("check train", 4), ("check val", 3), *teacher, *before, *student, *second]
    bars.clear()
    run.evaluate_run(tmp_path / "run", [], quiet)
    assert bars == [("check val", 3), ("eval", 2)]


def test_verify_shows_how_far_it_is(tmp_path, bars):
    verify_config(tiny_config(tmp_path / "run", verify__batches=2), quiet)
    assert bars == [("verify: backend", 2), ("verify: fp64", 2), ("verify: timing", verify.TIMED_ROUNDS)]


def test_the_look_at_a_teacher_s_normalisation_shows_how_far_it_is(tmp_path, bars):
    train(tiny_config(tmp_path / "run"), quiet)
    weights = tmp_path / "run" / "teacher" / "last.pt"
    bars.clear()
    with pytest.raises(TrainingError, match="expected an mIoU of at least"):
        train(tiny_config(tmp_path / "other", teacher__weights=weights, teacher__expect_miou=1.0), quiet)
    assert bars[-3:] == [("teacher's normalisation", 2)] * 3
