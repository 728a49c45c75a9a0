"""The configuration of a run: the settings, filled from a YAML file and dotted overrides, and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from transkd_fast.backends import BACKENDS
from transkd_fast.data import DATASETS
from transkd_fast.models import MODELS, known
from transkd_fast.reference.hcl import LEVEL_WEIGHTS
from transkd_fast.train import methods
from transkd_fast.train.settings import Config, DataConfig, DistillConfig, FitConfig
from transkd_fast.transkd import FUSIONS, LOGIT_LOSSES

CLASS_WEIGHTS = ("dataset", "computed")


class ConfigError(ValueError):
    """A configuration file or override that cannot be used; the message names the key."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; None for the defaults.
        overrides: ``dotted.key=value`` strings, applied after the file.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: if the file cannot be read, a key is unknown, or a value has the wrong type or range.
    """
    merged = OmegaConf.structured(Config)
    given: set[str] = set()  # keys of distill
    if path is not None:
        content = _read_yaml(Path(path))
        merged = _merge(merged, content, str(path))
        given |= _distill_keys(content)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: expected the form dotted.key=value")
        try:
            addition = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from error
        merged = _merge(merged, addition, f"override {override!r}")
        given |= _distill_keys(addition)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"bad value for {error.full_key!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    _one_of("distill.method", config.distill.method, (methods.CUSTOM, *methods.METHODS))
    _reject_contradictions(config.distill, given)
    methods.apply(config.distill, given)
    check_config(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write a configuration as YAML that :func:`load_config` reads back.

    Args:
        config: the configuration.
        path: the file.
    """
    OmegaConf.save(OmegaConf.structured(config), Path(path))


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration") from None
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, got a {type(content).__name__}")
    return content


def _distill_keys(content: DictConfig) -> set[str]:
    section = content.get("distill")
    return set(map(str, section)) if isinstance(section, DictConfig) else set()


def _reject_contradictions(distill: DistillConfig, given: Collection[str]) -> None:
    for key, (wanted, got) in methods.contradictions(distill, given).items():
        raise ConfigError(
            f"distill.{key}: expected {wanted!r}, which distill.method={distill.method!r} stands for, got {got!r};"
            f" leave the key out, or set distill.method={methods.CUSTOM}"
        )


def _merge(base: Any, addition: DictConfig, source: str) -> Any:
    try:
        return OmegaConf.merge(base, addition)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        close = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{source}: unknown key {key!r}{hint}") from error
    except OmegaConfBaseException as error:
        sections = sorted({key.rpartition(".")[0] for key in _keys(Config)} - {""})
        scalars = (
            key for key in sections if not isinstance(OmegaConf.select(addition, key, default={}), (dict, DictConfig))
        )
        place = error.full_key or next(scalars, None)
        raise ConfigError(f"{source}: bad value for {place!r}: {str(error).splitlines()[0]}") from error


def _keys(cls: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(cls):
        yield prefix + item.name
        default = item.default_factory() if callable(item.default_factory) else None
        if is_dataclass(default):
            yield from _keys(default, f"{prefix}{item.name}.")


def _expect(condition: bool, key: str, expected: str, got: Any) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def _positive(key: str, value: float) -> None:
    _expect(0 < value < math.inf, key, "a positive number", value)


def _not_negative(key: str, value: float) -> None:
    _expect(0 <= value < math.inf, key, "a number >= 0", value)


def _one_of(key: str, value: Any, names: Sequence[str | None]) -> None:
    _expect(value in names, key, "one of " + ", ".join(repr(name) for name in names), value)


def check_config(config: Config) -> None:
    """Check the ranges that types do not express.

    Args:
        config: the configuration.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    _expect(bool(config.run_dir), "run_dir", "the name of a folder", config.run_dir)
    _one_of("precision", config.precision, ("fp32", "bf16", "fp16"))
    _one_of("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    every = config.checkpoint_every
    _expect(every is None or every > 0, "checkpoint_every", "a positive number or null", every)
    _positive("checkpoint_minutes", config.checkpoint_minutes)
    _not_negative("skip_limit", config.skip_limit)
    _one_of("backend", config.backend, (None, "auto", *BACKENDS))
    device = config.device.split(":")[0]
    _expect(device in ("auto", "cpu", "cuda"), "device", "'auto', 'cpu', 'cuda' or 'cuda:N'", config.device)
    _expect(config.threads is None or config.threads > 0, "threads", "a positive number or null", config.threads)
    _positive("log_every", config.log_every)
    _not_negative("seed", config.seed)
    _check_data(config.data)
    for name, fit in (("fit", config.fit), ("teacher.fit", config.teacher.fit)):
        _check_fit(name, fit)
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        forms = f"one of {', '.join(map(repr, MODELS))}, 'timm:NAME' or 'package.module:factory'"
        _expect(known(model.model), f"{name}.model", forms, model.model)
        _expect(0 <= model.drop_path < 1, f"{name}.drop_path", "a rate in [0, 1)", model.drop_path)
        _expect(
            model.num_classes is None or model.num_classes > 1, f"{name}.num_classes", "at least 2", model.num_classes
        )
    least = config.teacher.expect_miou
    _expect(least is None or 0 < least <= 1, "teacher.expect_miou", "a share above 0 and up to 1, or null", least)
    _check_distill(config.distill)
    _one_of("verify.precision", config.verify.precision, (None, "fp32", "bf16"))
    for key in ("batches", "batch_size", "limit_fp32", "limit_bf16"):
        _positive(f"verify.{key}", getattr(config.verify, key))


def _check_data(data: DataConfig) -> None:
    _one_of("data.name", data.name, tuple(DATASETS))
    _expect(len(data.size) == 2 and min(data.size) >= 32, "data.size", "[height, width], each >= 32", data.size)
    _one_of("data.augment", data.augment, ("scale_crop", "published", "none"))
    _expect(
        len(data.scale) == 2 and 0 < data.scale[0] <= data.scale[1] < math.inf,
        "data.scale",
        "[low, high], 0 < low",
        data.scale,
    )
    _expect(0 <= data.flip <= 1, "data.flip", "a probability", data.flip)
    _expect(0 <= data.jitter < 1, "data.jitter", "a strength in [0, 1)", data.jitter)
    _not_negative("data.workers", data.workers)
    for key in ("train_length", "val_length"):
        length = getattr(data, key)
        _expect(length is None or length > 0, f"data.{key}", "a positive number or null", length)


def _check_fit(name: str, fit: FitConfig) -> None:
    for key in ("epochs", "batch_size", "lr", "power", "eval_every", "accumulate"):
        _positive(f"{name}.{key}", getattr(fit, key))
    for key in ("weight_decay", "warmup_steps"):
        _not_negative(f"{name}.{key}", getattr(fit, key))
    _expect(
        len(fit.betas) == 2 and all(0 <= b < 1 for b in fit.betas), f"{name}.betas", "two numbers in [0, 1)", fit.betas
    )
    _expect(fit.ema is None or 0 < fit.ema < 1, f"{name}.ema", "a decay between 0 and 1, or null", fit.ema)
    _expect(fit.clip_norm is None or fit.clip_norm > 0, f"{name}.clip_norm", "a positive number or null", fit.clip_norm)
    factors = fit.class_weights
    numbers = isinstance(factors, list) and all(type(factor) in (int, float) for factor in factors)
    _expect(
        factors in (None, *CLASS_WEIGHTS) or (numbers and all(0 <= f < math.inf for f in factors) and sum(factors) > 0),
        f"{name}.class_weights",
        f"null, {' or '.join(map(repr, CLASS_WEIGHTS))}, or a list of factors >= 0, not all of them 0",
        factors,
    )


def _check_distill(distill: DistillConfig) -> None:
    _one_of("distill.variant", distill.variant, ("base", "gl", "ea"))
    _one_of("distill.method", distill.method, (methods.CUSTOM, *methods.METHODS))
    _reject_contradictions(distill, [item.name for item in fields(distill)])  # a method that nobody applied
    _one_of("distill.fusion", distill.fusion, FUSIONS)
    _one_of("distill.feature_loss", distill.feature_loss, ("hcl", "cwd", None))
    _one_of("distill.logit_loss", distill.logit_loss, tuple(LOGIT_LOSSES))
    for key in ("mid_channels", "temperature", "logit_temperature"):
        _positive(f"distill.{key}", getattr(distill, key))
    for key in ("feature_weight", "embedding_weight", "logit_weight"):
        _not_negative(f"distill.{key}", getattr(distill, key))
    for key in ("feature_stage_weights", "embedding_stage_weights"):
        weights = getattr(distill, key)
        fits = len(weights) == 4 and all(0 <= weight < math.inf for weight in weights)
        _expect(fits, f"distill.{key}", "four factors >= 0, one per stage", weights)
    levels = distill.feature_level_weights
    fits = len(levels) == len(LEVEL_WEIGHTS) and all(0 <= weight < math.inf for weight in levels)
    _expect(fits, "distill.feature_level_weights", "three factors >= 0, one per pooled level", levels)
    stages = distill.embeddings
    _expect(
        len(set(stages)) == len(stages) and set(stages) <= {1, 2, 3, 4},
        "distill.embeddings",
        "stages out of 1..4",
        stages,
    )
    if distill.variant == "gl":
        _expect(4 in stages, "distill.embeddings", "stage 4 among them, which variant 'gl' mixes", stages)
    if distill.variant == "ea":
        _expect(bool(stages), "distill.embeddings", "a stage that variant 'ea' assists", stages)
    nothing = distill.enabled and distill.feature_loss is None and not stages and not distill.logits
    _expect(not nothing, "distill.enabled", "false where no feature_loss, embeddings or logits are distilled", True)
