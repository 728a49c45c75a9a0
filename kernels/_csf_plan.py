"""What csf's launchers check and work out beforehand: from shapes, dtypes and layouts alone, once for each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

PART_MULTIPLE = 64  # parts of a plane begin at multiples of it
WARPS = 4  # of the programs over maps
THREADS = 32 * WARPS
SUM_LOADS = 8  # 16-byte loads of a map that a thread has under way at a time, where z alone is read
MAP_LOADS = 4  # the same where more maps are
NARROW_COLUMNS = 32  # coarse rows no longer than that are not divided among programs, nor are fewer channels than
NARROW_CHANNELS = 32
WIDE_CHANNELS = 128
WIDE_WINDOWS = 64  # widest piece of a window that a step of a program takes
ATTENTION_WARPS = 8
ATTENTION_ELEMENTS = 4096  # float64 elements of a tile of the program between the passes
ATTENTION_CHANNELS = 64
ATTENTION_PARTS = 8
LARGEST_PLANE = 2**30  # pixels are counted in 32 bits
LARGEST_EXACT_ODD = 1024  # torch's rule is in float32; beyond, source(fine) = fine // 2 may fail for 2 n - 1 pixels

PARAMETERS = 9
MAPS = 2  # flags before those of the parameters in `wanted`


@dataclass(frozen=True)
class Plan:
    """How the maps of a call are cut into tiles.

    Attributes:
        sizes: (channels, height, width, coarse height, coarse width).
        scales: coarse over fine size of rows and columns, as float32.
        channels_last: layout of all maps.
        rule: 0 where the source of every fine index is its half, else how many times a search for the first fine index
            of a coarse one halves its interval.
        itemsizes: of z and y.
        alike: pixels of every window, 0 where they differ.
        windows: tile over windows of coarse pixels: (channels-last, vector, coarse vector, channels, coarse rows,
            coarse columns, fine columns per coarse one in a step, rule).
        in_windows: whether all passes go over windows, else only the backward's last one.
        dtype: compute type.
    """

    batch: int
    sizes: tuple[int, int, int, int, int]
    scales: tuple[float, float]
    channels_last: bool
    rule: int
    itemsizes: tuple[int, int]
    alike: int
    windows: tuple[int, ...]
    in_windows: bool
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        return self.sizes[1] * self.sizes[2]

    @property
    def coarse_pixels(self) -> int:
        return self.sizes[3] * self.sizes[4]

    @property
    def flat_programs(self) -> int:
        tile, _ = self.flat(1, MAP_LOADS)
        return self.batch * triton.cdiv(self.sizes[0], tile[2]) * triton.cdiv(self.pixels, tile[3])

    @property
    def window_programs(self) -> int:
        _, _, _, channels, rows, columns, _, _ = self.windows
        blocks = triton.cdiv(self.sizes[3], rows) * triton.cdiv(self.sizes[4], columns)
        return self.batch * triton.cdiv(self.sizes[0], channels) * blocks

    def flat(self, parts: int, loads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tiles over pixels of z and y, counted row by row.

        Args:
            parts: into how many parts a plane is cut.
            loads: 16-byte loads of a map that a thread has under way at a time, where nothing else limits them.

        Returns:
            (channels-last, vector, channels, pixels, kept): vector is known to divide the innermost dimension, kept are
            the pixels per channel that a sum holds apart while it runs. The same for y, and `alike`.
        """
        return _flat_tiles(self, parts, loads)

    def cut(self, parts: int) -> tuple[int, int, int]:
        """Number of parts, and their lengths in z and y."""
        return parts, part_length(self.pixels, parts), part_length(self.coarse_pixels, parts)

    def attention_sizes(self, samples: int, squeezed: int, parts: int) -> tuple[int, ...]:
        """What the program between the passes must know: see `_csf_attention.forward`."""
        return samples, self.batch, self.sizes[0], squeezed, parts, self.pixels, part_length(self.pixels, parts)

    def sum_programs(self, parts: int, channels: int) -> int:
        return self.batch * triton.cdiv(self.sizes[0], channels) * parts


def part_length(pixels: int, parts: int) -> int:
    """Pixels of one of `parts` parts of a plane; the last ones may have fewer, or none."""
    return triton.cdiv(triton.cdiv(pixels, parts), PART_MULTIPLE) * PART_MULTIPLE


def plan_of(z: Tensor, y: Tensor) -> Plan:
    """The plan for these maps.

    Args:
        z: fine map [B, M, H, W].
        y: coarse map [B, M, h, w], in z's layout.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the maps do not fit each other.
    """
    if y.device != z.device:
        raise RuntimeError(f"csf: expected y on z's device {z.device}, got {y.device}")
    channels_last = _common.is_channels_last("csf", z)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if y.dim() != 4 or not y.is_contiguous(memory_format=layout):
        raise RuntimeError(f"csf: expected y [B, M, h, w] in z's layout, {layout}, got {_common.described(y)}")
    return _plan(tuple(z.shape), tuple(y.shape), z.dtype, y.dtype, channels_last)


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...], coarse_shape: tuple[int, ...], dtype: torch.dtype, coarse_dtype: torch.dtype, last: bool
) -> Plan:
    if len(shape) != 4 or len(coarse_shape) != 4 or shape[:2] != coarse_shape[:2]:
        raise RuntimeError(
            f"csf: expected z [B, M, H, W] and y [B, M, h, w], got {list(shape)} and {list(coarse_shape)}"
        )
    if 0 in shape + coarse_shape:
        raise RuntimeError(f"csf: expected maps that are not empty, got {list(shape)} and {list(coarse_shape)}")
    for one in (dtype, coarse_dtype):
        if one not in _common.COMPUTE:
            raise RuntimeError(f"csf: expected float32, float64, bfloat16 or float16 maps, got {one}")
    if (dtype == torch.float64) != (coarse_dtype == torch.float64):
        raise RuntimeError(f"csf: float64 does not mix with other dtypes, got z of {dtype} and y of {coarse_dtype}")
    batch, channels, height, width = shape
    coarse_height, coarse_width = coarse_shape[2:]
    if max(height * width, coarse_height * coarse_width) > LARGEST_PLANE:
        raise RuntimeError(
            f"csf: expected at most {LARGEST_PLANE} pixels per sample and channel, got {list(shape)} and "
            f"{list(coarse_shape)}: use backend='eager'"
        )
    axes = ((height, coarse_height), (width, coarse_width))
    rule = 0 if all(doubled(*axis) for axis in axes) else max(search_steps(fine) for fine, _ in axes)
    alike = 4 if rule == 0 and height * width == 4 * coarse_height * coarse_width else 0
    return Plan(
        batch=batch,
        sizes=(channels, height, width, coarse_height, coarse_width),
        scales=(scale_of(*axes[0]), scale_of(*axes[1])),
        channels_last=last,
        rule=rule,
        itemsizes=(dtype.itemsize, coarse_dtype.itemsize),
        alike=alike,
        windows=_window_tile(shape, coarse_shape, dtype.itemsize, coarse_dtype.itemsize, last, rule),
        in_windows=rule == 0 and not last,
        dtype=_common.COMPUTE[dtype],
    )


@functools.lru_cache(maxsize=256)
def _flat_tiles(plan: Plan, parts: int, loads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    _, length, coarse_length = plan.cut(parts)
    at_once = _common.VECTOR_BYTES // max(plan.itemsizes) * THREADS
    channels = plan.sizes[0]
    inner = channels if plan.channels_last else plan.pixels
    # Short vectors mean many loads, each with an address and a mask to hold.
    loads = max(1, loads * _common.vector_length(inner, plan.itemsizes[0]) * plan.itemsizes[0] // _common.VECTOR_BYTES)
    if plan.channels_last:
        block = _common.block_of(channels, min(WIDE_CHANNELS, at_once), NARROW_CHANNELS)
    else:
        # Planes share a program where they are smaller than a tile, and not where parts of them are.
        taken = min(loads * at_once, triton.next_power_of_2(plan.pixels))
        block = min(loads * at_once // taken, triton.next_power_of_2(channels))
    shared = (block, loads, at_once // block)
    tile = _flat_tile(plan, plan.pixels, length, plan.itemsizes[0], *shared)
    coarse = _flat_tile(plan, plan.coarse_pixels, coarse_length, plan.itemsizes[1], *shared)
    return tile, (*coarse, plan.alike)


def _flat_tile(
    plan: Plan, pixels: int, length: int, itemsize: int, block: int, loads: int, at_once: int
) -> tuple[int, ...]:
    """A tile of `block` channels, at most `loads` times `at_once` pixels, over `length` of a plane's pixels."""
    taken = min(loads * at_once, triton.next_power_of_2(min(pixels, length)))
    if plan.channels_last:
        return 1, _common.vector_length(plan.sizes[0], itemsize), block, taken, min(at_once, taken)
    in_vector = min(_common.VECTOR_BYTES // itemsize, taken)
    return 0, _common.vector_length(pixels, itemsize), block, taken, taken // in_vector


def scale_of(fine: int, coarse: int) -> float:
    """The float32 coarse / fine of torch's nearest interpolation has it, both float32 too."""
    return _common.halves(_common.halves(coarse)[0] / _common.halves(fine)[0])[0]


def doubled(fine: int, coarse: int) -> bool:
    """Whether the source of every fine index is its half, rounded down."""
    return fine == 2 * coarse or (fine == 2 * coarse - 1 and coarse <= LARGEST_EXACT_ODD)


def search_span(fine: int) -> int:
    """How far a guess in float32 of the first fine index of a coarse one may be off, and one more."""
    return 2 + fine // 2**20


def search_steps(fine: int) -> int:
    return (2 * search_span(fine)).bit_length()


def _window_tile(
    shape: tuple[int, ...], coarse_shape: tuple[int, ...], itemsize: int, coarse_itemsize: int, last: bool, rule: int
) -> tuple[int, ...]:
    """One 16-byte load of each map per thread and step, so that y's entries stand in the threads of their windows."""
    channels, _, width = shape[1:]
    coarse_height, coarse_width = coarse_shape[2:]
    inner = channels if last else width
    vector = _common.vector_length(inner, itemsize)
    elements = _common.VECTOR_BYTES // itemsize * THREADS
    if vector * itemsize < _common.VECTOR_BYTES:
        # Short vectors mean many loads, each with an address and a mask to hold.
        elements //= 2
    if rule == 0:
        wide = 1 if last else 2
    else:
        # Pixels of a row beside each other are only in contiguous maps worth a step of their own.
        wide = min(triton.next_power_of_2(triton.cdiv(width, coarse_width)), WIDE_WINDOWS)
        wide = 1 if last and wide <= 4 else wide
    coarse_vector = _common.vector_length(channels if last else coarse_width, coarse_itemsize)
    if last:
        block = _common.block_of(channels, min(WIDE_CHANNELS, elements // wide), NARROW_CHANNELS)
        windows = elements // (block * wide)
        columns = _common.block_of(coarse_width, windows, min(windows, 8))
        rows = min(windows // columns, triton.next_power_of_2(coarse_height))
    else:
        windows = elements // wide
        columns = _common.block_of(coarse_width, windows, min(windows, NARROW_COLUMNS))
        rows = min(windows // columns, triton.next_power_of_2(coarse_height))
        block = min(windows // (columns * rows), triton.next_power_of_2(channels))
    return int(last), vector, coarse_vector, block, rows, columns, wide, rule


@functools.lru_cache(maxsize=256)
def attention_tiles(samples: int, channels: int, squeezed: int, parts: int) -> tuple[int, ...]:
    """Tiles of the program between the passes, which hold all samples.

    Returns:
        (samples; channels and parts of the sums; squeezed and, to be summed over, channels of the squeeze layer;
        channels and, to be summed over, squeezed channels of the heads).
    """
    held = triton.next_power_of_2(samples)
    elements = max(1, ATTENTION_ELEMENTS // held)
    all_channels, all_squeezed = triton.next_power_of_2(channels), triton.next_power_of_2(squeezed)
    of_sums = min(all_channels, ATTENTION_CHANNELS, elements)
    of_parts = min(triton.next_power_of_2(parts), ATTENTION_PARTS)
    of_layer = min(all_squeezed, ATTENTION_CHANNELS, elements)
    of_heads = min(all_channels, ATTENTION_CHANNELS, elements)
    return (
        held,
        of_sums,
        of_parts,
        of_layer,
        min(all_channels, elements // of_layer),
        of_heads,
        min(all_squeezed, elements // of_heads),
    )


def check_sums(plan: Plan, z: Tensor, sums: Tensor, first: int) -> None:
    """Raises RuntimeError unless these are sums of at least z's samples from `first` on."""
    fits = sums.dim() == 4 and sums.shape[1] > 0 and sums.shape[2] == 3 and sums.shape[3] == plan.sizes[0]
    if not fits or sums.dtype != torch.float64 or not sums.is_contiguous() or sums.device != z.device:
        raise RuntimeError(
            f"csf: expected contiguous float64 sums [samples, parts, 3, {plan.sizes[0]}] on z's device, got "
            f"{_common.described(sums)}"
        )
    if first < 0 or first + plan.batch > sums.shape[0]:
        raise RuntimeError(
            f"csf: expected sums of the samples from {first} on for a batch of {plan.batch}, got those of "
            f"{sums.shape[0]} samples"
        )


def check_parts(parts: int) -> None:
    """Raises RuntimeError unless there is at least one part."""
    if parts < 1:
        raise RuntimeError(f"csf: expected at least 1 part, got {parts}")


def check_grad(grad: Tensor, z: Tensor) -> None:
    """Raises RuntimeError unless grad has z's shape, dtype, layout and device."""
    layout = torch.channels_last if _common.is_channels_last("csf", z) else torch.contiguous_format
    same = grad.shape == z.shape and grad.dtype == z.dtype and grad.device == z.device
    if not same or not grad.is_contiguous(memory_format=layout):
        raise RuntimeError(
            f"csf: expected grad like z, {_common.described(z)}, on {z.device}, got {_common.described(grad)} on "
            f"{grad.device}"
        )


def check_state(z: Tensor, state: Tensor, least: int) -> None:
    """Raises RuntimeError unless the state has at least `least` entries as csf_fuse makes them."""
    fits = state.dim() == 1 and state.numel() >= least and state.dtype == torch.float64 and state.is_contiguous()
    if not fits or state.device != z.device:
        raise RuntimeError(
            f"csf: expected the state that csf_fuse made, float64 of {least} entries, got {_common.described(state)}"
        )


def state_entries(samples: int, channels: int, squeezed: int) -> int:
    """Length of the state: mean, invstd; fc_invstd; logit, pooled, centre per sample; squeezed per sample."""
    return 2 * channels + squeezed + 3 * samples * channels + samples * squeezed


def check_parameters(plan: Plan, z: Tensor, parameters: Sequence[Tensor | None]) -> int:
    """Raises RuntimeError unless the parameters have their shapes; returns the number of squeeze channels."""
    if len(parameters) != PARAMETERS:
        raise RuntimeError(f"csf: expected {PARAMETERS} parameters, got {len(parameters)}")
    fc = parameters[2]
    if fc is None or fc.dim() != 2 or fc.shape[0] == 0:
        raise RuntimeError(
            f"csf: expected the squeeze layer's weight [L, M], got {fc if fc is None else list(fc.shape)}"
        )
    channels, squeezed = plan.sizes[0], fc.shape[0]
    heads = [f"heads[{i}] {name}" for i in (0, 1) for name in ("weight", "bias")]
    names = ["weight", "bias", "fc_weight", "fc_bn weight", "fc_bn bias", *heads]
    shapes: list[tuple[int, ...]] = [(channels,), (channels,), (squeezed, channels), (squeezed,), (squeezed,)]
    shapes += [(channels, squeezed), (channels,)] * 2
    for k, (name, tensor, shape) in enumerate(zip(names, parameters, shapes, strict=True)):
        check_small(name, tensor, shape, z, required=k in (2, 5, 6, 7, 8))
    return squeezed


def check_small(name: str, tensor: Tensor | None, shape: tuple[int, ...], z: Tensor, required: bool) -> None:
    """Raises RuntimeError unless a parameter or a statistic has this shape; one that is not required may be None."""
    if tensor is None:
        if required:
            raise RuntimeError(f"csf: expected {name} {list(shape)}, got None")
        return
    fits = tuple(tensor.shape) == shape and tensor.is_contiguous() and tensor.dtype in _common.COMPUTE
    if not fits or tensor.device != z.device:
        raise RuntimeError(
            f"csf: expected {name} contiguous, {list(shape)}, floating and on {z.device}, got "
            f"{_common.described(tensor)} on {tensor.device}"
        )


def check_statistics(
    name: str,
    norm: int,
    momentum: float | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
    channels: int,
    z: Tensor,
    least: int,
) -> None:
    """Raises RuntimeError unless the kind of normalisation is known and has the statistics that it needs."""
    check_norm(name, norm, least)
    for kind, tensor in zip(("running_mean", "running_var"), statistics, strict=False):
        check_small(f"{name}'s {kind}", tensor, (channels,), z, required=norm in (1, 3))
    counter = statistics[2]
    if counter is not None and (counter.numel() != 1 or counter.dtype != torch.int64 or counter.device != z.device):
        raise RuntimeError(
            f"csf: expected {name}'s counter to be one int64 on {z.device}, got {_common.described(counter)}"
        )
    if norm == 3 and momentum is None and counter is None:
        raise RuntimeError(f"csf: expected {name}'s counter with momentum None (cumulative average), got None")


def check_norm(name: str, norm: int, least: int) -> None:
    """Raises RuntimeError unless the kind of normalisation is known."""
    if not least <= norm <= 3:
        raise RuntimeError(f"csf: expected {name}'s kind of normalisation to be {least} to 3, got {norm}")


def check_wanted(wanted: Sequence[bool], parameters: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError unless there is a flag per gradient, and none for a parameter that is None."""
    if len(wanted) != MAPS + PARAMETERS:
        raise RuntimeError(f"csf: expected {MAPS + PARAMETERS} flags of wanted gradients, got {len(wanted)}")
    for k, parameter in enumerate(parameters):
        if wanted[MAPS + k] and parameter is None:
            raise RuntimeError(f"csf: parameter {k} is None and has no gradient, but one is wanted")
