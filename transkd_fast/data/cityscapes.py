"""Cityscapes and ACDC: urban driving scenes with the nineteen classes of Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torchvision.datasets import Cityscapes as OfficialCityscapes

from transkd_fast.data.base import IGNORE_INDEX, DataError, Transforms
from transkd_fast.data.files import FileDataset, list_tree

_OFFICIAL = sorted((c for c in OfficialCityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
# Which label files there are, best first, and what their values mean; what is not named is void.
_TRAIN_IDS: Mapping[int, int] = {**{k: k for k in range(len(_OFFICIAL))}, IGNORE_INDEX: IGNORE_INDEX}
_IDS: Mapping[int, int] = {
    **{c.id: IGNORE_INDEX for c in OfficialCityscapes.classes if c.id >= 0},
    **{c.id: c.train_id for c in _OFFICIAL},
    IGNORE_INDEX: IGNORE_INDEX,  # id -1, the license plate, as 8 bits hold it
}
_KINDS = {"labelTrainIds": _TRAIN_IDS, "labelIds": _IDS}


class _DrivingScenes(FileDataset):
    classes = tuple(c.name for c in _OFFICIAL)
    palette = torch.tensor([c.color for c in _OFFICIAL], dtype=torch.uint8)


def _labels(folder: Path, stem: str) -> tuple[dict[str, Path], Mapping[int, int]]:
    """The label files below a folder in the first form that is there, and what its values mean."""
    for kind, values in _KINDS.items():
        found = list_tree(folder, f"_{stem}_{kind}.png", required=False)
        if found:
            return found, values
    names = " or ".join(f"*_{stem}_{kind}.png" for kind in _KINDS)
    raise DataError(f"{folder}: expected label files {names} in folders below it, found none; check root and split")


class Cityscapes(_DrivingScenes):
    """Cityscapes, 2048 x 1024, nineteen classes; everything else is 255.

    Expects the official layout: `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
    `root/gtFine/<split>/<city>/*_gtFine_labelTrainIds.png` or, where there are none, `*_gtFine_labelIds.png`.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine` (and `gtCoarse`).
        split: "train", "val", or "train_extra", which has coarse labels only.
        transforms: joint transform of image and mask; None for none.
        coarse: take the coarse labels of `gtCoarse`; default the fine ones of `gtFine`.
        allow_orphans: leave out frames without a label and labels without a frame, see `FileDataset`.

    Raises:
        ValueError: unknown split, or fine labels of "train_extra".
        DataError: missing or empty folders, or images and labels that do not pair up.

    Source: Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016.
    """

    splits = ("train", "val", "train_extra")
    # Of the published training, from the pixels' frequencies; void, which is its class 19, has 0.
    published_class_weights = (
        *(2.5959737, 6.741505, 3.5353868, 9.866315, 9.690922, 9.369371, 10.289124, 9.953209, 4.3098087, 9.490392),
        *(7.674411, 9.396925, 10.347794, 6.3928986, 10.226673, 10.241072, 10.28059, 10.396977, 10.05567),
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transforms: Transforms | None = None,
        coarse: bool = False,
        allow_orphans: bool = False,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"Cityscapes: expected split out of {', '.join(self.splits)}, got {split!r}")
        if split == "train_extra" and not coarse:
            raise ValueError("Cityscapes: expected coarse=True with split 'train_extra', which has no fine labels")
        root, kind = Path(root), "gtCoarse" if coarse else "gtFine"
        images = list_tree(root / "leftImg8bit" / split, "_leftImg8bit.png")
        labels, values = _labels(root / kind / split, kind)
        super().__init__(images, labels, transforms, values, allow_orphans)
        self.root, self.split = root, split


class ACDC(_DrivingScenes):
    """ACDC, 1920 x 1080: fog, night, rain and snow with the classes of Cityscapes; everything else is 255.

    Expects the official layout: `root/rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png` and
    `root/gt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png` or, where there are none, `*_gt_labelIds.png`.
    A frame's group is its condition.

    Args:
        root: folder that holds `rgb_anon` and `gt`.
        split: "train" or "val".
        transforms: joint transform of image and mask; None for none.
        conditions: which of the four; default all.
        allow_orphans: leave out frames without a label and labels without a frame, see `FileDataset`.

    Raises:
        ValueError: unknown split or condition.
        DataError: missing or empty folders, or images and labels that do not pair up.

    Source: Sakaridis, Dai, Van Gool, "ACDC: the adverse conditions dataset with correspondences", ICCV 2021.
    """

    splits = ("train", "val")
    conditions = ("fog", "night", "rain", "snow")

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transforms: Transforms | None = None,
        conditions: tuple[str, ...] = conditions,
        allow_orphans: bool = False,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"ACDC: expected split out of {', '.join(self.splits)}, got {split!r}")
        if not conditions or not set(conditions) <= set(self.conditions):
            raise ValueError(f"ACDC: expected conditions out of {', '.join(self.conditions)}, got {list(conditions)}")
        root = Path(root)
        images: dict[str, Path] = {}
        labels: dict[str, Path] = {}
        kinds = []
        for condition in conditions:
            frames = list_tree(root / "rgb_anon" / condition / split, "_rgb_anon.png")
            found, values = _labels(root / "gt" / condition / split, "gt")
            images |= {f"{condition}/{name}": path for name, path in frames.items()}
            labels |= {f"{condition}/{name}": path for name, path in found.items()}
            kinds.append(values)
        if any(values is not kinds[0] for values in kinds):
            raise DataError(f"{root}: expected labelTrainIds.png of all conditions or of none; convert the others")
        super().__init__(images, labels, transforms, kinds[0], allow_orphans)
        self.root, self.split = root, split

    def group(self, index: int) -> str:
        """Condition of frame `index`."""
        return self.name(index).partition("/")[0]
