"""Which backend runs: the order of the ways to choose, no silent fallback, and a light import."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import pattern

import transkd_fast
from transkd_fast import BackendError, backends, count_runs, functional, use_backend

PACKAGE = Path(transkd_fast.__file__).resolve().parent
X = torch.ones(2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An op of its own with a CPU and a CUDA kernel, nothing logged yet, and no choice in the environment."""
    monkeypatch.delenv(backends.ENV_VAR, raising=False)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    backends.register_op("probe")
    backends.register("probe", "cpu", lambda tensors: "takes no negatives" if (tensors[0] < 0).any() else None)
    backends.register("probe", "cuda", lambda tensors: None)
    backends.register_op("other")
    backends.register("other", "cpu", lambda tensors: None)


def choose(tensor=X, requested=None, op="probe"):
    return backends.choose(op, [tensor], requested)


def test_auto_takes_the_kernel():
    assert choose() == choose(requested="auto") == "cpu"


def test_argument_before_context_before_environment_before_auto(monkeypatch):
    monkeypatch.setenv(backends.ENV_VAR, "eager")
    assert choose() == "eager"
    with use_backend("cpu"):
        assert choose() == "cpu"
        assert choose(requested="eager") == "eager"
        with use_backend("eager"):
            assert choose() == "eager"
            assert choose(requested="auto") == "cpu"
        assert choose() == "cpu"
    assert choose() == "eager"
    monkeypatch.setenv(backends.ENV_VAR, "")
    assert choose() == "cpu"


def test_context_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert choose() == "cpu"


def test_context_for_some_ops():
    with use_backend("eager", ops=["probe"]):
        assert (choose(), choose(op="other")) == ("eager", "cpu")
        with use_backend("eager"), use_backend("cpu", ops=("other",)):
            assert (choose(), choose(op="other")) == ("eager", "cpu")
    with use_backend("eager", ops=[]):
        assert choose() == "cpu"


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_unknown_names(name, monkeypatch):
    listed = pattern("expected one of 'auto', 'eager', 'cpu', 'triton', 'cuda', got " + repr(name))
    with pytest.raises(ValueError, match=f"use_backend: {listed}"), use_backend(name):
        pass
    with pytest.raises(ValueError, match=f"backend: {listed}"):
        choose(requested=name)
    if name:  # an empty environment variable counts as none
        monkeypatch.setenv(backends.ENV_VAR, name)
        with pytest.raises(ValueError, match=f"{backends.ENV_VAR}: {listed}"):
            choose()
    with pytest.raises(ValueError, match=r"expected one of 'eager', 'cpu', 'triton', 'cuda'"):
        backends.register("probe", name, lambda tensors: None)
    assert choose(requested="auto") == "cpu"


def test_unknown_op_in_a_context():
    with pytest.raises(ValueError, match=r"expected ops among .*hcl.*, got 'hlc'"), use_backend("eager", ops=["hlc"]):
        pass
    with pytest.raises(TypeError, match="expected ops to be a collection of names"), use_backend("eager", ops="hcl"):
        pass


@pytest.mark.parametrize(
    ("tensor", "backend", "reason"),
    [
        (X, "triton", "no kernel for this op yet"),
        (-X, "cpu", "takes no negatives"),
        (X.to("meta"), "cpu", "tensors are on meta"),
    ],
)
@pytest.mark.parametrize("way", ["argument", "context", "environment"])
def test_an_explicit_choice_never_falls_back(tensor, backend, reason, way, monkeypatch):
    others = "backend='eager'" if tensor is not X else "backend='eager' or backend='cpu'"
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError) as error:
        if way == "argument":
            choose(tensor, backend)
        elif way == "context":
            with use_backend(backend):
                choose(tensor)
        else:
            monkeypatch.setenv(backends.ENV_VAR, backend)
            choose(tensor)
    assert str(error.value) == f"probe: backend={backend!r} cannot run: {reason}; use {others}, or backend='auto'"


def test_an_op_of_the_package_never_falls_back():
    student, teacher = torch.rand(1, 2, 4, 4, dtype=torch.float64), torch.rand(1, 2, 4, 4)
    assert functional.hcl_loss([student], [teacher]) == functional.hcl_loss([student], [teacher], backend="eager")
    with pytest.raises(BackendError, match="hcl: backend='cpu' cannot run: float64 maps do not mix"):
        functional.hcl_loss([student], [teacher], backend="cpu")


def test_cuda_without_a_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends._extension, "loaded", lambda name: True)
    with pytest.raises(BackendError, match="probe: backend='cuda' cannot run: no CUDA device is visible"):
        choose(requested="cuda")


def test_triton_without_the_package_says_so(monkeypatch):
    backends.register("probe", "triton", lambda tensors: None)
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(BackendError, match="cannot run: the package triton is not installed"):
        choose(requested="triton")


@pytest.mark.parametrize(("value", "device"), [("1", "cpu"), ("true", "cpu"), ("0", "cuda"), (None, "cuda")])
def test_triton_takes_cpu_tensors_where_it_interprets(value, device, monkeypatch):
    backends.register("probe", "triton", lambda tensors: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backends.why_not("probe", "triton", [X]) == (None if device == "cpu" else "tensors are on cpu")
    assert choose() == "cpu"  # never by itself


def test_auto_says_once_why_it_passed_a_backend_over(monkeypatch, caplog):
    monkeypatch.setattr(backends, "unavailable", lambda name: "built without it" if name == "cpu" else None)
    with caplog.at_level(logging.WARNING, "transkd_fast"):
        assert [choose() for _ in range(3)] == ["eager"] * 3
        assert choose(op="other") == "eager"
    assert caplog.messages == [
        "probe: passed over backend cpu: built without it",
        "other: passed over backend cpu: built without it",
    ]


def test_auto_says_each_reason(caplog):
    with caplog.at_level(logging.WARNING, "transkd_fast"):
        assert choose(-X) == choose(-2 * X) == "eager"
        assert choose(X) == "cpu"
    assert caplog.messages == ["probe: passed over backend cpu: takes no negatives"]


def test_auto_is_silent_about_kernels_that_do_not_exist(caplog):
    backends.register_op("plain")
    with caplog.at_level(logging.WARNING, "transkd_fast"):
        assert choose(op="plain") == "eager"
    assert caplog.messages == []


def test_auto_on_a_device_without_kernels(caplog):
    with caplog.at_level(logging.WARNING, "transkd_fast"):
        assert choose(X.to("meta")) == choose(X.to("meta")) == "eager"
    assert len(caplog.messages) == 1 and "device type 'meta'" in caplog.messages[0]


def test_runs_are_counted_also_in_nested_blocks():
    choose()
    with count_runs() as outer:
        choose()
        with count_runs() as inner:
            choose()
            choose(requested="eager")
        choose(op="other")
    choose()
    assert inner == {("probe", "cpu"): 1, ("probe", "eager"): 1}
    assert outer == {("probe", "cpu"): 2, ("probe", "eager"): 1, ("other", "cpu"): 1}


def test_refused_calls_are_not_counted_and_an_exception_ends_the_block():
    with pytest.raises(BackendError), count_runs() as counts:
        choose(requested="triton")
    choose()
    assert counts == {}


def test_an_op_counts_one_run_per_call():
    maps = [torch.rand(1, 2, 4, 4) for _ in range(3)]
    with count_runs() as counts:
        functional.hcl_loss(maps, maps)
        functional.hcl_loss(maps[:1], maps[:1], backend="eager")
    assert counts == {("hcl", "cpu"): 1, ("hcl", "eager"): 1}


def test_table_of_ops():
    table = backends.table()
    assert {"csf", "cwd", "gl_mixer", "hcl", "pea", "seg_ce"} <= table.keys()
    for states in table.values():
        assert list(states) == list(backends.BACKENDS) and states["eager"] is None
    assert table["hcl"]["cpu"] is None
    assert table["probe"]["triton"] == "no kernel for this op yet"


def python(code, *path, cwd=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    # An editable install resolves the package's extensions wherever the package itself was found.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    return done.returncode, done.stdout, done.stderr


def copy_package(root):
    shutil.copytree(PACKAGE, root / "transkd_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return root / "transkd_fast"


def test_import_is_light():
    code = """
import json, sys
import torch
before = set(sys.modules)
import transkd_fast
print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))
"""
    status, out, err = python(code, PACKAGE.parent)
    assert status == 0, err
    new = set(json.loads(out))
    assert "transkd_fast" in new
    heavy = {"timm", "transformers", "matplotlib", "torchvision", "torchmetrics", "omegaconf", "triton", "PIL", "tqdm"}
    assert new & heavy == set()


def test_source_tree_without_extension_says_what_to_do(tmp_path):
    copy_package(tmp_path)
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    status, _, err = python("import transkd_fast", tmp_path, cwd=tmp_path)
    assert status != 0
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: transkd_fast was imported from its source tree ({tmp_path})")
    assert "pip install -e ." in last


@pytest.mark.parametrize("extension", ["missing", "broken"])
def test_package_whose_extension_does_not_load_runs_eager(extension, tmp_path):
    package = copy_package(tmp_path)
    if extension == "broken":
        suffix = next(PACKAGE.glob("_C.*")).name.removeprefix("_C")
        (package / f"_C{suffix}").write_bytes(b"not a library")
    code = """
import torch, transkd_fast
from transkd_fast import functional, backends
maps = [torch.rand(1, 2, 4, 4, requires_grad=True)], [torch.rand(1, 2, 4, 4)]
with transkd_fast.count_runs() as counts:
    functional.hcl_loss(*maps).backward()
assert counts == {("hcl", "eager"): 1}, counts
assert transkd_fast.build_info()["extensions"]["_C"] == {"loaded": False, "reason": backends.unavailable("cpu")}
try:
    functional.hcl_loss(*maps, backend="cpu")
except transkd_fast.BackendError as error:
    print(error)
"""
    status, out, err = python(code, tmp_path, cwd=tmp_path)
    assert status == 0, err
    assert "hcl: passed over backend cpu: " in err
    assert out.startswith("hcl: backend='cpu' cannot run: ") and "use backend='eager'" in out
    assert ("No module named" if extension == "missing" else "_C") in out


def test_threads_leave_in_any_order():
    """The first to enter leaves first; the other's choice must stay until it leaves too."""
    first, second = use_backend("eager"), use_backend("cpu", ops=["hcl"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    maps = (torch.zeros(1, 1, 4, 4),) * 2
    assert backends.choose("hcl", maps) == "cpu"
    assert backends._choice == [{"hcl": "cpu"}]
    second.__exit__(None, None, None)
    assert backends._choice == []


def test_none_changes_nothing():
    with use_backend("eager"), use_backend(None):
        assert backends.choose("hcl", (torch.zeros(1, 1, 4, 4),) * 2) == "eager"
