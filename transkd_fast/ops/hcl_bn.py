"""hcl_bn: hcl of batch-normalised student maps, from the convolutions' raw output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from transkd_fast import backends
from transkd_fast.ops import _checks, _collectives, _registration
from transkd_fast.ops._autograd import distinct, first_derivative
from transkd_fast.ops._batch_norm import BATCH, RUNNING, TRACKED, settings_of, write_back
from transkd_fast.ops._layouts import is_channels_last, same_layout
from transkd_fast.ops.hcl import check_level_weights, table_shape
from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.hcl import LEVEL_WEIGHTS
from transkd_fast.reference.hcl_bn import hcl_bn as hcl_bn_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "hcl_bn"

backends.register_op(OP)
for _backend in ("cpu", "triton", "cuda"):
    backends.register(OP, _backend, _checks.same_precision)


def _reduce_fake(us: list[Tensor], parts: Sequence[int]) -> list[Tensor]:
    return [u.new_empty((n, 3, u.shape[1]), dtype=torch.float64) for u, n in zip(us, parts, strict=True)]


def _fwd_fake(us: list[Tensor], teachers: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables, states, sums = kept_shapes(us)
    dtype = torch.float64 if us[0].dtype == torch.float64 else torch.float32
    kept = ((tables, dtype), (states, torch.float64), (sums, torch.float64))
    flats = [us[0].new_empty(sum(math.prod(shape) for shape in shapes), dtype=kind) for shapes, kind in kept]
    return us[0].new_empty((), dtype=dtype), flats[0], flats[1], flats[2]


def kept_shapes(us: Sequence[Tensor]) -> tuple[list[Any], list[Any], list[Any]]:
    """Per stage the shapes of table, state and sums, which the forward returns one after the other."""
    return (
        [table_shape(u) for u in us],
        [(2, u.shape[1]) for u in us],
        [(u.shape[0], 2, u.shape[1]) for u in us],
    )


def stages_of(flat: Tensor, shapes: Sequence[Any]) -> list[Tensor]:
    """Views of these shapes one after the other."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _bwd_fake(
    grad: Tensor,
    us: list[Tensor],
    teachers: list[Tensor],
    tables: list[Tensor],
    states: list[Tensor],
    sums: list[Tensor],
    means: list[Tensor],
    affine: list[Tensor | None],
    norms: Sequence[int],
    weights: Sequence[float],
    level_weights: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    tensors = [t for m, u in enumerate(us) for t in (u, *affine[2 * m : 2 * m + 2])]
    return [torch.empty_like(t) for t, want in zip(tensors, wanted, strict=True) if want and t is not None]


_registration.register_fakes(hcl_bn_reduce=_reduce_fake, hcl_bn_fwd=_fwd_fake, hcl_bn_bwd=_bwd_fake)
_registration.register_triton(
    OP,
    hcl_bn_reduce="(Tensor[] us, int[] parts) -> Tensor[]",
    hcl_bn_fwd="(Tensor[] us, Tensor[] teachers, Tensor[] moments, Tensor?[] affine, Tensor(a!)[] running,"
    " Tensor(b!)[] batches, int[] norms, float[] momenta, float[] eps, float[] weights, float[] level_weights)"
    " -> (Tensor loss, Tensor tables, Tensor states, Tensor sums)",
    hcl_bn_bwd="(Tensor grad, Tensor[] us, Tensor[] teachers, Tensor[] tables, Tensor[] states, Tensor[] sums,"
    " Tensor[] means, Tensor?[] affine, int[] norms, float[] weights, float[] level_weights, bool[] wanted)"
    " -> Tensor[]",
)


class _Call(NamedTuple):
    """What a call is made of besides its tensors."""

    backend: str
    weights: tuple[float, ...]
    level_weights: tuple[float, ...]
    norms: tuple[int, ...]
    momenta: tuple[float, ...]  # negative: the average over all batches
    eps: tuple[float, ...]
    group: ProcessGroup | None
    grad_enabled: bool


def _parts(u: Tensor, backend: str) -> int:
    """Into how many parts a channel's values are cut, so that their blocks fill a large GPU; a matter of sizes only."""
    values, channels = u.numel() // u.shape[1], u.shape[1]
    # Channels-last, a block takes many channels together.
    blocks, wanted, least = (1, 256, 512) if is_channels_last(u) else (channels, 4096, 8192)
    parts = 1
    while backend != "cpu" and parts * blocks < wanted and values >= 2 * parts * least:
        parts *= 2
    return parts


class _HCLBN(torch.autograd.Function):
    """All stages at once; saves the maps as they are, and small tables per stage."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        stages, tracked = len(call.weights), call.norms.count(TRACKED)
        maps, statistics = tensors[: 4 * stages], tensors[4 * stages :]
        us, teachers, affine = _split(maps, stages)
        running, batches = statistics[: len(statistics) - tracked], statistics[len(statistics) - tracked :]
        moments = _moments(call, us)
        loss, tables, states, sums = _registration.raw_op("hcl_bn_fwd", call.backend)(
            us,
            teachers,
            moments,
            affine,
            running,
            batches,
            call.norms,
            call.momenta,
            call.eps,
            call.weights,
            call.level_weights,
        )
        ctx.call = call
        if call.grad_enabled:
            counts = [m[:, 0, :1].sum(dim=0) for m in moments] if call.group is not None else []
            ctx.save_for_backward(*maps, tables, states, sums, *counts)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        stages = len(call.weights)
        saved = iter(ctx.saved_tensors)
        us, teachers, affine = ([next(saved) for _ in range(count)] for count in (stages, stages, 2 * stages))
        tables, states, sums = (stages_of(next(saved), shapes) for shapes in kept_shapes(us))
        means: list[Tensor] = []
        need_u, _, need_affine = _split(ctx.needs_input_grad[1 : 1 + 4 * stages], stages)
        wanted = [w for m in range(stages) for w in (need_u[m], need_affine[2 * m], need_affine[2 * m + 1])]
        with torch.no_grad():
            if call.group is not None and any(norm != RUNNING for norm in call.norms):
                means = _collectives.mean_over([s.sum(dim=0) * grad for s in sums], list(saved), call.group)
            gradients = iter(
                _registration.raw_op("hcl_bn_bwd", call.backend)(
                    grad,
                    us,
                    teachers,
                    tables,
                    states,
                    sums,
                    means,
                    affine,
                    call.norms,
                    call.weights,
                    call.level_weights,
                    wanted,
                )
            )
        if torch.is_grad_enabled():
            sources = [grad, *us, *(t for t in affine if t is not None)]
            gradients = (first_derivative(OP, gradient, *sources) for gradient in gradients)
        of_u: list[Tensor | None] = []
        of_affine: list[Tensor | None] = []
        for m in range(stages):
            for into, want in zip((of_u, of_affine, of_affine), wanted[3 * m : 3 * m + 3], strict=True):
                into.append(next(gradients) if want else None)
        without = len(ctx.needs_input_grad) - 1 - 4 * stages
        return None, *of_u, *[None] * stages, *of_affine, *[None] * without


def _split(values: Sequence[Any], stages: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Cuts what is in the order of the Function's tensors: us, teachers, weight and bias of every stage."""
    return values[:stages], values[stages : 2 * stages], values[2 * stages :]


def _moments(call: _Call, us: Sequence[Tensor]) -> list[Tensor]:
    """Per stage count, mean and centred squares, [rows, 3, C]; no rows where running statistics normalise."""
    result = [u.new_empty((0, 3, u.shape[1]), dtype=torch.float64) for u in us]
    of_batch = [m for m, norm in enumerate(call.norms) if norm != RUNNING]
    if of_batch:
        chosen = [us[m] for m in of_batch]
        moments = _registration.raw_op("hcl_bn_reduce", call.backend)(chosen, [_parts(u, call.backend) for u in chosen])
        if call.group is not None:
            moments = _collectives.gather_moments(moments, call.group)
        for m, rows in zip(of_batch, moments, strict=True):
            result[m] = rows
    return result


def hcl_bn_loss(
    us: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    bns: Sequence[BatchNorm],
    stage_weights: Sequence[float] | None = None,
    backend: str | None = None,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    process_group: ProcessGroup | None = None,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """HCL over all stages of batch-normalised maps that are never stored: ``sum_m weight_m hcl(BN_m(u_m), teacher_m)``.

    Args:
        us: output of the last convolution before its batch norm, one map [B, C_m, H_m, W_m] per stage, any floating
            dtype, NCHW or channels-last.
        teacher_maps: the same shapes; their dtype may differ. No gradient flows into them.
        bns: one batch norm over C_m channels per stage; running statistics are updated in place in training.
        stage_weights: one factor per stage; default 1 each (the published alternative is 0.1, 0.1, 0.5, 1).
        backend: see :mod:`transkd_fast.backends`.
        level_weights: weights of the pooled levels (see :func:`hcl_loss`).
        process_group: processes over whose batches together the batch norms take their statistics; default: this
            process alone. Each of them calls with at least one sample, and with maps of one size. The loss is this
            process's; gradients of the parameters are its share, to be summed over the group.
        samples: batch sizes of the group's processes in the order of ranks; default: asked of them, which waits for
            the device. Only the eager backend needs them.

    Returns:
        Loss, 0-d, float32 (float64 for float64 maps).

    Raises:
        TypeError: if a map is no floating tensor.
        ValueError: if the numbers of stages, shapes or devices do not fit, a map is empty, or a channel has a single
            value in training.
        BackendError: if the chosen backend cannot run.

    Source:
        TransKD section III-B; the batch norm is the last one of a CSF stage.
    """
    if not len(us):
        raise ValueError("hcl_bn_loss: expected at least one stage, got empty lists")
    _checks.check_length("hcl_bn_loss", "teacher_maps", teacher_maps, len(us), "us")
    _checks.check_length("hcl_bn_loss", "bns", bns, len(us), "us")
    weights = [1.0] * len(us) if stage_weights is None else list(stage_weights)
    _checks.check_length("hcl_bn_loss", "stage_weights", weights, len(us), "us")
    _checks.check_weights("hcl_bn_loss", "stage_weights", weights)
    check_level_weights("hcl_bn_loss", level_weights)
    for stage, (u, teacher, bn) in enumerate(zip(us, teacher_maps, bns, strict=True), start=1):
        _check_stage(f"hcl_bn_loss: stage {stage}", u, teacher, bn, process_group)
    tracked = [bn[2:4] for bn in bns if bn.training and bn.running_mean is not None]
    if any(len({id(t) for t in statistics}) < len(tracked) for statistics in zip(*tracked, strict=True)):
        raise ValueError("hcl_bn_loss: expected running statistics of its own for every stage, got one for several")
    chosen = backends.choose(OP, (*us, *teacher_maps), backend)
    if process_group is not None and _collectives.size_of(process_group) == 1:
        process_group = None
    if chosen == "eager":
        joining = None
        if process_group is not None:
            if samples is None:
                samples = _collectives.samples_of([u.shape for u in us], process_group, us[0].device, OP)
            _collectives.check_samples(samples, us[0].shape[0], process_group, OP)
            joining = _collectives.joining(samples, process_group)
        stages = zip(weights, us, teacher_maps, bns, strict=True)
        return torch.stack([w * hcl_bn_reference(u, t, bn, level_weights, joining) for w, u, t, bn in stages]).sum()

    pairs = [same_layout(u, teacher.detach()) for u, teacher in zip(us, teacher_maps, strict=True)]
    affine = [None if t is None else t.contiguous() for bn in bns for t in (bn.weight, bn.bias)]
    tensors = distinct([*(pair[0] for pair in pairs), *(pair[1] for pair in pairs), *affine])
    settings = [settings_of(bn) for bn in bns]
    own = [t for (norm, _, _), statistics in settings if norm != BATCH for t in statistics[:2] if t is not None]
    counters = [statistics[2] for (norm, _, _), statistics in settings if norm == TRACKED]
    running = [t.contiguous() for t in own]
    batches = [us[0].new_zeros((), dtype=torch.int64) if t is None else t for t in counters]
    call = _Call(
        chosen,
        tuple(map(float, weights)),
        tuple(map(float, level_weights)),
        tuple(norm for (norm, _, _), _ in settings),
        tuple(-1.0 if momentum is None else float(momentum) for (_, momentum, _), _ in settings),
        tuple(float(eps) for (_, _, eps), _ in settings),
        process_group,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    loss = _HCLBN.apply(call, *tensors, *running, *batches)
    kinds = [norm for (norm, _, _), _ in settings if norm != BATCH for _ in range(2)]
    changed = [(old, new) for old, new, kind in zip(own, running, kinds, strict=True) if kind == TRACKED]
    write_back([*changed, *((t, t) for t in counters if t is not None)])
    return loss


def _check_stage(name: str, u: Tensor, teacher: Tensor, bn: BatchNorm, group: ProcessGroup | None) -> None:
    _checks.check_given(name, u=u, teacher=teacher)
    _checks.check_shape(name, "u", u, "B", "C", "H", "W")
    _checks.check_not_empty(name, "u", u)
    if teacher.shape[2:] != u.shape[2:] and teacher.shape[:2] == u.shape[:2]:
        raise ValueError(
            f"{name}: expected teacher to have shape {list(u.shape)} like u, got {list(teacher.shape)}; to resize the"
            " student's maps, normalise them and use hcl_loss with resize_student=True"
        )
    _checks.check_shape(name, "teacher", teacher, *u.shape)
    _checks.check_batch_norm(name, "bn", bn, u.shape[1], u.device)
    if group is None or _collectives.size_of(group) == 1:
        _checks.check_batch_statistics(name, "u", u, bn, u.shape[0])
