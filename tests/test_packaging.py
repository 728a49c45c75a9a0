"""How the package is built, installed and imported; nothing here needs the network or compiles anything."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import transkd_fast
from transkd_fast import _extension

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_SOURCE = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend():
    return load("transkd_build", ROOT / "tools" / "transkd_build.py")


@pytest.fixture
def setup_py():
    return load("transkd_setup", ROOT / "setup.py")


def python(code, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False
    )


def executable(path, output):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


def packages_below(folder, name):
    folders = {file.parent for file in folder.rglob("*.py")}
    return {".".join([name, *path.relative_to(folder).parts]) for path in folders}


# The in-tree build backend.


@pytest.fixture
def hidden_torch(backend, monkeypatch, tmp_path):
    """An environment as pip's build isolation shows it: torch cannot be imported, only site knows the folders."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [str(tmp_path / "absent"), str(tmp_path)])
    monkeypatch.setattr(backend.sys, "base_prefix", sys.prefix + "-base")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("installed", "version"),
    [
        (["torch-2.11.0"], "2.11.0"),
        (["torch-2.11.0+cpu"], "2.11.0+cpu"),
        (["torch-2.12.0a0+git1234567"], "2.12.0a0+git1234567"),
        (["torch-3.0.1"], "3.0.1"),
        (["torch-2.10.0"], None),
        (["torch-2.9.1+cu130"], None),
        (["torch-1.99.0"], None),
        (["torch-main"], None),
        (["torchvision-2.26.0", "torch_geometric-2.12.0"], None),
        ([], None),
    ],
)
def test_torch_is_required_only_where_none_is_new_enough(backend, hidden_torch, installed, version):
    for name in installed:
        (hidden_torch / f"{name}.dist-info").mkdir()
    assert backend.installed_torch() == (None if version is None else (hidden_torch, version))
    expected = ["torch>=2.11"] if version is None else []
    assert backend.get_requires_for_build_wheel() == expected
    assert backend.get_requires_for_build_editable() == expected
    assert backend.get_requires_for_build_sdist() == []


def test_torch_of_the_user_folder_counts_outside_a_virtual_environment(backend, hidden_torch, monkeypatch):
    user = hidden_torch / "user"
    (user / "torch-2.13.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(user))
    assert backend.installed_torch() is None
    monkeypatch.setattr(backend.sys, "base_prefix", sys.prefix)
    assert backend.installed_torch() == (user, "2.13.0")


@pytest.mark.parametrize(
    "hook",
    ["build_wheel", "build_editable", "prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"],
)
def test_build_hooks_expose_the_installed_torch_behind_the_build_tools(backend, hidden_torch, monkeypatch, hook):
    (hidden_torch / "torch-2.11.0.dist-info").mkdir()
    seen = []
    monkeypatch.setattr(backend.build_meta, hook, lambda *args: seen.append((args, sys.path[-1])) or "made")
    assert getattr(backend, hook)("folder") == "made"
    assert seen == [(("folder",), str(hidden_torch))]


def test_build_isolation_off_uses_the_torch_that_can_be_imported(tmp_path):
    code = "import sys, transkd_build as b; print(b.get_requires_for_build_wheel(), 'torch' in sys.modules)"
    result = python(code, tmp_path, PYTHONPATH=str(ROOT / "tools"))
    assert result.stdout.strip() == "[] False", result.stderr


def test_every_place_names_the_same_oldest_torch(backend, setup_py):
    major, minor = backend.MINIMUM_TORCH
    assert (major, minor) == setup_py.MINIMUM_TORCH
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in setup_py.TORCH_TARGET
    assert f"torch>={major}.{minor}" in PYPROJECT["project"]["dependencies"]


# setup.py. That the fixture can import it shows that only running it builds something.


@pytest.mark.parametrize("value", ["auto", "0", "1"])
def test_cuda_mode_is_taken_from_the_environment(setup_py, monkeypatch, value):
    monkeypatch.setenv("TRANSKD_FAST_CUDA", value)
    assert setup_py.cuda_mode() == value
    monkeypatch.delenv("TRANSKD_FAST_CUDA")
    assert setup_py.cuda_mode() == "auto"


@pytest.mark.parametrize("value", ["", "2", "on"])
def test_an_unknown_cuda_mode_is_refused(setup_py, monkeypatch, value):
    monkeypatch.setenv("TRANSKD_FAST_CUDA", value)
    with pytest.raises(SystemExit, match=f"expected TRANSKD_FAST_CUDA to be auto, 0 or 1, got '{value}'"):
        setup_py.cuda_mode()


def test_cuda_home_is_searched_in_order(setup_py, monkeypatch, tmp_path):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(setup_py, "USUAL_CUDA_HOME", str(tmp_path / "usual"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_py.find_cuda_home() is None

    # A wrapper on PATH lies in another folder than the toolkit, which its dry run names.
    executable(tmp_path / "bin" / "nvcc", "no word about any folder")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    assert setup_py.find_cuda_home() is None
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    executable(tmp_path / "bin" / "nvcc", f"#$ _NVVM_BRANCH_=nvvm\n#$ TOP={tmp_path}/toolkit/bin/..\n#$ PATH=x")
    assert setup_py.find_cuda_home() == str(tmp_path / "toolkit")

    executable(tmp_path / "usual" / "bin" / "nvcc", "")
    assert setup_py.find_cuda_home() == str(tmp_path / "usual")
    monkeypatch.setenv("CUDA_PATH", "/from/cuda/path")
    assert setup_py.find_cuda_home() == "/from/cuda/path"
    monkeypatch.setenv("CUDA_HOME", "/from/cuda/home")
    assert setup_py.find_cuda_home() == "/from/cuda/home"


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "reason"),
    [
        ("release 13.0, V13.0.88", None, "this torch has no CUDA"),
        (None, "13.0", "holds no bin/nvcc"),
        ("no number", "13.0", "does not tell its version"),
        ("release 12.8, V12.8.93", "13.0", "differ in the major version"),
        ("release 13.0, V13.0.88", "12.8", "differ in the major version"),
    ],
)
def test_why_no_cuda_tells_the_reason(setup_py, tmp_path, nvcc, torch_cuda, reason):
    if nvcc is not None:
        executable(tmp_path / "bin" / "nvcc", f"Cuda compilation tools, {nvcc}")
    assert reason in setup_py.why_no_cuda(str(tmp_path), torch_cuda)


def test_why_no_cuda_has_no_objection_to_another_minor_version(setup_py, tmp_path):
    assert "no nvcc was found" in setup_py.why_no_cuda(None, "13.0")
    executable(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    assert setup_py.why_no_cuda(str(tmp_path), "13.2") is None


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        ("[1/2] nvcc x.cu\nnvcc fatal   : Unknown option '--bogus'", "nvcc fatal   : Unknown option '--bogus'"),
        ('  x.cu(3): error: expected a ";"\n  x.cu(4): error: more', 'x.cu(3): error: expected a ";"'),
        ("x.cu:1:10: fatal error: a.h: No such file", "x.cu:1:10: fatal error: a.h: No such file"),
        ("nvcc -Werror x.cu\nninja: build stopped: subcommand failed.", None),
    ],
)
def test_the_first_error_of_the_compiler_is_found(setup_py, monkeypatch, tmp_path, log, complaint):
    executable(tmp_path / "bin" / "ninja", log)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    assert setup_py.first_complaint(str(tmp_path)) is None  # nothing was built there
    (tmp_path / "build.ninja").touch()
    assert setup_py.first_complaint(str(tmp_path)) == complaint


def test_config_header_holds_any_text(setup_py):
    # C++ has no \u001b and no surrogate pairs; gcc quotes names with \u2018 in its messages.
    header = setup_py.config_header({"STATE": 'a.cu: \x1berror: "\u2018b\u2019\\" \U0001f600', "ARCHS": "8.0;9.0+PTX"})
    first, state, archs = header.splitlines()
    assert first == "#pragma once"
    assert json.loads(state.removeprefix("#define TRANSKD_BUILD_STATE ")) == 'a.cu: error: "\u2018b\u2019\\" \U0001f600'
    assert archs == '#define TRANSKD_BUILD_ARCHS "8.0;9.0+PTX"'
    assert "\\u" not in header


def test_building_against_an_old_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.10.1+cu128'\n")
    code = "import sys, runpy; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    result = python(code, ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "expected torch >= 2.11 to build against, found 2.10.1+cu128" in result.stderr


# What is in the packages.


def test_packages_are_those_of_the_tree():
    tree = packages_below(ROOT / "transkd_fast", "transkd_fast") | packages_below(
        ROOT / "kernels", "transkd_fast.kernels"
    )
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == tree


def test_kernels_folder_is_installed_as_a_subpackage():
    kernels = importlib.import_module("transkd_fast.kernels")
    installed = {path.name for path in Path(kernels.__file__).parent.glob("*.py")}
    assert installed == {path.name for path in (ROOT / "kernels").glob("*.py")}


def test_source_distribution_needs_no_torch_and_is_complete(tmp_path):
    source, out, poison = tmp_path / "source", tmp_path / "out", tmp_path / "poison"
    for folder in (source, out, poison):
        folder.mkdir()
    (poison / "torch.py").write_text("raise ImportError('a source distribution needs no torch')\n")
    for path in ROOT.iterdir():
        if path.name in {"transkd_fast", "csrc", "kernels", "tools", "configs", "tests"}:
            shutil.copytree(path, source / path.name, ignore=NOT_SOURCE)
        elif path.is_file():
            shutil.copy(path, source)
    (source / "kernels" / "stale.pyc").touch()
    (source / "transkd_fast" / "_C.cpython-311-x86_64-linux-gnu.so").touch()

    code = f"import transkd_build; print(transkd_build.build_sdist({str(out)!r}))"
    result = python(code, source, PYTHONPATH=os.pathsep.join([str(poison), str(source / "tools")]))
    assert result.returncode == 0, result.stderr
    version = PYPROJECT["project"]["version"]
    with tarfile.open(out / f"transkd_fast-{version}.tar.gz") as archive:
        files = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "kernels", "tools", "configs", "transkd_fast")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    wanted |= {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py", "PKG-INFO"}
    assert wanted <= files
    assert not [name for name in files if name.endswith((".so", ".pyc")) or name.startswith("tests/")]


def test_metadata_is_that_of_pyproject():
    assert metadata.version("transkd_fast") == transkd_fast.__version__ == PYPROJECT["project"]["version"]
    (command,) = metadata.entry_points(group="console_scripts", name="transkd")
    assert command.value == PYPROJECT["project"]["scripts"]["transkd"]


# What was installed.


def test_build_info_tells_what_was_built():
    info = transkd_fast.build_info()
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 11)
    assert info["compiler"].split()[0] in {"gcc", "clang"}
    assert info["instruction_set_here"] in info["instruction_sets"]
    assert info["extensions"]["_C"] == {"loaded": True, "reason": None}

    # Whatever was built must load: a symbol that this torch lacks would show here as a reason.
    cuda = info["extensions"]["_C_cuda"]
    assert cuda["loaded"] == (torch.version.cuda is not None and info["cuda"] == "built"), cuda["reason"]
    assert cuda["loaded"] == (cuda["reason"] is None) == ("cuda_build" in info)
    if cuda["loaded"]:
        assert info["cuda_build"]["torch"] == info["torch"]
        assert info["cuda_build"]["archs"]
        assert str(info["cuda_build"]["cuda_toolkit"] // 1000) == torch.version.cuda.split(".")[0]


def test_extensions_do_not_link_the_python_half_of_torch():
    binaries = [Path(module.__file__) for module in _extension._modules.values()]
    assert binaries
    for binary in binaries:
        assert b"libtorch_python" not in binary.read_bytes()


def test_source_tree_without_binaries_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "transkd_fast", tmp_path / "transkd_fast", ignore=NOT_SOURCE)
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    # An editable install would lend its binaries to any source tree.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import transkd_fast"
    result = python(code, tmp_path)
    assert result.returncode == 1
    assert f"imported from its source tree ({tmp_path})" in result.stderr
    assert "run `pip install -e .`" in result.stderr


def test_import_loads_nothing_but_torch(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules); import transkd_fast; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) <= {"transkd_fast", "torch"}
