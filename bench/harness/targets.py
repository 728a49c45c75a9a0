"""Reads the targets of `targets.toml` and judges rows by them: PASS, MISS or NOT RUN."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from harness.rows import KERNELS, MODES, Row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = Path(__file__).resolve().parents[1] / "targets.toml"
PASS, MISS, NOT_RUN = "PASS", "MISS", "NOT RUN"
LISTS = ("backend", "size", "batch", "dtype", "layout")
DEFAULT_MALLOC = "default"  # what rows say where it was asked for
DIRECTIONS = {"forward": "forward", "backward": "backward", "total": "forward + backward"}
TITLES = {
    "eager": "eager",
    "compiled": "`torch.compile`",
    "published": "the published formulation",
    "published compiled": "`torch.compile` of the published formulation",
    "copy": "a copy of as many bytes",
    "cpu": "C++ CPU",
    "triton": "Triton",
    "cuda": "CUDA C++",
}


@dataclass(frozen=True)
class Measure:
    """How a number is read off a row and written.

    `timed` ones need more than one cold round, `compared` ones another row of the comparison.
    """

    words: str
    format: str
    value: Callable[[Row, Row | None], float | None]
    timed: bool = False
    compared: bool = False


def speedup(row: Row, other: Row | None, mode: str) -> float | None:
    """How many times faster a row is than another one of its comparison, by medians; None if one has no time."""
    mine, theirs = (getattr(r, mode).p50_ms if r is not None else None for r in (row, other))
    return theirs / mine if mine and theirs else None


def _speedup_by(row: Row, other: Row | None, name: str) -> float | None:
    """The same by a time that is no direction's."""
    mine, theirs = (getattr(r, name) if r is not None else None for r in (row, other))
    return theirs / mine if mine and theirs else None


def _peak_share(row: Row, other: Row | None) -> float | None:
    """Peak memory beyond the inputs as a share of another row's."""
    theirs = other.peak_bytes if other is not None else None
    return row.peak_bytes / theirs if row.peak_bytes is not None and theirs else None


def _figure(row: Row, other: Row | None, mode: str, name: str) -> float | None:
    return getattr(getattr(row, mode), name)


def _saved_new_maps(row: Row, other: Row | None) -> float | None:
    return None if row.saved_new_bytes is None or not row.leaf_bytes else row.saved_new_bytes / row.leaf_bytes


def _saved_beyond_gradients(row: Row, other: Row | None) -> float | None:
    return None if row.saved_new_bytes is None or not row.leaf_bytes else row.saved_new_bytes - row.leaf_bytes


MEASURES = {
    "saved_new_maps": Measure("maps of the student's size saved beyond the inputs", "{:.3g}", _saved_new_maps),
    "saved_new_bytes": Measure("bytes saved beyond the inputs", "{:.0f}", lambda row, other: row.saved_new_bytes),
    "saved_beyond_gradients": Measure("bytes saved beyond inputs and gradients", "{:.0f}", _saved_beyond_gradients),
    "speedup_wall": Measure("the whole call by the clock", "{:.1f}x", partial(_speedup_by, name="wall_ms"), True, True),
    "speedup_graph": Measure("the call as a CUDA graph", "{:.1f}x", partial(_speedup_by, name="graph_ms"), True, True),
    "peak_share": Measure("peak memory beyond the inputs", "{:.3f}x", _peak_share, compared=True),
    "kept_no_grad_bytes": Measure("bytes kept under `no_grad`", "{:.0f}", lambda row, other: row.kept_no_grad_bytes),
}
for _mode in MODES:
    _words = DIRECTIONS[_mode]
    MEASURES |= {
        f"speedup_{_mode}": Measure(_words, "{:.1f}x", partial(speedup, mode=_mode), True, True),
        f"copy_share_{_mode}": Measure(
            f"share of a copy's bytes/s, {_words}", "{:.0%}", partial(_figure, mode=_mode, name="copy_share"), True
        ),
        f"gemm_share_{_mode}": Measure(
            f"share of a GEMM's FLOP/s, {_words}", "{:.0%}", partial(_figure, mode=_mode, name="gemm_share"), True
        ),
        f"launches_{_mode}": Measure(f"launches, {_words}", "{:.0f}", partial(_figure, mode=_mode, name="launches")),
    }


@dataclass(frozen=True)
class Target:
    """One promise; it holds for each value of the tuples.

    Args:
        op: the op's name.
        backend: kernel backends.
        device: "cpu" or "cuda".
        size: what the bench calls its sizes.
        batch: numbers of samples.
        dtype: storage dtypes.
        layout: "nchw", "channels_last".
        measure: a key of `MEASURES`.
        source: where the bound comes from.
        at_least: lower bound, or None.
        at_most: upper bound, or None.
        against: for speed-ups and shares of memory, what is compared with: "eager", "compiled", "published",
            "published compiled" or "copy".
        malloc: "default" for rows that were measured with malloc as it is by default, else "".
    """

    op: str
    backend: tuple[str, ...]
    device: str
    size: tuple[str, ...]
    batch: tuple[int, ...]
    dtype: tuple[str, ...]
    layout: tuple[str, ...]
    measure: str
    source: str
    at_least: float | None = None
    at_most: float | None = None
    against: str = ""
    malloc: str = ""

    def single(self) -> list[Target]:
        """The targets with one value in each tuple that this one stands for."""
        return [
            replace(self, **{name: (value,) for name, value in zip(LISTS, values, strict=True)})
            for values in product(*(getattr(self, name) for name in LISTS))
        ]

    def covers(self, row: Row) -> bool:
        """Whether the row is of a case that this target speaks of, with whatever backend."""
        same = (row.op, row.device_type) == (self.op, self.device)
        same = same and (row.malloc == DEFAULT_MALLOC) == (self.malloc == DEFAULT_MALLOC)
        return same and all(getattr(row, name) in getattr(self, name) for name in LISTS if name != "backend")

    def holds(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most

    @property
    def number(self) -> float:
        """The limit."""
        return self.at_least if self.at_least is not None else self.at_most

    def written(self, value: float) -> str:
        # A share of a copy's speed is judged in hundredths, as is a limit that has them: 1.55x is not 1.6x.
        style = MEASURES[self.measure].format
        if self.against == "copy" or (style == "{:.1f}x" and round(self.number, 1) != self.number):
            style = "{:.2f}x"
        return style.format(value)

    @property
    def case(self) -> str:
        """What is measured where, in words."""
        backend, size, batch, dtype, layout = (" / ".join(map(str, getattr(self, name))) for name in LISTS)
        malloc = f", {self.malloc} malloc" if self.malloc else ""
        return f"{self.op} {backend}, {size}, batch {batch}, {dtype}, {layout}{malloc}"

    @property
    def bound(self) -> str:
        """What is promised, in words."""
        sign = ">=" if self.at_least is not None else "<="
        against = f" {TITLES[self.against]}" if self.against else ""
        return f"{MEASURES[self.measure].words} {sign} {self.written(self.number)}{against}"


@dataclass(frozen=True)
class Verdict:
    """What became of a single target: the value, or the reason why there is none; `row` is what it was read from."""

    target: Target
    verdict: str
    value: float | None = None
    reason: str = ""
    row: Row | None = None

    def __str__(self) -> str:
        measured = self.reason if self.value is None else f"{self.target.written(self.value)}, {self.row.rounds} rounds"
        return f"{self.verdict:<7} {self.target.case}: {self.target.bound}: {measured}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.target), "verdict": self.verdict, "value": self.value, "reason": self.reason}


def load(path: Path = TARGETS) -> list[Target]:
    """Read targets.

    Raises:
        ValueError: if an entry lacks a field, has an unknown one, or contradicts itself; the message names it.
    """
    found = []
    for i, case in enumerate(tomllib.loads(path.read_text()).get("case", []), 1):
        for j, target in enumerate(case.pop("target", []), 1):
            found.append(_target({**case, **target}, f"{path.name}: case {i}, target {j}"))
    return found


def _target(entry: dict[str, Any], name: str) -> Target:
    known = {field.name for field in fields(Target)}
    missing, unknown = known - {"at_least", "at_most", "against", "malloc"} - set(entry), set(entry) - known
    if missing or unknown:
        raise ValueError(f"{name}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    entry |= {key: tuple(entry[key]) if isinstance(entry[key], list) else (entry[key],) for key in LISTS}
    one_of = {
        "measure": MEASURES,
        "device": ("cpu", "cuda"),
        "against": ("", "eager", "compiled", "published", "published compiled", "copy"),
        "malloc": ("", DEFAULT_MALLOC),
    }
    for key, allowed in one_of.items():
        if entry.get(key, "") not in allowed:
            raise ValueError(f"{name}: {key}: expected one of {sorted(allowed)}, got {entry[key]!r}")
    if set(entry["backend"]) - set(KERNELS):
        raise ValueError(f"{name}: backend: expected some of {KERNELS}, got {entry['backend']}")
    if ("at_least" in entry) == ("at_most" in entry):
        raise ValueError(
            f"{name}: expected one of at_least and at_most, got {'both' if 'at_least' in entry else 'none'}"
        )
    if MEASURES[entry["measure"]].compared != ("against" in entry):
        compared = ", ".join(measure for measure in MEASURES if MEASURES[measure].compared)
        raise ValueError(f"{name}: against: expected with {compared} and only with them")
    return Target(**entry)


def judge(target: Target, rows: Sequence[Row], why_not: Callable[[Target], str], cold: bool = False) -> list[Verdict]:
    """Judge rows by a target.

    Args:
        target: the target.
        rows: rows of one run; older ones have no say.
        why_not: for a single target without a row, the reason.
        cold: the run had one cold round, whose times mean nothing.

    Returns:
        One verdict per single target it stands for.
    """
    return [_judge_single(single, rows, why_not, cold) for single in target.single()]


def _judge_single(target: Target, rows: Sequence[Row], why_not: Callable[[Target], str], cold: bool) -> Verdict:
    comparison = [row for row in rows if target.covers(row)]
    row = next((row for row in comparison if row.backend == target.backend[0]), None)
    if row is None:
        return Verdict(target, NOT_RUN, reason=why_not(target))
    if row.error is not None:
        return Verdict(target, MISS, reason=f"wrong result: {row.error}", row=row)
    measure = MEASURES[target.measure]
    if measure.timed and cold:
        return Verdict(target, NOT_RUN, reason="one cold round is no measurement", row=row)
    other = next((other for other in comparison if other.backend == target.against), None)
    value = measure.value(row, other)
    if value is None:
        lacking = target.against and (other is None or measure.value(other, other) is None)
        reason = f"{target.against} was not measured" if lacking else f"{target.measure} could not be measured"
        return Verdict(target, NOT_RUN, reason=reason, row=row)
    return Verdict(target, PASS if target.holds(value) else MISS, value, row=row)


def merged(target: Target, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The target's verdicts, or a single one for all of it where none ran, all for the same reason."""
    same = {(verdict.verdict, verdict.reason) for verdict in verdicts}
    return (
        [replace(verdicts[0], target=target)] if len(same) == 1 and verdicts[0].verdict == NOT_RUN else list(verdicts)
    )


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that stands for all: a miss without a value, the worst miss, a gap, else the nearest to the bound."""
    order = {MISS: 0, NOT_RUN: 1, PASS: 2}

    def rank(verdict: Verdict) -> tuple[int, bool, float]:
        value = verdict.value or 0.0
        return order[verdict.verdict], verdict.value is not None, -value if verdict.target.at_least is None else value

    return min(verdicts, key=rank)
