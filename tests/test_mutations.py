"""Errors planted in the kernels are caught by tests that need no GPU.

Each mutant changes one place of one source file in a copy of the tree, where the tests named with it must then fail;
without the change they pass. An op adds its mutants to MUTANTS.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import cache_from_source, find_spec
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
HCL_CUDA_MISALIGNED = (ON_CPU, "-k", "test_misaligned_bases and asan and nchw")
HCL_CUDA_TSAN = (ON_CPU, "-k", "test_sanitizers_find_nothing and tsan and cells and float32")

CSF_CPU = ("tests/test_csf.py", "-k", "test_value_and_gradients and cpu and float32 and 2_3_9x13")
CSF_CPU_LARGE = ("tests/test_csf.py", "-k", "larger_than_a_cache and cpu and nchw")
CSF_CPU_OFFSET = ("tests/test_csf.py", "-k", "test_a_large_mean_costs_no_digits and cpu and float32")
CSF_CPU_CUMULATIVE = ("tests/test_csf.py", "-k", "test_every_kind_of_normalisation and cumulative-tracked and cpu")
CSF_CPU_RATIO = ("tests/test_csf.py", "-k", "test_value_and_gradients and cpu and float32 and 2_5_7x82")
CSF_TRITON = ("tests/test_kernels_triton_csf.py", "-k", "test_several_programs_per_plane and nchw")
CSF_TRITON_SHARES = ("tests/test_kernels_triton_csf.py", "-k", "test_shares_of_two_processes and nchw")
CSF_ON_CPU = "tests/cuda_on_cpu/test_cuda_on_cpu_csf.py"
# ThreadSanitizer's driver compiles fastest, whatever is looked for.
CSF_CUDA = (CSF_ON_CPU, "-k", "test_sanitizers_find_nothing and nchw and tsan and float32")
CSF_CUDA_MISALIGNED = (CSF_ON_CPU, "-k", "test_misaligned_bases and nchw and float32")
CSF_CUDA_SHARES = (CSF_ON_CPU, "-k", "test_a_part_of_a_global_batch and nchw and float32")

RACE = "ThreadSanitizer: data race"

# What is planted at least. Barriers are CUDA C++'s own: Triton's interpreter runs a program as one thread, so that a
# `tl.debug_barrier` that is missing does not show.
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
           "- widen(t[u].element[v]);\n          sums[", "+ widen(t[u].element[v]);\n          sums[", HCL_CUDA_TSAN),
    Mutant("hcl", "cuda", "sign backward", "csrc/cuda/hcl_kernel.cuh",
           "narrow(alpha * d + entries", "narrow(alpha * d - entries", HCL_CUDA_TSAN),
    Mutant("hcl", "cuda", "off-by-one row", "csrc/cuda/hcl_kernel.cuh",
           "(stage.edge_row[i + 1] - top) * row_vectors", "(stage.edge_row[i + 1] - top - 1) * row_vectors",
           HCL_CUDA_TSAN),
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
    Mutant("csf", "cpu", "sign forward", "csrc/cpu/csf_loops.h",
           "(L(z + x) - shift) * scale + L(up + x)", "(L(z + x) - shift) * scale - L(up + x)", CSF_CPU),
    Mutant("csf", "cpu", "sign backward", "csrc/cpu/csf_loops.h",
           "(L(z + place) - shift) + constant)", "(L(z + place) - shift) - constant)", CSF_CPU),
    Mutant("csf", "cpu", "off-by-one row forward", "csrc/cpu/csf_passes.h",
           "expand(coarse, next - i, maps.columns.in, maps.column_source.data(), maps.columns.out,",
           "expand(coarse, next - i - 1, maps.columns.in, maps.column_source.data(), maps.columns.out,", CSF_CPU),
    Mutant("csf", "cpu", "off-by-one row backward", "csrc/cpu/csf_passes.h",
           "maps.row_source[(range.end - 1) / width] + 1;", "maps.row_source[(range.end - 1) / width];", CSF_CPU),
    Mutant("csf", "cpu", "unaligned vector", "csrc/cpu/csf_passes.h",
           "% 16 == 0 && row % 16 == 0;", "% 16 == 0 && row > 0;", CSF_CPU_LARGE,
           "Fatal Python error: Segmentation fault"),
    Mutant("csf", "cpu", "squares about zero", "csrc/cpu/csf_passes.h",
           "shift[c] = sum[c] / static_cast<T>(some);", "shift[c] = 0;", CSF_CPU_OFFSET),
    Mutant("csf", "cpu", "biased variance tracked", "csrc/common/csf_attention.h",
           "variance * (count / (count - 1))", "variance", CSF_CPU),
    Mutant("csf", "cpu", "cumulative average over the batches before", "csrc/common/csf_attention.h",
           "static_cast<double>(*bn.batches + 1)", "static_cast<double>(*bn.batches)", CSF_CPU_CUMULATIVE),
    Mutant("csf", "cpu", "gradient past ReLU", "csrc/common/csf_attention.h",
           "<= 0 ? 0 : sum;", "<= 0 ? sum : sum;", CSF_CPU),
    Mutant("csf", "cpu", "sources in whole numbers", "csrc/common/nearest.h",
           "static_cast<Index>(floorf(static_cast<float>(fine) * scale))", "fine * in / out", CSF_CPU_RATIO),
    Mutant("csf", "triton", "sign forward", "kernels/_csf_passes.py",
           "(scale * (upper - shift) + rest)", "(scale * (upper - shift) - rest)", CSF_TRITON),
    Mutant("csf", "triton", "sign backward", "kernels/_csf_passes.py",
           "value = p * gs[k] + r\n", "value = p * gs[k] - r\n", CSF_TRITON),
    Mutant("csf", "triton", "off-by-one row", "kernels/_csf_passes.py",
           "tl.cdiv(tl.cdiv(last, width), 2), TILE[4]", "last // width // 2, TILE[4]", CSF_TRITON),
    Mutant("csf", "triton", "unaligned vector", "kernels/_csf_plan.py",
           "    vector = _common.vector_length(inner, itemsize)\n    elements =",
           "    vector = _common.VECTOR_BYTES // itemsize\n    elements =", CSF_TRITON),
    Mutant("csf", "triton", "biased variance tracked", "kernels/_csf_attention.py",
           "running[2], channel, in_channels, unbiased,", "running[2], channel, in_channels, variance,", CSF_TRITON),
    Mutant("csf", "triton", "gradients of the whole batch", "kernels/_csf_attention.py",
           "tl.sum(tl.where(own, of_r, 0), axis=0)", "tl.sum(of_r, axis=0)", CSF_TRITON_SHARES),
    Mutant("csf", "cuda", "sign forward", "csrc/cuda/csf_kernel.cuh",
           "+ offset.get(c) + up_weight.get(c) * up", "+ offset.get(c) - up_weight.get(c) * up", CSF_CUDA),
    Mutant("csf", "cuda", "sign backward", "csrc/cuda/csf_gradients.cuh",
           "z_weight * distance + constant)", "z_weight * distance - constant)", CSF_CUDA),
    Mutant("csf", "cuda", "off-by-one row forward", "csrc/cuda/csf_sums.cuh",
           "pass.rows.start(walk.row + 1) - pass.rows.start(walk.row);",
           "pass.rows.start(walk.row + 1) - pass.rows.start(walk.row) - 1;", CSF_CUDA),
    Mutant("csf", "cuda", "off-by-one row backward", "csrc/cuda/csf_gradients.cuh",
           "min(pass.rows.out - 2 * row, 2u)", "2", CSF_CUDA, RACE),
    Mutant("csf", "cuda", "unaligned vector, bases", "csrc/cuda/csf_plan.h",
           "if (!aligned(m.z, 16) || ", "if (", CSF_CUDA_MISALIGNED, "misaligned address"),
    Mutant("csf", "cuda", "gradients of the whole batch", "csrc/common/csf_attention.h",
           "fc_bn_gradients.bias.set(l, own_sum);", "fc_bn_gradients.bias.set(l, sum);", CSF_CUDA_SHARES),
    *without_each("__syncthreads();", "missing barrier", "csf", "csrc/cuda/csf_block.cuh", CSF_CUDA, RACE),
    *without_each("__syncthreads();", "missing barrier", "csf", "csrc/cuda/csf_team.cuh", CSF_CUDA, RACE),
]  # fmt: skip


# Imports take most of the time of a short test run. So every run is a child of a process that has made them and nothing
# else; nothing of the tree itself is imported before.
SERVER = """
import json, os, runpy, sys, traceback
from importlib import import_module
from importlib.util import find_spec

for package in ("numpy", "pytest", "setuptools", "torch", "torch.utils.cpp_extension", "triton"):
    if find_spec(package.partition(".")[0]):
        import_module(package)
print("ready", flush=True)
for line in sys.stdin:
    output, *sys.argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, path in ((0, os.devnull), (1, output), (2, output)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        status = 0
        try:
            run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
            run(sys.argv[0], run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException:
            status = traceback.format_exc()
        if isinstance(status, str):
            print(status)
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
        self.extension = None
        environment = {
            **os.environ,
            "TRANSKD_FAST_CUDA": "0",
            "TRANSKD_FAST_CXXFLAGS": "-O0 -DTRANSKD_NO_CLONES",
            "OMP_NUM_THREADS": "2",
            "OPENBLAS_NUM_THREADS": "1",  # else numpy starts threads, which do not live on in a child
        }
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"

    def close(self):
        self.server.communicate()

    def call(self, *arguments):
        """Exit status and output of a script or a module."""
        output = self.folder / "output"
        output.unlink(missing_ok=True)
        self.server.stdin.write(json.dumps([str(output), *arguments]) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return status, output.read_text(encoding="utf-8", errors="replace")

    def build(self):
        """Compiles the extension for CPU; returns its path."""
        status, output = self.call("setup.py", "--quiet", "build_ext", "--inplace")
        assert status == 0, output[-3000:]
        (built,) = (self.folder / "transkd_fast").glob("_C.*")
        return built

    def test(self, mutant):
        """Exit status and output of the mutant's tests on the tree as it is."""
        return self.call("pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *mutant.tests)

    def write(self, path, source):
        path.write_text(source, encoding="utf-8")
        # Python tells versions of a file apart by seconds and size.
        Path(cache_from_source(path)).unlink(missing_ok=True)

    def must_pass(self, mutant):
        if (mutant.backend, mutant.tests) in self.passed:
            return
        if mutant.backend == "cpu":
            if self.extension is None:
                path = self.build()
                self.extension = path, path.read_bytes()
            path, as_it_was = self.extension
            path.unlink()
            path.write_bytes(as_it_was)
        status, output = self.test(mutant)
        assert status == 0, output[-3000:]
        self.passed.add((mutant.backend, mutant.tests))

    def must_fail(self, mutant):
        path = self.folder / mutant.file
        source = path.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.file}: expected once, found {source.count(mutant.old)} times"
        self.write(path, source.replace(mutant.old, mutant.new))
        try:
            if mutant.backend == "cpu":
                self.build()
            status, output = self.test(mutant)
        finally:
            self.write(path, source)
        # Tests ran and failed, or the process died of a fault. Anything else (nothing collected, a usage error) shows
        # nothing about the kernel.
        assert status in (1, -signal.SIGSEGV), f"exit status {status}: {output[-3000:]}"
        assert mutant.shows in output, output[-3000:]


def has_cuda_headers():
    try:
        runner.cuda_headers()
    except runner.BuildError:
        return False
    return True


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("mutants"))
    yield tree
    tree.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_error_is_caught(mutant, tree):
    if mutant.backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if mutant.backend == "cuda" and not has_cuda_headers():
        pytest.skip("there are no CUDA headers on this machine")
    tree.must_pass(mutant)
    tree.must_fail(mutant)
