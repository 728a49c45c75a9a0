"""Runs steps one after the other within a common deadline, and records what became of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gpu_run import processes, report
from gpu_run.processes import Done
from gpu_run.report import Report, Result

LEAST_SECONDS = 3.0  # no step comes to anything in less
LOG = "log.txt"


class Failed(Exception):
    """The step's outcome is bad; the message says how."""


class Unavailable(Exception):
    """The machine lacks or forbids what the step needs, which is no fault of what is tested."""


class TimedOut(Exception):
    """The step's time is over."""


@dataclass
class Work:
    """What a step works with.

    Args:
        root: the tree.
        out: folder of the results.
        environ: environment of the commands.
        log: the log file.
        deadline: when the step's time is over, on the clock of `time.monotonic`.
        numbers: what the step finds; kept also when it fails.
        ready: names of what earlier steps made, for `Step.needs`.
    """

    root: Path
    out: Path
    environ: Mapping[str, str]
    log: BinaryIO
    deadline: float
    numbers: dict[str, Any]
    ready: set[str]

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def call(self, *command: str | Path, seconds: float = math.inf, **environ: str) -> Done:
        """Run a command to its end.

        Args:
            command: program and arguments.
            seconds: what it may take, where that is less than the step's time.
            environ: what is added to the environment.

        Raises:
            TimedOut: if its time was over first.
        """
        seconds = min(seconds, self.seconds_left)
        words = " ".join([f"{key}={value}" for key, value in environ.items()] + [str(part) for part in command])
        self.log.write(f"\n$ {words}\n".encode())
        self.log.flush()
        if seconds <= 0:
            raise TimedOut
        done = processes.call(command, self.root, {**self.environ, **environ}, self.log, seconds)
        if done.status is None:
            raise TimedOut
        return done


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Args:
        name: what it is called in the results.
        seconds: what it may take; more only where earlier steps left some over.
        run: does it; returns what is to be known of a step that passed, and raises `Failed`, `Unavailable` or
            `TimedOut` where it did not.
        needs: what an earlier step must have made.
    """

    name: str
    seconds: float
    run: Callable[[Work], str | None]
    needs: str | None = None


@dataclass
class Run:
    """A run of steps.

    Args:
        root: the tree; commands run in it.
        out: folder of the results.
        environ: environment of the commands.
        head: what gpu.json says about the run.
        deadline: when everything is over, on the clock of `time.monotonic`.
        say: receives a line per step.
    """

    root: Path
    out: Path
    environ: Mapping[str, str]
    head: dict[str, Any]
    deadline: float
    say: Callable[[str], None] = print
    ready: set[str] = field(default_factory=set)

    def run(self, steps: Sequence[Step]) -> Report:
        """Run the steps; gpu.json is up to date before and after each."""
        results = [Result(step.name, reason="the run was stopped before it") for step in steps]
        kept = Report(self.head, results)
        (self.out / LOG).unlink(missing_ok=True)
        with (self.out / LOG).open("a+b") as log:
            for i, (step, result) in enumerate(zip(steps, results, strict=True)):
                result.reason = "the run was stopped while it ran"
                kept.write(self.out)
                later = sum(other.seconds for other in steps[i + 1 :])
                start = time.monotonic()
                try:
                    self._run(step, result, later, log)
                finally:  # an interrupt too is recorded
                    result.seconds = round(time.monotonic() - start, 1)
                    kept.write(self.out)
                log.write(f"\n{step.name}: {result.status} {result.reason}\n".encode())
                log.flush()
        return kept

    def _run(self, step: Step, result: Result, later: float, log: BinaryIO) -> None:
        left = self.deadline - time.monotonic()
        seconds = min(left, max(step.seconds, left - later))
        if seconds < LEAST_SECONDS:
            result.reason = "out of time"
        elif step.needs is not None and step.needs not in self.ready:
            result.reason = f"an earlier step did not make the {step.needs}"
        else:
            self.say(f"{step.name} (at most {seconds:.0f} s) ...")
            log.write(f"\n{'=' * 20} {step.name}\n".encode())
            deadline = time.monotonic() + seconds
            work = Work(self.root, self.out, self.environ, log, deadline, result.numbers, self.ready)
            result.status, result.reason = _outcome(step, work, seconds)
        self.say(f"{step.name}: {result.status}{': ' if result.reason else ''}{result.reason}")


def _outcome(step: Step, work: Work, seconds: float) -> tuple[str, str]:
    try:
        return report.PASSED, step.run(work) or ""
    except Failed as failure:
        return report.FAILED, str(failure)
    except Unavailable as lack:
        return report.UNAVAILABLE, str(lack)
    except TimedOut as over:
        return report.TIMED_OUT, str(over) or f"stopped after {seconds:.0f} s"
    except Exception as error:  # a mistake in a step must not cost the steps after it
        return report.FAILED, f"the step itself broke: {type(error).__name__}: {error}"
