"""The smallest run: a network of a few convolutions, on a few procedural frames."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transkd_fast import models
from transkd_fast.data import StreetScenes, write_folder
from transkd_fast.models import StageOutputs
from transkd_fast.train import Config, load_config, train


class TinyNet(nn.Module):
    """Four stages of one convolution each, with a batch norm and dropout, whose state a resumed run must hit."""

    def __init__(
        self, num_classes: int, drop_path_rate: float = 0.0, channels: tuple[int, ...] = (4, 8, 12, 16)
    ) -> None:
        super().__init__()
        self.num_classes, self.channels = num_classes, channels
        inputs = (3, *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 5 if m == 0 else 3, 4 if m == 0 else 2, 2 if m == 0 else 1)
            for m, (i, o) in enumerate(zip(inputs, channels, strict=True))
        )
        self.norm = nn.BatchNorm2d(channels[0])
        self.drop = nn.Dropout(drop_path_rate)
        self.head = nn.Conv2d(channels[0] + channels[-1], num_classes, 1)

    def forward(self, images: Tensor, features_only: bool = False) -> StageOutputs:
        features, x = [], images
        for index, stage in enumerate(self.stages):
            x = stage(x) if index == 0 else stage(x.relu())
            x = self.norm(x) if index == 0 else x
            features.append(x)
        embeddings = [f.flatten(2).transpose(1, 2) for f in features]
        if features_only:
            return StageOutputs(features, embeddings, None)
        context = features[-1].mean((2, 3), keepdim=True).expand(-1, -1, *features[0].shape[2:])
        return StageOutputs(features, embeddings, self.head(self.drop(torch.cat([features[0], context], 1))))


class TinyTeacher(TinyNet):
    """The same with other channels, as teachers have."""

    def __init__(self, num_classes: int, drop_path_rate: float = 0.0) -> None:
        super().__init__(num_classes, drop_path_rate, (6, 10, 16, 24))


MODELS = {"tiny": TinyNet, "tiny_teacher": TinyTeacher}

SETTINGS = {
    "device": "cpu",
    "keep_memory": "false",
    "data.size": "[64,64]",
    "data.train_length": "4",
    "data.val_length": "3",
    "teacher.model": "tiny_teacher",
    "teacher.fit.epochs": "1",
    "teacher.fit.batch_size": "2",
    "student.model": "tiny",
    "fit.epochs": "2",
    "fit.batch_size": "2",
    "fit.lr": "0.01",
    "distill.mid_channels": "8",
    "verify.batches": "1",
    "verify.batch_size": "2",
}
SEGFORMER = {"teacher.model": "segformer_b0", "student.model": "segformer_b0", "data.size": "[32,64]"}


def overrides(run_dir: Path, **more: object) -> list[str]:
    """Overrides of a tiny run; dots in the keys of `more` are written as double underscores."""
    settings = SETTINGS | {"run_dir": str(run_dir)} | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def tiny_config(run_dir: Path, **more: object) -> Config:
    return load_config(None, overrides(run_dir, **more))


def camvid_folder(root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (64, 64)) -> Path:
    """A small folder of real files."""
    write_folder(StreetScenes(train, size, split="train"), root, "train")
    write_folder(StreetScenes(val, size, split="val"), root, "val")
    return root


def pattern(text: str) -> str:
    """A regular expression for the text itself, as `pytest.raises(match=...)` wants it."""
    return re.escape(text)


def quiet(line: str) -> None:
    """A log that goes nowhere."""


def rows(folder: Path) -> list[dict[str, str]]:
    """The metrics of a training."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(a: Any, b: Any) -> bool:
    """Whether two nests of containers and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time and content of every file."""
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


RUN = {"fit__epochs": 3, "teacher__fit__epochs": 2, "student__drop_path": 0.5, "teacher__drop_path": 0.3}


def whole_run(run_dir: Path) -> Path:
    """A run with the settings of `RUN`, from start to end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, network in MODELS.items():
            patch.setitem(models.MODELS, name, network)
        train(tiny_config(run_dir, **RUN), quiet)
    return run_dir
