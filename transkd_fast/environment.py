"""What is installed, what was built, and what can run here: the report to put into a bug report."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

import transkd_fast.functional  # noqa: F401  registers every op
from transkd_fast import _extension, backends

PACKAGES = ("torch", "triton", "numpy", "torchvision", "torchmetrics", "timm", "omegaconf", "safetensors")


def collect(selftest: bool = False) -> dict[str, Any]:
    """Gather the report.

    Args:
        selftest: run the smallest kernel on every visible GPU (it leaves a CUDA context on each).

    Returns:
        A dict of plain values: versions, machine, build, ops.
    """
    return {
        "transkd_fast": _version("transkd_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "cuda": _cuda(selftest),
        "build": _extension.build_info(),
        "ops": backends.table(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda(selftest: bool) -> dict[str, Any]:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            state = _selftest(index) if selftest else "not asked for"
            devices.append({"name": properties.name, "capability": capability, "selftest": state})
    return {"torch_built_for": torch.version.cuda, "devices": devices}


def _selftest(index: int) -> str:
    """Run the smallest kernel of _C_cuda: a build without code for this GPU shows here, not amid a training."""
    if not _extension.loaded("_C_cuda"):
        return f"not run: {_extension.reason('_C_cuda')}"
    try:
        x = torch.arange(1000, dtype=torch.float32, device=f"cuda:{index}")
        right = torch.equal(torch.ops.transkd_fast.cuda_selftest(x), x + 1)
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"
    return "passed" if right else "failed: wrong result"


def render(report: dict[str, Any]) -> str:
    """The report as text.

    Args:
        report: what :func:`collect` gave.

    Returns:
        Lines for a terminal.
    """
    build = report["build"]
    lines = [
        f"transkd_fast {report['transkd_fast']}, Python {report['python']}, {report['platform']}",
        "packages: " + ", ".join(f"{k} {v or 'not installed'}" for k, v in report["packages"].items()),
        f"cpu: {report['cpu']['threads']} threads, torch uses {report['cpu']['capability']}",
        f"cuda: torch is built for {report['cuda']['torch_built_for'] or 'CPU only'}",
    ]
    for device in report["cuda"]["devices"]:
        lines.append(f"  {device['name']}, sm {device['capability']}, self-test {device['selftest']}")
    if not report["cuda"]["devices"]:
        lines.append("  no CUDA device is visible")
    for name, state in build["extensions"].items():
        lines.append(f"{name}: {'loaded' if state['loaded'] else 'not loaded: ' + state['reason']}")
        if name == "_C" and state["loaded"]:
            lines.append(f"  built with {build['compiler']} against torch {build['torch']}")
            lines.append(f"  instruction sets {build['instruction_sets']}; here {build['instruction_set_here']}")
        if name == "_C_cuda" and "cuda_build" in build:
            cuda = build["cuda_build"]
            lines.append(f"  built with CUDA {cuda['cuda_toolkit']} against torch {cuda['torch']} for {cuda['archs']}")
    lines.append("backends per op:")
    for op, states in report["ops"].items():
        lines.append(f"  {op}")
        lines += [f"    {backend:<7} {reason or 'can run'}" for backend, reason in states.items()]
    return "\n".join(lines)
