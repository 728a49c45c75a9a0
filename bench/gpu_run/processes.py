"""Runs a command with a time limit, its output going to a file, and leaves none of its processes behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

GRACE_SECONDS = 5.0
MARK = "TRANSKD_GPU_COMMAND"
MOST_OUTPUT = 2 * 2**20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status (None where its time was over), and what it printed on both channels."""

    status: int | None
    output: str


def call(command: Sequence[str | Path], cwd: Path, environ: Mapping[str, str], log: BinaryIO, seconds: float) -> Done:
    """Run a command.

    Args:
        command: program and arguments.
        cwd: working folder.
        environ: the whole environment.
        log: file, open for reading and appending, that receives what the command prints.
        seconds: when they are over, the command is interrupted, so that it can write what it has, and then killed.
            Processes that it started are killed in any case.

    Returns:
        How it ended.

    Raises:
        FileNotFoundError: if there is no such program.
    """
    start = log.seek(0, os.SEEK_END)
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**environ, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_prepare,
    )
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        _kill_all(process, mark)
    return Done(status, _output(log, start))


def _prepare() -> None:
    # Whoever ignores SIGINT, as nohup does in the background, hands that on, and out of time would only be killed.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A run that is killed itself must not leave a step on the GPU.
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    process.kill()
    process.wait()
    for _ in range(10):  # one that forks while being looked for is found the next time
        left = marked(mark)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: str) -> list[int]:
    """Running processes that carry the mark in their environment: children in sessions of their own keep it too."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def _output(log: BinaryIO, start: int) -> str:
    """What was printed; of very much only beginning and end, in the log too."""
    log.seek(start)
    data = log.read()
    if len(data) > MOST_OUTPUT:
        left_out = f"\n... {len(data) - MOST_OUTPUT} bytes left out ...\n".encode()
        data = data[: MOST_OUTPUT // 2] + left_out + data[-MOST_OUTPUT // 2 :]
        log.truncate(start)
        log.seek(start)
        log.write(data)
        log.flush()
    return data.decode(errors="replace")
