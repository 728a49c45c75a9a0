from collections.abc import Callable, Sequence

import pytest
from harness import DTYPES, Case, Row, report, write
from harness import measure as measure_cases

from transkd_fast.train.memory import keep_freed_memory

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("transkd_fast benches")
    group.addoption("--rounds", type=int, help="interleaved rounds per comparison (default: each bench's own number)")
    group.addoption("--dtype", choices=list(DTYPES), default="fp32", help="storage dtype of the ops' benches")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # its table would show rounds, of all cases together


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("benches")
        terminalreporter.write_line(report(rows))
        if not config.option.benchmark_disable:  # one cold round is no measurement to keep
            write(rows)


@pytest.fixture(scope="session")
def malloc() -> str:
    """How freed memory is treated; what the trainer does by default."""
    reason = keep_freed_memory()
    return "tuned" if reason is None else f"default ({reason})"


@pytest.fixture
def dtype(request):
    return DTYPES[request.config.getoption("dtype")]


@pytest.fixture
def measure(request, benchmark, malloc) -> Callable[[Sequence[Case], int, int], None]:
    """Measures cases, keeps their rows for the table, and fails if one of them is wrong."""

    def run(cases: Sequence[Case], rounds: int, warmup: int) -> None:
        rows = measure_cases(benchmark, cases, request.config.getoption("rounds") or rounds, warmup, malloc)
        request.config.stash[ROWS].extend(rows)
        wrong = [f"{row.backend}: {row.error}" for row in rows if row.error is not None]
        assert not wrong, "; ".join(wrong)

    return run
