"""Video files, frame by frame: read upright with their times, and written with the same times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from transkd_fast.data.base import DataError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_CODECS = ("libx264", "libopenh264", "mpeg4")  # the first that PyAV's FFmpeg has


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        time: when it is shown, in units of the video's time base.
    """

    pixels: np.ndarray
    time: int


class VideoReader:
    """Reads the first video stream of a file; PyAV decodes.

    Args:
        path: the file.

    Raises:
        DataError: the file cannot be opened or has no video.
        ModuleNotFoundError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        import av

        self.path = path
        try:
            self._container: Any = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"{path}: expected a readable video, but opening failed ({error})") from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{path}: expected a video, found no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate: Fraction = self._stream.average_rate or Fraction(25)
        self.time_base: Fraction = self._stream.time_base or 1 / self.rate
        self.length: int | None = self._stream.frames or None  # as far as the file says

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            DataError: a frame cannot be decoded, or there is none.
        """
        import av

        count, last = 0, -1
        try:
            for frame in self._container.decode(self._stream):
                pixels = frame.to_ndarray(format="rgb24")
                if turn := round(frame.rotation / 90) % 4:  # counterclockwise
                    pixels = np.ascontiguousarray(np.rot90(pixels, turn))
                step = max(1, round(1 / (self.rate * self.time_base)))
                last = frame.pts if frame.pts is not None else last + step
                yield Frame(pixels, last)
                count += 1
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: expected a readable video, but frame {count + 1} is not: {error}") from error
        if not count:
            raise DataError(f"{self.path}: expected a video with frames, got none")


class VideoWriter:
    """Writes a video file, whole or not at all, and the folders that it needs; without sound.

    Use it as a context: the file takes its name when the context ends without an error.

    Args:
        path: the file; .mp4, or .mkv where frames are label maps, which are kept without loss.
        time_base: of the frames' times, seconds.
        rate: frames per second, which players show.
    """

    def __init__(self, path: Path, time_base: Fraction, rate: Fraction) -> None:
        self.path, self._time_base, self._rate = path, time_base, rate
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w")
        return self

    def write(self, pixels: np.ndarray, time: int) -> None:
        """Adds a frame.

        Args:
            pixels: uint8 [H, W, 3], RGB, or a label map [H, W]; of one size in a file.
            time: when it is shown, in units of the time base.

        Raises:
            DataError: its size is another one.
        """
        import av

        colour = pixels.ndim == 3
        if colour:  # most players want colours at half the resolution, so both edges even
            height, width = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._new_stream(pixels, colour)
        if pixels.shape[:2] != (self._stream.height, self._stream.width):
            raise DataError(f"{self.path}: expected frames of one size, got {pixels.shape[:2]} among others")
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if colour else "gray")
        frame.pts, frame.time_base = time, self._time_base
        self._container.mux(self._stream.encode(frame))

    def _new_stream(self, pixels: np.ndarray, colour: bool) -> Any:
        import av

        codec = next(name for name in _CODECS if name in av.codecs_available) if colour else "ffv1"
        stream = self._container.add_stream(codec, rate=self._rate)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "yuv420p" if colour else "gray"
        stream.time_base = stream.codec_context.time_base = self._time_base
        if codec == "libx264":
            stream.options = {"crf": "18", "preset": "veryfast"}
        return stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if error is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
