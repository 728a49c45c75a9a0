"""What a run can be told: one dataclass per part of the configuration, with the meaning and default of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transkd_fast.reference.hcl import LEVEL_WEIGHTS


@dataclass
class DataConfig:
    """Which images, at which size, augmented how.

    Args:
        name: dataset, one of ``transkd_fast.data.DATASETS``.
        root: folder of a dataset that is read from files.
        size: height and width that images are trained and evaluated at, pixels.
        augment: "scale_crop" (random scale, crop, flip, jitter), "published" (flip, shift by up to 2 px) or "none".
        scale: range of the random scale of "scale_crop".
        flip: probability of a horizontal flip of "scale_crop".
        jitter: strength of the colour jitter of "scale_crop", 0 for no jitter.
        train_length: number of training frames of a procedural dataset.
        val_length: number of validation frames of a procedural dataset.
        cache: keep a procedural dataset's drawn scenes in memory.
        workers: loader processes; 0 loads in the training process.
        check: read every file once before training, so that a broken one is an error now and not in epoch 7.
        train_split: split that is trained on, e.g. "trainaug" of "voc2012" or "train_extra" of "cityscapes".
        allow_orphans: leave out images without a label and labels without an image, and report how many, instead of
            refusing them.
        coarse: train "cityscapes" on its coarse labels.
        conditions: of "acdc", those to take; null for all four.
    """

    name: str = "street_scenes"
    root: str | None = None
    size: list[int] = field(default_factory=lambda: [512, 1024])
    augment: str = "scale_crop"
    scale: list[float] = field(default_factory=lambda: [0.75, 1.5])
    flip: float = 0.5
    jitter: float = 0.0
    train_length: int | None = None
    val_length: int | None = None
    cache: bool = True
    workers: int = 0
    check: bool = True
    train_split: str = "train"
    allow_orphans: bool = False
    coarse: bool = False
    conditions: list[str] | None = None


@dataclass
class FitConfig:
    """How one model is trained: AdamW with a per-iteration schedule.

    Args:
        epochs: passes over the training frames.
        batch_size: frames per step.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        betas: AdamW's moment coefficients.
        warmup_steps: steps of linear warm-up.
        power: exponent of the polynomial decay to 0 (1 is linear).
        clip_norm: limit of the gradients' global norm; null switches clipping off.
        class_weights: factors in the cross-entropy: a list with one per logit; "dataset" for those of the published
            training, where the dataset has any; "computed" for 1 / ln(1.02 + share of the training pixels); null for 1
            each. The run's config.yaml names the numbers.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        accumulate: batches whose gradients are added up for one step, as if they were one.
        ema: decay per step of a moving average of the network's weights, which is then what is evaluated; null for
            none.
    """

    epochs: int = 100
    batch_size: int = 2
    lr: float = 6e-5
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup_steps: int = 0
    power: float = 1.0
    clip_norm: float | None = 1.0
    class_weights: Any = None
    eval_every: int = 1
    accumulate: int = 1
    ema: float | None = None


@dataclass
class ModelConfig:
    """Which network.

    Args:
        model: one of ``transkd_fast.models.MODELS``, "timm:NAME" for a hierarchical backbone of timm, or
            "package.module:factory" for your own.
        weights: file to load, strictly; null for random weights.
        weights_prefix: take only the file's keys that start so: "student." takes the student out of a TransKD file.
        num_classes: number of logits; null for the dataset's number of classes.
        drop_path: rate of stochastic depth at the last block.
    """

    model: str = "segformer_b0"
    weights: str | None = None
    weights_prefix: str = ""
    num_classes: int | None = None
    drop_path: float = 0.1


@dataclass
class TeacherConfig(ModelConfig):
    """The teacher; without weights it is trained first, as ``fit`` says.

    Args:
        fit: its training.
        expect_miou: least mIoU on the validation frames, in (0, 1], below which a teacher with weights is refused; null
            for no check.
    """

    model: str = "segformer_b2"
    fit: FitConfig = field(default_factory=FitConfig)
    expect_miou: float | None = None


@dataclass
class DistillConfig:
    """The distillation terms, see :class:`transkd_fast.TransKD`.

    Args:
        method: one of ``transkd_fast.train.methods.METHODS``, which sets the keys that it stands for; "custom" leaves
            all keys as they are.
        enabled: False trains the student alone.
        variant: "base", "gl" or "ea".
        mid_channels: width of CSF.
        legacy: the published batch-1 rule.
        fusion: "csf", or "review" for Knowledge Review, brings the student's features to the teacher's channels.
        feature_loss: "hcl" or "cwd" between these maps and the teacher's features; null for no features.
        feature_weight: factor of the feature loss.
        feature_stage_weights: factor per stage in it, fine to coarse.
        embeddings: stages whose patch embeddings are aligned, out of 1 to 4.
        embedding_weight: factor of the patch-embedding loss.
        embedding_stage_weights: factor per stage in it, fine to coarse.
        temperature: of "cwd".
        feature_level_weights: of "hcl": factor per pooled level, 4 x 4, 2 x 2, 1 x 1; the full size has 1.
        resize_student: resize CSF's maps to the teacher's where they differ in height or width, instead of refusing.
        logits: distil class scores too; the teacher then runs with its decoder.
        logit_loss: "kd_kl", softmaxes over classes, or "cwd", softmaxes over pixels.
        logit_weight: factor of the loss between class scores.
        logit_temperature: temperature of that loss.
    """

    method: str = "custom"
    enabled: bool = True
    variant: str = "base"
    mid_channels: int = 64
    legacy: bool = False
    fusion: str = "csf"
    feature_loss: str | None = "hcl"
    feature_weight: float = 1.0
    feature_stage_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0, 1.0])
    embeddings: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    embedding_weight: float = 1.0
    embedding_stage_weights: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.5, 1.0])
    temperature: float = 1.0
    feature_level_weights: list[float] = field(default_factory=lambda: list(LEVEL_WEIGHTS))
    resize_student: bool = False
    logits: bool = False
    logit_loss: str = "kd_kl"
    logit_weight: float = 1.0
    logit_temperature: float = 1.0


@dataclass
class LegacyConfig:
    """What the published training does otherwise; only for comparisons. ``distill.legacy`` has its batch-1 rule.

    Args:
        quarter_labels: train on labels at the logits' size, a quarter of the images', instead of at the images' size.
    """

    quarter_labels: bool = False


@dataclass
class VerifyConfig:
    """How ``transkd verify`` compares; see :mod:`transkd_fast.train.verify`.

    Args:
        precision: "fp32" or "bf16"; null for the run's.
        batches: number of batches.
        batch_size: frames per batch.
        limit_fp32: largest max-norm relative difference allowed in fp32.
        limit_bf16: the same in bf16.
    """

    precision: str | None = None
    batches: int = 2
    batch_size: int = 4
    limit_fp32: float = 1e-4
    limit_bf16: float = 2e-2


@dataclass
class Config:
    """A whole run.

    Args:
        run_dir: folder that receives everything the run writes.
        seed: seed of weights, orders and augmentations.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "fp32", "bf16" or "fp16" (autocast, the last with a scaled loss).
        compile: run student and teacher through torch.compile in training.
        channels_last: keep weights and images channels-last.
        backend: "auto" or one of ``transkd_fast.backends.BACKENDS``, for all ops; null leaves the choice to
            ``TRANSKD_FAST_BACKEND``, and to "auto" where that is not set.
        threads: CPU threads of torch; null leaves torch's choice.
        keep_memory: on CPU with glibc, keep freed memory in the process (see ``transkd_fast.train.memory``).
        resume: go on from the run folder's last checkpoints.
        log_every: steps between updates of the progress bar and checks for non-finite losses.
        tensorboard: write what TensorBoard shows into the folder of every training.
        log_gradients: at these steps log the norm of every loss term's gradient, and that of every stage.
        checkpoint_every: steps between checkpoints within an epoch; null for those of `checkpoint_minutes` alone.
        checkpoint_minutes: minutes between checkpoints within an epoch; one is always written at its end.
        on_nonfinite: "stop" at a loss or gradient that is not finite, or "skip" the step, which on a GPU costs a
            synchronisation per step.
        skip_limit: skipped steps in a row that are still no error.
        data: images.
        teacher: teacher.
        student: student.
        fit: training of the student.
        distill: distillation terms.
        legacy: what the published training does otherwise.
        verify: comparison of backends.
    """

    run_dir: str = "runs/default"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    backend: str | None = None
    threads: int | None = None
    keep_memory: bool = True
    resume: bool = False
    log_every: int = 10
    tensorboard: bool = False
    log_gradients: bool = False
    checkpoint_every: int | None = None
    checkpoint_minutes: float = 10.0
    on_nonfinite: str = "stop"
    skip_limit: int = 20
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    legacy: LegacyConfig = field(default_factory=LegacyConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
