"""Compiles the Triton kernels that an op's declared calls launch, without a GPU, and measures them.

`measure` starts this file as a process of its own: the interpreter, which the tests of a machine without a GPU switch
on, cannot be switched off again in a process that has imported triton.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from gpu_code import sass
from gpu_code.declare import ARCHS

NO_TRITON = "triton is not installed"


def missing():
    """Why Triton kernels cannot be compiled here, or None."""
    return None if find_spec("triton") else NO_TRITON


def _child(argument, triton_folder):
    # Triton's variables (interpreter, another ptxas, dumps) would compile something else than users run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    folders = [triton_folder, Path(__file__).resolve().parents[1], os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        command = [sys.executable, "-m", "gpu_code.triton_aot", argument]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return json.loads(done.stdout)


@functools.cache
def toolchain(triton_folder=None):
    return _child("--version", triton_folder)


def measure(op, triton_folder=None):
    """Compile what an op's declared calls launch.

    Args:
        op: The declared Op; its file in this folder carries its name.
        triton_folder: A folder that holds another triton than the installed one.

    Returns:
        (kernel, arch) -> Resources, for each kernel and each architecture of its call.
    """
    rows = _child(op.name, triton_folder)
    return {(kernel, arch): sass.Resources(**resources) for kernel, arch, resources in rows}


class _Driver:
    """Stands for a GPU of some architecture as far as compiling goes; the architecture is the device's number too."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def _launched_by(call, arch, logs):
    """(function, compiled kernel) of each specialisation that a call launches, without launching it.

    ptxas's logs go to `logs`, by hash: what an earlier call had compiled is not compiled again.
    """
    from triton import JITFunction, runtime

    found, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = run(self, *args, grid=grid, warmup=True, **options)
        logs.setdefault(compiled.hash, log.getvalue())
        found.setdefault(compiled.hash, (self.fn.__name__, compiled))

    runtime.driver.set_active(_Driver(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        call()
    return list(found.values())


def _measure_here(op, folder):
    import triton

    tool = sass.find_cuobjdump([Path(triton.__file__).parent / "backends" / "nvidia" / "bin"])
    binary = Path(folder, "kernel.cubin")
    rows, logs = [], {}
    for arch in ARCHS:
        for entry in (entry for entry in op.triton if arch in entry.archs):
            seen = set()
            for function, compiled in _launched_by(entry.call, arch, logs):
                name, count = f"{function} {entry.name}", 2
                while name in seen:
                    name, count = f"{function} {entry.name} #{count}", count + 1
                seen.add(name)
                binary.write_bytes(compiled.asm["cubin"])
                ((_, resources),) = sass.measure(tool, binary, logs[compiled.hash]).items()
                # ptxas sees no shared memory: the launch asks for it.
                rows.append([name, arch, asdict(resources) | {"shared": compiled.metadata.shared}])
    return rows


def _main(argument):
    if argument == "--version":
        return f"triton {importlib.import_module('triton').__version__}"
    with tempfile.TemporaryDirectory() as folder:
        return _measure_here(importlib.import_module(f"gpu_code.{argument}").OP, folder)


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
