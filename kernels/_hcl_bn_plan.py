"""What a call of hcl_bn's kernels checks and works out beforehand; `_hcl_plan` cuts the maps into cells."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common, _hcl_plan

OP = "hcl_bn"
RUNNING, BATCH, TRACKED = 1, 2, 3  # how a stage is normalised
STAGES_PER_LAUNCH = _hcl_plan.STAGES_PER_LAUNCH
SUMS = 3  # per cell and part: of d, of u less its channel's mean, of their product
FORWARD_COEFFICIENTS = 3
BACKWARD_COEFFICIENTS = 5
TILE_BYTES = 4096  # of the map per step of a program that takes moments: two 16-byte loads per thread of four warps
RUN = 64  # a channel's values are cut at multiples of it, so that every part begins where a vector does
WIDE_CHANNELS = 128
SECTOR_BYTES = 32  # fewer neighbouring channels of a channels-last map are not worth a program of their own
REDUCE_PROGRAMS = 256  # wanted per stage of channels-last maps
MOMENT_CHANNELS = 16
MOMENT_ROWS = 16
GRADIENT_CHANNELS = 16
GRADIENT_SAMPLES = 8


@dataclass(frozen=True)
class Reduce:
    """One launch of the kernel that takes moments; tuples have one entry per stage.

    Attributes:
        stages: which of the call's.
        sizes: (batch, channels, pixels) per stage.
        cuts: (parts, values of a part) per stage.
        tiles: per stage what a program takes in one step: (vector, channels, values, whether a plane has 2^31 pixels
            or nearly so) for contiguous maps, (vector, values, channels) for channels-last ones.
        ends: a stage's programs are those below its end and not below the one before.
    """

    stages: slice
    sizes: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int | bool, ...], ...]
    ends: tuple[int, ...]

    @property
    def programs(self) -> int:
        return self.ends[-1]


def check_reduce(us: Sequence[Tensor], parts: Sequence[int]) -> list[Reduce]:
    """The launches that take the moments of these maps.

    Args:
        us: maps [B, C, H, W], one per stage.
        parts: as many.

    Returns:
        The launches; calls that differ in values only share them.

    Raises:
        RuntimeError: if the maps are none that the kernels take, or a number of parts is not positive.
    """
    if not us or len(us) != len(parts):
        raise RuntimeError(
            f"{OP}: expected a number of parts per map, and at least one map, got {len(us)} maps and {len(parts)} "
            "numbers of parts"
        )
    for u, count in zip(us, parts, strict=True):
        if count < 1:
            raise RuntimeError(f"{OP}: expected parts > 0, got {count}")
        if u.dim() != 4 or not u.numel():
            raise RuntimeError(f"{OP}: expected u [B, C, H, W] with at least one element, got {_common.described(u)}")
        if u.device != us[0].device:
            raise RuntimeError(f"{OP}: expected all maps on one device, got {u.device} and {us[0].device}")
        _hcl_plan.check_dtypes(OP, (u.dtype,), us[0].dtype)
    described = [
        (tuple(u.shape), u.dtype.itemsize, _common.is_channels_last(OP, u), count)
        for u, count in zip(us, parts, strict=True)
    ]
    return [
        _reduce(begin, tuple(described[begin : begin + STAGES_PER_LAUNCH]))
        for begin in range(0, len(us), STAGES_PER_LAUNCH)
    ]


@functools.lru_cache(maxsize=256)
def _reduce(begin: int, maps: tuple[tuple[tuple[int, ...], int, bool, int], ...]) -> Reduce:
    sizes, cuts, programs = [], [], []
    tiles: list[tuple[int | bool, ...]] = []
    for (batch, channels, height, width), itemsize, channels_last, parts in maps:
        pixels = height * width
        length = triton.cdiv(triton.cdiv(batch * pixels, RUN), parts) * RUN
        elements = TILE_BYTES // itemsize
        if channels_last:
            block = _common.block_of(channels, min(WIDE_CHANNELS, elements), SECTOR_BYTES // itemsize)
            while parts * triton.cdiv(channels, block) < REDUCE_PROGRAMS and block > SECTOR_BYTES // itemsize:
                block //= 2
            values = min(elements // block, triton.next_power_of_2(length))
            tiles.append((_common.vector_length(channels, itemsize), values, block))
        else:
            values = min(elements, triton.next_power_of_2(length))
            block = min(elements // values, triton.next_power_of_2(channels))
            tiles.append((_common.vector_length(pixels, itemsize), block, values, pixels + values >= 2**31))
        sizes.append((batch, channels, pixels))
        cuts.append((parts, length))
        programs.append(parts * triton.cdiv(channels, block))
    ends = itertools.accumulate(programs)
    return Reduce(slice(begin, begin + len(maps)), tuple(sizes), tuple(cuts), tuple(tiles), tuple(ends))


def plan_of(
    us: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float], level_weights: Sequence[float]
) -> _hcl_plan.Plan:
    """How the maps are cut into cells and programs (see `_hcl_plan.plan_of`)."""
    return _hcl_plan.plan_of(OP, us, teachers, weights, level_weights, SUMS, called="us")


@dataclass(frozen=True)
class Norms:
    """How the stages are normalised, and with what; one entry per stage.

    Attributes:
        affine: weight and bias, either may be None.
        statistics: running mean, running variance and counter; None where there is none.
        kinds: the kind of normalisation, and whether the running statistics are averages over all batches.
        settings: momentum and eps, each in halves (`_common.halves`).
    """

    affine: tuple[tuple[Tensor | None, Tensor | None], ...]
    statistics: tuple[tuple[Tensor | None, Tensor | None, Tensor | None], ...]
    kinds: tuple[tuple[int, bool], ...]
    settings: tuple[tuple[tuple[float, float], tuple[float, float]], ...]


def check_affine(
    us: Sequence[Tensor], affine: Sequence[Tensor | None], norms: Sequence[int]
) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
    """The stages' weights and biases in pairs.

    Raises:
        RuntimeError: if they or the kinds of normalisation do not fit the maps.
    """
    _check_count("kinds of normalisation, one per stage", norms, len(us))
    _check_count("affine parameters, two per stage", affine, 2 * len(us))
    for m, (u, norm) in enumerate(zip(us, norms, strict=True)):
        if not RUNNING <= norm <= TRACKED:
            raise RuntimeError(f"{OP}: expected a kind of normalisation of {RUNNING} to {TRACKED}, got {norm}")
        for name, tensor in zip(("weight", "bias"), affine[2 * m : 2 * m + 2], strict=True):
            if tensor is not None:
                _check_small(f"{name} of stage {m + 1}", tensor, u)
    return tuple((affine[2 * m], affine[2 * m + 1]) for m in range(len(us)))


def check_norms(
    us: Sequence[Tensor],
    affine: Sequence[Tensor | None],
    running: Sequence[Tensor],
    batches: Sequence[Tensor],
    norms: Sequence[int],
    momenta: Sequence[float],
    eps: Sequence[float],
) -> Norms:
    """What the stages are normalised with.

    Args:
        us: maps, one per stage.
        affine: weight and bias of every stage, or None.
        running: running mean and variance of every stage of norm 1 or 3, in order.
        batches: the counter of every stage of norm 3, in order.
        norms: per stage 1 to 3.
        momenta: per stage, negative for the average over all batches.
        eps: per stage.

    Raises:
        RuntimeError: if they do not fit the maps.
    """
    pairs = check_affine(us, affine, norms)
    _check_count("momenta, one per stage", momenta, len(us))
    _check_count("eps, one per stage", eps, len(us))
    with_running = sum(norm != BATCH for norm in norms)
    _check_count("running statistics, mean and variance of every stage that has them", running, 2 * with_running)
    tracked = sum(norm == TRACKED for norm in norms)
    _check_count("counters, one per stage that updates its running statistics", batches, tracked)
    next_running, next_counter = iter(running), iter(batches)
    statistics: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
    for m, (u, norm) in enumerate(zip(us, norms, strict=True)):
        mean = variance = counter = None
        if norm != BATCH:
            mean, variance = next(next_running), next(next_running)
            _check_small(f"running mean of stage {m + 1}", mean, u)
            _check_small(f"running variance of stage {m + 1}", variance, u)
        if norm == TRACKED:
            counter = next(next_counter)
            if counter.numel() != 1 or counter.dtype != torch.int64 or counter.device != u.device:
                raise RuntimeError(
                    f"{OP}: expected the counter of stage {m + 1} as one int64 on {u.device}, got "
                    f"{_common.described(counter)}"
                )
        statistics.append((mean, variance, counter))
    return Norms(
        pairs,
        tuple(statistics),
        tuple((norm, norm == TRACKED and momentum < 0) for norm, momentum in zip(norms, momenta, strict=True)),
        tuple((_common.halves(momentum), _common.halves(e)) for momentum, e in zip(momenta, eps, strict=True)),
    )


def check_moments(moments: Sequence[Tensor], us: Sequence[Tensor], norms: Sequence[int]) -> None:
    """Raises RuntimeError unless there are moments of every stage, with rows where a batch's statistics normalise."""
    _check_count("moments, one tensor per stage", moments, len(us))
    for m, (rows, u, norm) in enumerate(zip(moments, us, norms, strict=True)):
        _check_doubles(f"moments of stage {m + 1}", rows, (rows.shape[0] if rows.dim() else 0, 3, u.shape[1]), u)
        if norm != RUNNING and not len(rows):
            raise RuntimeError(
                f"{OP}: expected moments with at least one row where a batch's statistics normalise, got none for "
                f"stage {m + 1}"
            )


def check_kept(
    us: Sequence[Tensor],
    states: Sequence[Tensor],
    sums: Sequence[Tensor],
    means: Sequence[Tensor],
    affine: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> None:
    """Raises RuntimeError unless what the forward kept, and the flags of the wanted gradients, fit the maps."""
    _check_count("states, one per stage", states, len(us))
    _check_count("sums, one tensor per stage", sums, len(us))
    if means:
        _check_count("means, one tensor per stage, or none", means, len(us))
    _check_count("flags of wanted gradients, three per stage", wanted, 3 * len(us))
    for m, u in enumerate(us):
        batch, channels = u.shape[:2]
        _check_doubles(f"state of stage {m + 1}", states[m], (2, channels), u)
        _check_doubles(f"sums of stage {m + 1}", sums[m], (batch, 2, channels), u)
        if means:
            _check_doubles(f"means of stage {m + 1}", means[m], (2, channels), u)
        for name, tensor, want in zip(("weight", "bias"), affine[2 * m :], wanted[3 * m + 1 : 3 * m + 3], strict=False):
            if want and tensor is None:
                raise RuntimeError(f"{OP}_bwd: the {name} of stage {m + 1} is None and has no gradient")


def flat(like: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One new tensor, and its views of these shapes one after the other."""
    sizes = [math.prod(shape) for shape in shapes]
    whole = like.new_empty(sum(sizes), dtype=dtype)
    return whole, [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def coefficients(us: Sequence[Tensor], rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Uninitialised coefficients [rows, C] per stage."""
    return tuple(u.new_empty((rows, u.shape[1]), dtype=dtype) for u in us)


def blocks(us: Sequence[Tensor], size: int) -> tuple[int, ...]:
    """Where the programs of each stage end that take `size` of its channels each."""
    return tuple(itertools.accumulate(triton.cdiv(u.shape[1], size) for u in us))


def _check_count(name: str, given: Sequence[object], expected: int) -> None:
    if len(given) != expected:
        raise RuntimeError(f"{OP}: expected {expected} {name}, got {len(given)}")


def _check_small(name: str, tensor: Tensor, u: Tensor) -> None:
    fits = tensor.numel() == u.shape[1] and tensor.is_contiguous() and tensor.device == u.device
    if not fits or tensor.dtype not in _common.COMPUTE:
        raise RuntimeError(
            f"{OP}: expected {name} contiguous, floating, with {u.shape[1]} elements and on {u.device}, got "
            f"{_common.described(tensor)} on {tensor.device}"
        )


def _check_doubles(name: str, tensor: Tensor, shape: tuple[int, ...], u: Tensor) -> None:
    fits = tuple(tensor.shape) == shape and tensor.is_contiguous() and tensor.device == u.device
    if not fits or tensor.dtype != torch.float64:
        raise RuntimeError(
            f"{OP}: expected {name} contiguous, float64, of shape {list(shape)} and on {u.device}, got "
            f"{_common.described(tensor)} on {tensor.device}"
        )
