"""How the raw ops of all backends become known to torch: fakes, and Triton launchers as registered ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from transkd_fast import _extension

NAMESPACE = "transkd_fast"
# Keeps what was registered alive; torch forgets it with the object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_fakes: dict[str, Callable[..., Any]] = {}


def raw_op(name: str, backend: str) -> Callable[..., Any]:
    """The raw op that a backend runs.

    Args:
        name: name of the raw op, e.g. ``"hcl_fwd"``.
        backend: "cpu", "cuda" (one op, told apart by the tensors' device) or "triton" (an op of its own, so that both
            can be chosen on one device).

    Returns:
        The callable ``torch.ops.transkd_fast.<name>``.
    """
    return getattr(torch.ops.transkd_fast, f"{name}_triton" if backend == "triton" else name)


def register_fakes(**fakes: Callable[..., Any]) -> None:
    """Say what the raw ops return, in shapes and dtypes, for ``torch.compile`` and meta tensors.

    Args:
        **fakes: per raw op a function of its arguments; :func:`register_triton` takes the same for the Triton twin.
    """
    _fakes.update(fakes)
    if _extension.loaded("_C"):  # which defines these ops
        for name, fake in fakes.items():
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def register_triton(op: str, **schemas: str) -> None:
    """Register the Triton launchers of an op as ops ``<name>_triton``.

    Args:
        op: name of the op; the launchers are functions ``<name>`` of ``transkd_fast.kernels.<op>``, which is imported
            at the first call.
        **schemas: per raw op its schema without the name.
    """
    for name, schema in schemas.items():
        _library.define(f"{name}_triton{schema}")
        # On CPU tensors Triton's interpreter runs (TRITON_INTERPRET=1); backends.py sees to it that nothing else comes.
        for key in ("CUDA", "CPU"):
            _library.impl(f"{name}_triton", _launcher(op, name), key)
        torch.library.register_fake(f"{NAMESPACE}::{name}_triton", _fakes[name], lib=_library)


def _launcher(op: str, name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{NAMESPACE}.kernels.{op}"), name)(*arguments)

    return launch
