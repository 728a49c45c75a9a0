"""`make gpu`: everything that needs a GPU, in one command, on a machine without network.

python bench/gpu.py run     build, test, measure and distil; results in $OUT or .gpu/out
python bench/gpu.py carry   before, on a machine with a network: fill .gpu/carry
python bench/gpu.py keep    after: take results over into bench/results/<device>/

Exit status of `run`: 0 where no step failed or ran out of its time, 1 where one did, 2 where there is no GPU or an
option is bad (nothing was started then), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from gpu_run import carry, keep, machine, place, report
from gpu_run.machine import Machine
from gpu_run.runner import LOG, Failed, Run, Step
from gpu_run.steps import JUNIT, MINUTES, STEPS
from harness import rows

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(".gpu", "out")
RESULTS = (report.NAME, LOG, "rows.json", "rows.csv", *JUNIT, "verdicts.json")
KERNEL_SOURCES = ("csrc/**/*", "kernels/*.py", "transkd_fast/ops/*.py")
EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130


def main(
    argv: Sequence[str] | None = None,
    root: Path = ROOT,
    probe: Callable[[], Machine] = machine.probe,
    steps: Sequence[Step] = STEPS,
) -> int:
    """Run the command line; tests give it another tree, machine or steps."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in one command.")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("run", help="build, test, measure and distil on this machine's GPU")
    commands.add_parser("carry", help="fetch what a machine without network may lack")
    kept = commands.add_parser("keep", help="take a run's results over into bench/results")
    kept.add_argument("source", type=Path, nargs="?", default=root / OUT, help="folder of the results (.gpu/out)")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return run(root, probe, steps)
        if args.command == "carry":
            lines = carry.fill(root, os.environ.get("TRANSKD_CAMVID"))
        else:
            lines = keep.keep(args.source, root / "bench" / "results")
    except (Failed, ValueError, OSError) as error:
        return refuse(str(error))
    print("\n".join(lines))
    return 0


def refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_REFUSED


def run(root: Path, probe: Callable[[], Machine], steps: Sequence[Step]) -> int:
    """Run the steps on the machine that the probe finds."""
    start = time.monotonic()
    minutes = minutes_from(os.environ.get("GPU_MINUTES"))
    found = probe()
    reason = machine.refusal(found)
    if reason is not None:
        return refuse(reason)
    out = Path(os.environ.get("OUT") or root / OUT).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # an older run's
        (out / name).unlink(missing_ok=True)
    environ = place.environment(root, os.environ, found.capabilities)
    head = head_of(root, found, environ)
    print(f"{head['device']}, torch {head['torch']}, triton {head['triton']}, nvcc {head['nvcc']}; results in {out}")
    signal.signal(signal.SIGTERM, _interrupt)
    going = Run(root, out, environ, head, start + 60 * minutes, say=lambda line: print(line, flush=True))
    try:
        finished = going.run(steps)
    except KeyboardInterrupt:
        print(f"make gpu: interrupted; what was done until then is in {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{finished.table()}\n\n{(time.monotonic() - start) / 60:.1f} minutes; results in {out}")
    return 0 if finished.clean else EXIT_FAILED


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def minutes_from(text: str | None) -> float:
    """The whole run's time.

    Raises:
        ValueError: if the text is no positive number.
    """
    if not text:
        return MINUTES
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise ValueError(f"GPU_MINUTES: expected a positive number of minutes, got {text!r}")
    return minutes


def head_of(root: Path, found: Machine, environ: dict[str, str]) -> dict[str, Any]:
    """What gpu.json says about the run."""
    return {
        "device": found.devices[0],
        "capability": found.capabilities[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": found.torch,
        "triton": found.triton,
        "cuda": found.cuda,
        "driver": machine.driver_version(),
        "nvcc": machine.nvcc_version(machine.find_tool("nvcc", environ)),
        "python": machine.python_version(),
        "commit": machine.commit(root),
        "sources": rows.digest(KERNEL_SOURCES, root),
    }


if __name__ == "__main__":
    sys.exit(main())
