"""Errors planted in the kernels are caught by tests that need no GPU.

Each mutant of planted_errors.py changes one place of one source file in a copy of the tree, where the tests named with
it must then fail; without the change they pass. `--every-mutant` plants them all, else one per op and backend.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest
import torch
from planted_errors import KINDS, MUTANTS, ROOT

import transkd_fast

PACKAGE = Path(transkd_fast.__file__).resolve().parent


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


def test_every_error_can_be_planted():
    sources = {mutant.file: (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in MUTANTS}
    assert [m.name for m in MUTANTS if sources[m.file].count(m.old) != 1] == []
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("mutants"))
    yield tree
    tree.close()


def of_backends(config, *backends):
    """The mutants of some backends: all, or one of each op and backend, the kinds of errors in turn."""
    mutants = [mutant for mutant in MUTANTS if mutant.backend in backends]
    if config.getoption("--every-mutant"):
        return mutants
    pairs = list(dict.fromkeys((mutant.op, mutant.backend) for mutant in MUTANTS))
    chosen = []
    for turn, pair in enumerate(pairs):
        planted = [mutant for mutant in mutants if (mutant.op, mutant.backend) == pair]
        kinds = [next((m for m in planted if m.error.startswith(kind)), None) for kind in KINDS.get(pair[1], ())]
        kinds = [mutant for mutant in kinds if mutant is not None]
        chosen += kinds[turn // 3 % len(kinds) :][:1] if kinds else planted[:1]
    return chosen


def pytest_generate_tests(metafunc):
    if "tree" in metafunc.fixturenames:
        metafunc.parametrize("mutant", of_backends(metafunc.config, "cpu", "triton"), ids=lambda mutant: mutant.name)


# Those of cuda are in test_mutations_cuda.py: files run in parallel.
def test_a_planted_error_is_caught(mutant, tree):
    if mutant.backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    tree.must_pass(mutant)
    tree.must_fail(mutant)
