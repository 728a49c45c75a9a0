"""``transkd env``: what is installed and what can run."""

from __future__ import annotations

import argparse
import json

from transkd_fast.cli._commands import Commands


def add(commands: Commands) -> None:
    """Add the command ``env``."""
    text = "Print versions, what was built, and which backends each op can run here."
    env = commands.add("env", _env, text, needs_trainer=False)
    env.add_argument("--json", action="store_true", help="as JSON")


def _env(args: argparse.Namespace) -> int:
    from transkd_fast import environment

    report = environment.collect(selftest=True)
    print(json.dumps(report, indent=2) if args.json else environment.render(report))
    return 0
