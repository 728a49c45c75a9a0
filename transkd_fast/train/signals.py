"""SIGTERM, by which schedulers take a machine away: the training finishes its step, saves, and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM came, and the training ended with a checkpoint; the process exits with 143, as others do on SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class SigtermNote:
    """Notes that SIGTERM came, while it is entered; a second one does what it would have done without.

    Python lets only the main thread set handlers; in another thread nothing is noted.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> SigtermNote:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
