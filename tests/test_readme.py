"""README's Python runs as written, and its commands and files exist."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_named_files_exist():
    names = set(re.findall(r"(?:configs|bench)/[\w./]+\.\w+", README)) | set(
        re.findall(r"\]\((?!http)([^)]+)\)", README)
    )
    assert len(names) >= 5
    for name in names:
        assert (ROOT / name).exists(), name


def test_op_table_is_true():
    """A backend has an entry exactly where a kernel is registered."""
    from transkd_fast import backends

    cell = r"([^|\n]*)\|"
    rows = re.findall(rf"^\| `(\w+)` \|[^|\n]*\|{cell}{cell}{cell}{cell}$", README, flags=re.MULTILINE)
    table = backends.table()
    assert {row[0] for row in rows} == set(table)
    for op, *ticks in rows:
        for backend, tick in zip(backends.BACKENDS, ticks, strict=True):
            assert (tick.strip() != "") == (table[op][backend] != "no kernel for this op yet"), (op, backend)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_tables_are_those_that_the_files_give():
    sys.path.insert(0, str(ROOT / "bench"))
    import tables
    from harness import targets

    expected = tables.filled(README, tables.blocks(tables.load(), targets.load()))
    assert expected == README, "run `python bench/tables.py --write`"
