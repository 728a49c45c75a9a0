"""How the commands print scores and comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transkd_fast.train.metrics import Scores
    from transkd_fast.train.verify import VerifyReport


def class_table(classes: Sequence[str], columns: dict[str, Scores]) -> str:
    """Scores side by side, one row per class.

    Args:
        classes: class names.
        columns: scores by heading.

    Returns:
        The lines of the table.
    """

    def cell(value: float) -> str:
        return "absent" if math.isnan(value) else f"{100 * value:.2f}"

    width = max(len("pixel accuracy"), *map(len, classes))
    lines = [f"{'IoU %':<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for index, name in enumerate(classes):
        lines.append(f"{name:<{width}}" + "".join(f"{cell(s.iou[index]):>10}" for s in columns.values()))
    lines.append(f"{'mIoU':<{width}}" + "".join(f"{cell(s.miou):>10}" for s in columns.values()))
    lines.append(f"{'mIoU, stride 4':<{width}}" + "".join(f"{cell(s.miou_stride4):>10}" for s in columns.values()))
    lines.append(f"{'pixel accuracy':<{width}}" + "".join(f"{cell(s.pixel_accuracy):>10}" for s in columns.values()))
    return "\n".join(lines)


def print_report(report: VerifyReport, count: int) -> None:
    """Print a comparison of backends, the losses and the largest differences first.

    Args:
        report: the comparison.
        count: number of tensors to print beside the losses.
    """
    worst = sorted(report.rows, key=lambda row: row.difference / row.bound, reverse=True)
    losses = [row for row in report.rows if row.name.startswith("loss/")]
    shown: list[Any] = losses + [row for row in worst if row not in losses][:count]
    width = max(len(row.name) for row in shown)
    title = "max-norm relative difference to eager fp64"
    width = max(len(title), width)
    print(f"{title:<{width}}  {'checked':>9} {'eager ' + report.precision:>10} {'bound':>9}")
    for row in shown:
        mark = "" if row.agrees else "  DISAGREES"
        print(f"{row.name:<{width}}  {row.difference:>9.2e} {row.eager:>10.2e} {row.bound:>9.2e}{mark}")
    widened = sum(row.bound > row.limit for row in report.rows)
    if len(shown) < len(report.rows):
        print(f"... and {len(report.rows) - len(shown)} tensors that differ less; --all prints them")
    if widened:
        limit = f"{report.rows[0].limit:.0e}"
        print(f"{widened} tensors have a bound above {limit}: eager {report.precision} itself is off by half of it")
    for (op, backend), number in sorted(report.runs.items()):
        print(f"{op:<10} {backend:<7} {number} calls")
    for name, measured in (("checked", report.checked), ("eager", report.eager)):
        print(f"{name:<8} {measured.images_per_second:8.2f} images/s {measured.peak_bytes / 2**20:9.1f} MiB peak")
    print(f"verify: {report.verdict}")
