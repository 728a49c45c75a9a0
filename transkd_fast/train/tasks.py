"""What is minimised: the loss terms of a batch, on labels alone or against a teacher as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.data import IGNORE_INDEX
from transkd_fast.models import StageOutputs
from transkd_fast.train.metrics import nearest_labels
from transkd_fast.transkd import TransKD


class TrainingError(RuntimeError):
    """Training that cannot go on, e.g. with a loss that is not finite."""


class LabelLoss:
    """The cross-entropy of a task, with the pixel counts of all batches added up on the device.

    Args:
        class_weights: [K] factors, or None.
        quarter_labels: take labels at the logits' size, by the nearest pixel, as the published training does, instead
            of logits at the labels'.
    """

    def __init__(self, class_weights: Tensor | None = None, quarter_labels: bool = False) -> None:
        self.class_weights = class_weights
        self.quarter_labels = quarter_labels
        self.counts: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, and count its pixels.

        Args:
            logits: [B, K, h, w].
            labels: [B, H, W], integers.

        Returns:
            0-d.

        Raises:
            TrainingError: if labels do not fit the logits; on CPU also if one is out of range, which on a GPU only
                the counts tell.
        """
        if self.quarter_labels:
            labels = nearest_labels(labels, (logits.shape[2], logits.shape[3]))
        try:
            loss, counts = functional.seg_ce(logits, labels, self.class_weights, IGNORE_INDEX)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.counts = counts if self.counts is None else self.counts + counts
        return loss

    def weight_of(self, labels: Tensor) -> Tensor:
        """What the mean over a batch divides by: the summed class weights of its labelled pixels.

        Args:
            labels: [B, H, W], integers; those that count are below the number of class weights.

        Returns:
            float64, 0-d.
        """
        valid = labels != IGNORE_INDEX
        if self.class_weights is None:
            return valid.sum(dtype=torch.float64)
        classes = len(self.class_weights)
        return (self.class_weights[labels.clamp(0, classes - 1)] * valid).sum(dtype=torch.float64)

    def take_counts(self) -> Tensor:
        """Hand over the counts and start anew; see :class:`transkd_fast.functional.SegCE` for what is counted."""
        counts, self.counts = self.counts, None
        return torch.zeros(4, dtype=torch.int64) if counts is None else counts


class SegmentationTask:
    """Training a network on labels alone.

    Args:
        model: the network; returns StageOutputs.
        class_weights: [K] factors in the cross-entropy, or None.
        quarter_labels: see `LabelLoss`.
    """

    def __init__(self, model: nn.Module, class_weights: Tensor | None = None, quarter_labels: bool = False) -> None:
        self.model = model
        self.network = model
        self.cross_entropy = LabelLoss(class_weights, quarter_labels)

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated and exported."""
        return self.model

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted loss terms of a batch; training minimises their sum.

        Args:
            images: [B, 3, H, W], RGB in [0, 1].
            labels: int64 [B, H, W].

        Returns:
            0-d tensors by name.

        Raises:
            TrainingError: see `LabelLoss`.
        """
        return {"ce": self.cross_entropy(self.network(images).logits, labels)}


class DistillationTask:
    """Training a student against labels and a frozen teacher.

    Args:
        model: the wrapped student.
        teacher: the teacher; it is frozen, in eval mode, and runs without its decoder unless logits are distilled.
        feature_weight: factor of the feature loss.
        embedding_weight: factor of the patch-embedding loss.
        class_weights: [K] factors in the cross-entropy, or None.
        logit_weight: factor of the loss between class scores.
        quarter_labels: see `LabelLoss`.
    """

    def __init__(
        self,
        model: TransKD,
        teacher: nn.Module,
        feature_weight: float = 1.0,
        embedding_weight: float = 1.0,
        class_weights: Tensor | None = None,
        logit_weight: float = 1.0,
        quarter_labels: bool = False,
    ) -> None:
        self.model = model
        self.network: nn.Module = model
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_network = self.teacher
        self.weights = {model.feature_loss: feature_weight, "pea": embedding_weight, model.logit_loss: logit_weight}
        self.cross_entropy = LabelLoss(class_weights, quarter_labels)

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated and exported."""
        return self.model.student

    def teach(self, images: Tensor) -> StageOutputs:
        """The teacher's features and embeddings, and its logits where these are distilled.

        no_grad, not inference_mode: tensors made under inference_mode cannot be saved for the student's backward.
        """
        with torch.no_grad():
            return self.teacher_network(images, features_only=self.model.logit_criterion is None)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted loss terms of a batch; training minimises their sum.

        Args:
            images: [B, 3, H, W], RGB in [0, 1].
            labels: int64 [B, H, W].

        Returns:
            0-d tensors by name.

        Raises:
            TrainingError: see `LabelLoss`.
        """
        output = self.network(images, self.teach(images))
        terms = {"ce": self.cross_entropy(output.logits, labels)}
        return terms | {name: self.weights[name] * loss for name, loss in output.losses.items()}


Task = SegmentationTask | DistillationTask
