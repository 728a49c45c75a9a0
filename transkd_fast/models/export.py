"""Deployable files of a network: Hugging Face, ONNX, torch.export; none is left that disagrees with the network."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from transkd_fast.models.convert import HUGGING_FACE_EPS, hugging_face_config, save_weights, to_hugging_face, with_eps
from transkd_fast.models.segformer import SegFormer

MIN_SIZE = 64  # pixels: below, a stage's map or its keys may be one pixel wide, which is another graph
TRACED = (2, 128, 192)
# Batch sizes and image sizes, odd ones too, at which a file is compared.
CHECKED = ((1, 64, 96), (3, 64, 96), (1, 101, 135), (3, 101, 135))
LIMIT = 1e-4  # of the largest logit
_FREE = {"images": {0: Dim("batch", min=1), 2: Dim("height", min=MIN_SIZE), 3: Dim("width", min=MIN_SIZE)}}


class ExportError(RuntimeError):
    """A network that cannot be exported, or whose file disagrees with it; nothing was left."""


class HuggingFaceDifference(NamedTuple):
    """Largest differences of logits on random images, and the largest logit.

    Attributes:
        eps: Between the network at the eps that it was trained with and at Hugging Face's.
        library: Between transformers' own model and the network at Hugging Face's eps; None without transformers.
        largest: The largest logit.
    """

    eps: float
    library: float | None
    largest: float


class Logits(nn.Module):
    """A network that gives its logits alone.

    Args:
        network: Gives StageOutputs; is copied, to the CPU, in fp32 and evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().float()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, 3, H, W], RGB in [0, 1], to logits [B, K, H / 4, W / 4]."""
        return self.network(images).logits


def export_torch(network: nn.Module, path: str | os.PathLike[str]) -> float:
    """Writes a network's logits as a torch.export program with free batch and image size, and checks the file.

    Args:
        network: Gives StageOutputs with logits.
        path: The file, `.pt2`; its folder must exist.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportError: If torch cannot export the network, or the file disagrees with it.
    """
    logits = Logits(network)
    program = _program(logits)

    def write(file: Path) -> Callable[[Tensor], Tensor]:
        torch.export.save(program, file)
        return cast(Callable[[Tensor], Tensor], torch.export.load(file).module())

    return _write_checked(logits, Path(path), write)


def export_onnx(network: nn.Module, path: str | os.PathLike[str]) -> float:
    """Writes a network's logits as ONNX with free batch and image size, and checks the file in onnxruntime.

    Args:
        network: Gives StageOutputs with logits.
        path: The file, `.onnx`; its folder must exist. Input "images", output "logits".

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportError: If a package is missing, the network cannot be exported, or the file disagrees with it.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ExportError(
            f"the package {error.name} is missing; install with `pip install 'transkd_fast[export]'`"
        ) from error
    logits = Logits(network)
    program = _program(logits)
    try:
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_FREE,  # for the names of the free sizes
            verbose=False,
        )
    # The exporter wraps what it finds in many kinds of exceptions.
    except Exception as error:
        raise ExportError(f"torch.onnx cannot export {type(network).__name__}: {_first_line(error)}") from error
    assert model is not None

    def write(file: Path) -> Callable[[Tensor], Tensor]:
        model.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return _write_checked(logits, Path(path), write)


def _program(logits: Logits) -> ExportedProgram:
    batch, height, width = TRACED
    try:
        with torch.no_grad():
            program = torch.export.export(
                logits, (torch.rand(batch, 3, height, width),), dynamic_shapes=_FREE, strict=False
            )
    # torch.export's own errors and those of the traced code.
    except Exception as error:
        raise ExportError(
            f"torch.export cannot export {type(logits.network).__name__} with free batch and image size: "
            f"{_first_line(error)}"
        ) from error
    ours = sorted({name for name in _calls(program) if name.startswith("transkd_fast")})
    if ours:
        raise ExportError(f"expected a network of torch's own operators, got {', '.join(ours)}, which run only here")
    return program


def _calls(program: ExportedProgram) -> list[str]:
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _images(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator)


def _write_checked(logits: Logits, path: Path, write: Callable[[Path], Callable[[Tensor], Tensor]]) -> float:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        run = write(temporary)
        worst = max(_difference(logits, run, shape) for shape in CHECKED)
        if not worst <= LIMIT:
            raise ExportError(
                f"{path}: not written: its logits differ from the network's by {worst:.1e} of the largest, expected"
                f" at most {LIMIT:.0e}"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return worst


@torch.no_grad()
def _difference(logits: Logits, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> float:
    images = _images(*shape)
    expected, got = logits(images), run(images)
    if got.shape != expected.shape:
        raise ExportError(
            f"images {list(images.shape)}: expected logits {list(expected.shape)}, the file gives {list(got.shape)}"
        )
    return float((got - expected).abs().max() / expected.abs().max())


def export_hugging_face(
    network: nn.Module, folder: str | os.PathLike[str], classes: tuple[str, ...] | None = None
) -> HuggingFaceDifference:
    """Writes a folder that transformers' SegformerForSemanticSegmentation and its image processor load.

    Args:
        network: A SegFormer.
        folder: The folder, which must not hold files yet. It gets config.json, model.safetensors and
            preprocessor_config.json, with mean 0 and standard deviation 1.
        classes: Names of the classes; None numbers them.

    Returns:
        What the other eps costs, and where transformers is installed how its model compares.

    Raises:
        ExportError: If the network is no SegFormer, the folder holds files, or transformers' model disagrees.

    Source: transformers, SegformerConfig and SegformerImageProcessor.
    """
    folder = Path(folder)
    if not isinstance(network, SegFormer):
        raise ExportError(f"expected a SegFormer, the only network here that transformers has, got {network}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: expected a folder without files, or a name that is free")
    trained = cast(SegFormer, Logits(network).network)
    temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
    temporary.mkdir(parents=True)
    try:
        save_weights(to_hugging_face(trained.state_dict()), temporary / "model.safetensors", {"format": "pt"})
        _write_json(hugging_face_config(trained, classes), temporary / "config.json")
        _write_json(_processor(), temporary / "preprocessor_config.json")
        difference = _compare(trained, temporary)
        if difference.library is not None and not difference.library <= LIMIT * difference.largest:
            raise ExportError(
                f"{folder}: not written: transformers' logits differ by {difference.library:.1e}, expected at most"
                f" {LIMIT:.0e} of the largest, {difference.largest:.1e}"
            )
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor() -> dict[str, Any]:
    # The network takes RGB in [0, 1] as it is.
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "do_reduce_labels": False,
    }


@torch.no_grad()
def eps_difference(network: SegFormer) -> tuple[float, float]:
    """Measures what Hugging Face's eps of layer norms changes, on random images.

    Args:
        network: The network at the eps that it has here.

    Returns:
        The largest difference of logits, and the largest logit.
    """
    network = cast(SegFormer, Logits(network).network)
    images = _images(2, 128, 192)
    expected = network(images).logits
    there = with_eps(network, HUGGING_FACE_EPS)(images).logits
    return float((there - expected).abs().max()), float(expected.abs().max())


@torch.no_grad()
def _compare(trained: SegFormer, folder: Path) -> HuggingFaceDifference:
    library = None
    try:
        from transformers import SegformerForSemanticSegmentation
    except ImportError:
        pass
    else:
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
        theirs, report = loaded
        unfit = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
        if unfit:
            raise ExportError(f"transformers does not load the weights as they are: {unfit}")
        images = _images(2, 128, 192)
        there = with_eps(trained, HUGGING_FACE_EPS)(images).logits
        library = float((theirs.eval()(images).logits - there).abs().max())
    difference, largest = eps_difference(trained)
    return HuggingFaceDifference(difference, library, largest)
