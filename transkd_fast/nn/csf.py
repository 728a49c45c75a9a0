"""The CSF module: brings a student's four maps to the teacher's channels, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transkd_fast import functional
from transkd_fast.nn._parameters import batch_norm_of, weight_and_bias, world_size
from transkd_fast.nn.sync_batch_norm import SyncBatchNorm, synchronised_over
from transkd_fast.ops._collectives import samples_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIN_SQUEEZE_CHANNELS = 32
LAST_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)


class Branches(NamedTuple):
    """Every stage's output before its last batch norm, and what normalises it, as `functional.hcl_bn_loss` takes them.

    Args:
        us: Outputs of the 3 x 3 convolutions, fine to coarse, shapes [B, C'_m, H_m, W_m].
        bns: Their batch norms; whoever normalises updates the running statistics.
        process_group: Processes over whose batches the statistics are taken; None for this one alone.
        samples: Their batch sizes in the order of ranks; None where they were not asked for.

    Source: TransKD section III-C.
    """

    us: list[Tensor]
    bns: list[functional.BatchNorm]
    process_group: ProcessGroup | None
    samples: Sequence[int] | None


class CSF(nn.ModuleList):
    """Cross selective fusion: one stage per map, named "0" (deepest) to "3" (finest), under the published keys.

    Per stage x = BN(conv1x1(F)); the deepest stage passes v = x on, the others fuse x with the coarser stage's v; each
    returns BN(conv3x3(v)).

    A fusing stage computes from the parameters of `conv1[1]`, `fc`, `fc1` and `fcs` without calling these modules, so
    their hooks do not run; nor do those of CSF itself, of `conv2` and of `conv2[1]` where `branches` is asked.

    Over several processes `SyncBatchNorm.convert_sync_batchnorm` synchronises the statistics of the whole module; the
    processes' batches may then differ in size, but not their images. Each forward asks all processes for their batch
    sizes, which the host waits for, and each fusing stage costs one collective per direction.

    Args:
        in_channels: Student channels, fine to coarse.
        out_channels: Teacher channels, fine to coarse.
        mid_channels: Width M of the fused maps; default 64.
        reduction: The squeeze layer has max(M // reduction, 32) channels; default 16.
        legacy: Use the published second squeeze layer (`fc1`) for a batch of 1. Otherwise its weight is a buffer that
            is loaded and saved but not used.

    Raises:
        ValueError: If the channel lists are empty or differ in length, or legacy is used over several processes.

    Source: TransKD section III-C; keys of the published checkpoints.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int = 64,
        reduction: int = 16,
        legacy: bool = False,
    ) -> None:
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                "CSF: expected in_channels and out_channels to have one entry per stage,"
                f" got {list(in_channels)} and {list(out_channels)}"
            )
        if legacy:
            reject_legacy_over_processes()
        squeezed = max(mid_channels // reduction, MIN_SQUEEZE_CHANNELS)
        stages = reversed(list(zip(in_channels, out_channels, strict=True)))
        super().__init__(
            _Stage(c_in, mid_channels, c_out, squeezed if i else None, legacy) for i, (c_in, c_out) in enumerate(stages)
        )
        self.in_channels = tuple(in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Fuses the maps of all stages.

        Args:
            maps: Student maps, fine to coarse, shapes [B, C_m, H_m, W_m].

        Returns:
            Maps with the teacher's channels, fine to coarse, shapes [B, C'_m, H_m, W_m].

        Raises:
            ValueError: If the number of maps or their channels do not fit, one batch norm of a stage is synchronised
                and the other is not, or the maps of other processes have another size.
        """
        return self._run(maps, raw=False)[0]

    @property
    def foldable(self) -> bool:
        """Whether `branches` says all that `forward` does: known classes of last norms, one group, no hooks."""
        norms = self._last_norms()
        stages: Any = self
        called = [self, *stages, *(stage.conv2 for stage in stages), *norms]
        return (
            all(type(norm) in LAST_NORMS for norm in norms)
            and len(_groups(norms)) <= 1
            and not any(module._forward_hooks or module._forward_pre_hooks for module in called)
        )

    def branches(self, maps: Sequence[Tensor]) -> Branches:
        """Fuses the maps of all stages, up to the batch norms with which `forward` would end.

        Args:
            maps: Student maps, fine to coarse, shapes [B, C_m, H_m, W_m].

        Returns:
            What is to be normalised and how (see `Branches`).

        Raises:
            TypeError: If the last batch norms are of other classes.
            ValueError: As `forward`, or if the last batch norms are not synchronised over the same processes.
        """
        norms = self._last_norms()
        if not all(type(norm) in LAST_NORMS for norm in norms):
            raise TypeError(
                "CSF: expected the last batch norms to be BatchNorm2d or SyncBatchNorm, got"
                f" {', '.join(type(norm).__name__ for norm in norms)}; call the module for its maps"
            )
        group = _one_group(norms, "the last batch norms of all stages")
        us, samples = self._run(maps, raw=True)
        return Branches(us, [batch_norm_of(norm) for norm in norms], group, samples.get(group))

    def _last_norms(self) -> list[_BatchNorm]:
        stages: Any = self
        return [stage.conv2[1] for stage in reversed(stages)]

    def _run(
        self, maps: Sequence[Tensor], raw: bool
    ) -> tuple[list[Tensor], dict[ProcessGroup | None, Sequence[int] | None]]:
        """Computes all stages' outputs, normalised or not, and the batch sizes of the groups that were asked."""
        if [t.dim() for t in maps] != [4] * len(self) or tuple(t.shape[1] for t in maps) != self.in_channels:
            raise ValueError(
                f"CSF: expected {len(self)} maps [B, C, H, W] with channels {list(self.in_channels)}, fine to coarse,"
                f" got shapes {[list(t.shape) for t in maps]}"
            )
        stages: Any = self
        self._reject_torchs_sync_batch_norm(maps[0])
        groups = [stage.process_group() for stage in stages]
        # In the order of stages, which is the same on all processes.
        samples: dict[ProcessGroup | None, Sequence[int] | None] = {
            group: None if group is None else samples_of([x.shape for x in maps], group, maps[0].device)
            for group in dict.fromkeys(groups)
        }
        outputs: list[Tensor] = []
        fused: Tensor | None = None
        for stage, x, group in zip(stages, reversed(maps), groups, strict=True):
            output, fused = stage(x, fused, samples[group], raw)
            outputs.insert(0, output)
        return outputs, samples

    def _reject_torchs_sync_batch_norm(self, x: Tensor) -> None:
        stages: Any = self
        called = [stages[0].conv1[1], *(stage.conv2[1] for stage in stages)]
        if x.device.type == "cpu" and any(isinstance(bn, nn.SyncBatchNorm) and synchronised_over(bn) for bn in called):
            raise ValueError(
                "CSF: expected batch norms that run on CPU, got torch.nn.SyncBatchNorm; use"
                " transkd_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
            )


class _Stage(nn.Module):
    """One stage of CSF; without squeeze channels it fuses nothing."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, squeezed: int | None, legacy: bool
    ) -> None:
        super().__init__()
        self.legacy = legacy
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        if squeezed is not None:
            self.fc = nn.Sequential(nn.Conv2d(mid_channels, squeezed, 1, bias=False), nn.BatchNorm2d(squeezed))
            fc1 = nn.Conv2d(mid_channels, squeezed, 1, bias=False)
            self.fc1 = nn.Sequential(fc1 if legacy else _Unused(fc1.weight))
            self.fcs = nn.ModuleList(nn.Conv2d(squeezed, mid_channels, 1) for _ in range(2))

    def forward(
        self, x: Tensor, coarser: Tensor | None, samples: Sequence[int] | None = None, raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        fused = self.conv1(x) if coarser is None else self._fuse(x, coarser, samples)
        return (self.conv2[0] if raw else self.conv2)(fused), fused

    def _fuse(self, x: Tensor, coarser: Tensor, samples: Sequence[int] | None) -> Tensor:
        fc_weight = cast(Tensor, self.fc[0].weight).flatten(1)
        norms = self._batch_norms()
        bn = batch_norm_of(norms[0])
        fc_bn: functional.BatchNorm | None = batch_norm_of(norms[1])
        if self.legacy:
            reject_legacy_over_processes()
            if x.shape[0] == 1:
                fc_weight, fc_bn = cast(Tensor, self.fc1[0].weight).flatten(1), None
        (weight_0, bias_0), (weight_1, bias_1) = (weight_and_bias(head) for head in self.fcs)
        heads = (weight_0.flatten(1), bias_0), (weight_1.flatten(1), bias_1)
        z = self.conv1[0](x)
        return functional.csf(
            z, coarser, bn, fc_weight, fc_bn, heads, process_group=self.process_group(), samples=samples
        )

    def _batch_norms(self) -> tuple[_BatchNorm, _BatchNorm]:
        return cast(_BatchNorm, self.conv1[1]), cast(_BatchNorm, self.fc[1])

    def process_group(self) -> ProcessGroup | None:
        """Finds the processes over which the op's batch norms take their statistics now; None for this one alone."""
        return _one_group(self._batch_norms(), "the batch norms of conv1 and fc") if hasattr(self, "fc") else None


def _groups(norms: Sequence[_BatchNorm]) -> set[ProcessGroup | None]:
    return {synchronised_over(bn) for bn in norms if bn.training or bn.running_mean is None}


def _one_group(norms: Sequence[_BatchNorm], which: str) -> ProcessGroup | None:
    """Finds the processes over which batch norms take their statistics now; None for this one alone."""
    groups = _groups(norms)
    if len(groups) > 1:
        raise ValueError(
            f"CSF: expected {which} to be synchronised over the same processes, got"
            f" {' and '.join(type(bn).__name__ for bn in norms)}; convert the whole model with"
            " transkd_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
        )
    return next(iter(groups), None)


class _Unused(nn.Module):
    """Keeps a published weight in the state dict without training it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())


def reject_legacy_over_processes() -> None:
    """Rejects the published batch-1 rule where a process's unused squeeze layer would stall the others.

    Raises:
        ValueError: If torch.distributed is initialised with more than one process.
    """
    if world_size() > 1:
        raise ValueError(
            f"CSF: expected one process with legacy=True, got {world_size()}: which squeeze layer trains depends on"
            " each process's batch size; use legacy=False"
        )
