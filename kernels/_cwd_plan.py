"""What a call of cwd's kernels works out beforehand: from shapes, dtypes and weights alone, once for each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

STRIDED, CONTIGUOUS = 1, 2  # the axis of a view [B, M, N] along which the softmaxes run
STAGES_PER_LAUNCH = 4  # the code of a launch grows with it
RECORD = 5  # numbers that a part of a softmax leaves
STATISTICS = 4
THREADS = 128
THREAD_ELEMENTS = 16  # of each map per step of a program
PROGRAMS = 1024  # wanted per stage: about what the largest GPUs run at a time
STEPS = 4  # fewest steps of a program where a softmax is long enough
NARROW = 64  # shorter rows are not divided among programs
WIDE_COLUMNS = 512
# A thread keeps five numbers per column: those of eight columns spill in Triton 3.6, and the fewer rows that then go
# with them make moving the maxima a larger part of the work than 16-byte loads save. Halves come 8 bytes at a time.
STRIDED_VECTOR = 4
MERGED_PARTS = 32  # at a time
MERGED_SOFTMAXES = 16
ALIGNMENT = 32  # elements between the parts of a workspace, so that each begins at a multiple of 16 bytes


@dataclass(frozen=True)
class Stage:
    """How the softmaxes of one stage are dealt to programs.

    Attributes:
        sizes: (batch, rows, columns, steps, parts) of the view [B, M, N]; a softmax is cut into parts, a program takes
            one part of several softmaxes, in so many steps.
        tile: what a program takes in one step. Softmaxes along the contiguous axis: (vector, rows, columns). Along the
            strided one: (vector, group, rows, columns), where a thread has the same columns in a group of rows. Rows
            of the view are known to be a multiple of vector long.
        programs: programs of the parts' and the backward's kernel.
        weight: of the stage.
    """

    sizes: tuple[int, ...]
    tile: tuple[int, ...]
    programs: int
    weight: float

    @property
    def parts(self) -> int:
        return self.sizes[-1]

    @property
    def softmaxes(self) -> int:
        """Of a sample."""
        return self.sizes[1] if len(self.tile) == 3 else self.sizes[2]

    @property
    def statistics_shape(self) -> tuple[int, int, int]:
        return self.sizes[0], STATISTICS, self.softmaxes

    @property
    def records(self) -> int:
        """Elements of the workspace: a softmax that one program has whole needs none."""
        return self.sizes[0] * self.parts * RECORD * self.softmaxes if self.parts > 1 else 0

    @property
    def merge_programs(self) -> int:
        return triton.cdiv(self.sizes[0] * self.softmaxes, MERGED_SOFTMAXES) if self.parts > 1 else 0


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch of each kernel; tuples have one entry per stage of the launch.

    Weights are pairs of floats (`_common.halves`). A stage's programs are those below its end and not below the one
    before.
    """

    stages: slice
    sizes: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, ...], ...]
    softmaxes: tuple[int, ...]
    ends: tuple[int, ...]
    merge_ends: tuple[int, ...]
    losses_at: int
    merge_losses_at: int
    weights: tuple[tuple[float, float], ...]
    gradient_scales: tuple[tuple[float, float], ...]

    @property
    def programs(self) -> int:
        return self.ends[-1]

    @property
    def merge_programs(self) -> int:
        return self.merge_ends[-1]


@dataclass(frozen=True)
class Plan:
    """All launches of a call, and its workspace: the records of each stage, then the loss's parts.

    Attributes:
        stages: all stages.
        launches: all launches.
        records_at: where in the workspace each stage's records begin.
        losses_at: where the loss's parts begin.
        losses: number of the loss's parts.
        inverse: 1 / temperature, as `_common.halves`.
        dtype: compute type, that of the workspace, the loss and the statistics.
    """

    stages: tuple[Stage, ...]
    launches: tuple[Launch, ...]
    records_at: tuple[int, ...]
    losses_at: int
    losses: int
    inverse: tuple[float, float]
    dtype: torch.dtype

    @property
    def workspace(self) -> int:
        return self.losses_at + self.losses

    def check_backward(self, grad: Tensor, statistics: Sequence[Tensor]) -> None:
        """Raises RuntimeError unless the upstream gradient and the statistics fit this plan."""
        if grad.numel() != 1 or grad.dtype != self.dtype:
            raise RuntimeError(f"cwd_bwd: expected a scalar grad of {self.dtype}, got {_common.described(grad)}")
        if len(statistics) != len(self.stages):
            raise RuntimeError(
                f"cwd_bwd: expected statistics of every stage, got {len(statistics)} for {len(self.stages)}"
            )
        for number, (stage, kept) in enumerate(zip(self.stages, statistics, strict=True), start=1):
            if tuple(kept.shape) != stage.statistics_shape or kept.dtype != self.dtype or not kept.is_contiguous():
                raise RuntimeError(
                    f"cwd_bwd: expected the statistics that cwd_fwd made, contiguous, here of stage {number} and shape "
                    f"{list(stage.statistics_shape)} and {self.dtype}, got {_common.described(kept)}"
                )


def plan_of(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> Plan:
    """The plan for these views.

    Args:
        students: contiguous views [B, M, N], one per stage.
        teachers: as many, of the same shapes.
        dims: as many; 1 or 2, the axis of a stage's softmaxes.
        weights: as many.
        temperature: of all softmaxes.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the views do not fit each other.
    """
    count = len(students)
    if not count or any(len(given) != count for given in (teachers, dims, weights)):
        raise RuntimeError(
            "cwd: expected as many teachers, dims and weights as students, and at least one, got "
            f"{count} students, {len(teachers)} teachers, {len(dims)} dims and {len(weights)} weights"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RuntimeError(f"cwd: expected temperature to be positive and finite, got {temperature}")
    for m in range(count):
        for name, view in (("student", students[m]), ("teacher", teachers[m])):
            _check_view(f"{name} of stage {m + 1}", view, students[0])
        if teachers[m].shape != students[m].shape:
            raise RuntimeError(
                f"cwd: expected teacher of stage {m + 1} to have shape {list(students[m].shape)} like student, got "
                f"{list(teachers[m].shape)}"
            )
        if dims[m] not in (STRIDED, CONTIGUOUS):
            raise RuntimeError(f"cwd: expected dims of stage {m + 1} to be 1 or 2, got {dims[m]}")
    described = tuple(
        (tuple(s.shape), dim, s.dtype, t.dtype) for s, t, dim in zip(students, teachers, dims, strict=True)
    )
    return _plan(described, tuple(weights), temperature)


def _check_view(name: str, view: Tensor, first: Tensor) -> None:
    if view.dtype not in _common.COMPUTE:
        raise RuntimeError(f"cwd: expected {name} to be float32, float64, bfloat16 or float16, got {view.dtype}")
    if view.dim() != 3 or view.numel() == 0:
        raise RuntimeError(
            f"cwd: expected {name} as a view [B, M, N] with at least one element, got shape {list(view.shape)}"
        )
    if not view.is_contiguous():
        raise RuntimeError(f"cwd: expected {name} contiguous, got {_common.described(view)}: call .contiguous() first")
    if view.device != first.device:
        raise RuntimeError(f"cwd: expected {name} on the device of stage 1's student, got {view.device}")
    if (view.dtype == torch.float64) != (first.dtype == torch.float64):
        raise RuntimeError(f"cwd: float64 does not mix with other dtypes, got {view.dtype} and {first.dtype}")


@functools.lru_cache(maxsize=256)
def _plan(
    views: tuple[tuple[tuple[int, ...], int, torch.dtype, torch.dtype], ...],
    weights: tuple[float, ...],
    temperature: float,
) -> Plan:
    stages = []
    for (shape, dim, dtype, other_dtype), weight in zip(views, weights, strict=True):
        make = _contiguous if dim == CONTIGUOUS else _strided
        stages.append(make(shape, min(dtype.itemsize, other_dtype.itemsize), weight))
    records_at, at = [], 0
    for stage in stages:
        records_at.append(at)
        at += triton.cdiv(stage.records, ALIGNMENT) * ALIGNMENT
    launches, losses = [], 0
    for begin in range(0, len(stages), STAGES_PER_LAUNCH):
        chosen = slice(begin, min(begin + STAGES_PER_LAUNCH, len(stages)))
        launches.append(_launch(stages, chosen, losses, temperature))
        losses = launches[-1].merge_losses_at + launches[-1].merge_programs
    return Plan(
        stages=tuple(stages),
        launches=tuple(launches),
        records_at=tuple(records_at),
        losses_at=at,
        losses=losses,
        # Softmaxes are one-hot or flat long before; and no difference is multiplied by infinity or zero.
        inverse=_common.halves(min(max(1 / temperature, 1e-30), 1e30)),
        dtype=_common.COMPUTE[views[0][2]],
    )


def _contiguous(shape: tuple[int, ...], smallest: int, weight: float) -> Stage:
    batch, rows, columns = shape
    vector = _common.vector_length(columns, smallest)
    elements = _elements(vector, smallest)
    block = _common.block_of(columns, elements, min(NARROW, elements))
    at_once = min(elements // block, triton.next_power_of_2(batch * rows))
    programs = triton.cdiv(batch * rows, at_once)
    steps, parts = _steps(programs, triton.cdiv(columns, block))
    return Stage((*shape, steps, parts), (vector, at_once, block), programs * parts, weight)


def _strided(shape: tuple[int, ...], smallest: int, weight: float) -> Stage:
    batch, rows, columns = shape
    vector = min(_common.vector_length(columns, smallest), STRIDED_VECTOR)
    elements = _elements(vector, smallest)
    in_one_access = min(THREADS * vector, elements)
    block = _common.block_of(columns, min(WIDE_COLUMNS, in_one_access), min(NARROW, in_one_access))
    group = min(elements // in_one_access, triton.next_power_of_2(rows))
    at_once = min(in_one_access // block, triton.next_power_of_2(triton.cdiv(rows, group)))
    programs = batch * triton.cdiv(columns, block)
    steps, parts = _steps(programs, triton.cdiv(rows, group * at_once))
    return Stage((*shape, steps, parts), (vector, group, at_once, block), programs * parts, weight)


def _elements(vector: int, smallest: int) -> int:
    """Elements of a tile. Short vectors mean many loads, each with a mask and an address to hold; doubles are wide."""
    full = THREADS * THREAD_ELEMENTS
    if smallest == 8:
        return full // 4
    return full if vector * smallest >= _common.VECTOR_BYTES // 2 else full // 2


def _steps(programs: int, steps: int) -> tuple[int, int]:
    """Steps of a program and the parts of a softmax, so that a stage has about PROGRAMS programs."""
    of_one = max(min(STEPS, steps), triton.cdiv(steps * programs, PROGRAMS))
    of_one = min(of_one, steps)
    return of_one, triton.cdiv(steps, of_one)


def _launch(stages: Sequence[Stage], chosen: slice, losses_at: int, temperature: float) -> Launch:
    own = stages[chosen]
    ends = tuple(itertools.accumulate(stage.programs for stage in own))
    return Launch(
        stages=chosen,
        sizes=tuple(stage.sizes for stage in own),
        tiles=tuple(stage.tile for stage in own),
        softmaxes=tuple(stage.softmaxes for stage in own),
        ends=ends,
        merge_ends=tuple(itertools.accumulate(stage.merge_programs for stage in own)),
        losses_at=losses_at,
        merge_losses_at=losses_at + ends[-1],
        weights=tuple(_common.halves(stage.weight) for stage in own),
        gradient_scales=tuple(_common.halves(stage.weight / temperature) for stage in own),
    )
