"""The committed table of what each kernel needs; `python -m gpu_code.table --write`, run in tests/, renews it."""

import argparse
import csv
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from gpu_code import declare, nvcc, sass, triton_aot

PATH = Path(__file__).with_name("resources.csv")
VALUES = ("registers", "shared", "spill", "stack", "ldg128", "stg128")
COLUMNS = ("op", "backend", "kernel", "arch", *VALUES, "toolchain")
HOW = (
    "If that is meant, write the table anew: in tests/, `python -m gpu_code.table --write` "
    "(README.md in tests/gpu_code/ says how to do it for another triton)."
)


def toolchain(backend, triton_folder=None):
    return nvcc.toolchain() if backend == "cuda" else triton_aot.toolchain(triton_folder)


def measure(op, backend, triton_folder=None):
    """(kernel, arch) -> Resources of one op's declared kernels."""
    if backend == "triton":
        return triton_aot.measure(op, triton_folder)
    with tempfile.TemporaryDirectory() as folder:
        return nvcc.measure(op, Path(folder))


def complaints(op, backend, measured):
    """What the gates say of measured kernels: one sentence for each that fails one."""
    return [
        f"{kernel} sm_{arch} " + ", ".join(found)
        for (kernel, arch), needs in measured.items()
        if (found := sass.gate(op.wide(backend, kernel), needs, op.tensor_cores(backend, kernel)))
    ]


def _fingerprint(op, backend, version):
    """Of everything that the outcome of `measure` depends on."""
    sources = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.cuh")]
    folder = declare.ROOT / ("csrc" if backend == "cuda" else "kernels")
    sources += [path for path in folder.rglob("*") if path.suffix in {".h", ".cuh", ".py"}]
    flags = nvcc.flags() if backend == "cuda" else []
    digest = hashlib.sha256(repr((op.name, backend, version, flags, declare.ARCHS)).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure_cached(op, backend, folder):
    """`toolchain` and `measure`; the compilation is repeated only if something changed since the last one."""
    version = toolchain(backend)
    path, fingerprint = Path(folder) / f"{op.name}-{backend}.json", _fingerprint(op, backend, version)
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint:
            return version, {(kernel, arch): sass.Resources(**needs) for kernel, arch, needs in kept["rows"]}
    measured = measure(op, backend)
    rows = [[kernel, arch, asdict(needs)] for (kernel, arch), needs in measured.items()]
    path.write_text(json.dumps({"fingerprint": fingerprint, "rows": rows}), encoding="utf-8")
    return version, measured


def rows_of(op, backend, version, measured):
    """The lines of the table, as dicts of strings."""
    fixed = {"op": op.name, "backend": backend, "toolchain": version}
    return [
        fixed | {"kernel": kernel, "arch": f"sm_{arch}"} | {name: str(getattr(needs, name)) for name in VALUES}
        for (kernel, arch), needs in measured.items()
    ]


def read(archs=declare.EVERY_ARCH):
    """The table's lines of some architectures."""
    names = {f"sm_{arch}" for arch in archs}
    with PATH.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["arch"] in names]


def write(rows):
    def place(row):
        return row["op"], row["backend"], row["toolchain"], row["kernel"], int(row["arch"].removeprefix("sm_"))

    with PATH.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))


def _differs(column, expected, got):
    """Whether a value is another one.

    cicc does not give the same PTX for the same source each time: of 28 stores in a row it may merge two. Numbers of
    loads and stores may therefore differ by a tenth, but not be none.
    """
    if column not in ("ldg128", "stg128"):
        return expected != got
    some, others = sorted((int(expected), int(got)))
    return others - some > others / 10


def differences(measured, table):
    """Where measured lines differ from the table's.

    Args:
        measured: Lines of one op, backend and toolchain.
        table: All lines of the table.

    Returns:
        One sentence per difference, or None if the table has no line of that backend's toolchain.
    """
    backend, version = measured[0]["backend"], measured[0]["toolchain"]
    ours = [row for row in table if (row["backend"], row["toolchain"]) == (backend, version)]
    if not ours:
        return None

    def by_kernel(rows):
        return {(row["kernel"], row["arch"]): row for row in rows if row["op"] == measured[0]["op"]}

    expected, got = by_kernel(ours), by_kernel(measured)
    found = []
    for key in sorted(expected.keys() | got.keys()):
        name = f"{version}: {key[0]} {key[1]}"
        if key not in expected:
            found.append(f"{name}: not in the table")
        elif key not in got:
            found.append(f"{name}: in the table, but not declared")
        else:
            changed = [column for column in VALUES if _differs(column, expected[key][column], got[key][column])]
            found += [f"{name}: {c} {expected[key][c]} in the table, {got[key][c]} measured" for c in changed]
    return found


def _main():
    parser = argparse.ArgumentParser(prog="python -m gpu_code.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table, not only the differences from it")
    parser.add_argument(
        "--triton", action="append", default=[], metavar="FOLDER", help="measure with this triton too (pip --target)"
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="measure this op only; default: every op")
    arguments = parser.parse_args()
    for reason in filter(None, (nvcc.missing(), triton_aot.missing())):
        print(f"not measured: {reason}")
    runs = [] if nvcc.missing() else [("cuda", None)]
    runs += [("triton", folder) for folder in [*([] if triton_aot.missing() else [None]), *arguments.triton]]
    ops = [op for name in arguments.op or declare.op_names() if (op := declare.op(name))]
    old, new = read() if PATH.exists() else [], []
    for backend, folder in runs:
        version = toolchain(backend, folder)
        for op in (op for op in ops if getattr(op, backend)):
            measured = measure(op, backend, folder)
            rows = rows_of(op, backend, version, measured)
            new += rows
            found = differences(rows, old)
            if found is None or len(found) >= len(rows):
                found = [f"{version}: {op.name}: {len(rows)} lines, all new or changed"]
            found += [f"{version}: GATE: {complaint}" for complaint in complaints(op, backend, measured)]
            print("\n".join(found), end="\n" if found else "", flush=True)
    measured_now = {(row["toolchain"], row["op"]) for row in new}
    kept = [row for row in old if (row["toolchain"], row["op"]) not in measured_now]
    for version, name in sorted({(row["toolchain"], row["op"]) for row in kept}):
        print(f"{version}, {name}: not measured, its lines stay as they are")
    if arguments.write:
        write(new + kept)
        print(f"{PATH.name}: {len(new)} lines measured, {len(kept)} kept")


if __name__ == "__main__":
    _main()
