"""Interrupted runs: their checkpoints are whole, and they end where they would have ended."""

from __future__ import annotations

import json
import math

import pytest
import tiny_run
import torch
from tiny_run import RUN, pattern, quiet, rows, same, snapshot, tiny_config, whole_run

from transkd_fast import models
from transkd_fast.train import (
    CheckpointError,
    ConfigError,
    loop,
    train,
)
from transkd_fast.train.checkpoint import load_checkpoint
from transkd_fast.train.loop import Trainer


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


def without_speed(table):
    return [{**row, "images_per_second": ""} for row in table]


def outcome(run_dir):
    """What must not depend on how a run came about: weights, optimiser, scores, metrics without the speed."""
    result = {}
    for name in ("teacher", "student"):
        for file in ("last.pt", "best.pt"):
            content = load_checkpoint(run_dir / name / file)
            result[f"{name}/{file}"] = content | {"rows": without_speed(content["rows"])}
        result[f"{name}/metrics.csv"] = without_speed(rows(run_dir / name))
    summary = json.loads((run_dir / "summary.json").read_text())
    return result | {"summary": {**summary, "images_per_second": None}}


def stop_at_step(monkeypatch, name, step):
    make_step = Trainer._step

    def stopping(self, batches, number, *rest):
        if (self.name, number) == (name, step):
            raise KeyboardInterrupt
        return make_step(self, batches, number, *rest)

    monkeypatch.setattr(Trainer, "_step", stopping)


def stop_at_save(monkeypatch, name, file, epoch):
    save = loop.save_checkpoint

    def stopping(content, path, **options):
        if (path.parent.name, path.name, content["epoch"]) == (name, file, epoch):
            raise KeyboardInterrupt
        save(content, path, **options)

    monkeypatch.setattr(loop, "save_checkpoint", stopping)


@pytest.mark.parametrize(
    ("stop", "where"),
    [
        (stop_at_step, ("teacher", 1)),
        (stop_at_step, ("teacher", 3)),
        (stop_at_step, ("student", 0)),
        (stop_at_step, ("student", 3)),
        (stop_at_save, ("student", "last.pt", 1)),
        (stop_at_save, ("student", "last.pt", 3)),
        (stop_at_save, ("student", "best.pt", 1)),
        (stop_at_save, ("teacher", "best.pt", 1)),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(stop, where, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, *where)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(run_dir, **RUN), quiet)
    for path in run_dir.rglob("*.pt"):
        load_checkpoint(path)
    assert not list(run_dir.rglob(".*"))
    train(tiny_config(run_dir, **RUN, resume=True), quiet)
    expected, got = outcome(uninterrupted), outcome(run_dir)
    assert [key for key in expected if not same(expected[key], got[key])] == []


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("workers", [(2, 2), (2, 0), (0, 2)])
def test_resumption_with_worker_processes(step, workers, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, "student", step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(run_dir, **RUN, data__workers=workers[0]), quiet)
    train(tiny_config(run_dir, **RUN, data__workers=workers[1], resume=True), quiet)
    expected, got = outcome(uninterrupted), outcome(run_dir)
    assert [key for key in expected if not same(expected[key], got[key])] == []


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    train(tiny_config(tmp_path / "run", **RUN, seed=1), quiet)
    expected, got = outcome(uninterrupted), outcome(tmp_path / "run")
    assert [key for key in expected if same(expected[key], got[key])] == []


@pytest.fixture
def stopped(tmp_path):
    """A run that was interrupted in the student's second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, "student", 2)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "run"), quiet)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("precision", "bf16"),
        ("fit.lr", 0.02),
        ("fit.class_weights", [1.0] * 10),
        ("teacher.fit.epochs", 2),
        ("data.size", [32, 64]),
        ("distill.variant", "ea"),
        ("student.model", "tiny_teacher"),
    ],
)
def test_resumption_with_another_configuration_is_refused(key, value, stopped):
    before = snapshot(stopped)
    with pytest.raises(ConfigError, match=f"^{pattern(key)}: expected .* a resumed run keeps its configuration"):
        train(tiny_config(stopped, **{key.replace(".", "__"): value}, resume=True), quiet)
    assert snapshot(stopped) == before


def test_resumption_may_change_what_does_not_change_the_outcome(stopped):
    threads = torch.get_num_threads()
    try:
        result = train(tiny_config(stopped, resume=True, log_every=1, threads=1, backend="eager"), quiet)
    finally:
        torch.set_num_threads(threads)
    assert math.isfinite(result.student.scores.miou)


def test_resumption_from_a_truncated_checkpoint(stopped):
    path = stopped / "student" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=pattern(f"{path}: not readable as a checkpoint")):
        train(tiny_config(stopped, resume=True), quiet)


def test_resumption_from_another_networks_checkpoint(stopped):
    path = stopped / "student" / "last.pt"
    path.write_bytes((stopped / "teacher" / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=pattern(f"{path}: expected a checkpoint with kind='student'")):
        train(tiny_config(stopped, resume=True), quiet)
