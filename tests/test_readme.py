"""README's Python runs as written, and its commands and files exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 2


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
    """A backend is ticked exactly where a kernel is registered."""
    from transkd_fast import backends

    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", README, flags=re.MULTILINE)
    table = backends.table()
    assert {row[0] for row in rows} == set(table)
    for op, *ticks in rows:
        for backend, tick in zip(backends.BACKENDS, ticks, strict=True):
            assert (tick.strip() == "yes") == (table[op][backend] != "no kernel for this op yet"), (op, backend)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_figures_are_those_of_the_committed_results():
    rows = json.loads((ROOT / "bench/results/amd-epyc-2-threads/rows.json").read_text())

    def row(op, backend, layout="nchw", shape="+"):
        found = [
            r for r in rows if (r["op"], r["backend"], r["layout"]) == (op, backend, layout) and shape in r["shape"]
        ]
        assert len(found) == 1
        return found[0]

    table = re.findall(r"^\| `hcl`, four stages .*?\| (\w+) \|(.*)\|$", README, flags=re.MULTILINE)
    assert [layout for layout, _ in table] == ["nchw", "channels_last"]
    for layout, cells in table:
        eager, compiled, cpu = (row("hcl", b, layout)["total_ms"] for b in ("eager", "compiled", "cpu"))
        expected = f" {eager:.1f} ms | {compiled:.1f} ms | {cpu:.1f} ms | {eager / cpu:.1f}x | {compiled / cpu:.1f}x "
        assert cells == expected
    ours, published = (row("step b2-b0", backend, shape="") for backend in ("ours", "published"))
    seconds = [r["total_ms"] / 1e3 for r in (ours, published)]
    peaks = [r["peak_bytes"] / 1e9 for r in (ours, published)]
    text = " ".join(README.split())
    assert (
        f"takes {seconds[0]:.1f} s where" in text and f"take {seconds[1]:.1f} s: {seconds[1] / seconds[0]:.1f}x" in text
    )
    assert f"with {peaks[0]:.1f} GB instead of {peaks[1]:.1f} GB at the peak" in text
