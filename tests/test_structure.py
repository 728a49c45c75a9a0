"""The rules of CONTRIBUTING.md that can be read off the files: imports go down only, every op has all its files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import planted_errors
import pytest
import test_on_gpu

import transkd_fast.functional  # noqa: F401  registers every op
from transkd_fast import backends

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Per floor what it may import: parts of transkd_fast (with everything below them), then packages of others.
TRUTH = {"reference"}
CHOICE = {"_extension", "backends"}
OPS = {"ops", "functional"}
BELOW_TRAIN = {*TRUTH, *CHOICE, *OPS, "nn", "transkd", "models", "data", "environment"}
IMPORTS = {
    "kernels": ({f"kernels.{path.stem}" for path in ROOT.glob("kernels/_[a-z]*.py")}, {"torch", "triton"}),
    "reference": (TRUTH, {"torch"}),
    "_extension": (set(), {"torch"}),
    "backends": ({"_extension"}, {"torch"}),
    "ops": ({*TRUTH, *CHOICE, "kernels", "ops"}, {"torch"}),
    "functional": ({*TRUTH, *CHOICE, "ops"}, {"torch"}),
    "nn": ({*TRUTH, *CHOICE, *OPS, "nn"}, {"torch"}),
    "transkd": ({*TRUTH, *CHOICE, *OPS, "nn", "models.outputs"}, {"torch"}),
    "models": ({"models"}, {"torch", "timm", "safetensors", "transformers", "onnxruntime", "onnxscript"}),
    "data": ({"data"}, {"torch", "torchvision", "numpy", "PIL", "yaml", "av"}),
    "environment": ({*TRUTH, *CHOICE, *OPS}, {"torch"}),
    "train": ({*BELOW_TRAIN, "train"}, {"torch", "torchmetrics", "omegaconf", "tqdm", "numpy", "matplotlib"}),
    "cli": ({*BELOW_TRAIN, "train", "cli"}, {"torch"}),
    "__main__": ({"cli"}, set()),
    "__init__": ({*TRUTH, *CHOICE, *OPS, "nn", "transkd", "models.outputs"}, {"torch"}),
}

# What some ops do not have yet. Whoever adds such a file takes its entry away.
KERNEL_FILES = (
    "csrc/cpu/{}_cpu.cpp",
    "csrc/cuda/{}_plan.h",
    "csrc/cuda/{}_kernel.cuh",
    "csrc/cuda/{}_cuda.cu",
    "kernels/{}.py",
    "tests/test_kernels_triton_{}.py",
    "tests/cuda_on_cpu/{}.cpp",
    "tests/cuda_on_cpu/test_cuda_on_cpu_{}.py",
    "tests/gpu_code/{}.py",
)
BENCH = "bench/bench_{}.py"
FILES = ("transkd_fast/reference/{}.py", "transkd_fast/ops/{}.py", "tests/test_{}.py", *KERNEL_FILES, BENCH)
NOT_YET: dict[str, set[str]] = {}


def modules():
    """Every module as it is installed, by name, without the package's own name."""
    found = {}
    for folder, package in ((ROOT / "transkd_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(source, module):
    """Names of all modules that a module imports anywhere, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: expected absolute imports, got a relative one in line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name.removeprefix("transkd_fast.") in MODULES else node.module


def floor_of(module):
    return module.partition(".")[0]


def within(module, parts):
    return any(module == part or module.startswith(part + ".") for part in parts)


def forbidden(source, module):
    ours, others = IMPORTS[floor_of(module)]
    for name in imports(source, module):
        package, _, part = name.partition(".")
        if package == "transkd_fast":
            if not within(part, ours):
                yield name
        elif package not in others and package not in sys.stdlib_module_names:
            yield name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    assert floor_of(module) in IMPORTS, f"{module}: give it a floor here and in CONTRIBUTING.md"
    assert list(forbidden(MODULES[module].read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("reference.hcl", "from transkd_fast import backends", ["transkd_fast.backends"]),
        ("reference.hcl", "import torch.nn.functional as F, numpy as np", ["numpy"]),
        ("ops.hcl", "import transkd_fast\nfrom transkd_fast import TransKD", ["transkd_fast", "transkd_fast"]),
        ("ops.hcl", "def f():\n    from transkd_fast.functional import csf", ["transkd_fast.functional"]),
        ("nn.csf", "if TYPE_CHECKING:\n    from transkd_fast.models.outputs import A", ["transkd_fast.models.outputs"]),
        ("transkd", "from transkd_fast.models import outputs, registry", ["transkd_fast.models.registry"]),
        (
            "kernels.hcl",
            "import os, triton\nfrom transkd_fast.kernels import _common, pea",
            ["transkd_fast.kernels.pea"],
        ),
        ("kernels.hcl", "from transkd_fast import backends", ["transkd_fast.backends"]),
        ("data.base", "import omegaconf.errors\nfrom tqdm import tqdm", ["omegaconf.errors", "tqdm"]),
    ],
)
def test_an_import_that_goes_up_is_found(module, source, found):
    assert list(forbidden(source, module)) == found


@pytest.mark.parametrize("op", sorted(backends.table()))
def test_an_op_has_its_files(op):
    missing = {pattern for pattern in FILES if not (ROOT / pattern.format(op)).exists()}
    assert missing == NOT_YET.get(op, set()), f"{op}: add the missing file, or take the one that exists out of NOT_YET"
    assert re.search(rf"^\| `{op}` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_only_ops_lack_files():
    assert set(NOT_YET) <= set(backends.table())


@pytest.mark.parametrize("op", sorted(set(backends.table()) - set(NOT_YET)))
def test_a_finished_op_has_its_kernels_its_gpu_tests_its_mutants_and_its_targets(op):
    assert {name for name, why in backends.table()[op].items() if why != "no kernel for this op yet"} == set(
        backends.BACKENDS
    )
    assert op in test_on_gpu.CALLS
    for backend, kinds in planted_errors.KINDS.items():
        planted = [m.error for m in planted_errors.MUTANTS if (m.op, m.backend) == (op, backend)]
        assert all(any(error.startswith(kind) for error in planted) for kind in kinds), (backend, planted)
    cases = tomllib.loads((ROOT / "bench" / "targets.toml").read_text(encoding="utf-8"))["case"]
    assert {"cpu", "cuda"} <= {case["device"] for case in cases if case["op"] == op}


def repository_files():
    listing = None
    if (ROOT / ".git").exists():
        try:
            listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            listing = None
    if listing is not None:
        return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    made = {"__pycache__", "build", "dist", "out", "runs"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix not in {".so", ".pyc"}
        and not any(
            part in made or part.endswith(".egg-info") or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(ROOT).parts[:-1]
        )
    ]


def test_no_file_names_a_folder_of_one_machine():
    files = repository_files()
    assert {ROOT / "Makefile", ROOT / ".ci" / "run"} <= set(files)
    pattern = re.compile(rb"(^|[^A-Za-z0-9_.])/(work|root|farm)/")
    assert [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_bytes())] == []
