"""What a file of weights holds, and SegFormer's names and configuration at Hugging Face."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from transkd_fast.models.registry import MODELS, create
from transkd_fast.models.segformer import Block, SegFormer
from transkd_fast.models.weights import WeightsError, describe_state, mismatches

STUDENT = "student."
HUGGING_FACE_EPS = 1e-5  # of every layer norm there; SegformerConfig.layer_norm_eps is not read

# Our modules and theirs, as files and transformers before 5.10 name them, and as its modules are named since;
# {s} counts stages from 0.
_STAGE_NAMES = {
    "patch_embed{m}.proj": (
        "segformer.encoder.patch_embeddings.{s}.proj",
        "segformer.stages.{s}.patch_embeddings.proj",
    ),
    "patch_embed{m}.norm": (
        "segformer.encoder.patch_embeddings.{s}.layer_norm",
        "segformer.stages.{s}.patch_embeddings.layer_norm",
    ),
    "norm{m}": ("segformer.encoder.layer_norm.{s}", "segformer.stages.{s}.layer_norm"),
    "linear_c{m}.proj": ("decode_head.linear_c.{s}.proj", "decode_head.linear_projections.{s}.proj"),
}
_BLOCKS = ("segformer.encoder.block.{s}.{i}.", "segformer.stages.{s}.blocks.{i}.")
_BLOCK_NAMES = {
    "norm1": ("layer_norm_1", "layernorm_before"),
    "norm2": ("layer_norm_2", "layernorm_after"),
    "attn.q": ("attention.self.query", "attention.q_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "attn.sr": ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    "attn.norm": ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    "mlp.fc1": ("mlp.dense1", "mlp.fc1"),
    "mlp.fc2": ("mlp.dense2", "mlp.fc2"),
    "mlp.dwconv.dwconv": ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
}
# Ours is one layer whose first half of rows gives the keys.
_KEY_VALUE = (("attention.self.key", "attention.self.value"), ("attention.k_proj", "attention.v_proj"))
_HEAD_NAMES = {
    "linear_fuse.conv": "decode_head.linear_fuse",
    "linear_fuse.bn": "decode_head.batch_norm",
    "linear_pred": "decode_head.classifier",
}


@dataclass(frozen=True)
class Detected:
    """What a state dict belongs to.

    Attributes:
        model: Name of the network, one of MODELS.
        num_classes: Its number of logits.
        wrapper: None for a network alone; else the arguments of `TransKD` around it, but for the student.
    """

    model: str
    num_classes: int
    wrapper: dict[str, Any] | None

    def __str__(self) -> str:
        """One phrase for a report."""
        network = f"{self.model} with {self.num_classes} classes"
        if self.wrapper is None:
            return network
        variant = {"base": "Base", "gl": "GL", "ea": "EA"}[self.wrapper["variant"]]
        channels = ", ".join(map(str, self.wrapper["teacher_channels"]))
        return f"TransKD-{variant} around {network}, for a teacher of {channels} channels"


def detect(state: Mapping[str, Tensor], model: str | None = None, num_classes: int | None = None) -> Detected:
    """Finds the registered network, and the TransKD modules around it, that a state dict fits best.

    Args:
        state: A state dict in the published names, without the prefix of a wrapper such as DataParallel.
        model: Name of the network where it is known; None compares the state with every model of MODELS.
        num_classes: Number of logits where it is known; None reads it off the classifier's shape.

    Returns:
        The network, which need not fit the state in every key.

    Raises:
        WeightsError: If no key of the state belongs to a registered network.
        ValueError: If `model` is not registered.

    Source: key names of the checkpoints published with TransKD and with SegFormer.
    """
    inner = student_of(state)
    name = model if model is not None else _nearest(inner)
    small, large = (skeleton(name, k).state_dict() for k in (2, 3))
    if not small.keys() & inner.keys():
        raise WeightsError(
            f"expected weights of one of {', '.join(MODELS)}; the file seems to hold {describe_state(state)}"
        )
    if num_classes is None:
        num_classes = _classes(small, large, inner)
    wrapper = _wrapper(state, inner, name) if any(key.startswith(STUDENT) for key in state) else None
    return Detected(name, num_classes, wrapper)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict as the published checkpoints do.

    Args:
        state: A state dict: published names, with a student that was wrapped before it was distilled, or Hugging
            Face's names of SegFormer.

    Returns:
        The same tensors; key and value layers of Hugging Face's become one.
    """
    if is_hugging_face(state):
        return from_hugging_face(state)
    wrapped = f"{STUDENT}module."
    own = [key for key in state if key.startswith(STUDENT)]
    if own and all(key.startswith(wrapped) for key in own):
        return {key.replace(wrapped, STUDENT, 1): value for key, value in state.items()}
    return dict(state)


def student_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes the student out of a TransKD state dict.

    Args:
        state: The state dict of a wrapped student or of a network alone.

    Returns:
        The network's own state dict.
    """
    inner = {key.removeprefix(STUDENT): value for key, value in state.items() if key.startswith(STUDENT)}
    return inner or dict(state)


def skeleton(name: str, num_classes: int) -> nn.Module:
    """Builds a network without storage, to read its keys, shapes and costs off.

    Args:
        name: One of MODELS.
        num_classes: Number of logits.

    Returns:
        The network on the meta device, in evaluation mode.
    """
    with torch.device("meta"):
        return create(name, num_classes=num_classes).eval()


def _nearest(state: Mapping[str, Tensor]) -> str:
    def distance(name: str) -> int:
        # A model whose package is not installed cannot be compared.
        try:
            own = skeleton(name, 2).state_dict()
        except ImportError:
            return 1 << 60
        return sum(map(len, mismatches(own, state).values()))

    return min(MODELS, key=distance)


def _classes(small: Mapping[str, Tensor], large: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int:
    """Reads the number of classes off the first tensor whose shape depends on it."""
    for key, value in small.items():
        axes = [axis for axis, size in enumerate(value.shape) if large[key].shape[axis] != size]
        if axes and key in state and state[key].ndim == value.ndim:
            return state[key].shape[axes[0]]
    return 20


def _wrapper(state: Mapping[str, Tensor], inner: Mapping[str, Tensor], model: str) -> dict[str, Any]:
    own = [key for key in state if not key.startswith(STUDENT)]
    assisted = any(key.startswith(("fuse_weights.", "patch_embed")) for key in own)
    mixed = any(key.startswith(("attn4.", "atten_weight", "conv_weight")) for key in own)
    features = any(key.startswith("skfs.") for key in own)
    channels = cast(tuple[int, ...], tuple(skeleton(model, 2).channels))  # type: ignore[arg-type]

    def rows(key: str) -> int | None:
        return state[key].shape[0] if key in state and state[key].ndim else None

    # The published list of fuse blocks runs from the coarsest stage to the finest.
    fused = [rows(f"skfs.{3 - m}.conv2.0.weight") for m in range(4)]
    projections = {m: rows(f"embed{m}_linearproject.weight") for m in range(1, 5)}
    stages = {m for m in projections if any(key.startswith(f"embed{m}_linearproject.") for key in own)}
    if stages == {1} and projections[1] is not None:
        stages = {_single_stage(state["embed1_linearproject.weight"], channels, fused)}
        projections = {m: projections[1] for m in stages}
    if mixed and not assisted:
        stages.add(4)
    return {
        "student_channels": channels,
        # Of a stage that is neither fused nor aligned no tensor has the teacher's width: any will do.
        "teacher_channels": tuple(fused[m] or projections.get(m + 1) or channels[m] for m in range(4)),
        "variant": "ea" if assisted else "gl" if mixed else "base",
        "mid_channels": rows("skfs.0.conv1.0.weight") or 64,
        "features": features,
        "embeddings": tuple(sorted(stages)),
    }


def _single_stage(weight: Tensor, student: tuple[int, ...], teacher: list[int | None]) -> int:
    """A single aligned stage is named the first whichever it is; its widths tell."""
    for m, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if weight.shape[-1] == ours and theirs in (None, weight.shape[0]):
            return m + 1
    return 1


def save_weights(state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a state dict as safetensors, whole or not at all.

    Args:
        state: Names to tensors.
        path: The file; its folder must exist.
        metadata: What to write into its header beside the tensors.
    """
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Tensors of the file must be dense and own their storage.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        save_file(tensors, temporary, metadata=dict(metadata))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Tells whether a state dict has Hugging Face's names of SegFormer.

    Args:
        state: A state dict.

    Returns:
        Whether it has.
    """
    return any(key.startswith(("segformer.encoder.", "segformer.stages.")) for key in state)


def to_hugging_face(state: Mapping[str, Tensor], layout: str = "files") -> dict[str, Tensor]:
    """Renames a SegFormer state dict for Hugging Face's SegformerForSemanticSegmentation.

    Args:
        state: Our state dict, published names.
        layout: "files" for the names of files and of modules before transformers 5.10, "stages" for those of
            modules since.

    Returns:
        Their state dict; keys that are not SegFormer's stay as they are.

    Source: transformers 4.57 and 5.24, models/segformer.
    """
    names = _names(state, r"block([1-4])\.(\d+)\.", 1, ("files", "stages").index(layout))
    result = {}
    for key, value in state.items():
        module, _, parameter = key.rpartition(".")
        theirs = names.get(module)
        if isinstance(theirs, tuple):
            for part, rows in zip(theirs, value.chunk(2), strict=True):
                result[f"{part}.{parameter}"] = rows
        else:
            result[key if theirs is None else f"{theirs}.{parameter}"] = value
    return result


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of Hugging Face's SegformerForSemanticSegmentation, in either layout, as ours.

    Args:
        state: Their state dict.

    Returns:
        Our state dict, published names; keys that are not SegFormer's stay as they are, and so do keys without values
        and values without keys.

    Source: transformers 4.57 and 5.24, models/segformer.
    """
    layout = int(any(key.startswith("segformer.stages.") for key in state))
    blocks = (r"segformer\.encoder\.block\.(\d)\.(\d+)\.", r"segformer\.stages\.(\d)\.blocks\.(\d+)\.")[layout]
    names = _names(state, blocks, 0, layout)
    ours = {theirs: name for name, theirs in names.items() if isinstance(theirs, str)}
    rest, result = dict(state), {}
    for name, theirs in names.items():
        for parameter in ("weight", "bias") if isinstance(theirs, tuple) else ():
            parts = [f"{part}.{parameter}" for part in theirs]
            if all(part in rest for part in parts):
                result[f"{name}.{parameter}"] = torch.cat([rest.pop(part) for part in parts])
    for key, value in rest.items():
        module, _, parameter = key.rpartition(".")
        result[f"{ours[module]}.{parameter}" if module in ours else key] = value
    return result


def _names(state: Mapping[str, Tensor], block: str, first: int, layout: int) -> dict[str, str | tuple[str, str]]:
    """Their name, or their names of keys and values, by our module's name, for the blocks that a state dict has."""

    def pairs() -> Iterator[tuple[str, str | tuple[str, str]]]:
        yield from _HEAD_NAMES.items()
        for s in range(4):
            for name, theirs in _STAGE_NAMES.items():
                yield name.format(m=s + 1), theirs[layout].format(s=s)
        found = {(int(match[1]) - first, int(match[2])) for key in state if (match := re.match(block, key))}
        for s, i in sorted(found):
            prefix, own = _BLOCKS[layout].format(s=s, i=i), f"block{s + 1}.{i}."
            for name, theirs in _BLOCK_NAMES.items():
                yield own + name, prefix + theirs[layout]
            key, value = _KEY_VALUE[layout]
            yield own + "attn.kv", (prefix + key, prefix + value)

    return dict(pairs())


def hugging_face_config(network: SegFormer, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Writes a SegFormer's shape as the config.json of SegformerForSemanticSegmentation.

    Args:
        network: The network.
        classes: Its classes' names; None numbers them.

    Returns:
        The configuration.

    Source: transformers, SegformerConfig.
    """
    stages = [[cast(Block, block) for block in getattr(network, f"block{m}")] for m in range(1, 5)]
    names = classes or tuple(f"LABEL_{k}" for k in range(network.num_classes))
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_channels": network.in_channels,
        "num_encoder_blocks": 4,
        "depths": [len(blocks) for blocks in stages],
        "hidden_sizes": list(network.channels),
        "num_attention_heads": [blocks[0].attn.num_heads for blocks in stages],
        "sr_ratios": [blocks[0].attn.sr_ratio for blocks in stages],
        "mlp_ratios": [b[0].mlp.fc1.out_features // b[0].mlp.fc1.in_features for b in stages],
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "decoder_hidden_size": network.linear_pred.in_channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": network.dropout.p,
        "drop_path_rate": stages[-1][-1].drop_path.rate,
        "layer_norm_eps": HUGGING_FACE_EPS,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255,
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
        "dtype": "float32",
    }


def from_hugging_face_config(config: Mapping[str, Any]) -> SegFormer:
    """Builds the SegFormer that a config.json of Hugging Face describes, with the layer norms' eps that it has there.

    Args:
        config: The configuration as a mapping.

    Returns:
        The network, freshly initialised.

    Raises:
        WeightsError: If it describes what our SegFormer is not.

    Source: transformers, SegformerConfig.
    """
    fixed = {
        "model_type": "segformer",
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "hidden_act": "gelu",
        "reshape_last_stage": True,
    }
    for key, expected in fixed.items():
        if config.get(key, expected) != expected:
            raise WeightsError(f"Hugging Face configuration: expected {key} {expected!r}, got {config[key]!r}")
    ratios = set(config["mlp_ratios"])
    if len(ratios) != 1:
        raise WeightsError(f"Hugging Face configuration: expected equal mlp_ratios, got {config['mlp_ratios']}")
    network = SegFormer(
        config["hidden_sizes"],
        config["depths"],
        config["decoder_hidden_size"],
        config["num_attention_heads"],
        config["sr_ratios"],
        int(ratios.pop()),
        num_classes=len(config["id2label"]),
        in_channels=config["num_channels"],
        drop_path_rate=config["drop_path_rate"],
        dropout=config["classifier_dropout_prob"],
    )
    return with_eps(network, HUGGING_FACE_EPS)


def with_eps(network: SegFormer, eps: float) -> SegFormer:
    """Copies a network and gives all its layer norms one eps.

    Args:
        network: The network; stays as it is.
        eps: The eps.

    Returns:
        The copy.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return network


def read_hugging_face_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a config.json.

    Args:
        path: The file.

    Returns:
        The configuration.

    Raises:
        WeightsError: If it is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: expected a JSON configuration: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
