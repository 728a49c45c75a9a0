"""`make gpu` without a GPU: its environment, what is carried along to it, and which of its results are kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
from bench_rows import row
from gpu_runs import HEAD, a_wheel, files_below, run_one

# isort: split
import gpu
from gpu_run import carry, keep, place, report
from gpu_run.processes import Done
from gpu_run.report import Result
from gpu_run.runner import Failed, Work
from harness import rows

# the environment of the steps


def test_the_venv_sees_the_packages_of_the_running_python_and_installs_beside_them(tmp_path):
    site = tmp_path / "elsewhere" / "site-packages"
    site.mkdir(parents=True)
    for name in ("only_there", "in_both"):
        (site / f"{name}.py").write_text("WHERE = 'site'\n")
    (site / "editable.pth").write_text("import sys; sys.seen = True\n")
    before = files_below(site)
    wheels = tmp_path / place.CARRY / "wheels"
    a_wheel(wheels, "lacking", ["only_in_wheel"], requires=["what_nobody_has"])
    a_wheel(wheels, "present", ["in_both"])

    def step(work):
        place.make(work, [str(site)])
        source = "import sys, only_there, in_both, only_in_wheel as w; print(only_there.WHERE, in_both.WHERE, w.WHERE)"
        work.numbers["where"] = work.call(place.python(work.root), "-I", "-c", source).output
        seen = "import sys; print(sys.prefix, hasattr(sys, 'seen'))"
        work.numbers["prefix"] = work.call(place.python(work.root), "-I", "-c", seen).output

    result = run_one(step, tmp_path, seconds=60)
    assert (result.status, result.reason) == ("passed", "")
    assert result.numbers["where"] == "site site wheel\n"
    assert result.numbers["prefix"] == f"{tmp_path / place.VENV} False\n"  # others' editable installs stay out of it
    assert result.numbers["carried_wheels"] == ["lacking-1.0-py3-none-any.whl"]
    assert "torch" not in result.numbers["missing_packages"] and "omegaconf" in result.numbers["missing_packages"]
    assert {path for path in files_below(site) if path.suffix != ".pyc"} == set(before)


def test_pip_gets_its_seconds_and_environment_and_says_what_failed(tmp_path, monkeypatch):
    asked = []

    def call(work, *command, **options):
        asked.append((command[-3:], options))
        return Done(1, "transkd_fast: no nvcc\n")

    monkeypatch.setattr(Work, "call", call)
    result = run_one(lambda work: place.pip(work, "install", ".", seconds=7.0, TRANSKD_FAST_CUDA="0"), tmp_path)
    assert asked == [(("install", "--no-index", "."), {"seconds": 7.0, "TRANSKD_FAST_CUDA": "0"})]
    assert (result.status, result.reason) == ("failed", "pip install failed: transkd_fast: no nvcc")


def test_a_wheel_of_one_platform_is_refused(tmp_path):
    a_wheel(tmp_path / place.CARRY / "wheels", "native", ["native"], tag="cp311-cp311-linux_x86_64")
    result = run_one(lambda work: place.make(work, []), tmp_path, seconds=60)
    assert result.status == "failed" and "expected a pure-Python wheel" in result.reason


def test_site_folders_are_those_of_installed_packages(tmp_path):
    names = ["lib/site-packages", "dist-packages", "project", "site-packages"]
    path = [str(tmp_path / name) for name in names]
    for name in names[:3]:
        (tmp_path / name).mkdir(parents=True)
    assert place.site_folders([*path, path[0]]) == path[:2]


def test_the_environment_chooses_the_gpu_and_drops_what_would_hide_it(tmp_path):
    environ = {"PATH": "/usr/bin", "TRITON_INTERPRET": "1", "TRANSKD_FAST_BACKEND": "eager", "KEPT": "yes"}
    got = place.environment(tmp_path, environ, ["9.0", "8.0", "9.0"])
    assert got["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0" and got["KEPT"] == "yes"
    assert got["PATH"].split(os.pathsep)[0] == str(tmp_path / ".gpu" / "venv" / "bin")
    assert got["PATH"].endswith(":/usr/bin")
    assert not {"TRITON_INTERPRET", "TRANSKD_FAST_BACKEND"} & set(got)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Processing\ntranskd_fast: expected torch\nERROR: x", "transkd_fast: expected torch"),
        ("a.cu(3): error: no\nERROR: x\n", "a.cu(3): error: no"),
        ("ERROR: no such\nlast", "ERROR: no such"),
        ("one\nlast\n", "last"),
        ("", "no output"),
    ],
)
def test_the_line_that_says_most(output, expected):
    assert place.complaint(output) == expected


# what is carried along


def test_wheels_are_fetched_with_what_they_require(tmp_path):
    shelf = tmp_path / "shelf"
    a_wheel(shelf, "conf", ["conf"], ["anTLR4_python3.runtime==4.9.*", "PyYAML>=5", 'sphinx; extra == "dev"'])
    a_wheel(shelf, "antlr4_python3_runtime", ["antlr4"], ["conf", 'typing; python_version < "3.5"'])
    asked = []

    def fetch(requirement, folder):
        asked.append(requirement)
        found = next(shelf.glob(f"{carry.distribution(requirement).replace('-', '_')}-*"), None)
        if found is not None:  # pip fetches nothing where the marker does not hold
            shutil.copy(found, folder)

    names = carry.fetch_all(["conf>=2"], tmp_path / "wheels", fetch)
    assert names == ["antlr4_python3_runtime-1.0-py3-none-any.whl", "conf-1.0-py3-none-any.whl"]
    assert asked == ["conf>=2", "anTLR4_python3.runtime==4.9.*", 'typing; python_version < "3.5"']


def test_only_pure_wheels_are_carried_and_a_failure_leaves_the_old_ones(tmp_path, monkeypatch):
    old = tmp_path / place.CARRY / "wheels" / "old.whl"
    old.parent.mkdir(parents=True)
    old.touch()
    with pytest.raises(Failed, match=r"native-1.0-cp312-abi3-linux.*expected a pure-Python wheel"):
        carry.fill(tmp_path, None, lambda _, folder: a_wheel(folder, "native", ["n"], tag="cp312-abi3-linux_x86_64"))
    monkeypatch.setattr(carry, "MOST_BYTES", 100)
    with pytest.raises(Failed, match="expected at most 0 MB to carry"):
        carry.fill(tmp_path, None, lambda _, folder: a_wheel(folder, "conf", ["conf"]))
    assert old.exists() and [path.name for path in (tmp_path / ".gpu").iterdir()] == ["carry"]
    monkeypatch.undo()
    lines = carry.fill(tmp_path, None, lambda _, folder: a_wheel(folder, "conf", ["conf"]))
    assert "wheel conf-1.0-py3-none-any.whl" in lines and any("TRANSKD_CAMVID" in line for line in lines)
    assert not old.exists()


def frames(folder, number, labels=None):
    for split in ("train", "val"):
        for kind, suffix, count in (("images", "jpg", number), ("labels", "png", labels or number)):
            (folder / kind / split).mkdir(parents=True)
            for i in range(count):
                (folder / kind / split / f"f{i:03}.{suffix}").write_text(f"{kind} {i}")
    return folder


def test_frames_are_spread_over_the_splits(tmp_path):
    copied = carry.copy_frames(frames(tmp_path / "camvid", 10), tmp_path / "new", {"train": 4, "val": 32})
    assert copied == {"train": 4, "val": 10}
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        names = sorted(path.name for path in (tmp_path / "new" / kind / "train").iterdir())
        assert names == [f"f{i:03}.{suffix}" for i in (0, 2, 5, 7)]
    assert (tmp_path / "new" / "labels" / "train" / "f005.png").read_text() == "labels 5"


def test_missing_frames_and_labels_are_errors(tmp_path):
    with pytest.raises(Failed, match=r"TRANSKD_CAMVID=.*expected images in images/train, found none"):
        carry.copy_frames(tmp_path, tmp_path / "new")
    with pytest.raises(Failed, match=r"f007.png: expected the label of f007.jpg"):
        carry.copy_frames(frames(tmp_path / "camvid", 10, labels=7), tmp_path / "new")


# results that are kept


def results_of_a_run(folder, **changes):
    folder.mkdir(exist_ok=True)
    report.Report({**HEAD, "device": "NVIDIA H200", **changes}, [Result("a", "passed"), Result("b", "failed")]).write(
        folder
    )
    rows.write([row("cuda", device="NVIDIA H200")], folder)
    return folder


def test_results_are_kept_under_the_devices_name(tmp_path):
    source, results = results_of_a_run(tmp_path / "out"), tmp_path / "results"
    (source / "log.txt").touch()
    lines = keep.keep(source, results)
    folder = results / "nvidia-h200"
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "rows.csv", "rows.json"]
    assert "not passed: b failed" in lines
    (source / "rows.json").unlink()
    (source / "rows.csv").unlink()
    keep.keep(source, results)
    assert [path.name for path in folder.iterdir()] == ["gpu.json"]  # not beside an older run's rows


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda out: (out / "gpu.json").unlink(), "expected the result of make gpu, found none"),
        (lambda out: (out / "gpu.json").write_text('{"device": "NVIDIA'), "expected JSON"),
        (lambda out: (out / "gpu.json").write_text("{}"), "expected the keys device, capability"),
        (lambda out: results_of_a_run(out, device=None), "device: expected text, got None"),
        (
            lambda out: results_of_a_run(out, device="NVIDIA A100"),
            "expected rows of NVIDIA A100, got some of NVIDIA H200",
        ),
        (lambda out: (out / "rows.json").write_text('[{"op": 1}]'), "expected rows of the benches"),
    ],
)
def test_broken_results_are_not_kept(broken, message, tmp_path, capsys):
    out = results_of_a_run(tmp_path / "out")
    broken(out)
    assert gpu.main(["keep", str(out)], tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bench" / "results").exists()


def test_a_status_nobody_knows_is_not_kept():
    content = {**HEAD, "steps": [{"name": "a", "status": "fine", "seconds": 1, "reason": ""}]}
    with pytest.raises(ValueError, match="a: expected a status out of passed, failed"):
        report.check(content)


def test_json_holds_no_nan(tmp_path):
    report.Report(dict(HEAD), [Result("a", numbers={"x": float("nan"), "y": (1, Path("p")), 3: None})]).write(tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["steps"][0]["numbers"] == {"x": None, "y": [1, "p"], "3": None}
