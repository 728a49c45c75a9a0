"""The table that a bench run ends with."""

from __future__ import annotations

from collections.abc import Sequence

from harness.rows import MODES, Figures, Row, comparisons

LEGEND = (
    "ratio: times faster than the first line. copy, gemm: least bytes and FLOPs per second as a share of those of a "
    "large copy and a large GEMM in this run (above 100%: from caches). new: saved beyond the inputs. MB: 10^6 bytes."
)


def report(rows: Sequence[Row]) -> str:
    """One table per comparison."""
    lines = [LEGEND]
    for members in comparisons(rows):
        lines += ["", _title(members), _header(members[0].device_type == "cuda")]
        lines += [_line(row) for row in members]
    return "\n".join(lines)


def _title(members: Sequence[Row]) -> str:
    first = next((row for row in members if row.copy_bytes_per_s), members[0])
    parts = [f"{first.op}, {first.size}, batch {first.batch}, {first.dtype}, {first.layout}: {first.shape}"]
    parts.append(f"{first.device}, {first.threads} threads, malloc {first.malloc}, load {first.load_before}")
    if first.copy_bytes_per_s and first.gemm_flops_per_s:
        copy, gemm = first.copy_bytes_per_s / 1e9, first.gemm_flops_per_s / 1e9
        parts.append(f"copy {copy:.1f} GB/s, gemm {gemm:.0f} GFLOP/s, {first.rounds} rounds")
    return "; ".join(parts)


def _header(cuda: bool) -> str:
    modes = " ".join(f"{f'{mode} ms':>11} {'p20..p80':>15} {'ratio':>6} {'copy':>5}" for mode in MODES)
    end = f"{'gemm':>5} {'peak MB':>8} {'saved':>7} {'new':>7}"
    return f"  {'':<9} {modes} {end}" + (f" {'wall ms':>8} {'graph ms':>8} {'launches':>9}" if cuda else "")


def _line(row: Row) -> str:
    if row.total.p50_ms is None:
        return f"  {row.backend:<9} WRONG, no time: {row.error}"
    memory = (row.peak_bytes, row.saved_bytes, row.saved_new_bytes)
    cells = [_cells(getattr(row, mode)) for mode in MODES]
    cells.append(f"{_percent(row.total.gemm_share):>5}")
    cells += [f"{size / 1e6:>{width}.2f}" for size, width in zip(memory, (8, 7, 7), strict=True)]
    if row.wall_ms is not None:
        counts = "+".join("?" if n is None else str(n) for n in (row.forward.launches, row.backward.launches))
        graph = "" if row.graph_ms is None else f"{row.graph_ms:.3f}"
        cells.append(f"{row.wall_ms:>8.3f} {graph:>8} {counts:>9}")
    if row.queued is False:
        cells.append("(times hold the host's work: it was slower than the device)")
    return f"  {row.backend:<9} {' '.join(cells)}"


def _cells(figures: Figures) -> str:
    spread = f"{figures.p20_ms:.3f}..{figures.p80_ms:.3f}"
    ratio = "" if figures.ratio is None else f"{figures.ratio:.2f}"
    return f"{figures.p50_ms:>11.3f} {spread:>15} {ratio:>6} {_percent(figures.copy_share):>5}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
