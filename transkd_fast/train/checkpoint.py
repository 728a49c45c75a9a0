"""Checkpoints: written whole or not at all, checked when read, the one before kept; read without unpickling code."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = "transkd_fast/1"
# What a training leaves and an evaluation needs; a resumed training needs TO_RESUME as well.
KEYS = ("kind", "network", "num_classes", "classes", "model", "optimizer", "epoch", "step", "best_miou", "scores")
TO_RESUME = (*KEYS, "steps_per_epoch", "sums", "counts", "skipped", "rows", "scaler", "ema")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written or is not of this run; the message names the file."""


def save_checkpoint(content: dict[str, Any], path: Path, keep_previous: bool = False) -> None:
    """Write a checkpoint so that a reader, or an interrupted run, sees the old file or the new one, both whole.

    Args:
        content: tensors, numbers, strings, and lists and dicts of them.
        path: the file; its folder must exist.
        keep_previous: leave the file that was there under the name that :func:`previous` gives.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; the old files are left as they are.
    """
    with _replacing(path, keep_previous) as file:
        torch.save({"format": FORMAT, **content}, file)


def previous(path: Path) -> Path:
    """Where the checkpoint before a checkpoint is kept: ``last.pt`` has ``last.previous.pt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint that :func:`save_checkpoint` wrote, and check it against the CRC-32 of each of its parts.

    Args:
        path: the file.
        required: keys that it must have.

    Returns:
        Its content, tensors on CPU.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged, or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a file that `transkd train` wrote")
    try:
        damaged = _damaged_part(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not readable as a checkpoint (truncated, damaged or of another kind): {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT!r}, as `transkd train` writes; plain weights go to "
            "student.weights or teacher.weights"
        )
    if damaged:
        raise CheckpointError(f"{path}: not readable as a checkpoint (damaged): the checksum of {damaged} does not fit")
    missing = [key for key in required if key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: expected a checkpoint with {', '.join(required)}; it lacks {', '.join(missing)}"
        )
    return content


def load_newest(path: Path, required: Sequence[str], log: Callable[[str], None]) -> tuple[dict[str, Any], Path] | None:
    """Read a checkpoint, or the one before it where it is damaged.

    Args:
        path: the newest one.
        required: keys that it must have.
        log: is told when the one before is used, and why.

    Returns:
        The content and the file that it came from; None where there is neither.

    Raises:
        CheckpointError: if none of those that exist can be read.
    """
    candidates = [candidate for candidate in (path, previous(path)) if candidate.exists()]
    errors: list[CheckpointError] = []
    for candidate in candidates:
        try:
            content = load_checkpoint(candidate, required)
        except CheckpointError as error:
            errors.append(error)
            continue
        if errors:
            log(f"{errors[0]}; going on from the checkpoint before it, {candidate}")
        return content, candidate
    if errors:
        advice = "choose another run_dir to start anew, or put a copy in its place"
        raise CheckpointError(f"{'; '.join(map(str, errors))}; {advice}")
    return None


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all.

    Args:
        text: its content.
        path: the file; its folder must exist.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; the old file is left as it is.
    """
    with _replacing(path) as file:
        file.write(text.encode())


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written.

    Args:
        folder: of a training that no other process writes to.
    """
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.(pt|csv)\.\d+", path.name):
            path.unlink()


@contextmanager
def _replacing(path: Path, keep_previous: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _open(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _second_name(path, previous(path))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (number := _system_error(error)) is None:
            raise
        full = number in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space, then go on with resume=true" if full else ""
        whole = f"; {path} as written before is whole" if path.exists() else ""
        raise CheckpointError(f"{path}: could not be written: {os.strerror(number)}{advice}{whole}") from error


def _open(path: Path) -> IO[bytes]:
    return path.open("wb")


def _system_error(error: BaseException | None) -> int | None:
    """The errno behind an error: torch.save may put its own in front of the system's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _second_name(path: Path, other: Path) -> None:
    """Give a file another name too, so that it has one at every moment where the file system can do that."""
    link = path.with_name(f".{other.name}.{os.getpid()}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:  # no hard links here
        os.replace(path, other)
    else:
        os.replace(link, other)


def _sync_folder(folder: Path) -> None:
    """Without it the new name may be lost with the power."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _damaged_part(path: Path) -> str | None:
    """The first part whose CRC-32 does not fit; torch writes them, but does not look at them when it reads."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return None  # of another kind, which torch.load says better
    with zipfile.ZipFile(path) as parts:
        return parts.testzip()
