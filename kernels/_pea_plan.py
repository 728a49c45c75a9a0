"""What pea's launchers check and work out beforehand: from shapes, dtypes and layouts alone, once for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from transkd_fast.kernels import _common

STAGES_PER_LAUNCH = 4  # of the launches that take several; their code grows with it
PROGRAMS = 264  # wanted of a stage: two per multiprocessor of an H100
HELD = 2048  # elements of the weight whose gradient four warps hold; for more there are eight
SMALLEST = 16  # side of the smallest matrix that tl.dot takes
LARGEST_TOKENS = 2**30  # tokens are counted in 32 bits
LARGEST_CHANNELS = 2**14  # so are the weight's entries, and a tile's offsets
ALIGNMENT = 32  # elements between the parts of a workspace, so that each begins at a multiple of 16 bytes
MERGE_ELEMENTS = 4096  # partial sums that a merging program has under way at a time
MERGE_STRIPS = 64
SCALE_BLOCK = 4096


@dataclass(frozen=True)
class Limits:
    """How much a program may hold without running out of registers.

    Attributes:
        tokens: of a tile.
        side: channels of a side of a matrix product.
        weights: elements of the weight whose gradient a program of a narrow stage holds.
        group: input channels of a group.
        buffers: in which a loop's loads are under way.
    """

    tokens: int
    side: int
    weights: int
    group: int
    buffers: int


ROOMY = Limits(64, 64, 8192, 256, 2)  # matrix instructions that take their factors from shared memory
MAPS = Limits(64, 64, 4096, 256, 2)  # the same, whose tiles must be turned
TIGHT = Limits(32, 64, 2048, 64, 2)  # other architectures, factors of 32 bits, assistants
DOUBLE = Limits(16, 32, 1024, 32, 1)
SCALAR = Limits(32, 32, 1024, 64, 1)  # no tensor cores: the factors of a product are held in registers

FLAGS = 7  # of wanted gradients per stage: x, weight, bias, target, assistant, projection_scale, assistant_scale
CODES = 6  # dtypes per stage in the backward: x, weight, bias, target, assistant, scales
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FACTOR = (0, 0, 0, 1, 2, 0)  # column of `factors` that each of the six takes


@dataclass(frozen=True)
class Described:
    """Of an activation [B, N, C]: its shape, dtype, and whether it is an NCHW map's view."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channel_major: bool


@dataclass(frozen=True)
class Stage:
    """How a stage is cut into programs.

    A *column* program sums over a strip of tiles of tokens, for a block of output channels and a group of input
    channels: the loss, the gradients of weight and bias. A narrow stage has one block and one group, and makes the
    gradient of x with them; else a *row* program makes that for one tile and group, going over all output channels.

    Attributes:
        sizes: (tokens of a sample, C_in, C_out). Where all activations are token-major, all tokens are one sample's.
        tile: (tokens; output channels of a block, blocks of a program; input channels of a piece, pieces of a group,
            groups; elements of the weight that one load may take; layouts of x, target, assistant and residual); a
            layout is (channel-major, elements that one load may take, whether tokens, and channels, fill tiles).
        tiles: of tokens.
        per_strip: tiles of a strip.
        column_programs: as said above.
        row_programs: as said above, 0 for narrow stages and where x has no gradient.
        strips: partial sums per entry of the gradients of weight and bias.
        weight_entries: entries of the weight's gradient, with those that fill up blocks; 0 if it is not wanted.
        bias_entries: the same of the bias.
        stride: entries from one strip's partial sums to the next.
        values: B N C_out, over which the loss is a mean.
        warps: of a program.
        buffers: in which a loop's loads are under way.
        residual: dtype of the residual that is kept, and whose layout it has (3 the target's, 4 the assistant's).
    """

    sizes: tuple[int, int, int]
    tile: tuple[Any, ...]
    tiles: int
    per_strip: int
    column_programs: int
    row_programs: int
    strips: int
    weight_entries: int
    bias_entries: int
    stride: int
    values: int
    warps: int
    buffers: int
    residual: tuple[torch.dtype, int] | None

    @property
    def cut(self) -> tuple[int, int, int]:
        return self.tiles, self.per_strip, self.stride

    @property
    def counts(self) -> tuple[int, ...]:
        """What the finishing kernel must know of a stage."""
        entries = self.weight_entries + self.bias_entries
        return (self.weight_entries, entries, self.strips, self.stride, *self.sizes[1:], self.column_programs)

    @property
    def merge_tile(self) -> tuple[int, ...]:
        """(strips, entries) of a merging program's step, and the matrices; empty where there is nothing to merge."""
        if not self.weight_entries + self.bias_entries:
            return ()
        strips = min(MERGE_STRIPS, triton.next_power_of_2(self.strips))
        entries = MERGE_ELEMENTS // max(strips, MERGE_STRIPS // 4)
        _, outputs, _, inputs, pieces, groups, *_ = self.tile
        return strips, entries, outputs, inputs, pieces * groups

    @property
    def merge_programs(self) -> int:
        tile = self.merge_tile
        return triton.cdiv(self.weight_entries + self.bias_entries, tile[1]) if tile else 0


@dataclass(frozen=True)
class Plan:
    """All stages of a call, and its workspace: the partial sums of each stage in the compute type.

    Attributes:
        stages: all stages.
        parts_at: where in the workspace each stage's partial sums begin.
        parts: length of the workspace.
        shares_at: where each stage's shares of the loss begin among those of all.
        shares: number of all shares of the loss.
        dtype: compute type.
    """

    stages: tuple[Stage, ...]
    parts_at: tuple[int, ...]
    parts: int
    shares_at: tuple[int, ...]
    shares: int
    dtype: torch.dtype


def plan_of(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Sequence[Tensor],
    assistants: Sequence[Tensor],
    projection_scales: Sequence[Tensor],
    assistant_scales: Sequence[Tensor],
    stage_weights: Sequence[float],
    wanted: Sequence[bool],
    tf32: bool,
    arch: int,
) -> Plan:
    """The plan for these tensors.

    Args:
        xs: as for `pea_fwd`.
        weights: the same.
        biases: the same.
        targets: the same.
        assistants: the same.
        projection_scales: the same.
        assistant_scales: the same.
        stage_weights: one per stage.
        wanted: seven flags per stage.
        tf32: whether float32 products may take TF32.
        arch: of the GPU, 90 for compute capability 9.0.

    Returns:
        The plan; calls that differ in values only share one.

    Raises:
        RuntimeError: if the tensors do not fit each other.
    """
    stages = len(xs)
    counts = (len(weights), len(biases), len(targets), len(stage_weights))
    if stages == 0 or any(count != stages for count in counts):
        raise RuntimeError(
            "pea: expected as many weights, biases, targets and stage_weights as xs, and at least one, got "
            f"{stages} xs and {counts}"
        )
    counts = (len(assistants), len(projection_scales), len(assistant_scales))
    if counts not in ((0, 0, 0), (stages, stages, stages)):
        raise RuntimeError(
            f"pea: expected assistants, projection_scales and assistant_scales for none or all of {stages} stages, got "
            f"{counts}"
        )
    if len(wanted) != FLAGS * stages:
        raise RuntimeError(f"pea: expected {FLAGS} flags of wanted gradients per stage, got {len(wanted)}")
    tensors = [*xs, *weights, *biases, *targets, *assistants, *projection_scales, *assistant_scales]
    if any(t.device != tensors[0].device for t in tensors):
        raise RuntimeError(f"pea: expected all tensors on one device, got {sorted({str(t.device) for t in tensors})}")
    described = []
    for m, (x, weight, bias, target) in enumerate(zip(xs, weights, biases, targets, strict=True)):
        of_stage = [_described("xs", m, x), _described("targets", m, target)]
        of_stage += [_described("assistants", m, assistant) for assistant in assistants[m : m + 1]]
        for name, other in zip(("targets", "assistants"), of_stage[1:], strict=False):
            if other.shape[:2] != x.shape[:2] or other.shape != of_stage[1].shape:
                raise RuntimeError(
                    f"pea: expected {name}[{m}] to have shape [{x.shape[0]}, {x.shape[1]}, C_out], the same for all, "
                    f"got {list(other.shape)}"
                )
            if (other.dtype == torch.float64) != (xs[0].dtype == torch.float64):
                raise RuntimeError(f"pea: float64 does not mix with other dtypes, got {other.dtype} and {xs[0].dtype}")
        if (x.dtype == torch.float64) != (xs[0].dtype == torch.float64):
            raise RuntimeError(f"pea: float64 does not mix with other dtypes, got {x.dtype} and {xs[0].dtype}")
        outputs = of_stage[1].shape[2]
        _check_parameter(f"weights[{m}]", weight, (outputs, x.shape[2]))
        _check_parameter(f"biases[{m}]", bias, (outputs,))
        for name, scales in (("projection_scales", projection_scales), ("assistant_scales", assistant_scales)):
            for scale in scales[m : m + 1]:
                if scale.numel() != 1 or scale.dtype not in _common.COMPUTE:
                    raise RuntimeError(
                        f"pea: expected {name}[{m}] to have one floating element, got {_common.described(scale)}"
                    )
        flags = tuple(wanted[FLAGS * m : FLAGS * (m + 1)])
        if not assistants and any(flags[4:]):
            raise RuntimeError(f"pea: stage {m + 1} has no assistant, but a gradient of one is wanted")
        described.append((tuple(of_stage), weight.dtype.itemsize, flags))
    return _plan(tuple(described), tf32, arch)


def _described(name: str, m: int, t: Tensor) -> Described:
    if t.dim() != 3 or t.numel() == 0:
        raise RuntimeError(f"pea: expected {name}[{m}] to be [B, N, C] and not empty, got shape {list(t.shape)}")
    if t.dtype not in _common.COMPUTE:
        raise RuntimeError(f"pea: expected {name}[{m}] to be float32, float64, bfloat16 or float16, got {t.dtype}")
    if t.shape[0] * t.shape[1] > LARGEST_TOKENS or t.shape[2] > LARGEST_CHANNELS:
        raise RuntimeError(
            f"pea: expected at most {LARGEST_TOKENS} tokens and {LARGEST_CHANNELS} channels, got {name}[{m}] of shape "
            f"{list(t.shape)}: use backend='eager'"
        )
    if t.is_contiguous():
        return Described(tuple(t.shape), t.dtype, False)
    if t.transpose(1, 2).is_contiguous():
        return Described(tuple(t.shape), t.dtype, True)
    raise RuntimeError(
        f"pea: expected {name}[{m}] to be dense tokens or a dense map's view, got {_common.described(t)}: "
        "call .contiguous() first"
    )


def _check_parameter(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape or not t.is_contiguous() or t.dtype not in _common.COMPUTE:
        raise RuntimeError(f"pea: expected {name} contiguous, {list(shape)} and floating, got {_common.described(t)}")


@functools.lru_cache(maxsize=256)
def _plan(described: tuple[tuple[tuple[Described, ...], int, tuple[bool, ...]], ...], tf32: bool, arch: int) -> Plan:
    stages = [_stage(*of_stage, tf32, arch) for of_stage in described]
    sizes = [_aligned(stage.strips * stage.stride) for stage in stages]
    shares = [stage.column_programs for stage in stages]
    return Plan(
        stages=tuple(stages),
        parts_at=tuple(itertools.accumulate(sizes[:-1], initial=0)),
        parts=sum(sizes),
        shares_at=tuple(itertools.accumulate(shares[:-1], initial=0)),
        shares=sum(shares),
        dtype=_common.COMPUTE[described[0][0][0].dtype],
    )


def _aligned(entries: int) -> int:
    return triton.cdiv(entries, ALIGNMENT) * ALIGNMENT


def _stage(
    activations: tuple[Described, ...], weight_itemsize: int, wanted: tuple[bool, ...], tf32: bool, arch: int
) -> Stage:
    x, target = activations[:2]
    (samples, tokens, inputs), outputs = x.shape, target.shape[2]
    if not any(one.channel_major for one in activations):
        samples, tokens = 1, samples * tokens
    compute = _common.COMPUTE[x.dtype]
    limits = _limits(activations, tf32, arch)
    block, blocks, piece, pieces, groups, narrow = _blocks(inputs, outputs, limits)
    warps = 4 if block * blocks * piece * pieces <= HELD else 8
    taken = min(limits.tokens, max(SMALLEST, triton.next_power_of_2(tokens)))
    tiles = samples * triton.cdiv(tokens, taken)
    of_x, of_weight, of_bias = wanted[:3]
    has_rows = of_x and not narrow
    covered = triton.cdiv(outputs, block * blocks) * block * blocks
    per_strip_of_all = triton.cdiv(outputs, block * blocks) * (groups if of_weight else 1)
    # Rows take about as long as columns, and run beside them.
    programs = PROGRAMS * 4 // warps // (2 if has_rows else 1)
    per_strip = triton.cdiv(tiles, max(1, programs // per_strip_of_all))
    strips = triton.cdiv(tiles, per_strip)
    residual = _residual(activations, wanted, compute)
    source = activations[residual[1] - 2] if residual else target
    weight_entries = covered * piece * pieces * groups if of_weight else 0
    bias_entries = outputs if of_bias else 0
    return Stage(
        sizes=(tokens, inputs, outputs),
        tile=(
            taken,
            block,
            blocks,
            piece,
            pieces,
            groups,
            _common.vector_length(inputs, weight_itemsize),
            _layout(x, x.dtype, tokens, taken, piece * pieces * groups),
            _layout(target, target.dtype, tokens, taken, covered),
            _layout(activations[-1], activations[-1].dtype, tokens, taken, covered),
            _layout(source, residual[0] if residual else target.dtype, tokens, taken, covered),
        ),
        tiles=tiles,
        per_strip=per_strip,
        column_programs=strips * per_strip_of_all,
        row_programs=tiles * groups if has_rows else 0,
        strips=strips,
        weight_entries=weight_entries,
        bias_entries=bias_entries,
        stride=_aligned(weight_entries + bias_entries),
        values=x.shape[0] * x.shape[1] * outputs,
        warps=warps,
        buffers=limits.buffers,
        residual=residual,
    )


def _limits(activations: tuple[Described, ...], tf32: bool, arch: int) -> Limits:
    dtype = activations[0].dtype
    if dtype == torch.float64:
        return DOUBLE
    if dtype == torch.float32 and not tf32:
        return SCALAR
    if dtype.itemsize > 2 or len(activations) > 2 or not 90 <= arch < 100:
        return TIGHT
    return MAPS if any(one.channel_major for one in activations) else ROOMY


def _blocks(inputs: int, outputs: int, limits: Limits) -> tuple[int, int, int, int, int, bool]:
    """(outputs of a block, blocks of a program, inputs of a piece, pieces of a group, groups, whether narrow)."""
    block, piece = (max(SMALLEST, _common.block_of(size, limits.side, 32)) for size in (outputs, inputs))
    blocks, pieces = triton.cdiv(outputs, block), triton.cdiv(inputs, piece)
    if block * blocks * piece * pieces <= limits.weights:
        return block, blocks, piece, pieces, 1, True
    groups = triton.cdiv(pieces, limits.group // piece)
    return block, 1, piece, triton.cdiv(pieces, groups), groups, False


def _layout(of: Described, dtype: torch.dtype, tokens: int, taken: int, covered: int) -> tuple[int, int, bool, bool]:
    vector = _common.vector_length(tokens if of.channel_major else of.shape[2], dtype.itemsize)
    major = 0 if not of.channel_major else 1 if of.shape[1] * of.shape[2] < 2**31 else 2
    return major, vector, tokens % taken == 0, of.shape[2] == covered


def _residual(
    activations: tuple[Described, ...], wanted: tuple[bool, ...], compute: torch.dtype
) -> tuple[torch.dtype, int] | None:
    chosen = [k for k in (3, 4) if wanted[k]]
    if not chosen:
        return None
    dtypes = {activations[k - 2].dtype for k in chosen}
    return (kept_dtype(dtypes.pop()) if len(dtypes) == 1 else compute), chosen[0]


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient that is not yet normalised is kept: float16's range is too small for it."""
    return torch.float32 if dtype == torch.float16 else dtype


def backward_entries(
    grad: Tensor, factors: Tensor, kept: Sequence[Tensor], dtypes: Sequence[int]
) -> list[tuple[Tensor, int, torch.dtype]]:
    """(kept tensor, entry of factors, dtype) of each wanted gradient.

    Args:
        grad: as for `pea_bwd`.
        factors: the same.
        kept: the same.
        dtypes: the same.

    Returns:
        In the order of dtypes.

    Raises:
        RuntimeError: if the arguments do not fit each other.
    """
    stages = factors.shape[0] if factors.dim() == 2 else 0
    if stages == 0 or factors.shape[1] != 3 or not factors.is_contiguous() or factors.dtype not in DTYPES[::3]:
        raise RuntimeError(f"pea_bwd: expected the factors that pea_fwd made, got {_common.described(factors)}")
    if grad.numel() != 1 or grad.dtype != factors.dtype:
        raise RuntimeError(f"pea_bwd: expected a scalar grad of {factors.dtype}, got {_common.described(grad)}")
    if len(dtypes) != CODES * stages or any(not -1 <= code < len(DTYPES) for code in dtypes):
        raise RuntimeError(
            f"pea_bwd: expected {CODES} dtypes from -1 to {len(DTYPES) - 1} per stage, for {stages} stages, got "
            f"{list(dtypes)}"
        )
    entries = []
    at = -1
    for m in range(stages):
        codes = dtypes[CODES * m : CODES * (m + 1)]
        for k, code in enumerate(codes):
            # One residual serves target and assistant.
            if code >= 0 and not (k == 4 and codes[3] >= 0):
                at += 1
            if code >= 0 and at < len(kept):
                entries.append((kept[at], 3 * m + FACTOR[k], DTYPES[code]))
    if at + 1 != len(kept):
        raise RuntimeError(f"pea_bwd: expected {at + 1} kept tensors for these dtypes, got {len(kept)}")
    for t in (grad, *kept):
        if t.device != factors.device:
            raise RuntimeError(f"pea_bwd: expected all tensors on {factors.device}, got one on {t.device}")
    for t in kept:
        if not t.is_contiguous() and not (t.dim() == 3 and t.transpose(1, 2).is_contiguous()):
            raise RuntimeError(f"pea_bwd: expected kept tensors as pea_fwd made them, got {_common.described(t)}")
    return entries
