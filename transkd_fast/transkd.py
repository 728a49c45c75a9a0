"""TransKD: a student with the modules that are trained beside it, and the losses against a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from transkd_fast import functional
from transkd_fast.models.outputs import StageOutputs
from transkd_fast.nn import CSF, PEA, CWDLoss, EmbeddingAssistant, GLMixer, HCLLoss, KDLoss, PatchEmbedding, Review
from transkd_fast.nn._parameters import weight_and_bias
from transkd_fast.ops.pea import STAGE_WEIGHTS
from transkd_fast.reference.hcl import LEVEL_WEIGHTS

STAGES = 4
VARIANTS = ("base", "gl", "ea")
FEATURE_LOSSES = ("hcl", "cwd")
FUSIONS = ("csf", "review")
# By the name of the loss in `TransKDOutput`, since "cwd" may be that of the features too.
LOGIT_LOSSES = {"kd_kl": "kd_kl", "cwd": "cwd_logits"}


class TransKDOutput(NamedTuple):
    """What a `TransKD` model returns.

    Args:
        logits: The student's class scores, [B, K, H / 4, W / 4].
        losses: With a teacher, the distillation losses by name, 0-d each: "hcl" or "cwd", "pea", and
            "kd_kl" or "cwd_logits" where logits are distilled. Else empty.
        fused: Without a teacher, the maps that CSF or Knowledge Review makes, fine to coarse, [B, C'_m, H_m, W_m];
            empty without features. Else None.
        projected: Without a teacher, the projected embeddings of the aligned stages, fine to coarse,
            [B, N_m, C'_m]. Else None.

    Source: TransKD section III.
    """

    logits: Tensor | None
    losses: dict[str, Tensor]
    fused: list[Tensor] | None
    projected: list[Tensor] | None


class TransKD(nn.Module):
    """Distils a four-stage transformer into `student`, on which alone the logits depend and which alone is deployed.

    Children carry the names of the published checkpoints, so that parameter names, state dict and checkpoints agree
    without renaming: `skfs` (CSF), `embed{m}_linearproject` (PEA), `attn4`, `conv1`, `conv2`, `atten_weight`,
    `conv_weight` (GL-Mixer), `patch_embed{m}` and `fuse_weights` (embedding assistant). A single aligned stage's
    projection is `embed1_linearproject` whichever the stage, as published. Only what is used is built.

    "hcl" takes CSF's outputs before their last batch norms, whose results are never stored; hooks of CSF itself and of
    these batch norms do not run then (see `CSF.branches`).

    Args:
        student: Module that maps images [B, 3, H, W] to `StageOutputs`.
        student_channels: Its channels, four, fine to coarse.
        teacher_channels: The teacher's channels, four, fine to coarse.
        variant: "base", "gl" (mixes the student's stage-4 embedding) or "ea" (adds embedding assistants).
        mid_channels: Width of CSF; default 64.
        legacy: Follow the published rule for batches of 1 (see `CSF`); only for comparisons, one process.
        features: Whether feature maps are distilled; default yes.
        embeddings: Stages, counted from 1, whose patch embeddings are aligned; default all four.
        feature_loss: "hcl" or "cwd".
        feature_weights: Weights of the feature loss's four stages; default 1 each.
        embedding_weights: Weights of the four stages' embedding losses; default 0.1, 0.1, 0.5, 1.
        num_heads: The mixer's attention heads; default 8.
        mixer_residual: Whether the mixer adds its input; default no.
        temperature: Temperature of "cwd"; default 1.
        level_weights: Weights of the pooled levels of "hcl" (see `HCLLoss`); default 1/2, 1/4, 1/8.
        resize_student: Whether CSF's maps are resized to the teacher's features, bilinearly, where their height and
            width differ; default no: they are rejected.
        logits: Whether class scores are distilled too, which needs the teacher's; default no.
        logit_temperature: Temperature of their softmaxes; default 1.
        fusion: What brings the student's features to the teacher's channels: "csf", or "review" for Knowledge
            Review, with its own width; default "csf".
        logit_loss: Divergence of class scores: "kd_kl", softmaxes over classes, or "cwd", over pixels; default "kd_kl".

    Raises:
        ValueError: If an option has no meaning, or legacy is used over several processes.

    Source: TransKD section III; key names of the published checkpoints.
    """

    def __init__(
        self,
        student: nn.Module,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        variant: str = "base",
        mid_channels: int = 64,
        legacy: bool = False,
        features: bool = True,
        embeddings: Sequence[int] = (1, 2, 3, 4),
        feature_loss: str = "hcl",
        feature_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        embedding_weights: Sequence[float] = STAGE_WEIGHTS,
        num_heads: int = 8,
        mixer_residual: bool = False,
        temperature: float = 1.0,
        level_weights: Sequence[float] = LEVEL_WEIGHTS,
        resize_student: bool = False,
        logits: bool = False,
        logit_temperature: float = 1.0,
        fusion: str = "csf",
        logit_loss: str = "kd_kl",
    ) -> None:
        super().__init__()
        _check_choice("variant", variant, VARIANTS)
        _check_choice("feature_loss", feature_loss, FEATURE_LOSSES)
        _check_choice("fusion", fusion, FUSIONS)
        _check_choice("logit_loss", logit_loss, tuple(LOGIT_LOSSES))
        per_stage: dict[str, Sequence[Any]] = {
            "student_channels": student_channels,
            "teacher_channels": teacher_channels,
            "feature_weights": feature_weights,
            "embedding_weights": embedding_weights,
        }
        for name, values in per_stage.items():
            if len(values) != STAGES:
                raise ValueError(
                    f"TransKD: expected {name} to have {STAGES} entries, fine to coarse, got {list(values)}"
                )
        self.embeddings = tuple(sorted(set(embeddings)))
        if not set(self.embeddings) <= set(range(1, STAGES + 1)):
            raise ValueError(f"TransKD: expected embeddings to be stages from 1 to {STAGES}, got {tuple(embeddings)}")
        if variant == "gl" and STAGES not in self.embeddings:
            raise ValueError(
                f"TransKD: expected embeddings to include stage 4, which variant 'gl' mixes, got {embeddings}"
            )
        if variant == "ea" and not self.embeddings:
            raise ValueError("TransKD: expected embeddings to name a stage that variant 'ea' assists, got none")
        self.variant = variant
        self.student_channels = tuple(student_channels)
        self.teacher_channels = tuple(teacher_channels)
        self.embedding_weights = tuple(embedding_weights)
        self.feature_loss = feature_loss
        self.mixer_residual = mixer_residual
        self.resize_student = resize_student

        self.student = student
        self.skfs: CSF | None = None
        self.review: Review | None = None
        if features:
            if fusion == "review":
                self.review = Review(student_channels, teacher_channels)
            else:
                self.skfs = CSF(student_channels, teacher_channels, mid_channels, legacy=legacy)
            self.criterion: HCLLoss | CWDLoss = (
                HCLLoss(feature_weights, level_weights, resize_student)
                if feature_loss == "hcl"
                else CWDLoss(temperature, feature_weights, resize_student)
            )
        self.logit_loss = LOGIT_LOSSES[logit_loss]
        self.logit_criterion: KDLoss | CWDLoss | None = None
        if logits:
            self.logit_criterion = KDLoss(logit_temperature) if logit_loss == "kd_kl" else CWDLoss(logit_temperature)
        if self.embeddings:
            self._add_projections()
        if variant == "gl":
            self._add_mixer(num_heads)
        if variant == "ea":
            self._add_assistants()

    def _add_projections(self) -> None:
        stages = [m - 1 for m in self.embeddings]
        pea = PEA([self.student_channels[i] for i in stages], [self.teacher_channels[i] for i in stages])
        for m, linear in zip(self.embeddings, pea, strict=True):
            self.add_module(self._projection_name(m), linear)

    def _projection_name(self, stage: int) -> str:
        # The published models know either all stages or one, which they name as the first.
        return f"embed{stage if len(self.embeddings) > 1 else 1}_linearproject"

    def _add_mixer(self, num_heads: int) -> None:
        mixer = GLMixer(self.student_channels[-1], num_heads)
        self.attn4, self.conv1, self.conv2 = mixer.attention, mixer.conv_a, mixer.conv_b
        self.atten_weight, self.conv_weight = mixer.attention_weight, mixer.conv_weight

    def _add_assistants(self) -> None:
        assistant = EmbeddingAssistant(self.student_channels, self.teacher_channels)
        self.fuse_weights = nn.ParameterDict()
        for m in self.embeddings:
            self.add_module(f"patch_embed{m}", assistant.embeddings[m - 1])
            self.fuse_weights[str(m - 1)] = assistant.projection_scales[m - 1]
            self.fuse_weights[str(m - 1 + STAGES)] = assistant.assistant_scales[m - 1]

    def forward(self, images: Tensor, teacher: StageOutputs | None = None) -> TransKDOutput:
        """Runs the student, and computes the losses against the teacher's outputs or the maps they would compare.

        Args:
            images: RGB images in [0, 1], shape [B, 3, H, W].
            teacher: The frozen teacher's outputs for the same images; its logits are used where logits are distilled.

        Returns:
            Logits, losses, fused maps and projected embeddings (see `TransKDOutput`).

        Raises:
            TypeError: If student or teacher give no `StageOutputs`.
            ValueError: If numbers of stages, channels or sizes do not fit, or the teacher is trainable.
        """
        outputs = self.student(images)
        self._check_stages("student", outputs, self.student_channels)
        if self.variant == "ea":
            self._check_assisted(images, outputs)
        if teacher is None:
            fusion = self.skfs if self.review is None else self.review
            fused = [] if fusion is None else fusion(outputs.features)
            return TransKDOutput(outputs.logits, {}, fused, self._project(images, outputs))
        self._check_stages("teacher", teacher, self.teacher_channels)
        self._check_teacher(outputs, teacher)
        losses = {}
        if self.skfs is not None:
            losses[self.feature_loss] = self._feature_loss(self.skfs, outputs.features, teacher.features)
        if self.review is not None:
            losses[self.feature_loss] = self.criterion(self.review(outputs.features), teacher.features)
        if self.embeddings:
            losses["pea"] = self._pea_loss(images, outputs, teacher)
        if self.logit_criterion is not None:
            losses[self.logit_loss] = self._logit_loss(self.logit_criterion, outputs.logits, teacher.logits)
        return TransKDOutput(outputs.logits, losses, None, None)

    def _feature_loss(self, csf: CSF, features: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        one_size = all(ours.shape[2:] == theirs.shape[2:] for ours, theirs in zip(features, teacher, strict=True))
        # A criterion of another class, or one with hooks, is to be called.
        criterion = self.criterion
        plain = type(criterion) is HCLLoss and not (criterion._forward_hooks or criterion._forward_pre_hooks)
        if not isinstance(criterion, HCLLoss) or not plain or not one_size or not csf.foldable:
            return criterion(csf(features), teacher)
        us, bns, process_group, samples = csf.branches(features)
        return functional.hcl_bn_loss(
            us,
            teacher,
            bns,
            criterion.stage_weights,
            level_weights=criterion.level_weights,
            process_group=process_group,
            samples=samples,
        )

    @staticmethod
    def _logit_loss(criterion: KDLoss | CWDLoss, student: Tensor | None, teacher: Tensor | None) -> Tensor:
        return criterion(student, teacher) if isinstance(criterion, KDLoss) else criterion([student], [teacher])

    def _projections(self) -> list[nn.Module]:
        return [self.get_submodule(self._projection_name(m)) for m in self.embeddings]

    def _aligned_embeddings(self, outputs: StageOutputs) -> list[Tensor]:
        """Selects the student's embeddings that are aligned, the last one mixed in variant GL."""
        xs = [outputs.embeddings[m - 1] for m in self.embeddings]
        if self.variant == "gl":
            xs[-1] = functional.gl_mixer(
                xs[-1],
                self.attn4(xs[-1]),
                *weight_and_bias(self.conv1),
                *weight_and_bias(self.conv2),
                self.atten_weight,
                self.conv_weight,
                self.mixer_residual,
            )
        return xs

    def _assist(self, images: Tensor, outputs: StageOutputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Computes variant EA's terms: assistant embeddings, projection scales, assistant scales."""
        inputs = [images, *outputs.features]
        return (
            [self._assistant(m)(inputs[m - 1]) for m in self.embeddings],
            [self.fuse_weights[str(m - 1)] for m in self.embeddings],
            [self.fuse_weights[str(m - 1 + STAGES)] for m in self.embeddings],
        )

    def _assistant(self, stage: int) -> PatchEmbedding:
        return cast(PatchEmbedding, self.get_submodule(f"patch_embed{stage}"))

    def _project(self, images: Tensor, outputs: StageOutputs) -> list[Tensor]:
        xs = self._aligned_embeddings(outputs)
        projected = [linear(x) for linear, x in zip(self._projections(), xs, strict=True)]
        if self.variant != "ea":
            return projected
        terms = zip(projected, *self._assist(images, outputs), strict=True)
        return [f_p * projection + f_a * assistant for projection, assistant, f_p, f_a in terms]

    def _pea_loss(self, images: Tensor, outputs: StageOutputs, teacher: StageOutputs) -> Tensor:
        weights, biases = zip(*map(weight_and_bias, self._projections()), strict=True)
        assistants, projection_scales, assistant_scales = (
            self._assist(images, outputs) if self.variant == "ea" else (None, None, None)
        )
        return functional.pea_loss(
            self._aligned_embeddings(outputs),
            weights,
            biases,
            [teacher.embeddings[m - 1] for m in self.embeddings],
            [self.embedding_weights[m - 1] for m in self.embeddings],
            assistants,
            projection_scales,
            assistant_scales,
        )

    def _used(self, outputs: StageOutputs) -> dict[str, list[Tensor]]:
        """Selects what takes part; a model without patch embeddings may give none where none are aligned."""
        fused = self.skfs is not None or self.review is not None
        features = {"features": outputs.features} if fused or self.variant == "ea" else {}
        return features | ({"embeddings": outputs.embeddings} if self.embeddings else {})

    def _scores(self, who: str, outputs: StageOutputs) -> list[Tensor]:
        if self.logit_criterion is None:
            return []
        if outputs.logits is None:
            raise ValueError(
                f"TransKD: expected logits from the {who}, which are distilled, got None; run it with its decoder, or"
                " use logits=False"
            )
        return [outputs.logits]

    def _check_stages(self, who: str, outputs: StageOutputs, channels: Sequence[int]) -> None:
        if not isinstance(outputs, StageOutputs):
            raise TypeError(f"TransKD: expected the {who} to give StageOutputs, got {type(outputs).__name__}")
        for kind, tensors in self._used(outputs).items():
            dims, axis = (4, 1) if kind == "features" else (3, 2)
            if len(tensors) != STAGES:
                raise ValueError(f"TransKD: expected {STAGES} {kind} from the {who}, got {len(tensors)}")
            for m, (tensor, expected) in enumerate(zip(tensors, channels, strict=True)):
                if tensor.dim() != dims or tensor.shape[axis] != expected:
                    layout = f"[B, {expected}, H, W]" if dims == 4 else f"[B, N, {expected}]"
                    raise ValueError(
                        f"TransKD: expected the {who}'s {kind}[{m}] to have shape {layout}, got {list(tensor.shape)};"
                        f" {who}_channels is {list(channels)}, fine to coarse"
                    )

    def _check_assisted(self, images: Tensor, outputs: StageOutputs) -> None:
        """Checks that assistants give as many tokens as the student: their strides are fixed, the student's are not."""
        for m in self.embeddings:
            name, x = ("the images", images) if m == 1 else (f"features[{m - 2}]", outputs.features[m - 2])
            embedding, expected = outputs.embeddings[m - 1], self._assistant(m).tokens_of(x)
            if embedding.shape[1] != expected:
                raise ValueError(
                    f"TransKD: expected the student's embeddings[{m - 1}] to have {expected} tokens like the assistant"
                    f" of {name} {list(x.shape)}, got {list(embedding.shape)}; variant 'ea' needs a student with"
                    " strides 4, 8, 16, 32"
                )

    def _check_teacher(self, student: StageOutputs, teacher: StageOutputs) -> None:
        students = self._used(student) | {"logits": self._scores("student", student)}
        teachers = self._used(teacher) | {"logits": self._scores("teacher", teacher)}
        for kind, tensors in students.items():
            for m, (ours, theirs) in enumerate(zip(tensors, teachers[kind], strict=True)):
                name = kind if kind == "logits" else f"{kind}[{m}]"
                if theirs.requires_grad:
                    raise ValueError(
                        f"TransKD: expected a frozen teacher, got {name} that requires a gradient; run the"
                        " teacher in eval mode under torch.no_grad()"
                    )
                if not torch.compiler.is_compiling() and torch.is_grad_enabled() and theirs.is_inference():
                    raise ValueError(
                        f"TransKD: expected teacher outputs that autograd can save, got the inference tensor"
                        f" {name}; run the teacher under torch.no_grad() instead of torch.inference_mode()"
                    )
                self._check_shapes(kind, name, ours, theirs)

    def _check_shapes(self, kind: str, name: str, ours: Tensor, theirs: Tensor) -> None:
        if kind == "logits":
            if theirs.shape != ours.shape:
                raise ValueError(
                    f"TransKD: expected the teacher's logits to have shape {list(ours.shape)} like the student's, got"
                    f" {list(theirs.shape)}; both must know the same classes and see the same images at the same size"
                )
            return
        free = {"features": (1, 2, 3) if self.resize_student else (1,), "embeddings": (2,)}[kind]
        if _without(ours.shape, free) != _without(theirs.shape, free):
            advice = "" if kind == "embeddings" else ", or set resize_student=True"
            raise ValueError(
                f"TransKD: expected the teacher's {name} to fit the student's {list(ours.shape)} but for"
                f" the channels, got {list(theirs.shape)}; both must see the same images at the same size{advice}"
            )


def _without(shape: torch.Size, axes: Sequence[int]) -> list[int]:
    return [size for i, size in enumerate(shape) if i not in axes]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"TransKD: expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")
