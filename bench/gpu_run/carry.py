"""Fills .gpu/carry on a machine with a network: what the machine with the GPU may lack and cannot fetch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from email.parser import Parser
from pathlib import Path

from gpu_run import place
from gpu_run.runner import Failed

MOST_BYTES = 40_000_000
FRAMES = {"train": 64, "val": 32}
WANTED = ("omegaconf>=2.3", "pytest-benchmark>=5.3", "tqdm>=4.66", "torchmetrics>=1.4")
# Found on the machine with the GPU, or no pure Python, so that it must be found there.
ASSUMED = ("torch", "numpy", "pyyaml", "packaging", "pytest", "setuptools", "lightning-utilities", "colorama")

Fetch = Callable[[str, Path], None]


def fetch_wheel(requirement: str, folder: Path) -> None:
    """Let pip fetch one wheel, or build it where there is only a source distribution.

    Raises:
        Failed: if pip cannot.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Failed(f"{requirement}: pip wheel failed: {place.complaint(done.stderr + done.stdout)}")


def fill(root: Path, camvid: str | None, fetch: Fetch = fetch_wheel) -> list[str]:
    """Make .gpu/carry anew; the old one stays where this fails.

    Args:
        root: the tree.
        camvid: folder with CamVid, as `images/<split>` and `labels/<split>`; None to carry no frames.
        fetch: puts the wheel of a requirement into a folder.

    Returns:
        Lines that say what is carried.

    Raises:
        Failed: if a wheel is not pure Python, frames are missing or all of it is too large.
    """
    new = root / ".gpu" / "carry.new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        lines = [f"wheel {name}" for name in fetch_all(WANTED, new / "wheels", fetch)]
        if camvid:
            lines += [
                f"{number} {split} frames of {camvid}"
                for split, number in copy_frames(Path(camvid), new / "camvid").items()
            ]
        else:
            lines.append("no frames: TRANSKD_CAMVID names no folder; the distillation will use procedural scenes")
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise Failed(f"expected at most {MOST_BYTES / 1e6:.0f} MB to carry, got {size / 1e6:.1f} MB")
        old = root / place.CARRY
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return [*lines, f"{size / 1e6:.1f} MB in {place.CARRY}"]


def fetch_all(requirements: Sequence[str], folder: Path, fetch: Fetch) -> list[str]:
    """Fetch wheels and those that they require, unless these can be assumed; returns their names.

    Raises:
        Failed: if one of them is not pure Python.
    """
    folder.mkdir(parents=True)
    waiting, asked = list(requirements), set()
    while waiting:
        requirement = waiting.pop(0)
        name = distribution(requirement)
        if name in asked or name in ASSUMED:
            continue
        asked.add(name)
        before = set(folder.iterdir())
        fetch(requirement, folder)
        for wheel in set(folder.iterdir()) - before:  # none where a marker rules the requirement out
            place.require_pure(wheel)
            waiting += requirements_of(wheel)
    return sorted(path.name for path in folder.iterdir())


def distribution(requirement: str) -> str:
    """The normalised name in a requirement."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else requirement


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel requires, its extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return [line for line in metadata.get_all("Requires-Dist", []) if not re.search(r";.*\bextra\b", line)]


def copy_frames(source: Path, target: Path, frames: Mapping[str, int] = FRAMES) -> dict[str, int]:
    """Copy frames with their labels, evenly spread over each split; returns how many.

    Raises:
        Failed: if a folder or a label is missing.
    """
    copied = {}
    for split, number in frames.items():
        images = sorted(
            p for p in (source / "images" / split).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        if not images:
            raise Failed(f"TRANSKD_CAMVID={source}: expected images in images/{split}, found none")
        number = min(number, len(images))
        for image in (images[i * len(images) // number] for i in range(number)):
            label = source / "labels" / split / f"{image.stem}.png"
            if not label.is_file():
                raise Failed(f"{label}: expected the label of {image.name}, found none")
            for path, kind in ((image, "images"), (label, "labels")):
                folder = target / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.name)
        copied[split] = number
    return copied
