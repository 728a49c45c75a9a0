"""What is checked of a teacher before anything is distilled from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from transkd_fast.train.metrics import Scores
from transkd_fast.train.tasks import TrainingError

# Of the images that most published networks were trained on, RGB in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FRAMES = 32  # for the comparison of normalisations


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Renormalised(nn.Module):
    """A network whose images are scaled and shifted per channel first.

    Args:
        network: the network.
        scale: factor per channel.
        shift: added per channel after it.
    """

    def __init__(self, network: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network, self.scale, self.shift = network, scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    def forward(self, images: Tensor) -> Any:
        """The network's output for the changed images [B, 3, H, W]."""
        return self.network(images * self.scale + self.shift)


def check_teacher(
    teacher: nn.Module,
    scores: Scores,
    expected: float | None,
    weights: str,
    loader: DataLoader[Any],
    score: Callable[[nn.Module, Any], Scores],
) -> None:
    """Refuse a teacher that is worse than it should be, and say whether its input normalisation is the reason.

    Args:
        teacher: the teacher as it would be used.
        scores: its scores on the validation frames.
        expected: the least mIoU that it should have, in [0, 1]; None for no check.
        weights: the file that it was loaded from, for the message.
        loader: validation batches.
        score: scores a network on some batches.

    Raises:
        TrainingError: if it is worse.
    """
    if expected is None or scores.miou >= expected:
        return
    device = next(teacher.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    batches = list(islice(loader, max(1, FRAMES // (loader.batch_size or 1))))
    ways = {
        "as it is": teacher,
        "with ImageNet's mean and deviation applied to its images": Renormalised(teacher, 1 / std, -mean / std),
        "with them taken back": Renormalised(teacher, std, mean),
    }
    found = {}
    for name, network in ways.items():
        found[name] = score(network, tqdm(batches, "teacher's normalisation", leave=False, disable=None)).miou
    best = max(found, key=lambda name: found[name])
    table = ", ".join(f"{name} {100 * miou:.2f} %" for name, miou in found.items())
    advice = "its input normalisation does not seem to be the reason; check file, classes and their order"
    if best != "as it is":
        advice = f"it expects other images, for it is best {best}; choose the model whose normalisation is the file's"
    raise TrainingError(
        f"teacher: expected an mIoU of at least {100 * expected:.2f} % (teacher.expect_miou), got"
        f" {100 * scores.miou:.2f} % from {weights}. On {len(batches)} batches: {table}: {advice}, or lower"
        " teacher.expect_miou"
    )
