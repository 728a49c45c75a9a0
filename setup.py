"""Builds transkd_fast._C (C++ for CPU, always) and transkd_fast._C_cuda (where nvcc and a CUDA torch of the same
major are).

Everything declarative is in pyproject.toml. Environment variables: TRANSKD_FAST_CUDA=auto|0|1 (auto builds what it
can and records why it could not, 1 makes that an error), TORCH_CUDA_ARCH_LIST, CUDA_HOME, TRANSKD_FAST_CXXFLAGS,
TRANSKD_FAST_NVCCFLAGS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", TORCH_TARGET]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-DUSE_CUDA",
    TORCH_TARGET,
    "--threads=2",
]  # USE_CUDA: else the CUDA shims are hidden
DEFAULT_ARCHS = "8.0;9.0+PTX"


def find_cuda_home() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return "/usr/local/cuda"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc on PATH may be a wrapper script, so its own word counts, not its folder.
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"TOP=(\S+)", dryrun.stderr + dryrun.stdout)
    return os.path.realpath(top.group(1)) if top else None


def why_no_cuda(home: str | None, torch_cuda: str | None) -> str | None:
    if torch_cuda is None:
        return "this torch has no CUDA"
    if home is None or not Path(home, "bin", "nvcc").exists():
        return "no nvcc was found (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)"
    version = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return f"{home}/bin/nvcc does not tell its version"
    if release.group(1) != torch_cuda.split(".")[0]:
        return f"nvcc {release.group(1)}.{release.group(2)} and torch's CUDA {torch_cuda} differ in the major version"
    return None


def extensions() -> dict[str, Any]:
    mode = os.environ.get("TRANSKD_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"transkd_fast: expected TRANSKD_FAST_CUDA to be auto, 0 or 1, got {mode!r}")
    home = find_cuda_home() if mode != "0" else None
    if home is not None:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension reads it
    # Imported here: making a source distribution and reading the metadata need no torch.
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cxx = [*CXX_FLAGS, f"-I{pybind11.get_include()}", f"-I{ROOT / 'csrc'}"]
    cxx += os.environ.get("TRANSKD_FAST_CXXFLAGS", "").split()
    cpp_sources = [
        "csrc/module.cpp",
        "csrc/ops.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    cpp = CppExtension("transkd_fast._C", cpp_sources, extra_compile_args={"cxx": cxx})
    # The stable ABI needs no libtorch_python; linking it would tie the file to one torch.
    cpp.libraries = [library for library in cpp.libraries if library != "torch_python"]

    cuda = None
    reason = "switched off by TRANSKD_FAST_CUDA=0" if mode == "0" else why_no_cuda(home, torch.version.cuda)
    if reason is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        nvcc = [*NVCC_FLAGS, f"-I{ROOT / 'csrc'}", *os.environ.get("TRANSKD_FAST_NVCCFLAGS", "").split()]
        cuda_sources = [*sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")), "csrc/cuda/module.cpp"]
        cuda = CUDAExtension("transkd_fast._C_cuda", cuda_sources, extra_compile_args={"cxx": cxx, "nvcc": nvcc})
        cuda.libraries = [library for library in cuda.libraries if library != "torch_python"]
        cuda.optional = mode == "auto"
    elif mode == "1":
        sys.exit(f"transkd_fast: TRANSKD_FAST_CUDA=1 asks for the CUDA kernels, but {reason}")
    else:
        print(f"transkd_fast: building without the CUDA C++ kernels: {reason}")

    class Build(BuildExtension):
        """Builds the CUDA extension first, so that _C can carry the reason if that fails in auto mode."""

        cuda_state = "built" if cuda is not None else reason

        def build_extension(self, ext: Any) -> None:
            ext.include_dirs.append(self._write_config())
            try:
                super().build_extension(ext)
            except Exception as error:
                if ext.name == "transkd_fast._C" or not ext.optional:
                    raise
                lines = [line for line in str(error).splitlines() if line.strip()]
                self.cuda_state = f"nvcc failed: {lines[-1] if lines else type(error).__name__}"
                print(f"transkd_fast: building without the CUDA C++ kernels: {error}", file=sys.stderr)

        def _write_config(self) -> str:
            """Write what module.cpp reports into a header; compiler flags would not survive every quotation mark."""
            folder = Path(self.build_temp).resolve() / "config"
            folder.mkdir(parents=True, exist_ok=True)
            values = {
                "TORCH": torch.__version__,
                "CUDA_STATE": self.cuda_state,
                "CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            }
            lines = [f"#define TRANSKD_BUILD_{name} {json.dumps(value)}\n" for name, value in values.items()]
            (folder / "build_config.h").write_text("".join(["#pragma once\n", *lines]))
            return str(folder)

    return {"ext_modules": [ext for ext in (cuda, cpp) if ext is not None], "cmdclass": {"build_ext": Build}}


NEEDS_TORCH = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}

setup(**(extensions() if NEEDS_TORCH & set(sys.argv) else {}))
