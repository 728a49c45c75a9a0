"""What the processes of a group exchange, so that statistics hold for the batch of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from transkd_fast.reference._common import GlobalBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Parts of a plane start at multiples of it (csf_reduce).
PART_MULTIPLE = 64


def size_of(group: ProcessGroup) -> int:
    """Counts the processes of a group."""
    return dist.get_world_size(group)


def samples_of(
    shapes: Sequence[Sequence[int]], group: ProcessGroup, device: torch.device, op: str = "csf"
) -> tuple[int, ...]:
    """Asks all processes for their batch sizes, and whether their maps are of one size.

    One small all-gather, read on the host: through the group's CPU backend if it has one (gloo, or
    ``"cpu:gloo,cuda:nccl"``), else on the maps' device, which the host then waits for.

    Args:
        shapes: Shapes [B, M, H, W] of this process's maps, of one batch.
        group: The processes.
        device: The maps' device.
        op: Name of the op, for the message.

    Returns:
        The batch size of every process, in the order of their ranks in the group.

    Raises:
        ValueError: If the sizes differ or a process has no sample; on every process, so that none waits for another.
    """
    on_host = any(backend.startswith("cpu:") for backend in dist.get_backend_config(group).split(","))
    mine = torch.tensor(
        [shapes[0][0], *(n for shape in shapes for n in shape[2:])], device="cpu" if on_host else device
    )
    everyones = mine.new_empty(size_of(group) * len(mine))
    dist.all_gather_into_tensor(everyones, mine, group=group)
    rows = everyones.view(-1, len(mine)).tolist()
    samples = tuple(row[0] for row in rows)
    sizes = [list(zip(row[1::2], row[2::2], strict=True)) for row in rows]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"{op}: expected maps of one size on all processes, got {sizes} in the order of ranks; give every process"
            " images of one size"
        )
    if min(samples) == 0:
        raise ValueError(
            f"{op}: expected at least one sample on every process, got batches of {list(samples)} in the order of ranks"
        )
    return samples


def check_samples(samples: Sequence[int], batch: int, group: ProcessGroup, op: str = "csf") -> None:
    """Checks batch sizes that a caller gives.

    Args:
        samples: Batch sizes of all processes.
        batch: That of this one.
        group: The processes.
        op: Name of the op, for the message.

    Raises:
        ValueError: If there are not as many as processes, or this one's is another.
    """
    size, rank = size_of(group), dist.get_rank(group)
    if len(samples) != size or samples[rank] != batch:
        raise ValueError(
            f"{op}: expected samples to hold the batch sizes of {size} processes, {batch} for rank {rank}, got"
            f" {list(samples)}"
        )


def first_of(samples: Sequence[int], group: ProcessGroup) -> int:
    """Counts the samples of the processes before this one.

    Args:
        samples: Batch sizes of all processes, from :func:`samples_of`.
        group: The processes.

    Returns:
        The index of this process's first sample in the batch of all.
    """
    return sum(samples[: dist.get_rank(group)])


def gather(rows: Tensor, samples: Sequence[int], group: ProcessGroup) -> Tensor:
    """Gathers what every process computed per sample, in one all-gather and without reading anything on the host.

    Args:
        rows: Of this process, shape [B, ...], any dtype.
        samples: Batch sizes of all processes, from :func:`samples_of`.
        group: The processes.

    Returns:
        The rows of all processes in the order of ranks, shape [sum of samples, ...].
    """
    check_samples(samples, rows.shape[0], group)
    largest = max(samples)
    mine = rows.contiguous()
    if rows.shape[0] < largest:
        mine = rows.new_zeros(largest, *rows.shape[1:])
        mine[: rows.shape[0]] = rows
    everyones = rows.new_empty(len(samples) * largest, *rows.shape[1:])
    dist.all_gather_into_tensor(everyones, mine, group=group)
    if min(samples) == largest:
        return everyones
    return torch.cat([padded[:count] for padded, count in zip(everyones.split(largest), samples, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, samples: Sequence[int], group: ProcessGroup) -> Tensor:
        first = first_of(samples, group)
        ctx.own, ctx.group = slice(first, first + rows.shape[0]), group
        return gather(rows, samples, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A copy: autograd may hand the same gradient to other nodes.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.own], None, None


def joining(samples: Sequence[int], group: ProcessGroup | None) -> GlobalBatch | None:
    """Describes the batch of all processes to the eager reference.

    Gathering there costs one all-gather, as :func:`gather`, and one all-reduce in the backward pass.

    Args:
        samples: Batch sizes of all processes, from :func:`samples_of`.
        group: The processes; None for this one alone.

    Returns:
        What the reference's `global_batch` takes.
    """
    if group is None:
        return None
    return GlobalBatch(lambda rows: _Gather.apply(rows, samples, group), first_of(samples, group))


def merge_moments(sums: Tensor, pixels: int) -> Tensor:
    """Merges the parts of every plane, so that a collective carries one row per sample.

    Means and centred squares by Chan's formula about the first part's mean, so that an offset costs no digits.

    Args:
        sums: What `csf_reduce` returns, shape [B, parts, 3, M], float64: mean, centred squares, weighted sum of y.
        pixels: Number n of pixels of a plane of z.

    Returns:
        The sums of whole planes, shape [B, 1, 3, M], float64.

    Source: Chan, Golub, LeVeque 1979, updating formulae for sample variances.
    """
    parts = sums.shape[1]
    if parts == 1:
        return sums
    length = -(-pixels // parts)
    length += -length % PART_MULTIPLE
    # Made on the device: a list would be copied to it, and the host would wait.
    starts = torch.arange(parts, dtype=sums.dtype, device=sums.device).view(parts, 1) * length
    counts = (pixels - starts).clamp(0, length)
    means, squares, coarse = sums.unbind(2)
    offsets = means - means[:, :1]
    offset = (counts * offsets).sum(dim=1, keepdim=True) / pixels
    squares = squares.sum(dim=1) + (counts * (offsets - offset).square()).sum(dim=1)
    return torch.stack([(means[:, :1] + offset).squeeze(1), squares, coarse.sum(dim=1)], dim=1).unsqueeze(1)


def gather_moments(moments: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Gathers the moments of all processes, of all stages in one all-gather.

    Args:
        moments: Of this process, per stage shape [rows, 3, C_m], float64: number of values, mean, sum of squared
            deviations from it.
        group: The processes.

    Returns:
        One row per process, in the order of ranks: per stage shape [processes, 3, C_m].
    """
    rows = [_merge_rows(stage) for stage in moments]
    mine = torch.cat([row.flatten() for row in rows])
    everyones = _gather_alike(mine, group)
    return [part.unflatten(1, (3, -1)).contiguous() for part in everyones.split([row.numel() for row in rows], dim=1)]


def mean_over(sums: Sequence[Tensor], counts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Averages over the values of all processes, for all stages in one all-gather.

    Args:
        sums: Of this process, per stage shape [2, C_m], float64.
        counts: Per stage the number of values of all processes, one element.
        group: The processes.

    Returns:
        The sums of all processes, added in the order of ranks, divided by the counts.
    """
    mine = torch.cat([part.flatten() for part in sums])
    parts = _gather_alike(mine, group).sum(dim=0).split([part.numel() for part in sums])
    return [part.view_as(own) / count for part, own, count in zip(parts, sums, counts, strict=True)]


def _gather_alike(mine: Tensor, group: ProcessGroup) -> Tensor:
    """Gathers vectors of one length, [processes, length]."""
    everyones = mine.new_empty(size_of(group) * len(mine))
    dist.all_gather_into_tensor(everyones, mine, group=group)
    return everyones.view(-1, len(mine))


def _merge_rows(moments: Tensor) -> Tensor:
    """Merges rows of moments [rows, 3, C] to [3, C] by Chan's formula about the first row's mean."""
    counts, means, squares = moments.unbind(1)
    total = counts.sum(dim=0)
    offsets = means - means[0]
    offset = (counts * offsets).sum(dim=0) / total
    squares = squares.sum(dim=0) + (counts * (offsets - offset).square()).sum(dim=0)
    return torch.stack([total, means[0] + offset, squares])
