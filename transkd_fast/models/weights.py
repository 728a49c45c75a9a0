"""Strict loading of weights: everything fits, or nothing is written and the error says what does not."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transkd_fast.models.segformer import VARIANTS

# Where checkpoints keep the state dict: ours, and the published training code's.
_STATE_KEYS = ("model", "student", "state_dict")
# What DataParallel and torch.compile put before every key.
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 10


class WeightsError(RuntimeError):
    """Weights that cannot be read or do not fit the module."""


@dataclass(frozen=True)
class LoadReport:
    """What load_weights did.

    Attributes:
        source: The file's path, or "mapping".
        loaded: Number of tensors loaded.
        unused: Number of tensors left out because they lie outside the prefix.
    """

    source: str
    loaded: int
    unused: int

    def __str__(self) -> str:
        """One line for a log."""
        left_out = f", {self.unused} outside the prefix not used" if self.unused else ""
        return f"{self.source}: {self.loaded} tensors loaded{left_out}"


def load_weights(module: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], prefix: str = "") -> LoadReport:
    """Loads a state dict into a module, strictly; the module stays untouched unless every key and shape fits.

    Args:
        module: The module to fill.
        source: A file (.safetensors, or anything torch.load reads with weights_only=True), or a mapping: a plain
            state dict, or a checkpoint that holds one under "model", "student" or "state_dict". A leading `module.`
            common to all keys is removed.
        prefix: Take only the keys that start so, without it; "student." takes the student out of a TransKD file.

    Returns:
        The counts of tensors loaded and left out.

    Raises:
        WeightsError: If the file is missing, unreadable or truncated, is not a state dict, or any key is missing,
            unexpected, or of another shape or kind of number than the module's.

    Source:
        Names of the published checkpoints: TransKD and SegFormer.
    """
    if isinstance(source, Mapping):
        name, state = "mapping", _unwrap(_state_dict(source, "mapping"))
    else:
        name, (state, _) = os.fspath(source), read_weights(source)
    taken = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not taken:
        raise WeightsError(
            f"load_weights: {name}: expected keys that start with {prefix!r}, found none; "
            f"the file seems to hold {describe_state(state)}"
        )
    taken = _unwrap(taken)
    _check(module, taken, name)
    module.load_state_dict(taken)
    return LoadReport(source=name, loaded=len(taken), unused=len(state) - len(taken))


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Reads a state dict from a file, without running code that the file may hold.

    Args:
        path: A file as `load_weights` takes it.

    Returns:
        The state dict without a wrapper's prefix, and all that the file holds.

    Raises:
        WeightsError: If the file is missing, unreadable or truncated, or holds no state dict.
    """
    content = _read(Path(path))
    return _unwrap(_state_dict(content, os.fspath(path))), content


def describe_state(state: Mapping[str, Tensor]) -> str:
    """Guesses from keys and shapes which model a state dict belongs to.

    Args:
        state: A state dict.

    Returns:
        A phrase for an error message, e.g. "SegFormer-B0 with 19 classes".
    """
    if any(key.startswith("student.") for key in state):
        student = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
        return f"TransKD modules around {describe_state(student)}"
    if any(key.startswith(("segformer.", "decode_head.")) for key in state):
        return "a Hugging Face or mmsegmentation model, whose names and layout differ"
    rows = {key: value.shape[0] for key, value in state.items() if value.ndim > 0}
    stems = [f"patch_embed{m}.proj.weight" for m in range(1, 5)]
    if any(stem not in rows for stem in stems):
        return f"an unknown model with keys such as {', '.join(list(state)[:3])}"
    channels = tuple(rows[stem] for stem in stems)
    blocks = {match[0] for key in state if (match := re.match(r"block[1-4]\.\d+\.", key))}
    depths = tuple(sum(block.startswith(f"block{m}.") for block in blocks) for m in range(1, 5))
    sizes = f"channels {list(channels)} and depths {list(depths)}"
    if rows.get("block1.0.mlp.fc1.weight") == 8 * channels[0]:
        return f"a PVTv2 with {sizes}"
    decoder, num_classes = rows.get("linear_fuse.bn.weight"), rows.get("linear_pred.weight")
    if decoder is None or num_classes is None:
        return f"a SegFormer encoder without its decoder, with {sizes}"
    for variant, config in VARIANTS.items():
        if (channels, depths, decoder) == config:
            return f"SegFormer-{variant.upper()} with {num_classes} classes"
    return f"a SegFormer with {num_classes} classes, decoder width {decoder}, {sizes}"


def mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compares a state dict with that of a module; nothing is read but keys, shapes and kinds of numbers.

    Args:
        own: The module's state dict, which may be on the meta device.
        state: The state dict to load into it.

    Returns:
        By kind ("missing", "unexpected", "mis-shaped", "mis-typed") every key that does not fit.
    """
    return {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "mis-shaped": [
            f"{key} (expected {list(own[key].shape)}, got {list(value.shape)})"
            for key, value in state.items()
            if key in own and own[key].shape != value.shape
        ],
        "mis-typed": [
            f"{key} (expected {own[key].dtype}, got {value.dtype})"
            for key, value in state.items()
            if key in own and own[key].is_floating_point() != value.is_floating_point()
        ],
    }


def _read(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"load_weights: expected a file of weights at {path}, found none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"load_weights: {path} needs the package safetensors; pip install safetensors") from error
    # Damaged files surface as almost any exception of zip, pickle and the storage readers.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise WeightsError(
            f"load_weights: cannot read {path}: {reason}. It may be truncated, not a file of weights, or hold Python "
            "objects besides tensors, which are not loaded for safety"
        ) from error


def _state_dict(content: Any, name: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        held = [key for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        if len(held) > 1:
            raise WeightsError(f"load_weights: {name} holds several state dicts ({', '.join(held)}); pass one of them")
        state = content[held[0]] if held else content
        if state and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
            return dict(state)
    keys = f" with keys {list(content)[:_SHOWN]}" if isinstance(content, Mapping) else ""
    raise WeightsError(
        f"load_weights: {name}: expected a state dict (names to tensors), or a checkpoint holding one under "
        f"{' or '.join(map(repr, _STATE_KEYS))}, got {type(content).__name__}{keys}"
    )


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _check(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    own: dict[str, Tensor] = module.state_dict()
    if any(value.is_meta for value in own.values()):
        raise WeightsError("load_weights: expected a module with storage, got one on the meta device; use to_empty()")
    problems = mismatches(own, state)
    lines = []
    for kind, keys in problems.items():
        if keys:
            more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            lines.append(f"  {len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{more}")
    if lines:
        whole = any(key.startswith("student.") for key in state) and not any(key.startswith("student.") for key in own)
        hint = "; prefix='student.' takes the student alone" if whole else ""
        raise WeightsError(
            f"load_weights: {name} does not fit {type(module).__name__}; nothing was loaded. The file seems to hold "
            f"{describe_state(state)}, the module is {describe_state(own)}{hint}\n" + "\n".join(lines)
        )
