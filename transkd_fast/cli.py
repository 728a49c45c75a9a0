"""The command line: ``transkd env | train | eval | verify | demo``.

Exit codes: 0 success; 1 what was checked does not hold (verify disagrees, the demo's student did not learn); 2 verify
ran no fused kernel; 3 bad input or a run that could not go on; 4 an error nobody foresaw, with its traceback; 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transkd_fast.train.config import Config
    from transkd_fast.train.metrics import Scores
    from transkd_fast.train.verify import VerifyReport

EXIT_FAILED = 1
EXIT_BAD_INPUT = 3
EXIT_UNFORESEEN = 4  # Python's own 1 would read as a verdict
EXIT_INTERRUPTED = 130

# What the demo asks of its student.
DEMO_GAIN = 0.15
DEMO_CLASS_IOU = 0.20
DEMO_CLASSES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    command: Callable[[argparse.Namespace], int] = args.command
    if command is not _env:
        try:
            import transkd_fast.train
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "transkd_fast":
                raise
            return _fail(f"the package {error.name} is missing; install with `pip install 'transkd_fast[train]'`")
        errors: tuple[type[Exception], ...] = (*transkd_fast.train.ERRORS, OSError)
    else:
        errors = (OSError,)
    try:
        return command(args)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNFORESEEN
    except errors as error:
        return _fail(str(error))
    except Exception:
        traceback.print_exc()
        return EXIT_UNFORESEEN
    except KeyboardInterrupt:
        resumable = "; the last checkpoint is whole, go on with resume=true" if command is _train else ""
        print(f"transkd: interrupted{resumable}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(message: str) -> int:
    print(f"transkd: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage with the code of bad input: argparse's own, 2, says that verify ran no fused kernel."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="transkd", description="Distil segmentation transformers with TransKD.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    env = add("env", _env, "Print versions, what was built, and which backends each op can run here.")
    env.add_argument("--json", action="store_true", help="as JSON")
    train = add("train", _train, "Train a teacher where none is given, then distil the student.")
    evaluate = add("eval", _eval, "Score a checkpoint on the validation frames of its run's data.")
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint file or run folder")
    verify = add("verify", _verify, "Compare the configured backend with eager fp64 on real batches.")
    verify.add_argument("--all", action="store_true", help="print every tensor, not only the worst")
    demo = add("demo", _demo, "A complete small distillation: train, distil, verify, and judge the outcome.")
    for command in (train, verify, demo):
        text = "YAML file" if command is demo else "YAML file; the defaults without it"
        command.add_argument("--config", type=Path, required=command is demo, help=text)
    for command in (train, evaluate, verify, demo):
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. fit.lr=1e-4")
    return parser


def _env(args: argparse.Namespace) -> int:
    from transkd_fast import environment

    report = environment.collect(selftest=True)
    print(json.dumps(report, indent=2) if args.json else environment.render(report))
    return 0


def _config(args: argparse.Namespace) -> Config:
    from transkd_fast.train.config import load_config

    return load_config(args.config, args.overrides)


def _train(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import train

    result = train(_config(args))
    print(_class_table(result.classes, {"before": result.before, "after": result.student.scores}))
    print(f"{result.student.images_per_second:.1f} images/s in training; run folder {result.run_dir}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import evaluate_run

    scores, classes = evaluate_run(args.checkpoint, args.overrides)
    print(_class_table(classes, {"IoU": scores}))
    print(f"{scores.pixels} pixels counted, {scores.ignored} ignored by their label")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import verify_config

    report = verify_config(_config(args))
    _print_report(report, len(report.rows) if args.all else 12)
    return report.exit_code


def _demo(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import train, verify_run

    config = _config(args)
    config.run_dir = _free_folder(config.run_dir)
    result = train(config)
    print("comparing the fused backend with eager fp64 on the trained weights ...")
    report = verify_run(config)
    _print_report(report, 4)
    before, after = result.before, result.student.scores
    teacher = f"{100 * result.teacher.miou:.1f} %" if result.teacher is not None else "none"
    print(_class_table(result.classes, {"before": before, "after": after}))
    rows = {
        "verify": report.verdict,
        "training": f"{result.student.images_per_second:.1f} images/s",
        "teacher mIoU": teacher,
        "student mIoU before": f"{100 * before.miou:.1f} %",
        "student mIoU after": f"{100 * after.miou:.1f} %",
        "run folder": str(result.run_dir),
    }
    width = max(map(len, rows))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows.items()))
    good = sum(iou > DEMO_CLASS_IOU for iou in after.iou)
    learnt = after.miou - before.miou >= DEMO_GAIN and good >= DEMO_CLASSES
    if not learnt:
        print(
            f"transkd: the student did not learn enough: expected +{100 * DEMO_GAIN:.0f} points of mIoU and "
            f"{DEMO_CLASSES} classes above {100 * DEMO_CLASS_IOU:.0f} % IoU, got "
            f"{100 * (after.miou - before.miou):+.1f} points and {good} classes",
            file=sys.stderr,
        )
    return report.exit_code if learnt else EXIT_FAILED


def _free_folder(path: str) -> str:
    """The folder itself, or the first of path-2, path-3, ... that does not exist: a demo overwrites nothing."""
    candidate, number = path, 1
    while Path(candidate).exists():
        number += 1
        candidate = f"{path}-{number}"
    return candidate


def _class_table(classes: Sequence[str], columns: dict[str, Scores]) -> str:
    def cell(value: float) -> str:
        return "absent" if math.isnan(value) else f"{100 * value:.2f}"

    width = max(len("pixel accuracy"), *map(len, classes))
    lines = [f"{'IoU %':<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for index, name in enumerate(classes):
        lines.append(f"{name:<{width}}" + "".join(f"{cell(s.iou[index]):>10}" for s in columns.values()))
    lines.append(f"{'mIoU':<{width}}" + "".join(f"{cell(s.miou):>10}" for s in columns.values()))
    lines.append(f"{'pixel accuracy':<{width}}" + "".join(f"{cell(s.pixel_accuracy):>10}" for s in columns.values()))
    return "\n".join(lines)


def _print_report(report: VerifyReport, count: int) -> None:
    worst = sorted(report.rows, key=lambda row: row.difference / row.bound, reverse=True)
    losses = [row for row in report.rows if row.name.startswith("loss/")]
    shown: list[Any] = losses + [row for row in worst if row not in losses][:count]
    width = max(len(row.name) for row in shown)
    title = "max-norm relative difference to eager fp64"
    width = max(len(title), width)
    print(f"{title:<{width}}  {'checked':>9} {'eager ' + report.precision:>10} {'bound':>9}")
    for row in shown:
        mark = "" if row.agrees else "  DISAGREES"
        print(f"{row.name:<{width}}  {row.difference:>9.2e} {row.eager:>10.2e} {row.bound:>9.2e}{mark}")
    widened = sum(row.bound > row.limit for row in report.rows)
    if len(shown) < len(report.rows):
        print(f"... and {len(report.rows) - len(shown)} tensors that differ less; --all prints them")
    if widened:
        limit = f"{report.rows[0].limit:.0e}"
        print(f"{widened} tensors have a bound above {limit}: eager {report.precision} itself is off by half of it")
    for (op, backend), number in sorted(report.runs.items()):
        print(f"{op:<10} {backend:<7} {number} calls")
    for name, measured in (("checked", report.checked), ("eager", report.eager)):
        print(f"{name:<8} {measured.images_per_second:8.2f} images/s {measured.peak_bytes / 2**20:9.1f} MiB peak")
    print(f"verify: {report.verdict}")


if __name__ == "__main__":
    sys.exit(main())
