"""What was measured of a case: one row, kept in JSON and CSV, with the sources that it was measured on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODES = ("forward", "backward", "total")
KERNELS = ("cpu", "triton", "cuda")

OP_SOURCES = ("transkd_fast/ops/{op}.py", "transkd_fast/ops/_*.py")
CPU_SOURCES = ("csrc/cpu/convert.cpp", "csrc/cpu/gemm.cpp")  # of what csrc/cpu/common declares
KERNEL_SOURCES = ("kernels/_common.py", "kernels/_batch_norm.py")
COMPILED_SOURCES = ("csrc/common/*", "setup.py")  # setup.py has the compilers' flags

# Glob patterns of the files whose contents a backend's times depend on.
SOURCES = {
    "eager": ["transkd_fast/reference/{op}.py", "transkd_fast/reference/_common.py"],
    "compiled": ["transkd_fast/reference/{op}.py", "transkd_fast/reference/_common.py"],
    "copy": ["bench/harness/cases.py"],
    "cpu": [*OP_SOURCES, "csrc/cpu/{op}*", "csrc/cpu/common/*", *CPU_SOURCES, *COMPILED_SOURCES],
    "triton": [*OP_SOURCES, "kernels/{op}.py", *KERNEL_SOURCES, "kernels/_{op}_*.py"],
    "cuda": [*OP_SOURCES, "csrc/cuda/{op}*", "csrc/cuda/common/*", *COMPILED_SOURCES],
}
PUBLISHED = {
    "csf": "bench/bench_csf.py",
    "gl_mixer": "bench/bench_gl_mixer.py",
    "cwd": "transkd_fast/reference/legacy.py",
    "hcl": "transkd_fast/reference/legacy.py",
    "hcl_bn": "bench/bench_hcl_bn.py",
    "pea": "bench/bench_pea.py",
}
# What a bench writes itself, where the reference does more than is compared with.
PLAIN = {"seg_ce": "bench/bench_seg_ce.py"}
BASES = {"hcl_bn": "hcl"}  # ops that another one's files are made of
MODULES = {"gl_mixer": "transkd_fast/nn/gl_mixer.py"}  # that a bench measures beside the op alone
STEP_SOURCES = [
    "bench/bench_step.py",
    "bench/harness/precision.py",
    "transkd_fast/transkd.py",
    *(f"transkd_fast/{folder}/*.py" for folder in ("models", "nn", "ops", "reference")),
    "transkd_fast/train/tasks.py",
]
HEAD_SOURCES = [
    "bench/bench_head.py",
    "bench/harness/precision.py",
    "transkd_fast/transkd.py",
    *(f"transkd_fast/{folder}/*.py" for folder in ("nn", "ops", "reference")),
]
STEP_KERNELS = {
    "cpu": ["csrc/cpu/**/*", *COMPILED_SOURCES],
    "cuda": ["csrc/cuda/**/*", *COMPILED_SOURCES, "kernels/*.py"],
}


@dataclass
class Figures:
    """One direction: times in ms, bytes and FLOPs per second, shares of the same run's copy and GEMM rates.

    Args:
        p20_ms: 20th percentile of the rounds.
        p50_ms: median.
        p80_ms: 80th percentile.
        ratio: how many times faster than the comparison's first case, by medians.
        least_bytes: what must be read and written, if the bench says so.
        least_flops: what must be computed, likewise.
        bytes_per_s: the least bytes over the median.
        flops_per_s: the least FLOPs over the median.
        copy_share: bytes_per_s over the copy's; above 1 where caches hold what the copy fetches from memory.
        gemm_share: flops_per_s over the GEMM's.
        launches: kernels, copies and fills on a GPU; None on CPU, where nothing is launched.
    """

    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    least_bytes: int | None = None
    least_flops: int | None = None
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    copy_share: float | None = None
    gemm_share: float | None = None
    launches: int | None = None


@dataclass
class Row:
    """What was measured of a case; the fields up to `sources` identify it. Memory in bytes.

    `wall_ms` is the whole call with the host's work, on CUDA only: the other times there leave idle gaps out that the
    host leaves, unless `queued` says that the host was too slow. `graph_ms` is a replay of the whole call as a CUDA
    graph, where the bench asks for it. `saved_bytes` is what autograd keeps alive between forward and backward,
    `saved_new_bytes` the part of it that the forward allocated, `kept_no_grad_bytes` what a forward under no_grad
    leaves allocated besides its result, `leaf_bytes` the size of the tensors whose gradients are taken.
    """

    op: str
    backend: str
    size: str
    batch: int
    shape: str
    dtype: str
    layout: str
    device_type: str
    device: str
    threads: int
    malloc: str
    transkd_fast: str
    torch: str
    triton: str
    cuda_toolkit: str
    driver: str
    python: str
    sources: str
    baseline: str
    measured_at: str
    load_before: float
    rounds: int = 0
    copy_bytes_per_s: float | None = None
    gemm_flops_per_s: float | None = None
    forward: Figures = field(default_factory=Figures)
    backward: Figures = field(default_factory=Figures)
    total: Figures = field(default_factory=Figures)
    wall_ms: float | None = None
    graph_ms: float | None = None
    queued: bool | None = None
    peak_bytes: int | None = None
    leaf_bytes: int | None = None
    saved_bytes: int | None = None
    saved_new_bytes: int | None = None
    kept_no_grad_bytes: int | None = None
    error: str | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """What the rows of one comparison share."""
        return (
            self.op, self.size, self.batch, self.shape, self.dtype, self.layout,
            self.device_type, self.device, self.threads, self.malloc,
        )  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def stale(self) -> bool:
        """Whether the sources have changed since."""
        return self.sources != digest(sources_of(self.op, self.backend, self.device_type))


KEY = [f.name for f in fields(Row)][: [f.name for f in fields(Row)].index("sources") + 1]


def sources_of(op: str, backend: str, device_type: str) -> list[str]:
    """Glob patterns, relative to the repository, of the files that a row depends on."""
    if op.startswith("step "):
        return [*STEP_SOURCES, *STEP_KERNELS[device_type]]
    if op == "head":
        return [*HEAD_SOURCES, *(STEP_KERNELS[device_type] if backend in KERNELS else [])]
    if backend.startswith("published"):
        return [PUBLISHED[op]]
    if op in PLAIN and backend in ("eager", "compiled"):
        return [PLAIN[op]]
    module = [MODULES[op]] if op in MODULES and backend != "copy" else []
    patterns = [pattern.format(op=name) for name in (op, BASES.get(op, op)) for pattern in SOURCES[backend]]
    return list(dict.fromkeys(patterns)) + module


def digest(patterns: Iterable[str], root: Path = ROOT) -> str:
    """A hash of names and contents of all files that the patterns name."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    if not files:
        raise ValueError(f"sources: expected files in {root}, got none for {list(patterns)}")
    result = hashlib.sha256()
    for path in files:
        result.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return result.hexdigest()[:12]


def read(folder: Path) -> list[Row]:
    """The rows in a folder's rows.json; none where there is no such file.

    Raises:
        ValueError: if the file is not of today's layout.
    """
    path = folder / "rows.json"
    if not path.exists():
        return []
    try:
        return [
            Row(**{**row, **{mode: Figures(**row[mode]) for mode in MODES}}) for row in json.loads(path.read_text())
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected rows of today's layout, got {error!r}; move the file away") from None


def write(rows: Sequence[Row], folder: Path) -> None:
    """Put rows into rows.json and rows.csv of a folder; a row there with the same key is replaced.

    Each file is replaced as a whole: whoever stops the program while it writes finds the old one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_key = {row.key: asdict(row) for row in [*read(folder), *rows]}
    flat = [_flat(row) for row in by_key.values()]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    _replace(folder / "rows.csv", table.getvalue())
    _replace(folder / "rows.json", json.dumps(list(by_key.values()), indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        result.update(_flat(value, f"{name}_") if isinstance(value, Mapping) else {prefix + name: value})
    return result


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """The newest comparison of each group, in the order in which the groups first appear.

    Rows are compared only within one comparison: ratios hold within one run.
    """
    by_group: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    return [
        [row for row in members if row.measured_at == max(other.measured_at for other in members)]
        for members in by_group.values()
    ]


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """Neighbouring rows of one comparison, together."""
    return [list(members) for _, members in groupby(rows, key=lambda row: (row.group, row.measured_at))]
