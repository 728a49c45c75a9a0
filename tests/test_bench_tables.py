"""README's tables: what they say follows from committed results, targets and sources, and nothing else."""

import json
import re
import warnings

import pytest
from bench_rows import row, tables, target
from harness import rows


def current(backend, **changes):
    device_type = changes.get("device_type", "cpu")
    return row(backend, sources=rows.digest(rows.sources_of("hcl", backend, device_type)), **changes)


def results(*these, **changes):
    return tables.Results("folder", rows.latest(these), **changes)


def test_a_kernel_ran_on_a_gpu_only_if_rows_say_so():
    def status(*found):
        table = tables.status_table(found)
        return re.search(r"^\| `hcl` .*\| ([^|]*) \|$", table, flags=re.MULTILINE)[1]

    on_gpu = {"device_type": "cuda", "device": "NVIDIA X"}
    assert "ran on" not in status() and "ran on" not in status(results(current("cpu")))
    assert status(results(current("cuda", **on_gpu))) == "ran on NVIDIA X, 2026-01-02"
    assert "ran on" not in status(results(current("cuda", error="off", **on_gpu)))
    assert status(results(row("cuda", **on_gpu))) == "an earlier version ran on NVIDIA X, 2026-01-02"
    assert status(results(current("cuda", **on_gpu), failed_steps=["tests failed"])).endswith("(but: tests failed)")


def test_a_kernel_is_called_tested_only_with_its_test(tmp_path):
    for name in ("kernels/hcl.py", "csrc/cuda/hcl_cuda.cu", "tests/test_kernels_triton_hcl.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    line = next(line for line in tables.status_table([], tmp_path).splitlines() if line.startswith("| `hcl`"))
    assert line.split(" | ")[3:] == ["", "interpreter only, not yet run on a GPU", "not yet run |"]
    (tmp_path / "kernels" / "csf.py").touch()
    line = next(line for line in tables.status_table([], tmp_path).splitlines() if line.startswith("| `csf`"))
    assert line.split(" | ")[4] == "not yet run"  # another op's test says nothing of it


def test_speed_table_shows_ratios_and_marks_old_rows():
    eager, compiled = current("eager", ms=40.0), current("compiled", ms=15.0)
    fresh = tables.speed_tables([results(eager, compiled, current("cpu", ms=5.0))], [target()])
    case = "| `hcl`, stages 1-4, batch 2, fp32, nchw | C++ CPU | 40 ms | 15 ms |"
    assert f"{case} 5 ms | 8.0x | 3.0x |  |" in fresh and tables.STALE not in fresh
    old = tables.speed_tables([results(eager, compiled, row("cpu", ms=5.0))], [target()])
    assert rf"{case} 5 ms\* | 8.0x | 3.0x |  |" in old and tables.STALE in old
    assert tables.speed_tables([results(eager)], [target(size=("stage 1",))]) == ""


def test_rows_with_default_malloc_stand_under_their_own_title():
    both = [
        current(b, ms=ms, malloc=malloc) for malloc in ("tuned", "default") for b, ms in (("eager", 40.0), ("cpu", 5.0))
    ]
    table = tables.speed_tables([results(*both)], [target(), target(malloc="default")])
    titles = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `hcl`")]
    assert titles == [
        "`hcl`, stages 1-4, batch 2, fp32, nchw",
        "`hcl`, stages 1-4, batch 2, fp32, nchw, default malloc",
    ]


def test_target_table_takes_the_worst_case_of_each_device():
    promised = target(layout=("nchw", "channels_last"))
    other = {"layout": "channels_last"}
    measured_rows = [current("eager", ms=40.0), current("cpu", ms=5.0)]
    measured_rows += [current("eager", ms=40.0, **other), current("cpu", ms=10.0, **other)]
    assert "| MISS, 4.0x on CPU |" in tables.target_table([results(*measured_rows)], [promised])
    assert tables.STALE in tables.target_table([results(measured_rows[0], row("cpu", ms=5.0))], [target()])
    assert tables.target_table([], [promised]).endswith("| NOT RUN |")


def test_results_are_read_with_the_steps_that_failed(tmp_path):
    rows.write([row()], tmp_path / "device")
    steps = [{"name": "build", "status": "passed"}, {"name": "tests", "status": "failed"}]
    steps += [{"name": "sanitizer", "status": "unavailable"}, {"name": "bench", "status": "timed out"}]
    (tmp_path / "device" / "gpu.json").write_text(json.dumps({"device": "NVIDIA X", "date": "", "steps": steps}))
    (found,) = tables.load(tmp_path)
    assert (found.name, found.rows, found.failed_steps) == ("device", [row()], ["tests failed", "bench timed out"])


def test_rows_older_than_their_sources_are_listed():
    found = tables.stale([results(current("eager"), row("cpu"))])
    assert found == ["folder: hcl cpu, stages 1-4, batch 2, fp32, nchw"]


def test_committed_results_that_are_out_of_date_are_shown():
    """Not every machine can measure them anew: this lists them, it does not fail."""
    committed = tables.load()
    assert committed and all(device.rows for device in committed)
    old = tables.stale(committed)
    if old:
        warnings.warn("\n  ".join([f"{tables.STALE}:", *old]), stacklevel=1)


def test_parts_go_between_their_markers():
    text = "a\n<!-- generated: bench/tables.py speed -->\nold\n<!-- end -->\nb\n"
    once = tables.filled(text, {"speed": r"new \* 1"})
    assert once == "a\n<!-- generated: bench/tables.py speed -->\n\nnew \\* 1\n\n<!-- end -->\nb\n"
    assert tables.filled(once, {"speed": r"new \* 1"}) == once
    with pytest.raises(ValueError, match="expected once"):
        tables.filled(text, {"status": ""})
