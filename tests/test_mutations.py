"""Errors planted in the kernels are caught by tests that need no GPU.

Each mutant changes one place of one source file in a copy of the tree, where the tests named with it must then fail;
without the change they pass. An op adds its mutants to MUTANTS.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import runner

import transkd_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(transkd_fast.__file__).resolve().parent


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Args:
        op: whose kernel.
        backend: which one.
        error: what kind of error.
        file: the source, relative to the repository.
        old: text that stands there once...
        new: ...and what stands there instead.
        tests: arguments of pytest that catch it.
        shows: what their output must then say.
    """

    op: str
    backend: str
    error: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    shows: str = "assert "

    @property
    def name(self) -> str:
        return f"{self.op}-{self.backend}-{self.error}"


def without_each(call, error, op, file, tests, shows):
    """A mutant for every place of a file of device code where a function is called, without that call."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for number, match in enumerate(re.finditer(re.escape(call), source), start=1):
        # Everything before belongs to the text, so that it stands there once.
        old = source[: match.end()]
        new = old.removesuffix(call)
        yield Mutant(op, "cuda", f"{error} {number} of {Path(file).name}", file, old, new, tests, shows)


HCL_CPU = ("tests/test_hcl.py", "-k", "test_value_and_gradients and cpu and float32")
HCL_CPU_LARGE = ("tests/test_hcl.py", "-k", "larger_than_a_cache and cpu")
HCL_TRITON = ("tests/test_hcl.py", "-k", "test_value_and_gradients and triton and float32 and (2x3x9x7 or 2x5x8x12)")
ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_hcl.py"
HCL_CUDA = (ON_CPU, "-k", "test_sanitizers_find_nothing and asan and usual and float32")
HCL_CUDA_MISALIGNED = (ON_CPU, "-k", "test_misaligned_bases and asan")
HCL_CUDA_TSAN = (ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and cells and float32")

RACE = "ThreadSanitizer: data race"

# What is planted at least. Barriers are CUDA C++'s own: Triton sets them itself.
KINDS = {
    "cpu": ("sign", "off-by-one row", "unaligned vector"),
    "triton": ("sign", "off-by-one row", "unaligned vector"),
    "cuda": ("sign", "off-by-one row", "unaligned vector", "missing barrier"),
}
# op, backend, error, file, old, new, tests
MUTANTS = [
    Mutant("hcl", "cpu", "sign forward", "csrc/cpu/hcl_loops.h",
           "  d.lanes -= other.lanes;\n", "  d.lanes += other.lanes;\n", HCL_CPU),
    Mutant("hcl", "cpu", "sign backward", "csrc/cpu/hcl_loops.h",
           "alpha * (s[i] - t[i]) + add", "alpha * (s[i] - t[i]) - add", HCL_CPU),
    Mutant("hcl", "cpu", "off-by-one row forward", "csrc/cpu/hcl_cpu.cpp",
           "r < piece.bottom; ++r", "r + 1 < piece.bottom; ++r", HCL_CPU),
    Mutant("hcl", "cpu", "off-by-one row backward", "csrc/cpu/hcl_cpu.cpp",
           "std::upper_bound(rows.edge, rows.edge + rows.segments + 1, r)",
           "std::lower_bound(rows.edge + 1, rows.edge + rows.segments, r)", HCL_CPU),
    Mutant("hcl", "cpu", "unaligned vector", "csrc/cpu/hcl_cpu.cpp",
           "% 16 == 0 && run * sizeof(T) % 16 == 0", "% 16 == 0", HCL_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("hcl", "triton", "sign forward", "kernels/hcl.py",
           "    return s - t\n", "    return s + t\n", HCL_TRITON),
    Mutant("hcl", "triton", "sign backward", "kernels/hcl.py",
           "alpha * d + level[None, :]", "alpha * d - level[None, :]", HCL_TRITON),
    Mutant("hcl", "triton", "off-by-one row", "kernels/hcl.py",
           "tl.minimum(first + length, end)", "tl.minimum(first + length, end - 1)", HCL_TRITON),
    Mutant("hcl", "triton", "unaligned vector", "kernels/_common.py",
           "min(size & -size, ", "min(size, ", HCL_TRITON),
    Mutant("hcl", "cuda", "sign forward", "csrc/cuda/hcl_kernel.cuh",
           "- widen(t[u].element[v]);\n          sums[", "+ widen(t[u].element[v]);\n          sums[", HCL_CUDA),
    Mutant("hcl", "cuda", "sign backward", "csrc/cuda/hcl_kernel.cuh",
           "narrow(alpha * d + entries", "narrow(alpha * d - entries", HCL_CUDA),
    Mutant("hcl", "cuda", "off-by-one row", "csrc/cuda/hcl_kernel.cuh",
           "(stage.edge_row[i + 1] - top) * row_vectors", "(stage.edge_row[i + 1] - top - 1) * row_vectors", HCL_CUDA),
    Mutant("hcl", "cuda", "off-by-one row past the end", "csrc/cuda/hcl_kernel.cuh",
           "(stage.edge_row[i + 1] - top) * row_vectors", "(stage.edge_row[i + 1] - top + 1) * row_vectors",
           HCL_CUDA, "AddressSanitizer"),
    Mutant("hcl", "cuda", "unaligned vector, bases", "csrc/cuda/hcl_plan.h",
           "bool fits = aligned(m.student, width * size_of(m.student_type)) &&", "bool fits =", HCL_CUDA_MISALIGNED,
           "misaligned address"),
    Mutant("hcl", "cuda", "unaligned vector, rows", "csrc/cuda/hcl_plan.h",
           "fits = fits && pyramid.columns.edge[j] % width == 0;", "fits = fits && j >= 0;", HCL_CUDA,
           "runtime error"),
    *without_each("__syncthreads();", "missing barrier", "hcl", "csrc/cuda/hcl_kernel.cuh", HCL_CUDA_TSAN, RACE),
    *without_each("__syncthreads();", "missing barrier", "hcl", "csrc/cuda/common/reduce.cuh", HCL_CUDA_TSAN, RACE),
    *without_each("__threadfence();", "missing fence", "hcl", "csrc/cuda/common/reduce.cuh", HCL_CUDA_TSAN, RACE),
]  # fmt: skip


class Tree:
    """A copy of what the tests of kernels need, with the compiled extension of the package at hand."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("csrc", "kernels", "tools", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        shutil.copytree(PACKAGE, folder / "transkd_fast", ignore=shutil.ignore_patterns("__pycache__", "kernels"))
        (folder / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
        # An installed package has its kernels inside; the source tree beside it.
        (folder / "transkd_fast" / "kernels").symlink_to(folder / "kernels")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
            shutil.copy(ROOT / name, folder)
        self.passed = set()

    def call(self, *arguments):
        environment = {
            **os.environ,
            "TRANSKD_FAST_CUDA": "0",
            "TRANSKD_FAST_CXXFLAGS": "-O1 -DTRANSKD_NO_CLONES",
            "OMP_NUM_THREADS": "2",
        }
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def test(self, mutant):
        """Exit status and output of the mutant's tests on the tree as it is."""
        if mutant.backend == "cpu":
            built = self.call("setup.py", "--quiet", "build_ext", "--inplace")
            assert built.returncode == 0, built.stdout[-3000:]
        return self.call("-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *mutant.tests)

    def must_pass(self, mutant):
        if (mutant.backend, mutant.tests) not in self.passed:
            result = self.test(mutant)
            assert result.returncode == 0, result.stdout[-3000:]
            self.passed.add((mutant.backend, mutant.tests))

    def must_fail(self, mutant):
        path = self.folder / mutant.file
        source = path.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.file}: expected once, found {source.count(mutant.old)} times"
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            result = self.test(mutant)
        finally:
            path.write_text(source, encoding="utf-8")
        # Tests ran and failed, or the process died of a fault. Anything else (nothing collected, a usage error) shows
        # nothing about the kernel.
        assert result.returncode in (1, -signal.SIGSEGV), f"exit status {result.returncode}: {result.stdout[-3000:]}"
        assert mutant.shows in result.stdout, result.stdout[-3000:]


def has_cuda_headers():
    try:
        runner.cuda_headers()
    except runner.BuildError:
        return False
    return True


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_error_is_caught(mutant, tree):
    if mutant.backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if mutant.backend == "cuda" and not has_cuda_headers():
        pytest.skip("there are no CUDA headers on this machine")
    tree.must_pass(mutant)
    tree.must_fail(mutant)
