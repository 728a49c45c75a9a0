"""One step of a training: losses, gradients and the update, in any precision, over several batches and processes."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from transkd_fast.nn import SyncBatchNorm
from transkd_fast.train.build import autocast, derived_seed
from transkd_fast.train.config import ConfigError
from transkd_fast.train.distributed import ALONE, Processes
from transkd_fast.train.guards import Buffers, first_not_finite
from transkd_fast.train.settings import Config, FitConfig
from transkd_fast.train.tasks import DistillationTask, Task

Batch = tuple[Tensor, Tensor]
# Stage numbers in names of weights: patch_embed1, block1 and norm1 count from 1, stages.0 and skfs.0 from 0.
_STAGE = re.compile(
    r"(?:^|\.)(?:(?:patch_embed|block|norm|embed)([1-4])(?=[._])|(?:stages|skfs|abfs|layers)\.([0-3])\.)"
)


def learning_rate(fit: FitConfig, step: int, total: int) -> float:
    """The rate of one step: linear warm-up, then polynomial decay that reaches 0 at the end.

    Args:
        fit: the training's settings.
        step: number of steps already made.
        total: number of steps of the whole training.

    Returns:
        The learning rate.
    """
    if step < fit.warmup_steps:
        return fit.lr * (step + 1) / fit.warmup_steps
    progress = (step - fit.warmup_steps) / max(1, total - fit.warmup_steps)
    return fit.lr * (1 - min(progress, 1.0)) ** fit.power


def steps_per_epoch(name: str, fit: FitConfig, loader: DataLoader[Any], quarter_labels: bool) -> int:
    """Number of steps of an epoch; batches that fill no step are left out.

    Args:
        name: the training's name, for messages.
        fit: gives the number of batches per step.
        loader: training batches.
        quarter_labels: whether labels are taken at the logits' size.

    Returns:
        The number.

    Raises:
        ConfigError: if there is no step, or published rules do not go with accumulated gradients.
    """
    if fit.accumulate > 1 and quarter_labels:
        raise ConfigError(
            "legacy.quarter_labels: expected false with fit.accumulate > 1: which pixels count is known only after the"
            " forward pass"
        )
    if len(loader) < fit.accumulate:
        raise ConfigError(
            f"{name}: expected at least {fit.accumulate} batches per epoch for fit.accumulate={fit.accumulate}, got"
            f" {len(loader)}; lower accumulate or batch_size"
        )
    return len(loader) // fit.accumulate


def seed_step(seed: int) -> None:
    """Seed every generator that a step may draw from, so that its numbers follow from its place in the training.

    Args:
        seed: in [0, 2^32).
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@dataclass
class StepResult:
    """What a step came to.

    Args:
        terms: the loss terms, their sum "loss" and "grad_norm", 0-d each.
        made: whether the weights were updated; not where something was not finite.
        finite_loss: whether the loss terms were finite; False only where the step looked.
        first: the first tensor that was not finite, a phrase; empty where the step was made.
        gradients: norms on request: per loss term, and per stage of the whole gradient before clipping.
    """

    terms: dict[str, Tensor]
    made: bool = True
    finite_loss: bool = True
    first: str = ""
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Stepper:
    """Makes the steps of a training; holds the optimiser, the loss scaler and the average of the weights.

    Args:
        config: the run's configuration.
        name: the training's name, from which its random numbers derive.
        task: gives the losses; its networks are compiled, laid out and spread over processes as configured.
        fit: optimiser and schedule.
        total_steps: of the whole training.
        processes: those that train together.
    """

    def __init__(
        self, config: Config, name: str, task: Task, fit: FitConfig, total_steps: int, processes: Processes = ALONE
    ) -> None:
        self.config, self.name, self.task, self.fit_config = config, name, task, fit
        self.total_steps, self.processes = total_steps, processes
        self.device = next(task.model.parameters()).device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._prepare_networks()
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        betas = (fit.betas[0], fit.betas[1])
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(parameters, fit.lr, betas, weight_decay=fit.weight_decay, fused=fused)
        half = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        # On a GPU looking at every step makes the host wait for it.
        self.looks = self.device.type == "cpu" or config.on_nonfinite == "skip" or half
        self._buffers = Buffers(task.model) if config.on_nonfinite == "skip" or half else None
        self.average: AveragedModel | None = None
        if fit.ema is not None:
            self.average = AveragedModel(task.deployed, multi_avg_fn=get_ema_multi_avg_fn(fit.ema))

    def _prepare_networks(self) -> None:
        task, config = self.task, self.config
        if config.channels_last:
            task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if isinstance(task, DistillationTask):
                task.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.processes.count > 1:
            SyncBatchNorm.convert_sync_batchnorm(task.model)
        if config.compile:
            if config.log_gradients:  # takes several gradients of one graph, for which compiled code keeps its buffers
                torch._functorch.config.donated_buffer = False
            task.network = torch.compile(task.model)  # type: ignore[assignment]
            if isinstance(task, DistillationTask):
                task.teacher_network = torch.compile(task.teacher)  # type: ignore[assignment]
        if self.processes.count > 1:
            # Running statistics are the same everywhere, and the frozen teacher has no gradients to share.
            device_ids = [self.device] if self.device.type == "cuda" else None
            task.network = DistributedDataParallel(
                task.network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def step(self, batches: Sequence[Batch], number: int, measure: bool = False) -> StepResult:
        """Make a step on the gradient over some batches, which is that of one batch of all their images.

        Args:
            batches: images [B, 3, H, W] and labels [B, H, W] each.
            number: number of steps already made.
            measure: measure gradients' norms too, per loss term (of the first batch) and per stage.

        Returns:
            The step's outcome; nothing but the random generators has changed where it was not made.

        Raises:
            TrainingError: if a label is out of range, which on a GPU only the counts tell.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.fit_config, number, self.total_steps)
        if self._buffers is not None:
            self._buffers.keep()
        batches = [self._moved(batch) for batch in batches]
        factors = self._label_factors([labels for _, labels in batches])
        self.optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for index, factor in enumerate(factors):
            with self._gradients_stay_here(index + 1 < len(batches)):
                terms = self._losses(batches, index, number, factor)
                if measure and index == 0:
                    gradients |= self._norms_per_loss(terms)
                loss = torch.stack(list(terms.values())).sum()
                self.scaler.scale(loss).backward()
            for key, value in ({"loss": loss} | terms).items():
                summed[key] = summed[key] + value.detach() if key in summed else value.detach()
        self.scaler.unscale_(self.optimizer)
        if measure:
            gradients |= self._norms_per_stage()
        limit = math.inf if self.fit_config.clip_norm is None else self.fit_config.clip_norm
        summed["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), limit)
        result = StepResult(summed, gradients=gradients)
        if self.looks:
            self._look(result, batches, number, factors)
        if result.made:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lower where a gradient was not finite, as unscale_ noted
        if result.made and self.average is not None:
            self.average.update_parameters(self.task.deployed)
        return result

    def _moved(self, batch: Batch) -> Batch:
        images = batch[0].to(self.device, non_blocking=True, memory_format=self.layout)
        return images, batch[1].to(self.device, torch.int64, non_blocking=True)

    def _gradients_stay_here(self, more_to_come: bool) -> AbstractContextManager[Any]:
        network = self.task.network
        return network.no_sync() if more_to_come and isinstance(network, DistributedDataParallel) else nullcontext()

    def _label_factors(self, labels: Sequence[Tensor]) -> list[Tensor | None]:
        """Factors that make the mean of the batches' cross-entropies that of all their labelled pixels at once."""
        parts = len(labels) * self.processes.count
        if parts == 1:
            return [None]
        weights = torch.stack([self.task.cross_entropy.weight_of(part) for part in labels])
        total = self.processes.sum(weights.sum())
        return list(torch.where(total > 0, parts * weights / total, 0))

    def _losses(self, batches: Sequence[Batch], index: int, number: int, factor: Tensor | None) -> dict[str, Tensor]:
        purpose = self.name if self.processes.first else f"{self.name}/{self.processes.rank}"
        seed_step(derived_seed(self.config.seed, purpose, number * len(batches) + index))
        with autocast(self.device, self.config.precision):
            terms = self.task.losses(*batches[index])
        if factor is not None:
            terms = terms | {"ce": terms["ce"] * factor.to(terms["ce"].dtype)}
        return terms if len(batches) == 1 else {key: value / len(batches) for key, value in terms.items()}

    def _look(
        self, result: StepResult, batches: Sequence[Batch], number: int, factors: Sequence[Tensor | None]
    ) -> None:
        terms = result.terms
        losses = torch.stack([value for key, value in terms.items() if key != "grad_norm"])
        finite_loss = bool(losses.isfinite().all())
        result.finite_loss = not self.processes.any(not finite_loss, self.device)
        result.made = result.finite_loss and bool(terms["grad_norm"].isfinite())
        if result.made:
            return
        phrases = []
        for index, (images, _) in enumerate(batches):
            forward = partial(self._losses, batches, index, number, factors[index])
            phrases.append(first_not_finite(self.task, forward, images, terms))
        result.first = next((p for p in phrases if not p.startswith(("the loss", "the gradient"))), phrases[0])
        if self._buffers is not None:
            self._buffers.put_back()

    def _norms_per_loss(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        norms = {}
        for name, term in terms.items():
            scaled = self.scaler.scale(term)
            found = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
            norms[f"gradient/{name}"] = norm / self.scaler.get_scale()
        return norms

    def _norms_per_stage(self) -> dict[str, Tensor]:
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.task.model.named_parameters():
            if parameter.grad is not None:
                groups.setdefault(stage_of(name), []).append(parameter.grad)
        return {f"gradient/{key}": torch.nn.utils.get_total_norm(found) for key, found in groups.items()}


def stage_of(name: str) -> str:
    """The stage that a weight belongs to, from its name.

    Args:
        name: e.g. "student.block2.0.attn.q.weight".

    Returns:
        E.g. "student/stage2"; the first part of the name for what belongs to no stage.
    """
    top = name.partition(".")[0]
    found = _STAGE.search(name)
    if found is None:
        return top
    stage = int(found[1]) if found[1] else int(found[2]) + 1
    return f"{top}/stage{stage}" if top in ("student", "skfs") else f"stage{stage}"
