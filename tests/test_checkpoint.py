"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from tiny_run import pattern

from transkd_fast.train import checkpoint
from transkd_fast.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    previous,
    remove_leftovers,
    save_checkpoint,
    write_text,
)

CONTENT = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "epoch": 3,
    "best": 0.25,
    "classes": ["road", "sky"],
    "scores": None,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_round_trip(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert same({key: loaded[key] for key in CONTENT}, CONTENT)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    save_checkpoint(CONTENT, tmp_path / "last.pt")
    assert stat.S_IMODE((tmp_path / "last.pt").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), CheckpointError),
        (MemoryError(), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_a_writer_that_dies_leaves_the_old_file_whole(error, raised, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(CONTENT, path)
    before = path.read_bytes()

    def die(content, file):
        file.write(before[: len(before) // 2])
        file.flush()
        raise error

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(raised):
        save_checkpoint({**CONTENT, "epoch": 4}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_writer_that_dies_the_first_time_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        save_checkpoint(CONTENT, tmp_path / "last.pt")
    assert os.listdir(tmp_path) == []


def test_the_new_file_is_complete_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(CONTENT, path)
    replace, seen = os.replace, []

    def watched(source, target):
        seen.append((load_checkpoint(path)["epoch"], torch.load(source, weights_only=True)["epoch"]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save_checkpoint({**CONTENT, "epoch": 4}, path)
    assert seen == [(3, 4)]
    assert load_checkpoint(path)["epoch"] == 4


def full_disk(path):
    return Path("/dev/full").open("wb")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_full_disk_is_said_and_leaves_the_old_files_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    for epoch in (3, 4):
        save_checkpoint({**CONTENT, "epoch": epoch}, path, keep_previous=True)
    monkeypatch.setattr(checkpoint, "_open", full_disk)
    for write in (lambda: save_checkpoint(CONTENT, path, keep_previous=True), lambda: write_text("text", path)):
        message = f"{path}: could not be written: No space left on device; free some space, .* {path} as written before"
        with pytest.raises(CheckpointError, match=message):
            write()
    assert [load_checkpoint(file)["epoch"] for file in (previous(path), path)] == [3, 4]
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_is_kept_and_some_checkpoint_is_whole_at_every_moment(links, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    replace, seen = os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append([load_checkpoint(file)["epoch"] for file in (previous(path), path) if file.exists()])

    monkeypatch.setattr(os, "replace", watched)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    for epoch in (1, 2, 3):
        save_checkpoint({**CONTENT, "epoch": epoch}, path, keep_previous=True)
    assert seen == [[1], [1, 1], [1, 2], [2, 2], [2, 3]] if links else [[1], [1], [1, 2], [2], [2, 3]]


def test_every_byte_that_is_wrong_is_found_or_does_not_matter(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(CONTENT, path)
    whole, found = path.read_bytes(), 0
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            found += 1
        else:
            assert same({key: loaded[key] for key in CONTENT}, CONTENT)
    values = whole.index(CONTENT["model"]["w"].numpy().tobytes())
    path.write_bytes(whole[: values + 9] + b"\xff" + whole[values + 10 :])
    with pytest.raises(CheckpointError, match=r"damaged.*: the checksum of .*/data/. does not fit"):
        load_checkpoint(path)
    assert found > 50


def test_where_the_newest_is_damaged_the_one_before_is_taken_with_a_message(tmp_path):
    path, lines = tmp_path / "last.pt", []
    assert load_newest(path, (), lines.append) is None
    for epoch in (3, 4):
        save_checkpoint({**CONTENT, "epoch": epoch}, path, keep_previous=True)
    content, source = load_newest(path, ("epoch",), lines.append)
    assert (content["epoch"], source, lines) == (4, path, [])
    path.write_bytes(path.read_bytes()[:-100])
    content, source = load_newest(path, ("epoch",), lines.append)
    assert (content["epoch"], source) == (3, previous(path))
    assert len(lines) == 1 and lines[0].startswith(f"{path}: not readable as a checkpoint (truncated, damaged")
    assert lines[0].endswith(f"; going on from the checkpoint before it, {previous(path)}")
    path.unlink()
    assert load_newest(path, (), lines.append)[0]["epoch"] == 3
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{previous(path)}: not readable .*choose another run_dir"):
        load_newest(path, (), lines.append)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    names = [".last.pt.123", ".best.pt.4", ".metrics.csv.5", ".last.previous.pt.6", ".notes", "last.pt", ".a.pt"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.pt", ".notes", "last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(share, tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(CONTENT, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=pattern(f"{path}: not readable as a checkpoint")):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{"model": {}}, {"format": "other/1"}, [1, 2], torch.ones(2), {"format": "transkd_fast/0"}], ids=repr
)
def test_file_of_another_kind(content, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=pattern(f"{path}: expected a checkpoint of format 'transkd_fast/1'")):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello\n", b"\x89PNG\r\n", bytes(100)])
def test_file_that_torch_did_not_write(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern(str(path))):
        load_checkpoint(path)


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(writer, tmp_path):
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    content = {"format": "transkd_fast/1", "model": Exploit(str(trace))}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=pattern(str(path))):
        load_checkpoint(path)
    assert not trace.exists()
    if writer == "torch":  # the file would have done it
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("name", ["none.pt", "."])
def test_missing_file(name, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / name)
