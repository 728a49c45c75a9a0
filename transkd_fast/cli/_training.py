"""``transkd train``, ``eval``, ``verify`` and ``demo``: a run, its scores, its kernels."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from transkd_fast.cli._commands import EXIT_FAILED, Commands, add_config, add_overrides, config_of
from transkd_fast.cli._tables import class_table, print_report

# What the demo asks of its student.
DEMO_GAIN = 0.15
DEMO_CLASS_IOU = 0.20
DEMO_CLASSES = 5


def add(commands: Commands) -> None:
    """Add the commands."""
    text = "Train a teacher where none is given, then distil the student."
    add_config(commands.add("train", _train, text, resumable=True))
    evaluate = commands.add("eval", _eval, "Score a checkpoint on the validation frames of its run's data.")
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint file or run folder")
    add_overrides(evaluate)
    verify = commands.add("verify", _verify, "Compare the configured backend with eager fp64 on real batches.")
    verify.add_argument("--all", action="store_true", help="print every tensor, not only the worst")
    add_config(verify)
    demo = commands.add("demo", _demo, "A complete small distillation: train, distil, verify, and judge the outcome.")
    add_config(demo, required=True)


def _train(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import train

    result = train(config_of(args))
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, the first one speaks
        return 0
    print(class_table(result.classes, {"before": result.before, "after": result.student.scores}))
    print(f"{result.student.images_per_second:.1f} images/s in training; run folder {result.run_dir}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import evaluate_run

    scores, classes = evaluate_run(args.checkpoint, args.overrides)
    print(class_table(classes, {"all" if scores.groups else "IoU": scores, **scores.groups}))
    print(f"{scores.pixels} pixels counted, {scores.ignored} ignored by their label")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import verify_config

    report = verify_config(config_of(args))
    print_report(report, len(report.rows) if args.all else 12)
    return report.exit_code


def _demo(args: argparse.Namespace) -> int:
    from transkd_fast.train.run import train, verify_run

    config = config_of(args)
    config.run_dir = _free_folder(config.run_dir)
    result = train(config)
    print("comparing the fused backend with eager fp64 on the trained weights ...")
    report = verify_run(config)
    print_report(report, 4)
    before, after = result.before, result.student.scores
    teacher = f"{100 * result.teacher.miou:.1f} %" if result.teacher is not None else "none"
    print(class_table(result.classes, {"before": before, "after": after}))
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
