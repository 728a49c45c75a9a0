"""What an op declares to have its GPU code compiled and judged; README.md has an example."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVERY_ARCH = (80, 90, 100)
# `make test` judges one; the environment goes on to the process that compiles Triton.
ARCHS = tuple(map(int, os.environ.get("GPU_CODE_ARCHS", "").split())) or EVERY_ARCH


@dataclass(frozen=True)
class Wide:
    """The least number of global loads and stores in a kernel's code that move 16 bytes or more per thread."""

    loads: int = 0
    stores: int = 0


@dataclass(frozen=True)
class Cuda:
    """One CUDA kernel as C++ names it, without its namespace, e.g. `scale_kernel<float, 4>`."""

    name: str
    wide: Wide = Wide()
    tensor_cores: bool = False  # must its code use them


@dataclass(frozen=True)
class Triton:
    """One call of Triton launchers. Whatever they launch is compiled, nothing runs: `call` uses tensors on "meta"."""

    name: str
    call: Callable[[], object]
    wide: dict[str, Wide] = field(default_factory=dict)  # by kernel function
    archs: tuple[int, ...] = EVERY_ARCH
    tensor_cores: tuple[str, ...] = ()  # kernel functions whose code must use them


@dataclass
class Op:
    """The GPU code of one op.

    A line of the table names a CUDA kernel as declared, a Triton kernel by its function and its call's name:
    "scale_kernel bf16".
    """

    name: str
    cuda: tuple[Cuda, ...] = ()
    triton: tuple[Triton, ...] = ()
    header: str = ""

    def __post_init__(self):
        self.header = self.header or f"csrc/cuda/{self.name}_kernel.cuh"
        for entries in (self.cuda, self.triton):
            names = [entry.name for entry in entries]
            assert len(names) == len(set(names)), f"{self.name}: expected each name once, got {sorted(names)}"

    def wide(self, backend, kernel):
        """The wide accesses that a kernel of the table is declared to have."""
        entry, function = self._entry(backend, kernel)
        return entry.wide if backend == "cuda" else entry.wide.get(function, Wide())

    def tensor_cores(self, backend, kernel):
        """Whether a kernel of the table is declared to use tensor cores."""
        entry, function = self._entry(backend, kernel)
        return entry.tensor_cores if backend == "cuda" else function in entry.tensor_cores

    def _entry(self, backend, kernel):
        if backend == "cuda":
            return next(entry for entry in self.cuda if entry.name == kernel), kernel
        function, _, call = kernel.partition(" ")
        return next(entry for entry in self.triton if entry.name == call.partition(" #")[0]), function


def op_names():
    """Every op that has GPU code, whether it is declared or not."""
    cuda = {path.name.removesuffix("_kernel.cuh") for path in ROOT.glob("csrc/cuda/*_kernel.cuh")}
    triton = {path.stem for path in ROOT.glob("kernels/*.py") if not path.name.startswith("_")}
    return sorted(cuda | triton)


def op(name):
    """What an op declares, or None if it has no file in this folder."""
    if not Path(__file__).with_name(f"{name}.py").exists():
        return None
    return importlib.import_module(f"gpu_code.{name}").OP
