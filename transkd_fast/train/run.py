"""A whole run: check the data, train or load the teacher, distil the student; and evaluation of what a run left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from transkd_fast import backends, environment, models
from transkd_fast.data import DataError, SegmentationDataset
from transkd_fast.train import build
from transkd_fast.train.board import Board
from transkd_fast.train.build import Log, Network
from transkd_fast.train.checkpoint import KEYS, CheckpointError, load_checkpoint, write_text
from transkd_fast.train.config import ConfigError, load_config, save_config
from transkd_fast.train.distributed import Processes, joined
from transkd_fast.train.loop import FitResult, Trainer, evaluate
from transkd_fast.train.memory import keep_freed_memory
from transkd_fast.train.metrics import Scores
from transkd_fast.train.observers import Observer
from transkd_fast.train.preflight import check_teacher, file_hash
from transkd_fast.train.settings import Config, FitConfig, ModelConfig
from transkd_fast.train.step import steps_per_epoch
from transkd_fast.train.tasks import SegmentationTask, Task
from transkd_fast.train.verify import VerifyReport, verify

# What may change between the parts of a resumed run without making it another run.
_FREE_TO_CHANGE = (
    *("run_dir", "resume", "device", "threads", "keep_memory", "log_every", "backend", "verify"),
    *("checkpoint_every", "checkpoint_minutes", "on_nonfinite", "skip_limit", "log_gradients", "tensorboard"),
    *("data.root", "data.check", "data.cache", "data.workers"),
)


@dataclass
class RunResult:
    """What a run came to.

    Args:
        run_dir: the run's folder.
        before: the student's scores with its initial weights.
        student: its training.
        teacher: the teacher's scores, None where the student was trained alone.
        classes: class names.
    """

    run_dir: Path
    before: Scores
    student: FitResult
    teacher: Scores | None
    classes: tuple[str, ...]


def prepare_process(config: Config, log: Log = tqdm.write) -> None:
    """Set what holds for the whole process: threads and the allocator.

    Args:
        config: the run's configuration.
        log: receives what could not be set.

    Raises:
        ConfigError: if the environment names an unknown backend.
    """
    try:
        backends.from_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.keep_memory and build.select_device(config.device).type == "cpu":
        reason = keep_freed_memory()
        if reason is not None:
            log(f"keep_memory: not in effect: {reason}")


def train(config: Config, log: Log = tqdm.write, observers: Sequence[Observer] = ()) -> RunResult:
    """Carry out a run: everything is checked and built before the first step.

    Args:
        config: the run's configuration.
        log: receives progress lines.
        observers: watch the trainings; each is closed when the run ends, however it ends. Under torchrun they and the
            log are told by the first process alone, which is the one that writes.

    Returns:
        The result; the run folder holds config.yaml, environment.json, summary.json and a folder per trained network.

    Raises:
        ConfigError: if the configuration does not fit data or machine, or the folder holds another run.
        DataError: if the data is broken.
        WeightsError: if weights to load do not fit.
        TrainingError: if a loss is not finite.
    """
    try:
        with joined(config) as processes:
            if processes.first:
                observers = [*observers, Board()] if config.tensorboard else observers
                return _train(config, log, observers, processes)
            return _train(config, lambda line: None, (), processes)
    finally:
        for observer in observers:
            observer.close()


def _train(config: Config, log: Log, observers: Sequence[Observer], processes: Processes) -> RunResult:
    prepare_process(config, log)
    device = build.select_device(config.device)
    train_set, val_set = build.build_dataset(config, "train"), build.build_dataset(config, "val")
    val_batch = None
    if config.data.check:
        val_batch = processes.by_first(lambda: (_check_data(train_set, "train"), _check_data(val_set, "val"))[1])
    _report_orphans({"train": train_set, "val": val_set}, log)
    build.resolve_class_weights(config, train_set, log)
    classes = train_set.classes
    student = build.build_model(config, config.student, len(classes), "student", log)
    weights = build.class_weights(config.fit, student.num_classes, "fit", device)
    teacher = transkd = None
    if config.distill.enabled:
        teacher = build.build_model(config, config.teacher, len(classes), "teacher", log)
        build.class_weights(config.teacher.fit, teacher.num_classes, "teacher.fit", device)
    build.dry_run(config, {"student": student} | ({"teacher": teacher} if teacher is not None else {}), log)
    if teacher is not None:
        transkd = build.build_transkd(config, student, teacher)
    fits = {"student": config.fit} | ({"teacher": config.teacher.fit} if teacher is not None else {})
    loaders = {
        name: (
            build.build_loader(config, train_set, fit, name, True, processes),
            build.build_loader(config, val_set, _with_batch(fit, val_batch), name, False, processes),
        )
        for name, fit in fits.items()
    }
    for name, fit in fits.items():
        steps_per_epoch(name, fit, loaders[name][0], config.legacy.quarter_labels)
    run_dir = processes.by_first(lambda: _open_run_dir(config))
    log(f"run folder {run_dir}; {len(train_set)} training and {len(val_set)} validation frames, {len(classes)} classes")

    def trainer(name: str, task: Task, fit: FitConfig, model: ModelConfig) -> Trainer:
        meta = {"kind": name, "network": model.model, "num_classes": model.num_classes or len(classes)}
        return Trainer(
            config, name, task, fit, *loaders[name], classes, run_dir / name, meta, log, observers, processes
        )

    teacher_scores = None
    task: Task
    if teacher is None or transkd is None:
        task = SegmentationTask(student, weights, config.legacy.quarter_labels)
    else:
        teacher_scores = _ready_teacher(config, teacher, trainer, log)
        task = build.distillation_task(config, transkd, teacher, student.num_classes)
    student_trainer = trainer("student", task, config.fit, config.student)
    before = student_trainer.evaluate()
    log(f"student before training: mIoU {100 * before.miou:.2f} %")
    result = RunResult(run_dir, before, student_trainer.fit(), teacher_scores, classes)
    if processes.first:
        _write_summary(result)
    return result


def _check_data(dataset: SegmentationDataset, split: str) -> int | None:
    """Read every frame, and return the batch size that scoring needs, None for any.

    Scores are taken at label size, so labels of different sizes cannot share a batch.
    """
    report = dataset.check(progress=lambda frames: tqdm(frames, f"check {split}", leave=False, disable=None))
    if report.labelled_pixels == 0:
        raise DataError(
            f"{split}: expected labelled pixels, got only ignored ones in {len(dataset)} frames; "
            "check the label values against the dataset's classes"
        )
    return 1 if len(report.label_sizes) > 1 else None


def _report_orphans(datasets: dict[str, SegmentationDataset], log: Log) -> None:
    for split, dataset in datasets.items():
        if any(dataset.orphans):
            images, labels = dataset.orphans
            log(f"{split}: left out {images} images without a label and {labels} labels without an image")


def _with_batch(fit: FitConfig, batch_size: int | None) -> FitConfig:
    return fit if batch_size is None else replace(fit, batch_size=batch_size)


def _ready_teacher(config: Config, teacher: Network, trainer: Any, log: Log) -> Scores:
    """Train the teacher unless it came with weights, and say how good it is before anything is distilled from it."""
    settings = config.teacher
    device = build.select_device(config.device)
    weights = build.class_weights(settings.fit, teacher.num_classes, "teacher.fit", device)
    task = SegmentationTask(teacher, weights, config.legacy.quarter_labels)
    fitter = trainer("teacher", task, settings.fit, settings)
    if settings.weights is None:
        scores = fitter.fit().scores
    else:
        log(f"teacher: SHA-256 of {settings.weights} is {file_hash(settings.weights)}")
        scores = fitter.evaluate()
        score = partial(evaluate, num_classes=len(fitter.classes), device=device, precision=config.precision)
        score = partial(score, processes=fitter.processes)
        check_teacher(teacher, scores, settings.expect_miou, settings.weights, fitter.val_loader, score)
    log(f"teacher {settings.model}: mIoU {100 * scores.miou:.2f} %, pixel accuracy {100 * scores.pixel_accuracy:.2f} %")
    return scores


def _open_run_dir(config: Config) -> Path:
    run_dir = Path(config.run_dir)
    saved = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir: expected a folder or a name that is free, got the file {run_dir}")
    if run_dir.exists() and any(run_dir.iterdir()):
        if not config.resume:
            raise ConfigError(
                f"run_dir: {run_dir} already holds files; set resume=true to go on with that run, "
                "or choose another run_dir"
            )
        if not saved.exists():
            raise ConfigError(f"run_dir: expected {saved} to resume from, found none")
        _check_same_run(config, load_config(saved), saved)
    elif config.resume:
        raise ConfigError(f"run_dir: expected a run to resume in {run_dir}, found none; set resume=false to start it")
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)
    write_text(json.dumps(environment.collect(), indent=2) + "\n", run_dir / "environment.json")
    return run_dir


def _check_same_run(config: Config, saved: Config, path: Path) -> None:
    def flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in values.items():
            items |= flat(f"{prefix}{key}.", value) if isinstance(value, dict) else {f"{prefix}{key}": value}
        return items

    now, then = flat("", asdict(config)), flat("", asdict(saved))
    for key, value in now.items():
        if not {key, key.split(".")[0]} & set(_FREE_TO_CHANGE) and value != then[key]:
            raise ConfigError(
                f"{key}: expected {then[key]!r} as in {path}, got {value!r}; a resumed run keeps its configuration"
            )


def _write_summary(result: RunResult) -> None:
    def plain(scores: Scores) -> dict[str, Any]:
        # JSON has no NaN, which marks what does not occur.
        stride4 = None if math.isnan(scores.miou_stride4) else scores.miou_stride4
        iou = [None if math.isnan(iou) else iou for iou in scores.iou]
        return {**scores._asdict(), "iou": iou, "miou_stride4": stride4}

    summary = {
        "student_before": plain(result.before),
        "student": plain(result.student.scores),
        "student_best_miou": result.student.best_miou,
        "teacher": plain(result.teacher) if result.teacher is not None else None,
        "images_per_second": result.student.images_per_second,
        "classes": list(result.classes),
    }
    write_text(json.dumps(summary, indent=2) + "\n", result.run_dir / "summary.json")


def evaluate_run(checkpoint: Path, overrides: list[str], log: Log = tqdm.write) -> tuple[Scores, tuple[str, ...]]:
    """Score a network that a run left on the run's validation frames.

    Args:
        checkpoint: a checkpoint file, a folder that holds last.pt, or a run folder (its student then).
        overrides: ``dotted.key=value`` strings over the run's configuration, e.g. ``data.root=...``.
        log: receives one line per step of the way.

    Returns:
        Scores, those of the dataset's groups of frames among them, and class names.

    Raises:
        CheckpointError: if the checkpoint is missing or broken, or its classes are not the dataset's.
        ConfigError: if the run's configuration is missing or an override is bad.
    """
    path = find_checkpoint(checkpoint)
    state = load_checkpoint(path, KEYS)
    config = load_config(path.parent.parent / "config.yaml", overrides)
    prepare_process(config, log)
    dataset = build.build_dataset(config, "val")
    if tuple(state["classes"]) != dataset.classes:
        raise CheckpointError(
            f"{path}: was trained on the {len(state['classes'])} classes {', '.join(state['classes'])}; "
            f"expected those of {config.data.name}: {', '.join(dataset.classes)}"
        )
    val_batch = _check_data(dataset, "val") if config.data.check else None
    model = network_of(state, log)
    device = build.select_device(config.device)
    loader = build.build_loader(config, dataset, _with_batch(config.fit, val_batch), "eval", train=False)
    batches = tqdm(loader, "eval", leave=False)
    groups = [group for group in map(dataset.group, range(len(dataset))) if group is not None]
    scores = evaluate(model.to(device), batches, dataset.num_classes, device, config.precision, groups=groups)
    return scores, dataset.classes


def network_of(state: dict[str, Any], log: Log = tqdm.write) -> nn.Module:
    """The network that a checkpoint is scored by: with the average of its weights where one is kept.

    Args:
        state: the checkpoint's content.
        log: receives what was loaded.

    Returns:
        The network, on CPU.

    Raises:
        WeightsError: if the weights do not fit.
    """
    model = models.create(state["network"], num_classes=state["num_classes"])
    if state.get("ema") is not None:
        log(f"{models.load_weights(model, state['ema'])}, averaged, epoch {state['epoch']}")
    else:
        distilled = any(key.startswith("student.") for key in state["model"])
        log(f"{models.load_weights(model, state, prefix='student.' if distilled else '')}, epoch {state['epoch']}")
    return model


def verify_config(config: Config, log: Log = tqdm.write) -> VerifyReport:
    """Compare the configured backend with eager fp64 on training batches, from the configuration's weights.

    Args:
        config: the run's configuration; without weights files, student and teacher are freshly initialised.
        log: receives what was loaded.

    Returns:
        The comparison.

    Raises:
        ConfigError: if the configuration distils nothing.
    """
    return _verify(config, None, log)


def verify_run(config: Config, log: Log = tqdm.write) -> VerifyReport:
    """The same on the weights that a finished run left in ``config.run_dir``.

    Args:
        config: the run's configuration.
        log: receives what was loaded.

    Returns:
        The comparison.

    Raises:
        WeightsError: if the run left no whole checkpoints that fit.
    """
    return _verify(config, Path(config.run_dir), log)


def _verify(config: Config, run_dir: Path | None, log: Log) -> VerifyReport:
    if not config.distill.enabled:
        raise ConfigError("distill.enabled: expected true, for there is nothing to verify without distillation")
    prepare_process(config, log)
    device = build.select_device(config.device)
    dataset = build.build_dataset(config, "train")
    build.resolve_class_weights(config, dataset, log)
    student = build.build_model(config, config.student, dataset.num_classes, "student", log)
    teacher = build.build_model(config, config.teacher, dataset.num_classes, "teacher", log)
    model = build.build_transkd(config, student, teacher)
    if run_dir is not None:
        models.load_weights(model, run_dir / "student" / "last.pt")
        if config.teacher.weights is None:
            models.load_weights(teacher, run_dir / "teacher" / "last.pt")
    task = build.distillation_task(config, model, teacher, student.num_classes)
    fit = replace(config.fit, batch_size=config.verify.batch_size)
    loader = build.build_loader(config, dataset, fit, "verify", train=True)
    batches = [(i.to(device), m.to(device, torch.int64)) for i, m in islice(loader, config.verify.batches)]
    if len(batches) < config.verify.batches:
        raise ConfigError(
            f"verify.batches: expected at most {len(batches)}, all that the data yields, got {config.verify.batches}"
        )
    return verify(task, batches, config)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a file, a folder with last.pt or a run folder stands for.

    Raises:
        CheckpointError: if there is none.
    """
    for candidate in (path, path / "last.pt", path / "student" / "last.pt"):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{path}: expected a checkpoint, a folder with last.pt, or a run folder with student/last.pt")
