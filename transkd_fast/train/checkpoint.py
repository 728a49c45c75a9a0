"""Checkpoints: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FORMAT = "transkd_fast/1"
# What a training leaves and a resumed one, or an evaluation, needs.
KEYS = ("kind", "network", "num_classes", "classes", "model", "optimizer", "epoch", "step", "best_miou", "scores")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or is not of this run; the message names the file."""


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: a reader, or an interrupted run, sees the old file or the new one, both whole.

    Args:
        content: tensors, numbers, strings, and lists and dicts of them.
        path: the file; its folder must exist.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint that :func:`save_checkpoint` wrote.

    Args:
        path: the file.
        required: keys that it must have.

    Returns:
        Its content, tensors on CPU.

    Raises:
        CheckpointError: if the file is missing, truncated, or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that `transkd train` wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not readable as a checkpoint (truncated or of another kind): {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT!r}, as `transkd train` writes; plain weights go to "
            "student.weights or teacher.weights"
        )
    missing = [key for key in required if key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: expected a checkpoint with {', '.join(required)}; it lacks {', '.join(missing)}"
        )
    return content


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all.

    Args:
        text: its content.
        path: the file; its folder must exist.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
