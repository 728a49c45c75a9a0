"""An environment of the run's own: a venv that also sees the packages of the Python that runs this, and carried wheels.

`--system-site-packages` would show the packages of the base installation only, and the running Python may itself be a
venv. Its folders are named in a .pth file: what is installed here goes into the venv and that Python stays as it is.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_run.runner import Failed, Work

CARRY = Path(".gpu", "carry")
VENV = Path(".gpu", "venv")
CACHE = Path(".gpu", "cache")
PTH = "packages_of_the_running_python.pth"
SITE_NAMES = ("site-packages", "dist-packages")
# What the steps import beyond torch; the first ones are no pure Python and must be on the machine.
REQUIRED = (
    *("numpy", "torchvision", "PIL", "safetensors", "yaml", "setuptools", "pybind11", "ninja"),
    *("torchmetrics", "tqdm", "pytest", "pytest_benchmark", "cpuinfo", "omegaconf"),
)
IMPORTABLE = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""


def site_folders(path: Sequence[str]) -> list[str]:
    """The folders of installed packages on an interpreter's sys.path, in its order."""
    return [folder for folder in dict.fromkeys(path) if Path(folder).name in SITE_NAMES and Path(folder).is_dir()]


def environment(root: Path, environ: Mapping[str, str], capabilities: Sequence[str]) -> dict[str, str]:
    """The environment of all steps: the venv and the running Python's programs on PATH, caches inside the tree."""
    # What is left over from a shell must neither choose backends nor put the interpreter in the GPU's place.
    dropped = {"TRITON_INTERPRET", "TRANSKD_FAST_BACKEND", "TRANSKD_FAST_CUDA", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {key: value for key, value in environ.items() if key not in dropped}
    programs = [str(root / VENV / "bin"), str(Path(sys.executable).parent), environ.get("PATH", os.defpath)]
    return kept | {
        "PATH": os.pathsep.join(programs),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",  # bars are for a terminal, the output goes to a file
        "TORCH_CUDA_ARCH_LIST": ";".join(sorted(set(capabilities))),
        "MAX_JOBS": str(os.cpu_count() or 1),
        "TRITON_CACHE_DIR": str(root / CACHE / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / CACHE / "inductor"),
    }


def python(root: Path) -> Path:
    return root / VENV / "bin" / "python"


def make(work: Work, folders: Sequence[str] | None = None) -> None:
    """Make the venv and install the carried wheels that are needed.

    Raises:
        Failed: if it cannot be made.
    """
    folders = site_folders(sys.path) if folders is None else folders
    made = work.call(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV)
    if made.status != 0:
        raise Failed(f"python -m venv failed: {last_line(made.output)}")
    asked = work.call(python(work.root), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    site = Path(asked.output.strip())
    (site / PTH).write_text("".join(f"{folder}\n" for folder in folders))
    install_wheels(work, site)
    missing = not_importable(work, REQUIRED)
    if missing:
        work.numbers["missing_packages"] = missing


def install_wheels(work: Work, site: Path) -> None:
    """Install those carried wheels whose modules cannot be imported without them."""
    installed = []
    for wheel in sorted((work.root / CARRY / "wheels").glob("*.whl")):
        require_pure(wheel)
        if not not_importable(work, modules_of(wheel)):
            continue
        pip(work, "install", "--no-deps", wheel)
        installed.append(wheel.name)
    work.numbers["carried_wheels"] = installed


def pip(work: Work, command: str, *arguments: str | Path, seconds: float = math.inf, **environ: str) -> None:
    """Run the running Python's pip on the venv, without network and without the user's settings.

    Raises:
        Failed: with pip's last complaint.
        TimedOut: if the seconds, or the step's time, were over first.
    """
    options = ["--isolated", "--disable-pip-version-check", "--no-input"]
    words = (sys.executable, "-m", "pip", "--python", VENV, *options, command, "--no-index", *arguments)
    done = work.call(*words, seconds=seconds, **environ)
    if done.status != 0:
        raise Failed(f"pip {command} failed: {complaint(done.output)}")


def not_importable(work: Work, names: Sequence[str]) -> list[str]:
    """The modules out of `names` that the venv's Python does not find."""
    asked = work.call(python(work.root), "-c", IMPORTABLE, *names)
    if asked.status != 0:
        raise Failed(f"{VENV}: its Python does not run: {last_line(asked.output)}")
    missing: list[str] = json.loads(last_line(asked.output))
    return missing


def require_pure(wheel: Path) -> None:
    """Refuse a wheel that is made for one platform or one version of Python.

    Raises:
        Failed: if it is.
    """
    if not wheel.name.endswith("-none-any.whl"):
        raise Failed(f"{wheel.name}: expected a pure-Python wheel, ...-none-any.whl; take it out of {wheel.parent}")


def modules_of(wheel: Path) -> list[str]:
    """The top-level modules and packages that a wheel installs."""
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name).parts for name in archive.namelist() if name.endswith(".py")]
    return sorted({parts[0].removesuffix(".py") for parts in names if not parts[0].endswith((".data", ".dist-info"))})


def last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


def complaint(output: str) -> str:
    """The line of pip's or the compiler's output that says most about what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for words in ("transkd_fast: ", ": error:", "fatal error", "ERROR", "Error"):
        found = next((line for line in lines if words in line), None)
        if found is not None:
            return found
    return lines[-1] if lines else "no output"
