"""Fixtures of all tests, and the rule that no test is skipped for a reason nobody wrote down."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: where there is no GPU its kernels are tested in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--allowed-skips", help="file that names each test that may be skipped, with its reason")
    parser.addoption("--every-mutant", action="store_true", help="plant every error of planted_errors.py")


def pytest_configure(config):
    path = config.getoption("--allowed-skips")
    if path:
        config.pluginmanager.register(SkipGuard(Path(path)), "skip-guard")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Groups tests for pytest-xdist: those of a file run in one process; machine code is judged op by op."""
    for item in items:
        group = item.location[0]
        if "gpu_code" in item.path.parts and "op" in getattr(getattr(item, "callspec", None), "params", {}):
            group += f" {item.callspec.params['op']}"
        item.add_marker(pytest.mark.xdist_group(group))


class SkipGuard:
    """Fails the run when a test is skipped that the file does not name with that reason."""

    def __init__(self, path):
        lines = [line.strip() for line in path.read_text().splitlines()]
        entries = [line.partition(" ") for line in lines if line and not line.startswith("#")]
        self.allowed = [(pattern, reason.strip()) for pattern, _, reason in entries]
        self.unexpected = []

    def pytest_runtest_logreport(self, report):
        self._check(report)

    def pytest_collectreport(self, report):
        self._check(report)

    def _check(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            if not any(fnmatchcase(report.nodeid, pattern) and reason == why for pattern, why in self.allowed):
                self.unexpected.append(f"{report.nodeid} {reason}")

    def pytest_terminal_summary(self, terminalreporter):
        if self.unexpected:
            terminalreporter.section("skipped, but not named with this reason in the file of allowed skips", red=True)
            for line in self.unexpected:
                terminalreporter.write_line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.unexpected and session.exitstatus == 0:
            session.exitstatus = 1


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch):
    """A run of pytest that a test starts is no worker of this one: pytest-benchmark measures nothing in a worker."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
