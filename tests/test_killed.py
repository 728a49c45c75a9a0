"""Runs that are killed, stopped, damaged or out of disk at any moment end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from test_resume import outcome
from tiny_run import pattern, quiet, same, tiny_config

from transkd_fast import models
from transkd_fast.train import CheckpointError, checkpoint, train
from transkd_fast.train.checkpoint import load_checkpoint, previous
from transkd_fast.train.loop import Trainer
from transkd_fast.train.signals import Terminated

# Three steps of two batches each per epoch, every random thing switched on, and a checkpoint after every step.
RUN = {
    "data__train_length": 12,
    "fit__epochs": 2,
    "fit__accumulate": 2,
    "fit__ema": 0.9,
    "student__drop_path": 0.5,
    "teacher__drop_path": 0.3,
    "checkpoint_every": 1,
}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, network in tiny_run.MODELS.items():
            patch.setitem(models.MODELS, name, network)
        # No checkpoint within an epoch, and other steps at which the loop reads back.
        train(tiny_config(run_dir, **RUN | {"checkpoint_every": "null"}, log_every=2), quiet)
    return outcome(run_dir)


def ends_alike(run_dir, undisturbed, lines=None):
    """Goes on with a run and says what is not as in the run that nothing disturbed."""
    train(tiny_config(run_dir, **RUN, resume=True), quiet if lines is None else lines.append)
    got = outcome(run_dir)
    assert [key for key in undisturbed if not same(undisturbed[key], got[key])] == []
    assert not list(run_dir.rglob(".*"))


def at_step(patch, name, number, act):
    """Acts after a step is made, before anything of it is counted."""
    make_step = Trainer._step

    def acting(self, batches, step, *rest):
        result = make_step(self, batches, step, *rest)
        if (self.name, step) == (name, number):
            act()
        return result

    patch.setattr(Trainer, "_step", acting)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "step"), [("teacher", 2), ("student", 1), ("student", 5)])
def test_a_run_goes_on_within_an_epoch(name, step, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, name, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "run", **RUN), quiet)
    # Of the three steps of an epoch none is lost but the one at hand; the last one's checkpoint is the epoch's.
    saved = load_checkpoint(tmp_path / "run" / name / "last.pt")
    assert saved["step"] == step
    made = []
    at_step(monkeypatch, name, step, lambda: made.append(step))
    lines = []
    ends_alike(tmp_path / "run", undisturbed, lines)
    assert made == [step]
    within = f" and {step % 3} steps of the next" if step % 3 else ""
    assert any(line.endswith(f"after epoch {step // 3}/{2 if name == 'student' else 1}{within}") for line in lines)


@pytest.mark.parametrize(("name", "step"), [("teacher", 0), ("student", 2)])
def test_sigterm_ends_a_run_with_a_checkpoint_after_the_step(name, step, undisturbed, tmp_path, monkeypatch):
    lines, before = [], signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, name, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated) as stop:
            train(tiny_config(tmp_path / "run", **RUN | {"checkpoint_every": "null"}), lines.append)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    last = tmp_path / "run" / name / "last.pt"
    assert lines[-1] == f"{name}: SIGTERM: stopped after step {step + 1}; resume=true goes on from {last}"
    assert load_checkpoint(last)["step"] == step + 1
    ends_alike(tmp_path / "run", undisturbed)


def test_sigterm_during_an_evaluation_loses_no_step(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        evaluate = Trainer.evaluate

        def stopped(self):
            if self.progress.steps == 3 and self.name == "student":
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self)

        patch.setattr(Trainer, "evaluate", stopped)
        with pytest.raises(Terminated):
            train(tiny_config(tmp_path / "run", **RUN | {"checkpoint_every": "null"}), quiet)
    saved = load_checkpoint(tmp_path / "run" / "student" / "last.pt")
    assert (saved["epoch"], saved["step"], saved["rows"]) == (0, 3, [])
    ends_alike(tmp_path / "run", undisturbed)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, "student", 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "run", **RUN), quiet)
    last = tmp_path / "run" / "student" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    lines = []
    ends_alike(tmp_path / "run", undisturbed, lines)
    assert any(f"{last}: not readable as a checkpoint (damaged)" in line for line in lines)
    assert f"student: resumed from {previous(last)} after epoch 1/2" in lines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("file", ["last.pt", "metrics.csv"])
def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_space(file, undisturbed, tmp_path, monkeypatch):
    opened, numbers = checkpoint._open, []

    def full(path):
        if f".{file}." in path.name and path.parent.name == "student":
            numbers.append(path)
            if len(numbers) == 2:
                return Path("/dev/full").open("wb")
        return opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_open", full)
        path = tmp_path / "run" / "student" / file
        with pytest.raises(CheckpointError, match=pattern(f"{path}: could not be written: No space left on device")):
            train(tiny_config(tmp_path / "run", **RUN), quiet)
    ends_alike(tmp_path / "run", undisturbed)


SCRIPT = """
import sys
import tiny_run
from transkd_fast import models
from transkd_fast.train import train
models.MODELS.update(tiny_run.MODELS)
train(tiny_run.load_config(None, sys.argv[1:]), lambda line: print(line, flush=True))
"""


def test_a_process_killed_at_a_random_moment_is_taken_up_again(undisturbed, tmp_path):
    """SIGKILL leaves no time for anything."""
    run_dir, delay = tmp_path / "run", random.Random(time.time_ns()).uniform(0, 1.5)
    command = [sys.executable, "-c", SCRIPT, *tiny_run.overrides(run_dir, **RUN)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("run folder"))
        time.sleep(delay)
        process.kill()
    print(f"killed {delay:.3f} s after its first step was due, code {process.returncode}")
    ends_alike(run_dir, undisturbed)
