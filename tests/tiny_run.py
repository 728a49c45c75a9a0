"""The smallest run: a network of a few convolutions, on a few procedural frames."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from transkd_fast.data import StreetScenes, write_folder
from transkd_fast.models import StageOutputs
from transkd_fast.train import Config, load_config


class TinyNet(nn.Module):
    """Four stages of one convolution each, with the batch norm, dropout and stochastic depth that a resumed run must hit."""

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
