"""Loads the compiled extensions and remembers why one of them could not be loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_modules: dict[str, ModuleType] = {}
_reasons: dict[str, str] = {}


def _load(name: str) -> None:
    try:
        _modules[name] = importlib.import_module(f"transkd_fast.{name}")
    except ImportError as error:
        _reasons[name] = str(error)


def _explain_missing_cpp() -> None:
    """Turn "no module named _C" into what happened and what to do."""
    if "_C" in _modules or any(_PACKAGE.glob("_C.*.so")) or any(_PACKAGE.glob("_C.*.pyd")):
        return
    if (_PACKAGE.parent / "setup.py").exists() and (_PACKAGE.parent / "csrc").is_dir():
        raise ImportError(
            f"transkd_fast was imported from its source tree ({_PACKAGE.parent}), which holds no compiled extension. "
            "Expected an installed package: run `pip install -e .` there to develop, or, after a plain "
            "`pip install .`, start Python in another folder."
        )


_load("_C")
_explain_missing_cpp()
if "_C" not in _modules:
    _reasons["_C_cuda"] = "transkd_fast._C, which declares the ops, is not loaded"
elif torch.version.cuda is None:
    _reasons["_C_cuda"] = f"this torch ({torch.__version__}) has no CUDA"
elif _modules["_C"].build_info()["cuda"] != "built":
    _reasons["_C_cuda"] = "not built: " + _modules["_C"].build_info()["cuda"]
else:
    _load("_C_cuda")


def loaded(name: str) -> bool:
    """Whether an extension is loaded.

    Args:
        name: ``"_C"`` (C++ for CPU) or ``"_C_cuda"`` (CUDA C++).

    Returns:
        True if its kernels are registered with torch.
    """
    return name in _modules


def reason(name: str) -> str | None:
    """Why an extension is not loaded.

    Args:
        name: ``"_C"`` or ``"_C_cuda"``.

    Returns:
        The reason in words, or None if it is loaded.
    """
    return None if name in _modules else _reasons.get(name, "not loaded")


def build_info() -> dict[str, Any]:
    """What was built, with which compilers, and why something was not.

    Returns:
        A dict with ``version`` pairs of the build (torch, compiler, instruction sets, CUDA architectures) as recorded
        in ``_C`` and, per extension, ``loaded`` and the ``reason`` where it is not.
    """
    info: dict[str, Any] = dict(_modules["_C"].build_info()) if "_C" in _modules else {}
    if "_C_cuda" in _modules:
        info["cuda_build"] = dict(_modules["_C_cuda"].build_info())
    info["extensions"] = {name: {"loaded": loaded(name), "reason": reason(name)} for name in ("_C", "_C_cuda")}
    return info
