"""One step: in several batches, in halves, averaged, compiled, channels-last; and where something is not finite."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_run
import torch
from test_train import make_trainer
from tiny_run import pattern, quiet, rows, same, tiny_config
from torch import nn

from transkd_fast import models
from transkd_fast.models import StageOutputs
from transkd_fast.train import ConfigError, TrainingError, evaluate_run, train
from transkd_fast.train.checkpoint import load_checkpoint
from transkd_fast.train.loop import Trainer, evaluate
from transkd_fast.train.observers import Observer
from transkd_fast.train.preflight import IMAGENET_MEAN, IMAGENET_STD, check_teacher, file_hash
from transkd_fast.train.step import Stepper, stage_of
from transkd_fast.train.tasks import SegmentationTask


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def batch_of(count, generator):
    labels = torch.randint(10, (count, 64, 64), generator=generator)
    for index, frame in enumerate(labels):
        frame[: 12 * index] = 255
    return torch.rand(count, 3, 64, 64, generator=generator, dtype=torch.float64), labels


def test_a_step_in_parts_is_the_step_on_all_images_at_once(tmp_path):
    """With class weights, and parts that differ in their labelled pixels, one of which has none."""
    network = tiny_run.TinyNet(10).double()
    network.norm = nn.Identity()  # batch statistics are those of each part
    images, labels = batch_of(6, torch.Generator().manual_seed(0))
    labels[4:] = 255
    weights = []
    for sizes in ((6,), (2, 2, 2)):
        task = SegmentationTask(copy.deepcopy(network), torch.linspace(0.5, 2, 10, dtype=torch.float64))
        config = tiny_config(tmp_path, fit__accumulate=len(sizes))
        stepper = Stepper(config, "student", task, config.fit, 10)
        result = stepper.step(list(zip(images.split(sizes), labels.split(sizes), strict=True)), 0)
        weights.append({"loss": result.terms["loss"], "norm": result.terms["grad_norm"], **task.model.state_dict()})
        assert result.terms["loss"] == result.terms["ce"]
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


def test_batches_that_fill_no_step_are_left_out(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, data__train_length=7, fit__accumulate=2, fit__epochs=2), tmp_path)
    trainer.fit()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit__accumulate": 3}, "student: expected at least 3 batches per epoch for fit.accumulate=3, got 2"),
        (
            {"fit__accumulate": 2, "legacy__quarter_labels": "true"},
            "legacy.quarter_labels: expected false with fit",
        ),
    ],
)
def test_batches_per_step_that_do_not_fit_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=pattern(message)):
        train(tiny_config(tmp_path / "run", **settings), quiet)
    assert not (tmp_path / "run").exists()


def test_the_average_of_the_weights_is_evaluated_kept_and_loaded(tmp_path, monkeypatch):
    seen, make_step = [], Trainer._step

    def watched(self, *arguments):
        result = make_step(self, *arguments)
        if self.name == "student":
            seen.append(copy.deepcopy(self.task.deployed.state_dict()))
        return result

    monkeypatch.setattr(Trainer, "_step", watched)
    result = train(tiny_config(tmp_path / "run", fit__ema=0.75), quiet)
    expected = dict(seen[0])
    for state in seen[1:]:
        for name, tensor in state.items():
            averaged = "norm" not in name or name in ("norm.weight", "norm.bias")  # statistics are the latest
            expected[name] = 0.75 * expected[name] + 0.25 * tensor if averaged else tensor
    saved = load_checkpoint(tmp_path / "run" / "student" / "last.pt")
    torch.testing.assert_close(dict(saved["ema"]), expected, rtol=1e-5, atol=1e-6)
    assert not same(saved["ema"]["head.weight"], saved["model"]["student.head.weight"])
    lines = []
    assert evaluate_run(tmp_path / "run", [], lines.append)[0] == result.student.scores
    assert any("averaged" in line for line in lines)


def test_half_precision_scales_the_loss_and_leaves_out_steps_that_overflow(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config(tmp_path, precision="fp16", data__train_length=8, fit__epochs=1), tmp_path)
    assert trainer.stepper.scaler.get_scale() == 2**16
    losses, calls, states, dtypes = trainer.task.losses, [], [], set()
    trainer.task.deployed.stages[1].register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))

    def overflowing(images, labels):
        calls.append(None)
        states.append(copy.deepcopy(dict(trainer.task.model.state_dict())))
        terms = losses(images, labels)
        if len(calls) == 2:
            terms["ce"].register_hook(lambda gradient: gradient * math.inf)
        return terms

    monkeypatch.setattr(trainer.task, "losses", overflowing)
    trainer.fit()
    # The second step is repeated once, to say what was not finite, and leaves everything as it was.
    assert dtypes == {torch.float16} and len(calls) == 5
    assert same(states[1], states[3]) and not same(states[3], states[4])
    assert trainer.stepper.scaler.get_scale() == 2**15
    assert load_checkpoint(tmp_path / "last.pt")["scaler"]["scale"] == 2**15
    row = rows(tmp_path)[0]
    assert row["train/skipped"] == "1.0" and math.isfinite(float(row["train/loss"]))


@pytest.mark.parametrize("setting", ["channels_last", "compile"])
def test_layout_and_compilation_change_no_key_and_hardly_a_number(setting, tmp_path, monkeypatch):
    compile_, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or compile_(module, backend="eager"))
    results = []
    for chosen in (False, True):
        folder = tmp_path / str(chosen)
        config = tiny_config(folder, student__drop_path=0, fit__epochs=1, fit__lr=1e-4, **{setting: chosen})
        trainer = make_trainer(config, folder)
        trainer.fit()
        results.append(load_checkpoint(folder / "last.pt")["model"])
    torch.testing.assert_close(*results, rtol=1e-3, atol=5e-4)
    if setting == "compile":
        assert compiled == [trainer.task.model, trainer.task.teacher]
    else:
        assert trainer.task.deployed.stages[1].weight.is_contiguous(memory_format=torch.channels_last)


# Not finite.


def spoiled(trainer, monkeypatch, steps, name="pea"):
    """Makes a loss NaN in some of the steps, counted from 0; returns the networks' states before all of them."""
    losses, states = trainer.task.losses, []

    def broken(images, labels):
        terms = losses(images, labels)
        return terms | {name: terms[name] * (math.nan if trainer.step in steps else 1)}

    make_step = trainer._step

    def watched(*arguments):
        states.append(copy.deepcopy(dict(trainer.task.model.state_dict())))
        return make_step(*arguments)

    monkeypatch.setattr(trainer.task, "losses", broken)
    monkeypatch.setattr(trainer, "_step", watched)
    return states


def test_a_step_that_is_not_finite_is_skipped_and_reported(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, on_nonfinite="skip", data__train_length=10, fit__epochs=1)
    trainer, lines = make_trainer(config, tmp_path), []
    trainer.log = lines.append
    states = spoiled(trainer, monkeypatch, {1, 2})
    trainer.fit()
    assert same(states[1], states[2]) and same(states[2], states[3]) and not same(states[3], states[4])
    row = rows(tmp_path)[0]
    assert row["train/skipped"] == "2.0" and math.isfinite(float(row["train/pea"]))
    assert lines[:2] == [
        f"student: step {step} of epoch 1 skipped: the loss pea is not finite; {step - 1} skipped so far"
        for step in (2, 3)
    ]


def test_too_many_skipped_steps_in_a_row_are_an_error(tmp_path, monkeypatch):
    settings = {"on_nonfinite": "skip", "skip_limit": 2, "data__train_length": 16}
    trainer = make_trainer(tiny_config(tmp_path, **settings), tmp_path)
    spoiled(trainer, monkeypatch, {0, 1, 3, 4, 5})
    message = "student: 3 steps skipped in a row up to step 6 of epoch 1, more than skip_limit=2: the loss pea is not"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()


@pytest.mark.parametrize(
    ("network", "name", "first"),
    [
        ("model", "student.stages.2.weight", "the output of student.stages.2"),
        ("model", "embed2_linearproject.weight", None),
        ("teacher", "stages.1.weight", "the output of teacher.stages.1"),
        ("images", "", "the images"),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named_before_any_weight_is_lost(network, name, first, tmp_path):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    if network == "images":
        moved = trainer.stepper._moved
        trainer.stepper._moved = lambda batch: (moved(batch)[0] * math.inf, moved(batch)[1])
    else:
        getattr(trainer.task, network).state_dict()[name].view(-1)[0] = math.nan
    before = copy.deepcopy(dict(trainer.task.model.state_dict()))
    with pytest.raises(TrainingError, match="not finite in epoch 1 at step 1; first not finite: ") as error:
        trainer.fit()
    assert first is None or f"first not finite: {first};" in str(error.value)
    weights = dict(trainer.task.model.named_parameters())
    for key, weight in weights.items():
        torch.testing.assert_close(weight.data, before[key], rtol=0, atol=0, equal_nan=True)
    assert not (tmp_path / "last.pt").exists()


def test_weights_that_a_step_made_infinite_are_not_saved(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=1), tmp_path)
    weight, steps = trainer.task.model.student.head.bias, []

    def after(*_):
        steps.append(None)
        if len(steps) == 2:  # the epoch's last
            weight.data[3] = math.inf

    trainer.optimizer.register_step_post_hook(after)
    with pytest.raises(TrainingError, match=r"student: student\.head\.bias not finite in epoch . after step"):
        trainer.fit()
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=repr)
def test_out_of_memory_says_what_to_try(error, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    monkeypatch.setattr(trainer, "_step", lambda *_: (_ for _ in ()).throw(error))
    advice = "try fit.batch_size=1 with fit.accumulate=2, or precision=bf16, or data.size below [64,64]"
    with pytest.raises(TrainingError, match=pattern(advice)) as caught:
        trainer.fit()
    assert "for batches of 2 images of 64 x 64" in str(caught.value)


def test_gradient_norms_are_those_of_each_loss_and_stage(tmp_path):
    class Values(Observer):
        def step(self, trainer, step, values):
            seen.append({key: value for key, value in values.items() if key.startswith("gradient/")})

    seen = []
    config = tiny_config(tmp_path, log_gradients="true", log_every=1, fit__epochs=1, student__drop_path=0)
    trainer = make_trainer(config, tmp_path)
    trainer.observers = (Values(),)
    task = copy.deepcopy(trainer.task)
    trainer.fit()
    trainer.train_loader.sampler.set_epoch(0)
    images, labels = next(iter(trainer.train_loader))
    names, parameters = zip(*task.model.named_parameters(), strict=True)
    terms = task.losses(images, labels.long())
    expected = {}
    for key, term in {**terms, "all": sum(terms.values())}.items():
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        gradients = {name: g.double() for name, g in zip(names, found, strict=True) if g is not None}
        if key != "all":
            expected[f"gradient/{key}"] = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    for name, g in gradients.items():
        stage = f"gradient/{stage_of(name)}"
        expected[stage] = math.hypot(expected.get(stage, 0.0), g.norm().item())
    assert seen[0] == pytest.approx(expected, rel=1e-4)
    assert {"gradient/ce", "gradient/student/stage1", "gradient/skfs/stage4"} <= set(expected)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("student.block2.0.attn.q.weight", "student/stage2"),
        ("student.patch_embed4.proj.bias", "student/stage4"),
        ("student.norm1.weight", "student/stage1"),
        ("student.linear_fuse.conv.weight", "student"),
        ("skfs.0.fcs.1.bias", "skfs/stage1"),
        ("embed3_linearproject.weight", "stage3"),
        ("fuse_weights.2", "fuse_weights"),
    ],
)
def test_stages_are_read_off_the_names(name, stage):
    assert stage_of(name) == stage


# The teacher.


class Threshold(nn.Module):
    """Class 1 where the first channel is above 0, as it would be of images with ImageNet's mean taken away."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return StageOutputs([], [], torch.cat([-images[:, :1], images[:, :1]], 1) * self.factor)


def test_a_teacher_that_expects_other_images_is_refused_with_advice():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0] > IMAGENET_MEAN[0]).long()
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=2)

    def score(network, batches):
        return evaluate(network, batches, 2, torch.device("cpu"), "fp32")

    teacher = Threshold()
    scores = score(teacher, loader)
    check_teacher(teacher, scores, None, "t.pt", loader, score)
    check_teacher(teacher, scores, scores.miou, "t.pt", loader, score)
    with pytest.raises(TrainingError) as error:
        check_teacher(teacher, scores, 0.9, "t.pt", loader, score)
    message = str(error.value)
    assert message.startswith("teacher: expected an mIoU of at least 90.00 % (teacher.expect_miou), got ")
    assert "with ImageNet's mean and deviation applied to its images 100.00 %" in message
    assert "it is best with ImageNet's mean and deviation applied to its images; choose the model" in message
    assert IMAGENET_STD[0] == 0.229


def test_the_teachers_file_is_hashed_and_its_score_expected(tmp_path):
    config = tiny_config(tmp_path / "first", distill__enabled="false", fit__epochs=1, student__model="tiny_teacher")
    train(config, quiet)
    weights, lines = tmp_path / "first" / "student" / "best.pt", []
    with pytest.raises(TrainingError, match=r"teacher: expected an mIoU of at least 99\.00 %"):
        train(tiny_config(tmp_path / "run", teacher__weights=weights, teacher__expect_miou=0.99), lines.append)
    assert f"teacher: SHA-256 of {weights} is {file_hash(weights)}" in lines
    assert not (tmp_path / "run" / "student").exists()
    assert file_hash(__file__) != file_hash(weights)
