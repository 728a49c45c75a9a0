"""What all commands share: how one is added, its configuration, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from transkd_fast.train.settings import Config

EXIT_FAILED = 1
EXIT_BAD_INPUT = 3
EXIT_UNFORESEEN = 4  # Python's own 1 would read as a verdict
EXIT_INTERRUPTED = 130

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Reports wrong usage with the code of bad input: argparse's own, 2, says that verify ran no fused kernel."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


class Commands:
    """The commands of a parser.

    Args:
        parser: gets one sub-parser per command.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        self, name: str, function: Command, text: str, needs_trainer: bool = True, resumable: bool = False
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: what is typed.
            function: takes the parsed arguments and returns the exit code. Imports what it needs itself, so that the
                command line starts quickly.
            text: help, one sentence.
            needs_trainer: whether it needs the packages of the extra ``train``.
            resumable: whether it leaves checkpoints from which ``resume=true`` goes on.

        Returns:
            The command's parser, for its arguments.
        """
        command: argparse.ArgumentParser = self._commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function, needs_trainer=needs_trainer, resumable=resumable)
        return command


def add_config(command: argparse.ArgumentParser, required: bool = False) -> None:
    """Add ``--config`` and the overrides to a command.

    Args:
        command: its parser.
        required: whether there must be a file.
    """
    text = "YAML file" if required else "YAML file; the defaults without it"
    command.add_argument("--config", type=Path, required=required, help=text)
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add dotted overrides to a command.

    Args:
        command: its parser.
    """
    command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. fit.lr=1e-4")


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that a command was given.

    Args:
        args: with what :func:`add_config` adds.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: if it cannot be used.
    """
    from transkd_fast.train.config import load_config

    return load_config(args.config, args.overrides)
