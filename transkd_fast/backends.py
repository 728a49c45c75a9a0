"""Which implementation of an op runs: eager PyTorch, C++ for CPU, Triton or CUDA C++.

The choice for one call is, in this order: the ``backend=`` argument, the innermost :func:`use_backend` context, the
environment variable ``TRANSKD_FAST_BACKEND``, and ``"auto"``. ``"auto"`` takes the first backend that can run and
logs why it passed over another one that has a kernel; an explicit choice runs or raises :class:`BackendError`, it
never falls back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from transkd_fast import _extension

BACKENDS = ("eager", "cpu", "triton", "cuda")
ENV_VAR = "TRANSKD_FAST_BACKEND"

CanRun = Callable[[Sequence[Tensor]], "str | None"]

_AUTO_ORDER = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_registry: dict[str, dict[str, CanRun]] = {}
_choice: list[dict[str, str]] = []
_counter: Counter[tuple[str, str]] | None = None
_logged: set[tuple[str, ...]] = set()
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_lock = threading.Lock()
_logger = logging.getLogger("transkd_fast")


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run; the message says why and what can."""


def register_op(op: str) -> None:
    """Make an op known; its eager reference can always run.

    Args:
        op: name of the op, the same in every folder of the project.
    """
    _registry.setdefault(op, {"eager": lambda tensors: None})


def register(op: str, backend: str, can_run: CanRun) -> None:
    """Say that an op has a kernel in a backend.

    Args:
        op: name of the op, known through :func:`register_op`.
        backend: one of ``BACKENDS``.
        can_run: given the tensors of a call, returns None if the kernel takes them, else the reason why not. Device and
            availability of the backend itself are checked before it is asked.
    """
    _registry[op][_known(backend, op)] = can_run


def _known(backend: str, source: str, also: tuple[str, ...] = ()) -> str:
    if backend not in BACKENDS and backend not in also:
        names = ", ".join(repr(name) for name in (*also, *BACKENDS))
        raise ValueError(f"{source}: expected one of {names}, got {backend!r}")
    return backend


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all.

    Args:
        backend: one of ``BACKENDS``.

    Returns:
        The reason, or None if the backend can run.
    """
    if backend == "cpu":
        return _extension.reason("_C")
    if backend in ("triton", "cuda"):
        if backend == "triton" and not _HAS_TRITON:
            return "the package triton is not installed"
        if backend == "cuda" and not _extension.loaded("_C_cuda"):
            return _extension.reason("_C_cuda")
        if torch.version.hip is not None:
            return "this torch is built for ROCm, for which there are no kernels"
        if backend == "triton" and interpreting_triton():
            return None
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
    return None


def interpreting_triton() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors (``TRITON_INTERPRET=1``); for tests, it is very slow.

    Returns:
        True if the triton backend takes tensors on CPU instead of CUDA.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _device_of(backend: str) -> str | None:
    return "cpu" if backend == "triton" and interpreting_triton() else _DEVICE_OF.get(backend)


def why_not(op: str, backend: str, tensors: Sequence[Tensor] = ()) -> str | None:
    """Why a backend cannot run an op, on this machine and for these tensors.

    Args:
        op: name of a registered op.
        backend: one of ``BACKENDS``.
        tensors: the tensors of the call; leave empty to ask about the machine only.

    Returns:
        The reason, or None if it can run.
    """
    implementations = _registry[op]
    if backend not in implementations:
        return "no kernel for this op yet"
    reason = unavailable(backend)
    if reason is not None:
        return reason
    wanted = _device_of(backend)
    for tensor in tensors:
        if wanted is not None and tensor.device.type != wanted:
            return f"tensors are on {tensor.device.type}"
    return implementations[backend](tensors) if tensors else None


def choose(op: str, tensors: Sequence[Tensor], requested: str | None = None) -> str:
    """Decide which backend runs one call of an op.

    Args:
        op: name of a registered op.
        tensors: every tensor of the call.
        requested: the caller's ``backend=`` argument; None to take the context, the environment or ``"auto"``.

    Returns:
        The backend's name.

    Raises:
        ValueError: if a name is unknown.
        BackendError: if an explicit choice cannot run.
    """
    backend = _known(requested, f"{op}: backend", ("auto",)) if requested is not None else _configured(op)
    if backend == "auto":
        backend = _first_that_runs(op, tensors)
    else:
        reason = why_not(op, backend, tensors)
        if reason is not None:
            others = [name for name in BACKENDS if why_not(op, name, tensors) is None]
            raise BackendError(
                f"{op}: backend={backend!r} cannot run: {reason}; use "
                + " or ".join(f"backend={name!r}" for name in others)
                + ", or backend='auto'"
            )
    if _counter is not None and not torch.compiler.is_compiling():
        _counter[op, backend] += 1
    return backend


def _configured(op: str) -> str:
    for choice in reversed(_choice):
        name = choice.get(op, choice.get("*"))
        if name is not None:
            return name
    return from_environment()


def from_environment() -> str:
    """The choice that the environment variable ``TRANSKD_FAST_BACKEND`` makes.

    Returns:
        A backend's name, or "auto" where the variable is not set.

    Raises:
        ValueError: if the name is unknown.
    """
    name = os.environ.get(ENV_VAR)
    return _known(name, f"environment variable {ENV_VAR}", ("auto",)) if name else "auto"


def _first_that_runs(op: str, tensors: Sequence[Tensor]) -> str:
    device_type = tensors[0].device.type
    order = _AUTO_ORDER.get(device_type, ("eager",))
    refusals = {}
    for backend in order:
        reason = why_not(op, backend, tensors)
        if reason is None:
            break
        refusals[backend] = reason
    if not torch.compiler.is_compiling():
        if device_type not in _AUTO_ORDER:
            _log_once(op, f"eager runs: there are no kernels for device type {device_type!r}")
        for passed_over, reason in refusals.items():
            # That an op has no CPU kernel yet is no news on every machine; that a GPU runs eager is.
            if passed_over in _registry[op] or device_type != "cpu":
                _log_once(op, f"passed over backend {passed_over}: {reason}")
    return backend


def _log_once(*message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.warning("%s: %s", *message)


@contextmanager
def use_backend(name: str | None, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Choose the backend of all calls inside a ``with`` block.

    It holds for the whole process, so that the threads of autograd and of data parallelism see it too. A graph that
    ``torch.compile`` made is made anew when the choice changes, but does not notice a changed environment variable.

    Args:
        name: one of ``BACKENDS`` or ``"auto"``; None changes nothing.
        ops: the ops it holds for; default all of them.

    Raises:
        TypeError: if ops is a string.
        ValueError: if a name is unknown.
    """
    if name is None:
        yield
        return
    _known(name, "use_backend", ("auto",))
    if isinstance(ops, str):
        raise TypeError(f"use_backend: expected ops to be a collection of names, got the string {ops!r}")
    names = ["*"] if ops is None else list(ops)
    for op in names:
        if op != "*" and op not in _registry:
            raise ValueError(f"use_backend: expected ops among {', '.join(sorted(_registry))}, got {op!r}")
    choice = dict.fromkeys(names, name)
    with _lock:
        _choice.append(choice)
    try:
        yield
    finally:
        with _lock:  # by identity: another thread may have entered or left in between
            _choice[:] = [other for other in _choice if other is not choice]


@contextmanager
def count_runs() -> Iterator[Counter[tuple[str, str]]]:
    """Count which backend ran each op inside a ``with`` block (calls inside compiled graphs are not seen).

    Returns:
        A counter with keys ``(op, backend)``.
    """
    global _counter
    outer, _counter = _counter, Counter()
    try:
        yield _counter
    finally:
        inner, _counter = _counter, outer
        if outer is not None:
            outer.update(inner)


def table() -> dict[str, dict[str, str | None]]:
    """Per op and backend, why it cannot run on this machine.

    Returns:
        ``{op: {backend: reason or None}}`` over all registered ops.
    """
    return {op: {backend: why_not(op, backend) for backend in BACKENDS} for op in sorted(_registry)}
