"""Takes a run's results over into bench/results/<device>/, to be committed, once they are known to be whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from harness import rows

from gpu_run import report

KEPT = (report.NAME, "rows.json", "rows.csv")


def slug(device: str) -> str:
    """A device's name as that of a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def keep(source: Path, results: Path) -> list[str]:
    """Copy a run's results.

    Args:
        source: folder that `make gpu` wrote.
        results: bench/results.

    Returns:
        Lines that say what was kept, and what a reader of it should know.

    Raises:
        ValueError: if something is missing or broken.
    """
    path = source / report.NAME
    if not path.is_file():
        raise ValueError(f"{path}: expected the result of make gpu, found none; name its folder with FROM=...")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    report.check(content)
    names = [name for name in KEPT if (source / name).is_file()]
    remarks = []
    if "rows.json" in names:
        try:
            measured = rows.read(source)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{source / 'rows.json'}: expected rows of the benches as they are now: {error}") from None
        foreign = sorted({row.device for row in measured} - {content["device"]})
        if foreign:
            raise ValueError(f"{source / 'rows.json'}: expected rows of {content['device']}, got some of {foreign[0]}")
        remarks.append(f"{len(measured)} rows")
    else:
        remarks.append("no rows: no bench came to its end")
    bad = [f"{step['name']} {step['status']}" for step in content["steps"] if step["status"] != report.PASSED]
    if bad:
        remarks.append(f"not passed: {', '.join(bad)}")
    folder = results / slug(content["device"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:  # rows of an older run do not belong beside this run's verdicts
        (folder / name).unlink(missing_ok=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return [f"{folder}: {', '.join(names)}", *remarks, "now: python bench/tables.py --write, and commit both"]
