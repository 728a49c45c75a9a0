"""Observers: told what the metrics file says, at the steps where the loop reads values back, and closed at the end."""

from __future__ import annotations

import pytest
import tiny_run
from tiny_run import quiet, rows, tiny_config

from transkd_fast import models
from transkd_fast.train import TrainingError, train
from transkd_fast.train.observers import Observer


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


class Recorder(Observer):
    def __init__(self):
        self.calls = []

    def start(self, trainer):
        self.calls.append(("start", trainer.name))

    def step(self, trainer, step, values):
        self.calls.append(("step", trainer.name, step, values))

    def epoch(self, trainer, epoch, row, scores):
        self.calls.append(("epoch", trainer.name, epoch, row, scores))

    def close(self):
        self.calls.append(("close",))


def test_observers_are_told_of_every_training_of_a_run(tmp_path):
    recorder = Recorder()
    config = tiny_config(tmp_path / "run", data__train_length=6, log_every=2, fit__eval_every=2)
    result = train(config, quiet, [Observer(), recorder])
    heads = [call[:3] for call in recorder.calls]
    teacher = [("start", "teacher"), ("step", "teacher", 2), ("step", "teacher", 3), ("epoch", "teacher", 1)]
    student = [("step", "student", 2), ("step", "student", 3), ("epoch", "student", 1)]
    student += [("step", "student", 5), ("step", "student", 6), ("epoch", "student", 2)]
    assert heads == [*teacher, ("start", "student"), *student, ("close",)]
    table = rows(tmp_path / "run" / "student")
    for epoch, index in enumerate((-5, -2)):
        row, scores = recorder.calls[index][3:]
        assert {key: str(value) for key, value in row.items()} == table[epoch]
        values = recorder.calls[index - 1][3]
        assert {str(values.pop("lr"))} == {table[epoch]["lr"]} and values.pop("images_per_second") > 0
        assert {f"train/{k}": str(v) for k, v in values.items()} == {k: v for k, v in row_of(table, epoch).items()}
        assert scores == (None if epoch == 0 else result.student.scores)


def row_of(table, epoch):
    return {key: value for key, value in table[epoch].items() if key.startswith("train/")}


def test_observers_are_closed_where_a_run_fails(tmp_path, monkeypatch):
    class Refusing(Recorder):
        def epoch(self, *rest):
            raise TrainingError("enough")

    observers = [Refusing(), Recorder()]
    with pytest.raises(TrainingError, match="enough"):
        train(tiny_config(tmp_path / "run"), quiet, observers)
    assert [observer.calls[-1] for observer in observers] == [("close",)] * 2
