"""Training in two processes under torchrun gives what one process gives with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import multi_process_run
import pytest
import tiny_run
import torch
from tiny_run import rows, tiny_config

from transkd_fast import models
from transkd_fast.data import make_loader
from transkd_fast.train import ConfigError
from transkd_fast.train.distributed import joined


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes left, and how torchrun ended."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(Path(multi_process_run.__file__)), str(folder)]
    process = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    return folder, process


def test_two_processes_train_as_one_with_twice_the_batch(two, tmp_path):
    folder, process = two
    multi_process_run.twenty_steps(tmp_path, 4)
    expected = torch.load(tmp_path / "outcome-0.pt")
    assert len(expected["rows"]) == 5 and expected["rows"][-1]["step"] == 20
    for rank in range(2):
        path = folder / "steps" / f"outcome-{rank}.pt"
        assert path.exists(), process.stderr
        found = torch.load(path)
        torch.testing.assert_close(found["model"], expected["model"], rtol=1e-10, atol=1e-10)
        for got, row in zip(found["rows"], expected["rows"], strict=True):
            numbers = {key: value for key, value in row.items() if key != "images_per_second"}
            assert {key: got[key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-9, nan_ok=True)
        # Three frames do not share evenly among two processes; each is counted once.
        assert found["scores"] == expected["scores"]
        assert found["scores"]["pixels"] + found["scores"]["ignored"] == 3 * 64 * 64


def test_an_error_in_one_process_ends_all_and_leaves_the_checkpoints(two):
    folder, process = two
    assert process.returncode != 0 and "rank 1 fails" in process.stderr
    lines = process.stdout.splitlines()
    # Four frames, two processes: one step of the teacher, two of the student per epoch; the first process alone speaks.
    assert len([line for line in lines if line.startswith("teacher epoch 1/1")]) == 1
    assert (folder / "run" / "teacher" / "last.pt").exists()
    assert [row["step"] for row in rows(folder / "run" / "teacher")] == ["1"]
    assert not (folder / "run" / "student" / "last.pt").exists()
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:1"}, "device: expected 'auto', 'cpu' or 'cuda' with 2 processes"),
        ({"distill__legacy": "true"}, "distill.legacy: expected false with 2 processes"),
        ({"legacy__quarter_labels": "true"}, "legacy.quarter_labels: expected false with 2 processes"),
    ],
)
def test_what_needs_one_process_is_refused_before_they_join(settings, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message), joined(tiny_config(tmp_path, **settings)):
        pass


@pytest.mark.parametrize("skip", [0, 12])
def test_shares_of_a_batch_are_those_of_the_whole_batch(skip):
    def batches(batch_size, rank=0, replicas=1):
        loader = make_loader(list(range(23)), batch_size, True, 5, drop_last=True, rank=rank, replicas=replicas)
        loader.sampler.set_epoch(3, skip)
        loader.collate_fn = list
        assert len(loader) == (23 - skip) // (batch_size * replicas)
        return [list(batch) for batch in loader]

    parts = [batches(2, rank, 3) for rank in range(3)]
    together = [sorted(chain(*shares)) for shares in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in batches(6)] and len(together) == (3 if not skip else 1)


def test_each_frame_is_scored_once_whatever_the_number_of_processes():
    shares = []
    for rank in range(4):
        loader = make_loader(list(range(6)), 2, rank=rank, replicas=4)
        loader.collate_fn = list
        shares.append([frame for batch in loader for frame in batch])
    assert [len(share) for share in shares] == [2, 2, 1, 1] and sorted(chain(*shares)) == list(range(6))
