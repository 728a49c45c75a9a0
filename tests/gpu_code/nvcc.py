"""Compiles the declared CUDA kernels of one op with the project's own flags and measures them."""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

from gpu_code import sass
from gpu_code.declare import ARCHS, ROOT

NO_NVCC = "no nvcc was found (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)"
NO_CUOBJDUMP = "no cuobjdump was found (CUDA toolkit, PATH, triton)"


@functools.cache
def _setup():
    spec = importlib.util.spec_from_file_location("transkd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def home():
    """The CUDA folder that setup.py would build with, or None if it holds no nvcc."""
    found = _setup().find_cuda_home()
    return Path(found) if found and Path(found, "bin", "nvcc").exists() else None


def find_cuobjdump():
    cuda = home()
    return sass.find_cuobjdump([cuda / "bin"] if cuda else [])


def missing():
    """Why CUDA kernels cannot be judged here, or None."""
    if home() is None:
        return NO_NVCC
    return NO_CUOBJDUMP if find_cuobjdump() is None else None


def _run(*options):
    command = [str(home() / "bin" / "nvcc"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@functools.cache
def toolchain():
    return "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", _run("--version")).group(1)


def flags():
    """Those of setup.py and those that torch's build helper adds to them; --threads apart, which changes no code."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    return [flag for flag in [*COMMON_NVCC_FLAGS, *_setup().NVCC_FLAGS] if not flag.startswith("--threads")]


def source(op):
    """A translation unit that instantiates the declared kernels: taking an address does it without a signature."""
    include = op.header.removeprefix("csrc/")
    addresses = "".join(f"    reinterpret_cast<const void*>(&{kernel.name}),\n" for kernel in op.cuda)
    return (
        f'#include "{include}"\nnamespace transkd {{\n'
        f"namespace {op.name} {{}}\nusing namespace {op.name};\n"  # an op may have a namespace of its own
        f"extern const void* const kernels[];\nconst void* const kernels[] = {{\n{addresses}}};\n}}\n"
    )


def measure(op, folder, extra_flags=()):
    """Compile an op's declared kernels.

    Args:
        op: The declared Op.
        folder: Where the generated source and the binary go.
        extra_flags: Further flags of nvcc.

    Returns:
        (kernel, arch) -> Resources, for each declared kernel and each of ARCHS that this nvcc knows.
    """
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", _run("--list-gpu-code"))}
    unit, binary = folder / f"{op.name}.cu", folder / f"{op.name}.fatbin"
    unit.write_text(source(op), encoding="utf-8")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS if arch in known]
    log = _run(
        *flags(), *extra_flags, "-I", ROOT / "csrc", "-I", ROOT, "-Xptxas=-v", "-fatbin", *targets, unit, "-o", binary
    )
    measured = {}
    for (arch, symbol), resources in sass.measure(find_cuobjdump(), binary, log).items():
        measured[sass.same_name(sass.kernel_name(symbol)), arch] = resources
    found = {}
    for kernel in op.cuda:
        for arch in (arch for arch in ARCHS if arch in known):
            key = sass.same_name(kernel.name), arch
            names = sorted({name for name, _ in measured})
            assert key in measured, (
                f"{op.name}: expected a kernel {kernel.name} in sm_{arch} code, got {names}: "
                "write its name in the declaration as the compiler does"
            )
            found[kernel.name, arch] = measured[key]
    return found
