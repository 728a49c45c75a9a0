"""``transkd predict``: what a trained network says of images and videos."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from transkd_fast.cli._commands import EXIT_FAILED, Commands, add_overrides
from transkd_fast.cli._tables import class_table


def add(commands: Commands) -> None:
    """Add the command."""
    text = "Write what a trained network says of images, folders of images and videos."
    command = commands.add("predict", _predict, text)
    command.add_argument("checkpoint", type=Path, help="checkpoint file or run folder")
    command.add_argument("input", type=Path, help="image, video, or folder of them, also in folders within it")
    command.add_argument("--out", type=Path, required=True, help="folder for colours/, overlay/, index/ and panels/")
    size = "size that images are given to the network at: 'run' for the run's (default), 'keep' for their own, or HxW"
    command.add_argument("--size", type=_size, default="run", help=size)
    command.add_argument("--teacher", action="store_true", help="panels of teacher, student and where they differ")
    command.add_argument("--labels", type=Path, help="folder of label PNGs under the images' names, for scores")
    command.add_argument("--force", action="store_true", help="overwrite what is there")
    add_overrides(command)


def _size(text: str) -> tuple[int, int] | str:
    if text in ("run", "keep"):
        return text
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected 'run', 'keep' or HxW such as 512x1024, got {text!r}")
    return int(found[1]), int(found[2])


def _predict(args: argparse.Namespace) -> int:
    from transkd_fast.train.predict import Predictor, predict

    predictor = Predictor(args.checkpoint, args.overrides, args.size, args.teacher)
    report = predict(predictor, args.input, args.out, args.labels, args.force)
    if report.scores is not None:
        print(class_table(predictor.classes, {"IoU": report.scores}))
        print(f"{report.scores.pixels} pixels counted, {report.scores.ignored} ignored by their label")
    if report.unlabelled:
        print(f"{report.unlabelled} images without a label are predicted, but not scored")
    print(f"{report.images} images and {report.videos} videos of {report.frames} frames predicted into {args.out}")
    if report.different is not None and report.pixels:
        print(f"student and teacher differ in {100 * report.different / report.pixels:.2f} % of the pixels")
    if report.failed:
        print(f"{len(report.failed)} files could not be predicted, see above")
        return EXIT_FAILED
    return 0
