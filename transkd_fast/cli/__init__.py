"""The command line, ``transkd COMMAND``; every command stands in a module of this folder.

Exit codes: 0 success; 1 what was checked does not hold (verify disagrees, the demo's student did not learn), or a file
could not be predicted; 2 verify ran no fused kernel; 3 bad input or a run that could not go on; 4 an error nobody
foresaw, with its traceback; 130 interrupted; 143 stopped by SIGTERM, with a checkpoint from which resume=true goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from transkd_fast.cli import _environment, _models, _predict, _profile, _training
from transkd_fast.cli._commands import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_UNFORESEEN, Commands, Parser

_MODULES = (_environment, _training, _models, _predict, _profile)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    parser = Parser(prog="transkd", description="Distil segmentation transformers with TransKD.")
    commands = Commands(parser)
    for module in _MODULES:
        module.add(commands)
    args, rest = parser.parse_known_args(argv)
    # argparse gives a command's positional arguments no more than one place: overrides may also stand after options.
    if not all("=" in text and not text.startswith("-") and hasattr(args, "overrides") for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    errors: tuple[type[Exception], ...] = (OSError,)
    if args.needs_trainer:
        try:
            import transkd_fast.train
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "transkd_fast":
                raise
            return _fail(f"the package {error.name} is missing; install with `pip install 'transkd_fast[train]'`")
        errors = (*transkd_fast.train.ERRORS, OSError)
    try:
        return int(args.command(args))
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNFORESEEN
    except errors as error:
        return _fail(str(error))
    except Exception:
        traceback.print_exc()
        return EXIT_UNFORESEEN
    except KeyboardInterrupt:
        resumable = "; the last checkpoint is whole, go on with resume=true" if args.resumable else ""
        print(f"transkd: interrupted{resumable}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(message: str) -> int:
    print(f"transkd: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT
