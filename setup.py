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
MINIMUM_TORCH = (2, 11)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of MINIMUM_TORCH
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", TORCH_TARGET]
# Without USE_CUDA the stable ABI hides its CUDA part.
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", TORCH_TARGET, "--threads=2"]
USUAL_CUDA_HOME = "/usr/local/cuda"
DEFAULT_ARCHS = "8.0;9.0+PTX"
NEEDS_TORCH = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


def cuda_mode() -> str:
    mode = os.environ.get("TRANSKD_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"transkd_fast: expected TRANSKD_FAST_CUDA to be auto, 0 or 1, got {mode!r}")
    return mode


def find_cuda_home() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    if Path(USUAL_CUDA_HOME, "bin", "nvcc").exists():
        return USUAL_CUDA_HOME
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
    if home is None:
        return "no nvcc was found (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)"
    if not Path(home, "bin", "nvcc").exists():
        return f"the CUDA folder {home} holds no bin/nvcc"
    version = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return f"{home}/bin/nvcc does not tell its version"
    if release.group(1) != torch_cuda.split(".")[0]:
        return (
            f"nvcc {release.group(1)}.{release.group(2)} of {home} and torch's CUDA {torch_cuda} differ in the major "
            "version"
        )
    return None


def first_complaint(build_folder: str) -> str | None:
    """The first error of the failed compilation; torch lets ninja print it past us, so the failed step runs again."""
    ninja = shutil.which("ninja")
    if ninja is None or not Path(build_folder, "build.ninja").exists():
        return None
    log = subprocess.run([ninja, "-C", build_folder], capture_output=True, text=True, errors="replace", check=False)
    lines = (log.stdout + log.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\b(error|fatal)\s*:", line)), None)


def config_header(values: dict[str, str]) -> str:
    """The header with what module.cpp reports; quoted in a header because flags lose quotation marks on their way."""
    lines = ["#pragma once\n"]
    for name, value in values.items():
        printable = "".join(filter(str.isprintable, value))
        lines.append(f"#define TRANSKD_BUILD_{name} {json.dumps(printable, ensure_ascii=False)}\n")
    return "".join(lines)


def extensions() -> dict[str, Any]:
    mode = cuda_mode()
    home = find_cuda_home() if mode != "0" else None
    if home is not None:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension reads it
    # Imported here: making a source distribution and reading the metadata need no torch.
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        sys.exit(f"transkd_fast: expected torch >= {wanted} to build against, found {torch.__version__}: upgrade it")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # Ahead of torch's own headers: the pybind11 among those refuses to be used with the stable ABI.
    include_dirs = [pybind11.get_include(), str(ROOT / "csrc")]
    cxx = [*CXX_FLAGS, *os.environ.get("TRANSKD_FAST_CXXFLAGS", "").split()]
    cpp_sources = [
        "csrc/module.cpp",
        "csrc/ops.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    cpp = CppExtension("transkd_fast._C", cpp_sources, include_dirs=list(include_dirs), extra_compile_args={"cxx": cxx})
    # The stable ABI needs no libtorch_python; linking it would tie the file to one torch.
    cpp.libraries = [library for library in cpp.libraries if library != "torch_python"]

    cuda = None
    reason = "switched off by TRANSKD_FAST_CUDA=0" if mode == "0" else why_no_cuda(home, torch.version.cuda)
    if reason is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        nvcc = [*NVCC_FLAGS, *os.environ.get("TRANSKD_FAST_NVCCFLAGS", "").split()]
        cuda_sources = [*sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")), "csrc/cuda/module.cpp"]
        cuda = CUDAExtension(
            "transkd_fast._C_cuda",
            cuda_sources,
            include_dirs=list(include_dirs),
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        )
        cuda.libraries = [library for library in cuda.libraries if library != "torch_python"]
    elif mode == "1":
        sys.exit(f"transkd_fast: TRANSKD_FAST_CUDA=1 asks for the CUDA kernels, but {reason}")
    else:
        print(f"transkd_fast: building without the CUDA C++ kernels: {reason}")

    class Build(BuildExtension):
        """Builds the CUDA extension first, so that _C can carry the reason if that fails in auto mode."""

        cuda_state = "built" if cuda is not None else reason

        def build_extensions(self) -> None:
            built = []
            for ext in list(self.extensions):
                ext.include_dirs.append(self._write_config())
                self.extensions = [ext]  # one by one: torch's own checks of nvcc and its host compiler raise in here
                try:
                    super().build_extensions()
                except Exception as error:
                    if ext is not cuda:
                        raise
                    complaint = first_complaint(self.build_temp) or str(error).strip().rpartition("\n")[2]
                    self.cuda_state = f"the build failed: {complaint or type(error).__name__}"
                    if mode == "1":
                        sys.exit(f"transkd_fast: TRANSKD_FAST_CUDA=1 asks for the CUDA kernels, but {self.cuda_state}")
                    print(f"transkd_fast: building without the CUDA C++ kernels: {self.cuda_state}", file=sys.stderr)
                else:
                    built.append(ext)
            self.extensions = built

        def _write_config(self) -> str:
            folder = Path(self.build_temp).resolve() / "config"
            folder.mkdir(parents=True, exist_ok=True)
            values = {
                "TORCH": torch.__version__,
                "CUDA_STATE": self.cuda_state,
                "CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            }
            header, text = folder / "build_config.h", config_header(values)
            if not header.exists() or header.read_text(encoding="utf-8") != text:  # else ninja compiles anew
                header.write_text(text, encoding="utf-8")
            return str(folder)

    return {"ext_modules": [ext for ext in (cuda, cpp) if ext is not None], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**(extensions() if NEEDS_TORCH & set(sys.argv) else {}))
