"""``transkd import``, ``export`` and ``report``: published checkpoints, deployable files, what networks cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from transkd_fast.cli._commands import Commands, add_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from transkd_fast.models.complexity import Latency, Macs
    from transkd_fast.models.convert import Detected
    from transkd_fast.models.segformer import SegFormer
    from transkd_fast.train.build import Network
    from transkd_fast.train.settings import Config

_TARGETS = ("huggingface", "onnx", "torch")


def add(commands: Commands) -> None:
    """Add the commands."""
    text = "Check a file of published weights against the network it belongs to, and write it as safetensors."
    reader = commands.add("import", _import, text)
    reader.add_argument("file", type=Path, help="TransKD, teacher or network; .pth, .pt, .safetensors")
    reader.add_argument("--out", type=Path, help="file to write, .safetensors; without it the file is only checked")
    reader.add_argument("--student", action="store_true", help="write the student alone")
    _add_network(reader)
    writer = commands.add("export", _export, "Write the student alone in a form to deploy, and check what was written.")
    writer.add_argument("source", type=Path, help="run folder, checkpoint, or file of weights")
    writer.add_argument("--to", choices=_TARGETS, required=True, help="form")
    writer.add_argument("out", type=Path, help="folder (huggingface) or file (onnx: .onnx, torch: .pt2)")
    _add_network(writer)
    text = "Print parameters, multiply-accumulates and latency of teacher, student and student in training."
    report = commands.add("report", _report, text)
    report.add_argument("--batch", type=int, default=1, help="images per call that is timed; default 1")
    report.add_argument("--seconds", type=float, default=3.0, help="time per network that is timed; default 3")
    add_config(report)
    report.epilog = "A run folder may stand before the overrides instead of --config."


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="name of the network, e.g. segformer_b0; found by the keys without it")
    command.add_argument("--num-classes", type=int, help="number of logits; found by the classifier without it")


def _import(args: argparse.Namespace) -> int:
    from transkd_fast.models import convert
    from transkd_fast.models.complexity import count_parameters
    from transkd_fast.models.weights import WeightsError, read_weights

    if args.out is not None:
        _check_out(args.out, (".safetensors",))
    elif args.student:
        raise WeightsError("--student: expected --out, the file to write the student to")
    state, content = read_weights(args.file)
    foreign = convert.is_hugging_face(state)
    state = convert.published_names(state)
    found = _detect(state, args)
    module, student = _build(found)
    print(f"{args.file}: {found}")
    _load(module, state, args.file)
    parameters = f"{count_parameters(module) / 1e6:.2f} M parameters"
    if module is not student:
        parameters += f", {count_parameters(student) / 1e6:.2f} M of them the student's"
    print(f"{len(state)} tensors, all fit; {parameters}; {found.num_classes} classes")
    if foreign:
        _print_eps(cast("SegFormer", student))
    if args.out is not None:
        written = student if args.student else module
        convert.save_weights(written.state_dict(), args.out, _metadata(found, args, content))
        print(f"written to {args.out}: {len(written.state_dict())} tensors")
    return 0


def _metadata(found: Detected, args: argparse.Namespace, content: Mapping[str, Any]) -> dict[str, str]:
    alone = found.wrapper is None or args.student
    entries = {
        "format": "pt",
        "model": found.model,
        "num_classes": str(found.num_classes),
        "holds": "network" if found.wrapper is None or alone else f"transkd-{found.wrapper['variant']}",
        "source": args.file.name,
    }
    classes = _classes(content)
    return entries if classes is None else {**entries, "classes": "\n".join(classes)}


def _classes(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = content.get("classes")
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None


def _detect(state: Mapping[str, Tensor], args: argparse.Namespace) -> Detected:
    from transkd_fast.models import MODELS, WeightsError, convert

    if args.model is not None and args.model not in MODELS:
        raise WeightsError(f"--model: expected one of {', '.join(MODELS)}, got {args.model!r}")
    if args.num_classes is not None and args.num_classes < 1:
        raise WeightsError(f"--num-classes: expected at least 1, got {args.num_classes}")
    try:
        return convert.detect(state, args.model, args.num_classes)
    except ImportError as error:
        raise WeightsError(f"--model: {args.model} needs a package: {error}") from error


def _build(found: Detected) -> tuple[nn.Module, nn.Module]:
    """The module that a file belongs to, and the network in it."""
    from transkd_fast import models
    from transkd_fast.transkd import TransKD

    network = models.create(found.model, num_classes=found.num_classes)
    if found.wrapper is None:
        return network, network
    try:
        return TransKD(network, **found.wrapper), network
    except ValueError as error:
        raise models.WeightsError(f"no TransKD model has these weights: {error}") from error


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    from transkd_fast.models.weights import WeightsError, mismatches

    problems = mismatches(module.state_dict(), state)
    for kind, keys in problems.items():
        for key in keys:
            print(f"  {kind}: {key}")
    counts = [f"{len(keys)} {kind}" for kind, keys in problems.items() if keys]
    if counts:
        raise WeightsError(f"{path} does not fit: {', '.join(counts)}; nothing was written")
    module.load_state_dict(state)


def _print_eps(network: SegFormer) -> None:
    from transkd_fast.models.export import eps_difference

    difference, largest = eps_difference(network)
    print(
        "from Hugging Face, where every layer norm has eps 1e-5; here those of blocks and stages have 1e-6: logits of"
        f" random images differ by {difference:.1e}, the largest is {largest:.1e}.\nThe images must be normalised as"
        " its preprocessor_config.json says; nothing of that is in the weights"
    )


def _export(args: argparse.Namespace) -> int:
    from transkd_fast.models import convert, export
    from transkd_fast.models.weights import read_weights

    _check_out(args.out, {"onnx": (".onnx",), "torch": (".pt2",), "huggingface": ()}[args.to])
    path = _weights_of(args.source)
    state, content = read_weights(path)
    state = convert.student_of(convert.published_names(state))
    found = _detect(state, args)
    _, network = _build(found)
    print(f"{path}: {found}")
    _load(network, state, path)
    names = _classes(content)
    if args.to == "huggingface":
        classes = names if names is not None and len(names) == found.num_classes else None
        difference = export.export_hugging_face(network, args.out, classes)
        checked = "not checked: the package transformers is not installed"
        if difference.library is not None:
            checked = f"transformers gives the same logits at that eps to {difference.library:.1e}"
        print(
            f"written to {args.out}; mean 0, standard deviation 1\n"
            f"layer norms' eps, 1e-5 there, 1e-6 in the blocks trained: logits differ by {difference.eps:.1e},"
            f" the largest is {difference.largest:.1e}\n{checked}"
        )
        return 0
    print("exporting and checking, which takes a minute for large networks ...")
    write = export.export_onnx if args.to == "onnx" else export.export_torch
    worst = write(network, args.out)
    shapes = ", ".join("x".join(map(str, shape)) for shape in export.CHECKED)
    print(
        f"written to {args.out}: images [B, 3, H, W], RGB in [0, 1], any B, H and W from {export.MIN_SIZE} on;"
        f" logits [B, {found.num_classes}, H / 4, W / 4]\n"
        f"checked at {shapes}: logits differ by at most {worst:.1e} of the largest"
    )
    return 0


def _check_out(out: Path, suffixes: tuple[str, ...]) -> None:
    from transkd_fast.models import WeightsError

    if suffixes and out.suffix not in suffixes:
        raise WeightsError(f"{out}: expected a name that ends with {suffixes[0]}")
    if not out.absolute().parent.is_dir():
        raise WeightsError(f"{out}: expected a folder at {out.absolute().parent}, found none")


def _weights_of(source: Path) -> Path:
    """The file itself, or the last checkpoint of a run's student, as `transkd eval` takes it."""
    from transkd_fast.models import WeightsError

    if not source.is_dir():
        return source
    names = [f"{folder}{name}" for folder in ("student/", "") for name in ("last.pt", "best.pt")]
    for name in names:
        if (source / name).is_file():
            return source / name
    raise WeightsError(f"{source}: expected a run folder with {' or '.join(names)}")


class _Row(NamedTuple):
    name: str
    parameters: int
    macs: Macs
    latency: Latency


def _report(args: argparse.Namespace) -> int:
    import torch

    from transkd_fast import backends
    from transkd_fast.train import build
    from transkd_fast.train.config import ConfigError
    from transkd_fast.train.run import prepare_process

    for key in ("batch", "seconds"):
        if getattr(args, key) <= 0:
            raise ConfigError(f"--{key}: expected a positive number, got {getattr(args, key)}")
    config = _report_config(args)
    prepare_process(config)
    device = build.select_device(config.device)
    height, width = config.data.size
    with backends.use_backend(config.backend):
        rows = _rows(config, torch.rand(args.batch, 3, height, width, device=device), args.seconds)
    width_of_names = max(len(row.name) for row in rows)
    heads = ("parameters", "GMACs", "with attention", "executed", "median ms", "p20", "p80")
    print(" " * width_of_names + "".join(f"{head:>15}" for head in heads))
    for row in rows:
        gigas = [n / 1e9 for n in (row.macs.layers, row.macs.total, row.macs.executed + row.macs.attention)]
        times = [1e3 * t for t in row.latency[:3]]
        cells = [f"{row.parameters / 1e6:.2f} M", *(f"{g:.2f}" for g in gigas), *(f"{t:.1f}" for t in times)]
        print(f"{row.name:<{width_of_names}}" + "".join(f"{cell:>15}" for cell in cells))
    where = f"{device}, {config.precision}"
    if device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    print(
        f"GMACs: one image of {height} x {width}; without attention's products, as published figures count them, and"
        f" with them; executed: with them, and the decoder's layers folded where the network folds them\n"
        f"latency: a forward pass of {args.batch} x 3 x {height} x {width}, {where},"
        f" {min(row.latency.calls for row in rows)} or more calls"
    )
    return 0


def _report_config(args: argparse.Namespace) -> Config:
    """The configuration given, or that of a run folder, with its networks' numbers of classes."""
    from transkd_fast.train import build
    from transkd_fast.train.checkpoint import load_checkpoint
    from transkd_fast.train.config import ConfigError, load_config

    run = None
    if args.overrides and "=" not in args.overrides[0]:
        run = Path(args.overrides.pop(0))
        if args.config is not None:
            raise ConfigError(f"{run}: expected a run folder or --config, got both")
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run}: expected a run folder with config.yaml, found none")
    config = load_config(args.config if run is None else run / "config.yaml", args.overrides)
    networks = (config.student, config.teacher)
    if any(network.num_classes is None for network in networks):
        last = run / "student" / "last.pt" if run is not None else None
        if last is not None and last.is_file():
            classes = len(load_checkpoint(last, ("classes",))["classes"])
        else:
            classes = build.build_dataset(config, "train").num_classes
        for network in networks:
            network.num_classes = network.num_classes or classes
    return config


def _rows(config: Config, images: Tensor, seconds: float) -> list[_Row]:
    import torch

    from transkd_fast import backends
    from transkd_fast.models.complexity import count_macs, count_parameters, measure_latency
    from transkd_fast.train import build

    def network(purpose: str) -> Network:
        settings = replace(getattr(config, purpose), weights=None)
        return build.build_model(config, settings, settings.num_classes, purpose, print).eval()

    def row(name: str, module: nn.Module, forward: Callable[..., Any], timed: Callable[[], Any] | None = None) -> _Row:
        # Fused kernels are one call each; eager shows what they multiply.
        with backends.use_backend("eager"):
            macs = count_macs(module, (1, *images.shape[1:]), forward)
        with torch.no_grad(), build.autocast(images.device, config.precision):
            latency = measure_latency(timed or (lambda: forward(module, images)), images.device, seconds)
        return _Row(name, count_parameters(module), macs, latency)

    def whole(module: nn.Module, x: Tensor) -> Any:
        return module(x)

    student = network("student")
    rows = [row(f"student {config.student.model}, as deployed", student, whole)]
    if not config.distill.enabled:
        return rows
    teacher = network("teacher")
    rows.insert(0, row(f"teacher {config.teacher.model}", teacher, whole))
    if not config.distill.logits:
        name = "teacher without its decoder, as in training"
        rows.insert(1, row(name, teacher, lambda module, x: module(x, features_only=True)))
    with torch.no_grad(), build.autocast(images.device, config.precision):
        target = teacher(images)
    # Before the wrapper goes into training mode: the student's row is done.
    wrapper = build.build_transkd(config, student, teacher).train()
    rows.append(row("student in training, with losses", wrapper, whole, lambda: wrapper(images, target)))
    return rows
