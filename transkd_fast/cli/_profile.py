"""``transkd profile``: time and memory of a training step by its parts."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from transkd_fast.cli._commands import Commands, add_config, config_of

if TYPE_CHECKING:
    from transkd_fast.train.profile import ProfileReport

_FILES = ("profile.json", "profile.png")


def add(commands: Commands) -> None:
    """Add the command."""
    command = commands.add("profile", _profile, "Print what the parts of the student's training step cost.")
    command.add_argument("--steps", type=int, default=10, help="steps to profile; default 10")
    command.add_argument("--warmup", type=int, default=3, help="steps before them; default 3")
    command.add_argument("--out", type=Path, help=f"folder for {' and '.join(_FILES)}")
    add_config(command)


def _profile(args: argparse.Namespace) -> int:
    from transkd_fast.train.config import ConfigError
    from transkd_fast.train.profile import draw_chart, profile_config

    for key, least in (("steps", 1), ("warmup", 0)):
        if getattr(args, key) < least:
            raise ConfigError(f"--{key}: expected at least {least}, got {getattr(args, key)}")
    if args.out is not None:
        for name in _FILES:
            if (args.out / name).exists():
                raise ConfigError(f"--out: {args.out / name} is there already; choose another folder")
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                "--out: the package matplotlib, which draws the chart, is missing; install it with"
                " `pip install 'transkd_fast[report]'`, or leave out --out for the table alone"
            )
    report = profile_config(config_of(args), args.steps, args.warmup)
    print(_table(report))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / _FILES[0]).write_text(report.as_json())
        draw_chart(report, args.out / _FILES[1])
        print(f"written to {' and '.join(str(args.out / name) for name in _FILES)}")
    return 0


def _table(report: ProfileReport) -> str:
    from transkd_fast.train.profile import quantiles

    width = max(map(len, report.parts))
    lines = [f"{'':<{width}}{'p20 ms':>11}{'p50 ms':>11}{'p80 ms':>11}{'share':>9}{'kept MiB':>12}{'peak MiB':>12}"]
    for part in report.parts:
        times = "".join(f"{1e3 * seconds:>11.2f}" for seconds in report.quantiles(part))
        memory = "".join(f"{size / 2**20:>12.1f}" for size in report.memory(part))
        lines.append(f"{part:<{width}}{times}{100 * report.share(part):>7.1f} %{memory}")
    for name, steps in (("step", report.steps), ("without profiler", report.plain)):
        lines.append(f"{name:<{width}}" + "".join(f"{1e3 * seconds:>11.2f}" for seconds in quantiles(steps)))
    lines.append("kept: tensors allocated less those freed; peak: allocated in the step so far, at the most meanwhile")
    return "\n".join(lines)
