"""What this machine has: the GPU that torch sees, the toolkit, the driver; and why a run cannot start."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
PROBE_SECONDS = 120  # the first import of torch may read gigabytes from a cold disk

# Runs in a process of its own: the run itself must hold no memory on the GPU.
PROBE = """
import importlib.metadata, json
found = {}
try:
    found["triton"] = importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    pass
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    torch.ones(1, device="cuda").cpu()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["devices"] = [p.name for p in properties]
    found["capabilities"] = [f"{p.major}.{p.minor}" for p in properties]
except Exception as error:
    found["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Machine:
    """What the probe found; `error` says why torch cannot use a GPU.

    Args:
        torch: version of torch, None where it cannot be imported.
        cuda: version of CUDA that torch was built for, None for one without CUDA.
        triton: version of Triton, None where it is not installed.
        devices: names of the visible GPUs.
        capabilities: compute capability of each, e.g. "9.0".
        error: first line of what went wrong.
    """

    torch: str | None = None
    cuda: str | None = None
    triton: str | None = None
    devices: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    error: str | None = None


def probe() -> Machine:
    """Ask the running interpreter's torch what it sees."""
    try:
        asked = subprocess.run(
            [sys.executable, "-B", "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        found = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Machine(error=f"torch did not answer within {PROBE_SECONDS} s")
    except (IndexError, ValueError):  # torch took the process down
        complaint = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        return Machine(error=f"asking torch ended with status {asked.returncode}: {complaint}")
    for name in ("devices", "capabilities"):
        found[name] = tuple(found.get(name, ()))
    return Machine(**found)


def refusal(machine: Machine) -> str | None:
    """Why a run cannot start on this machine and what to do, or None if it can."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    expected = f"make gpu: expected an NVIDIA GPU and a Python with torch >= {wanted} that sees it"
    advice = f"name another Python with make gpu PYTHON=...; {sys.executable} was asked"
    if machine.torch is None:
        reason = machine.error or "torch is not installed"
        return f"{expected}, found no torch ({reason}); install torch, or {advice}"
    if release(machine.torch) < MINIMUM_TORCH:
        return f"{expected}, found torch {machine.torch}; install torch >= {wanted}, or {advice}"
    if machine.cuda is None:
        return f"{expected}, found torch {machine.torch}, built without CUDA; install one built for CUDA, or {advice}"
    if not machine.devices:
        return (
            f"{expected}, found torch {machine.torch} without a GPU that works ({machine.error or 'none is visible'}); "
            f"run this on a machine with one, check nvidia-smi and CUDA_VISIBLE_DEVICES, or {advice}"
        )
    return None


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find_tool(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """A program of the CUDA toolkit, looked for where setup.py looks for nvcc."""
    homes = [environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if environ.get(variable)]
    for home in (*homes, "/usr/local/cuda"):
        path = Path(home, "bin", name)
        if path.is_file():
            return str(path)
    return shutil.which(name, path=environ.get("PATH"))


def nvcc_version(nvcc: str | None) -> str | None:
    """The toolkit's release, e.g. "13.0"; None without nvcc or where it does not tell."""
    if nvcc is None:
        return None
    found = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]) or "")
    return found.group(1) if found else None


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where nvidia-smi cannot tell."""
    lines = (output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").split()
    return lines[0] if lines else None


def commit(root: Path) -> str | None:
    """The checked-out commit, with "-dirty" where tracked files differ from it; None for a tree without git."""
    git = ["git", "-C", str(root)]
    head = output_of([*git, "rev-parse", "HEAD"]) if (root / ".git").exists() else None
    if not head:
        return None
    return head.strip() + ("-dirty" if output_of([*git, "status", "--porcelain", "--untracked-files=no"]) else "")


def output_of(command: list[str]) -> str | None:
    """What a command prints; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def python_version() -> str:
    return platform.python_version()
