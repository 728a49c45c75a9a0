"""What a trained network says of images and videos: label maps, pictures of them, the teacher beside, and scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from transkd_fast import data, functional, models
from transkd_fast.data import IGNORE_INDEX, DataError, pictures
from transkd_fast.data.files import lookup_of, read_label
from transkd_fast.data.video import VIDEO_SUFFIXES, VideoReader, VideoWriter
from transkd_fast.train import build
from transkd_fast.train.build import Log
from transkd_fast.train.checkpoint import KEYS, CheckpointError, load_checkpoint
from transkd_fast.train.config import ConfigError, load_config
from transkd_fast.train.metrics import Scores, SegmentationMeter
from transkd_fast.train.run import find_checkpoint, network_of, prepare_process
from transkd_fast.train.settings import Config

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Folders below the output folder; "panels" only beside a teacher.
KINDS = ("colours", "overlay", "index")
PANELS = "panels"


class Prediction(NamedTuple):
    """Classes of an image's pixels.

    Args:
        student: uint8 [H, W].
        teacher: the same of the teacher, None without one.
        logits: the student's class scores, [1, K, h, w].
    """

    student: np.ndarray
    teacher: np.ndarray | None
    logits: Tensor


class Predictor:
    """A trained network, and its teacher if wanted, for images of any size.

    Args:
        checkpoint: a checkpoint file, a folder that holds last.pt, or a run folder (its student then).
        overrides: ``dotted.key=value`` strings over the run's configuration, e.g. ``device=cpu``.
        size: height and width that images are resized to for the network; "run" for those of the run, "keep" for the
            images' own.
        teacher: load the run's teacher too.
        log: receives what was loaded.

    Raises:
        CheckpointError: if a checkpoint is missing or broken.
        ConfigError: if the run's configuration is missing, an override is bad, or there is no teacher.
        DataError: if the class file of a run on "folder" is missing.
        WeightsError: if weights do not fit.
    """

    def __init__(
        self,
        checkpoint: Path,
        overrides: Sequence[str] = (),
        size: tuple[int, int] | str = "run",
        teacher: bool = False,
        log: Log = tqdm.write,
    ) -> None:
        path = find_checkpoint(checkpoint)
        state = load_checkpoint(path, KEYS)
        self.config: Config = load_config(path.parent.parent / "config.yaml", list(overrides))
        prepare_process(self.config, log)
        self.classes: tuple[str, ...] = tuple(state["classes"])
        self.palette = data.palette_of(self.config.data.name, self.config.data.root).numpy()
        void = data.void_of(self.config.data.name, self.config.data.root)
        values = {k: k for k in range(len(self.classes))} | dict.fromkeys((*void, IGNORE_INDEX), IGNORE_INDEX)
        self.label_lookup = lookup_of(values)
        if len(self.palette) != len(self.classes):
            raise CheckpointError(
                f"{path}: was trained on {len(self.classes)} classes, but {self.config.data.name} has"
                f" {len(self.palette)} colours; give the run's own data.name and data.root"
            )
        self.device = build.select_device(self.config.device)
        self.student = network_of(state, log).eval().to(self.device)
        self.teacher = self._load_teacher(path, log) if teacher else None
        height, width = self.config.data.size
        self.size = (height, width) if size == "run" else size

    def _load_teacher(self, path: Path, log: Log) -> nn.Module:
        settings = self.config.teacher
        last = path.parent.parent / "teacher" / "last.pt"
        if not self.config.distill.enabled or (settings.weights is None and not last.is_file()):
            raise ConfigError(
                f"{path}: expected a run with a teacher, of {last} or of teacher.weights, found neither; leave out"
                " --teacher"
            )
        teacher = build.build_model(self.config, settings, len(self.classes), "teacher", log)
        if settings.weights is None:
            log(f"teacher: {models.load_weights(teacher, last)}")
        return teacher.eval()

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> Prediction:
        """Classes at the image's own size.

        Args:
            pixels: uint8 [H, W, 3], RGB.

        Returns:
            The prediction.

        Raises:
            ValueError: if the image is too small for the network.
        """
        height, width = pixels.shape[:2]
        size = (height, width) if isinstance(self.size, str) else self.size
        batch = data.network_input(pixels, size)[None].to(self.device)
        found = []
        for network in (self.student, self.teacher):
            if network is not None:
                with build.autocast(self.device, self.config.precision):
                    logits = network(batch).logits[:, : len(self.classes)]
                found.append((logits, functional.seg_predict(logits, (height, width))[0].byte().cpu().numpy()))
        return Prediction(found[0][1], found[1][1] if len(found) > 1 else None, found[0][0])


@dataclass
class PredictReport:
    """What a prediction over files came to.

    Args:
        images: number of images predicted.
        videos: number of videos predicted.
        frames: number of their frames.
        failed: files that could not be predicted, and why.
        pixels: number of pixels predicted.
        different: number of them that the teacher sees differently; None without a teacher.
        scores: against the labels; None without labels.
        unlabelled: number of images that have no label, where labels were given.
    """

    images: int = 0
    videos: int = 0
    frames: int = 0
    failed: dict[Path, str] = field(default_factory=dict)
    pixels: int = 0
    different: int | None = None
    scores: Scores | None = None
    unlabelled: int = 0


@dataclass
class Source:
    """A file to predict.

    Args:
        path: the file.
        name: its name below each output folder, without the suffix there.
        video: whether it is a video.
        label: its label file, if there is one.
    """

    path: Path
    name: Path
    video: bool
    label: Path | None = None


def find_sources(given: Path, out: Path, log: Log = tqdm.write) -> list[Source]:
    """The images and videos of a file or, also in folders within it, of a folder.

    Args:
        given: file or folder.
        out: the output folder; what lies in it is left out.
        log: is told how many files are neither.

    Returns:
        Them, with names that differ: where two files differ in the suffix alone, both keep theirs.

    Raises:
        DataError: if there is none.
    """
    known = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    if given.is_dir():
        files = [
            path
            for path in sorted(given.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(given).parts)
            and out.resolve() not in path.resolve().parents
        ]
        paths = [path for path in files if path.suffix.lower() in known]
        if len(files) > len(paths):
            log(f"{given}: left out {len(files) - len(paths)} files that are neither images nor videos by their suffix")
        root = given
    else:
        if not given.is_file():
            raise DataError(f"{given}: expected an image, a video or a folder of them, found none")
        paths, root = [path for path in (given,) if path.suffix.lower() in known], given.parent
    if not paths:
        raise DataError(f"{given}: expected images or videos ({' '.join(known)}), found none")
    names = _different_names([path.relative_to(root) for path in paths])
    return [Source(p, n, p.suffix.lower() in VIDEO_SUFFIXES) for p, n in zip(paths, names, strict=True)]


def _different_names(paths: Sequence[Path]) -> list[Path]:
    names = [path.with_suffix("") for path in paths]
    while True:
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if not twice:
            return names
        names = [path if name in twice else name for path, name in zip(paths, names, strict=True)]


def targets_of(source: Source, out: Path, panels: bool) -> dict[str, Path]:
    """The files that a source's prediction is written to, by kind."""
    kinds = (*KINDS, PANELS) if panels else KINDS
    if source.video:  # label maps survive without loss in Matroska alone
        suffixes = {kind: ".mkv" if kind == "index" else ".mp4" for kind in kinds}
    else:
        suffixes = dict.fromkeys(kinds, ".png")
    return {kind: out / kind / source.name.parent / f"{source.name.name}{suffixes[kind]}" for kind in kinds}


def predict(
    predictor: Predictor,
    given: Path,
    out: Path,
    labels: Path | None = None,
    force: bool = False,
    log: Log = tqdm.write,
) -> PredictReport:
    """Predict images and videos, and write what came out.

    Args:
        predictor: the network.
        given: an image, a video, or a folder of them.
        out: folder for colours/, overlay/, index/ and, with a teacher, panels/.
        labels: folder (or file, for one image) with a label PNG of class indices per image, under the image's name,
            with 255 or the dataset's void value where nothing counts; images without one are predicted, but not scored.
        force: overwrite what is there.
        log: receives what could not be done.

    Returns:
        Counts, failures and scores; a file that cannot be read is one of the failures, and the rest goes on.

    Raises:
        DataError: before any work, if there is nothing to predict, or no image has a label.
        ConfigError: before any work, if a file is there already, or PyAV is missing for videos.
    """
    sources = find_sources(given, out, log)
    report = PredictReport(different=None if predictor.teacher is None else 0)
    if labels is not None:
        report.unlabelled = _find_labels(sources, labels)
    if any(source.video for source in sources) and importlib.util.find_spec("av") is None:
        raise ConfigError("videos: the package av is missing; install with `pip install 'transkd_fast[video]'`")
    if not force:
        _refuse_overwriting(sources, out, predictor.teacher is not None)
    meter = SegmentationMeter(len(predictor.classes), predictor.device)
    scored = False
    for source in tqdm(sources, "predict", unit="file", leave=False, disable=None):
        targets = targets_of(source, out, predictor.teacher is not None)
        try:
            if source.video:
                _predict_video(predictor, source, targets, report)
                report.videos += 1
            else:
                scored |= _predict_image(predictor, source, targets, report, meter)
                report.images += 1
        except (DataError, ValueError) as error:  # too small an image is a ValueError of the network
            report.failed[source.path] = str(error)
            log(f"{source.path}: not predicted: {str(error).removeprefix(f'{source.path}: ')}")
    if scored:
        report.scores = meter.compute()
    return report


def _find_labels(sources: Sequence[Source], labels: Path) -> int:
    """Give the images their labels, and return how many have none."""
    if not labels.exists():
        raise DataError(f"--labels: expected a folder of label PNGs, {labels} does not exist")
    images = [source for source in sources if not source.video]
    for source in images:
        # An image that keeps its suffix among others is labelled under its name without it.
        stem = source.name if source.name.name != source.path.name else source.name.with_suffix("")
        path = labels if labels.is_file() and len(images) == 1 else labels / stem.parent / f"{stem.name}.png"
        source.label = path if path.is_file() else None
    missing = sum(source.label is None for source in images)
    if missing == len(images):
        example = f", such as {labels / images[0].name}.png" if images else ""
        raise DataError(f"--labels: expected label PNGs under the images' names{example}, found none in {labels}")
    return missing


def _refuse_overwriting(sources: Sequence[Source], out: Path, panels: bool) -> None:
    there = [path for source in sources for path in targets_of(source, out, panels).values() if path.exists()]
    if there:
        raise ConfigError(
            f"--out: {len(there)} files are there already, such as {there[0]}; choose another folder, or overwrite them"
            " with --force"
        )


def _predict_image(
    predictor: Predictor, source: Source, targets: dict[str, Path], report: PredictReport, meter: SegmentationMeter
) -> bool:
    """Predict an image, and return whether it was scored."""
    pixels = pictures.read_upright(source.path)
    label = None
    if source.label is not None:
        label = read_label(source.label, predictor.label_lookup)
        if label.shape != pixels.shape[:2]:
            raise DataError(f"{source.label}: expected the image's size {pixels.shape[:2]}, got {label.shape}")
    prediction = predictor(pixels)
    made = _pictures(predictor, pixels, prediction, report) | {"colours": prediction.student}
    for kind, picture in made.items():
        pictures.write_png(targets[kind], picture, predictor.palette if kind == "colours" else None)
    if label is None:
        return False
    meter.update(prediction.logits, torch.from_numpy(label).long()[None].to(predictor.device))
    return True


def _predict_video(predictor: Predictor, source: Source, targets: dict[str, Path], report: PredictReport) -> None:
    # What a video added is taken back where it turns out to be broken.
    counts = (report.frames, report.pixels, report.different)
    try:
        with VideoReader(source.path) as reader, ExitStack() as files:
            writers = {
                kind: files.enter_context(VideoWriter(path, reader.time_base, reader.rate))
                for kind, path in targets.items()
            }
            for frame in tqdm(reader, source.path.name, reader.length, unit="frame", leave=False, disable=None):
                prediction = predictor(frame.pixels)
                for kind, picture in _pictures(predictor, frame.pixels, prediction, report).items():
                    writers[kind].write(picture, frame.time)
                report.frames += 1
    except BaseException:
        report.frames, report.pixels, report.different = counts
        raise


def _pictures(
    predictor: Predictor, pixels: np.ndarray, prediction: Prediction, report: PredictReport
) -> dict[str, np.ndarray]:
    """The pictures of a prediction by kind; its pixels are counted."""
    student, teacher, palette = prediction.student, prediction.teacher, predictor.palette
    report.pixels += student.size
    overlay = pictures.overlaid(pixels, student, palette)
    made = {"colours": pictures.coloured(student, palette), "overlay": overlay, "index": student}
    if teacher is not None:
        different = student != teacher
        report.different = (report.different or 0) + int(different.sum())
        views = (pictures.overlaid(pixels, teacher, palette), overlay, pictures.marked(pixels, different))
        captions = ("teacher", "student", f"{100 * different.mean():.2f} % differ")
        made[PANELS] = pictures.side_by_side(views, captions)
    return made
