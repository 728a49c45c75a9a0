"""gpu.json: what a run is of, and what became of each step. Rewritten after every step, so that a kill loses little."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, UNAVAILABLE, NOT_RUN, TIMED_OUT = "passed", "failed", "unavailable", "not run", "timed out"
STATUSES = (PASSED, FAILED, UNAVAILABLE, NOT_RUN, TIMED_OUT)
HEAD = (
    "device", "capability", "date", "torch", "triton", "cuda", "driver", "nvcc", "python", "commit", "sources",
)  # fmt: skip
NAME = "gpu.json"


@dataclass
class Result:
    """What became of a step.

    Args:
        name: the step.
        status: one of `STATUSES`.
        seconds: how long it ran.
        reason: why it did not pass, or what is to be known of one that did.
        numbers: what it found.
    """

    name: str
    status: str = NOT_RUN
    seconds: float = 0.0
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """A run: what it is of (keys `HEAD`) and its steps."""

    head: dict[str, Any]
    results: list[Result]

    @property
    def clean(self) -> bool:
        return all(result.status not in (FAILED, TIMED_OUT) for result in self.results)

    def write(self, folder: Path) -> None:
        content = {**self.head, "steps": [asdict(result) for result in self.results]}
        path, part = folder / NAME, folder / f"{NAME}.part"
        part.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
        os.replace(part, path)

    def table(self) -> str:
        """The summary for the terminal."""
        width = max(len(result.name) for result in self.results)
        lines = []
        for result in self.results:
            seconds = f"{result.seconds:6.1f} s" if result.seconds else " " * 8
            lines.append(f"{result.name:<{width}}  {result.status:<11} {seconds}  {result.reason}".rstrip())
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """The value with nothing in it that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def check(content: Any) -> None:
    """Say what is wrong with a parsed gpu.json.

    Raises:
        ValueError: if it is not what `Report.write` writes.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{NAME}: expected an object, got {type(content).__name__}")
    missing = [key for key in (*HEAD, "steps") if key not in content]
    if missing:
        raise ValueError(f"{NAME}: expected the keys {', '.join(HEAD)}, steps; {', '.join(missing)} missing")
    for key in ("device", "capability", "date", "torch", "sources"):
        if not isinstance(content[key], str) or not content[key]:
            raise ValueError(f"{NAME}: {key}: expected text, got {content[key]!r}")
    if not isinstance(content["steps"], list) or not content["steps"]:
        raise ValueError(f"{NAME}: steps: expected at least one, got {content['steps']!r}")
    for step in content["steps"]:
        if not isinstance(step, dict) or not {"name", "status", "seconds", "reason"} <= set(step):
            raise ValueError(f"{NAME}: steps: expected objects with name, status, seconds and reason, got {step!r}")
        if step["status"] not in STATUSES:
            raise ValueError(
                f"{NAME}: {step['name']}: expected a status out of {', '.join(STATUSES)}, got {step['status']!r}"
            )
