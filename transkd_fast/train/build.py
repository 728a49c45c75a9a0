"""From a configuration to datasets, loaders, models and the student's task."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from transkd_fast import data, models
from transkd_fast.train.config import ConfigError
from transkd_fast.train.distributed import ALONE, Processes
from transkd_fast.train.settings import Config, DataConfig, FitConfig, ModelConfig
from transkd_fast.train.tasks import DistillationTask
from transkd_fast.transkd import TransKD

Log = Callable[[str], None]


class Network(nn.Module):
    """What the trainer asks of a network, for the type checker: ``forward(images, features_only) -> StageOutputs``."""

    channels: tuple[int, ...]
    num_classes: int


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A seed for one purpose, so that no two parts of a run draw the same numbers.

    Args:
        seed: the run's seed.
        purpose: what it is for, e.g. "student".
        number: a counter, e.g. the epoch.

    Returns:
        A number in [0, 2^32).
    """
    return zlib.crc32(f"{seed}/{purpose}/{number}".encode())


def select_device(name: str) -> torch.device:
    """The device of a run.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        The device.

    Raises:
        ConfigError: if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} is not there, torch sees {torch.cuda.device_count()} CUDA devices; "
            "use device=cpu or device=auto"
        )
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision.

    Args:
        device: where the step runs.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        A context manager; a plain one for fp32.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def build_dataset(config: Config, split: str) -> data.SegmentationDataset:
    """One split of the configured dataset, with the transforms of that split.

    Args:
        config: the run's configuration.
        split: "train" or "val".

    Returns:
        The dataset.

    Raises:
        DataError: if files are missing or broken.
        ConfigError: if an option does not fit the dataset.
    """
    settings = config.data
    height, width = settings.size
    if split == "val":
        transforms = data.eval_transforms((height, width))
    elif settings.augment == "published":
        transforms = data.published_transforms((height, width))
    elif settings.augment == "scale_crop":
        low, high = settings.scale
        transforms = data.train_transforms((height, width), (low, high), settings.flip, settings.jitter)
    else:
        transforms = data.train_transforms((height, width), (1.0, 1.0), 0.0)
    length = settings.train_length if split == "train" else settings.val_length
    try:
        return data.create(
            settings.name,
            settings.train_split if split == "train" else split,
            settings.root,
            (height, width),
            transforms,
            length,
            config.seed,
            settings.cache,
            **_options(settings, split),
        )
    except data.DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def _options(settings: DataConfig, split: str) -> dict[str, Any]:
    """What was asked of the dataset beyond the usual; one that does not have it refuses it."""
    options: dict[str, Any] = {}
    if settings.allow_orphans:
        options["allow_orphans"] = True
    if settings.coarse and split == "train":
        options["coarse"] = True
    if settings.conditions is not None:
        options["conditions"] = tuple(settings.conditions)
    return options


def build_loader(
    config: Config,
    dataset: data.SegmentationDataset,
    fit: FitConfig,
    phase: str,
    train: bool,
    processes: Processes = ALONE,
) -> DataLoader[Any]:
    """A loader that repeats itself for the same seed and epoch.

    Args:
        config: the run's configuration.
        dataset: what it loads.
        fit: gives the batch size.
        phase: name that the order is derived from.
        train: shuffle, and drop the last batch when it is not full.
        processes: those that share the frames; default alone.

    Returns:
        The loader.

    Raises:
        ConfigError: if the dataset yields no batch.
    """
    seed = derived_seed(config.seed, phase)
    try:
        return data.make_loader(
            dataset,
            fit.batch_size,
            train,
            seed,
            config.data.workers,
            drop_last=train,
            rank=processes.rank,
            replicas=processes.count,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def build_model(config: Config, settings: ModelConfig, num_classes: int, purpose: str, log: Log) -> Network:
    """A network with seeded or loaded weights.

    Args:
        config: the run's configuration.
        settings: which network.
        num_classes: number of logits unless the settings say otherwise.
        purpose: "teacher" or "student".
        log: receives the loading report.

    Returns:
        The network on the run's device.

    Raises:
        ConfigError: if there is no such network, or it has fewer logits than the dataset has classes.
        WeightsError: if weights are named and do not fit.
    """
    if settings.num_classes is not None and settings.num_classes < num_classes:
        raise ConfigError(
            f"{purpose}.num_classes: expected at least {num_classes}, the classes of {config.data.name}, "
            f"got {settings.num_classes}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, purpose))
        classes = settings.num_classes or num_classes
        try:
            made = models.create(settings.model, num_classes=classes, drop_path_rate=settings.drop_path)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{purpose}.model: {error}") from error
        model = cast(Network, made)
    if settings.weights is not None:
        log(f"{purpose}: {models.load_weights(model, settings.weights, settings.weights_prefix)}")
    return model.to(select_device(config.device))


def dry_run(config: Config, networks: dict[str, Network], log: Log) -> None:
    """Run the networks once on empty images of the training's size, and say what they give.

    Args:
        config: the run's configuration.
        networks: student and teacher by name.
        log: receives the lines.

    Raises:
        ConfigError: if one gives something else than `StageOutputs` of its channels at strides 4 to 32, or no patch
            embeddings though they are to be distilled.
    """
    images = torch.zeros(2, 3, *config.data.size, device=select_device(config.device))
    for name, network in networks.items():
        try:
            lines = models.describe(name, network, images)
        except (AssertionError, RuntimeError, ValueError) as error:  # backbones refuse sizes in many ways
            raise ConfigError(f"{name}.model: with images of {config.data.size}: {error}") from error
        for line in lines:
            log(line)
        wanted = config.distill.embeddings if config.distill.enabled else []
        if wanted and getattr(network, "embedding_stages", len(wanted)) == 0:
            model = (config.student if name == "student" else config.teacher).model
            raise ConfigError(
                f"distill.embeddings: expected [] with {name}.model={model!r}, which gives no patch embeddings, got"
                f" {wanted}; switch PEA off with distill.embeddings=[], or take distill.method=csf"
            )


def build_transkd(config: Config, student: Network, teacher: Network) -> TransKD:
    """The student with the modules that distillation trains beside it.

    Args:
        config: the run's configuration.
        student: the student.
        teacher: the teacher; only its channels and its number of classes are looked at.

    Returns:
        The wrapper on the run's device.

    Raises:
        ConfigError: if logits are distilled between networks that do not give equally many.
    """
    settings = config.distill
    if settings.logits and student.num_classes != teacher.num_classes:
        raise ConfigError(
            "distill.logits: expected student and teacher to have equally many logits, got"
            f" {student.num_classes} and {teacher.num_classes}; set student.num_classes and teacher.num_classes alike"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "transkd"))
        model = TransKD(
            student,
            student.channels,
            teacher.channels,
            variant=settings.variant,
            mid_channels=settings.mid_channels,
            legacy=settings.legacy,
            features=settings.feature_loss is not None,
            embeddings=settings.embeddings,
            feature_loss=settings.feature_loss or "hcl",
            feature_weights=settings.feature_stage_weights,
            embedding_weights=settings.embedding_stage_weights,
            temperature=settings.temperature,
            level_weights=settings.feature_level_weights,
            resize_student=settings.resize_student,
            logits=settings.logits,
            logit_temperature=settings.logit_temperature,
            fusion=settings.fusion,
            logit_loss=settings.logit_loss,
        )
    return model.to(select_device(config.device))


def distillation_task(config: Config, model: TransKD, teacher: Network, num_classes: int) -> DistillationTask:
    """The student's task as the configuration says.

    Args:
        config: the run's configuration.
        model: the wrapped student, from :func:`build_transkd`.
        teacher: the teacher.
        num_classes: the student's number of logits.

    Returns:
        The task.

    Raises:
        ConfigError: if there is not one class weight per logit.
    """
    settings = config.distill
    return DistillationTask(
        model,
        teacher,
        settings.feature_weight,
        settings.embedding_weight,
        class_weights(config.fit, num_classes, "fit", select_device(config.device)),
        settings.logit_weight,
        config.legacy.quarter_labels,
    )


def resolve_class_weights(config: Config, dataset: data.SegmentationDataset, log: Log) -> None:
    """Puts numbers where the configuration names class weights, "dataset" or "computed".

    Args:
        config: the run's configuration; changed.
        dataset: the training frames.
        log: receives the computed weights.

    Raises:
        ConfigError: if the dataset has no published weights.
        DataError: if frames cannot be read, or no pixel is labelled.
    """
    computed: list[float] | None = None
    fits = (("fit", config.fit, config.student), ("teacher.fit", config.teacher.fit, config.teacher))
    for key, fit, model in fits:
        if fit.class_weights == "dataset":
            published = dataset.published_class_weights
            if published is None:
                raise ConfigError(
                    f"{key}.class_weights: {config.data.name} has no published weights; use 'computed', a list or null"
                )
            weights = list(published)
        elif fit.class_weights == "computed":
            if computed is None:
                counts, ignored = data.count_pixels(dataset, lambda frames: tqdm(frames, "class weights", leave=False))
                computed = data.class_weights_of(counts)
                named = ", ".join(f"{name} {w:.3f}" for name, w in zip(dataset.classes, computed, strict=True))
                log(f"class weights of {int(counts.sum())} labelled pixels ({ignored} ignored): {named}")
            weights = list(computed)
        else:
            continue
        # A logit beyond the dataset's classes, such as the published models' void, has no labels.
        fit.class_weights = weights + [0.0] * ((model.num_classes or len(weights)) - len(weights))


def class_weights(config: FitConfig, num_classes: int, key: str, device: torch.device) -> Tensor | None:
    """The class weights as a tensor.

    Args:
        config: the training's settings.
        num_classes: number of logits.
        key: the settings' place in the configuration, for messages.
        device: where to put it.

    Returns:
        float32 [K], or None for equal weights.

    Raises:
        ConfigError: if there is not one weight per class.
    """
    if config.class_weights is None:
        return None
    if len(config.class_weights) != num_classes:
        raise ConfigError(
            f"{key}.class_weights: expected {num_classes} factors, one per class, got {len(config.class_weights)}"
        )
    return torch.tensor(config.class_weights, dtype=torch.float32, device=device)
