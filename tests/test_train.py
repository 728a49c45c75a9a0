"""The training loop: what is learnt, what is left alone, what stops it."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from tiny_run import pattern, quiet, rows, same, tiny_config
from torch.optim.lr_scheduler import PolynomialLR

from transkd_fast import functional, models
from transkd_fast.train import ConfigError, TrainingError, build, train
from transkd_fast.train.checkpoint import load_checkpoint
from transkd_fast.train.loop import Trainer
from transkd_fast.train.memory import keep_freed_memory, peak_memory
from transkd_fast.train.metrics import nearest_labels
from transkd_fast.train.settings import FitConfig
from transkd_fast.train.step import learning_rate
from transkd_fast.train.tasks import DistillationTask, LabelLoss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def make_trainer(config, folder):
    """A trainer of the student of `config`, with an untrained teacher."""
    sets = [build.build_dataset(config, split) for split in ("train", "val")]
    count = sets[0].num_classes
    student = build.build_model(config, config.student, count, "student", quiet)
    teacher = build.build_model(config, config.teacher, count, "teacher", quiet)
    task = DistillationTask(build.build_transkd(config, student, teacher), teacher)
    loaders = [
        build.build_loader(config, s, config.fit, "student", t) for s, t in zip(sets, (True, False), strict=True)
    ]
    return Trainer(config, "student", task, config.fit, *loaders, sets[0].classes, folder, {"kind": "student"}, quiet)


# The schedule.


@pytest.mark.parametrize("power", [1.0, 0.9, 2.0])
def test_decay_is_torchs_polynomial(power):
    fit = FitConfig(lr=0.5, power=power)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = PolynomialLR(optimizer, total_iters=20, power=power)
    for step in range(21):
        assert learning_rate(fit, step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()
    assert learning_rate(fit, 20, 20) == 0.0


def test_warm_up_is_linear_and_decay_starts_from_its_end():
    fit = FitConfig(lr=0.8, warmup_steps=4)
    rates = [learning_rate(fit, step, 12) for step in range(13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[4:] == pytest.approx([0.8 * (1 - k / 8) for k in range(9)])


@pytest.mark.parametrize("total", [3, 4])
def test_warm_up_longer_than_the_training(total):
    fit = FitConfig(lr=0.8, warmup_steps=4)
    assert [learning_rate(fit, step, total) for step in range(total)] == pytest.approx([0.2, 0.4, 0.6, 0.8][:total])


def test_every_step_has_its_own_rate(tmp_path):
    config = tiny_config(tmp_path, fit__epochs=3, fit__warmup_steps=2)
    trainer, rates = make_trainer(config, tmp_path), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.fit()
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


# The loop.


def test_losses_fall_and_the_scores_rise_when_a_few_frames_are_learnt_by_heart(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=25, data__augment="none", fit__eval_every=25), tmp_path)
    trainer.val_loader = trainer.train_loader
    before = trainer.evaluate()
    result = trainer.fit()
    table = rows(tmp_path)
    for term, share in (("loss", 0.6), ("ce", 0.6), ("hcl", 0.6), ("pea", 0.8)):
        assert float(table[-1][f"train/{term}"]) < share * float(table[0][f"train/{term}"]), term
    assert result.scores.pixel_accuracy > before.pixel_accuracy + 0.2


def test_a_step_is_adamw_on_the_sum_of_the_terms(tmp_path):
    config = tiny_config(
        tmp_path,
        fit__epochs=1,
        fit__weight_decay=0.1,
        fit__betas="[0.8,0.99]",
        fit__clip_norm=0.5,
        student__drop_path=0,
    )
    trainer = make_trainer(config, tmp_path)
    task = copy.deepcopy(trainer.task)
    trainer.fit()
    betas = (0.8, 0.99)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.01, betas=betas, weight_decay=0.1, fused=True)
    trainer.train_loader.sampler.set_epoch(0)
    for rate, (images, labels) in zip((0.01, 0.005), trainer.train_loader, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        sum(task.losses(images, labels.long()).values()).backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 0.5)
        optimizer.step()
    assert same(dict(trainer.task.model.state_dict()), dict(task.model.state_dict()))


@pytest.mark.parametrize("augment", ["none", "scale_crop"])
def test_every_epoch_has_its_own_order_and_augmentation(augment, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, fit__epochs=2, data__augment=augment, data__train_length=8)
    trainer, seen = make_trainer(config, tmp_path), []
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda batches, *rest: (seen.extend(batches[0][0]), step(batches, *rest))[1])
    trainer.fit()
    first, second = ([tuple(image.flatten().tolist()) for image in epoch] for epoch in (seen[:8], seen[8:]))
    assert first != second
    # Unaugmented, the same frames come in another order; augmented, hardly any frame comes back as it was.
    assert len(set(first)) == 8
    assert len(set(first) & set(second)) == (8 if augment == "none" else 0)


@pytest.mark.parametrize("logits", ["false", "true"])
def test_the_teacher_is_left_as_it_is_and_runs_its_decoder_only_where_logits_are_distilled(logits, tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, teacher__drop_path=0.5, distill__logits=logits), tmp_path)
    teacher, modes = trainer.task.teacher, []
    before = copy.deepcopy(teacher.state_dict())
    teacher.register_forward_hook(
        lambda module, _, out: modes.append(
            (any(m.training for m in module.modules()), out.features[0].requires_grad, out.logits is None)
        )
    )
    trainer.fit()
    assert modes == [(False, False, logits == "false")] * 4
    assert same(dict(teacher.state_dict()), dict(before))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {
        id(p) for g in trainer.optimizer.param_groups for p in g["params"]
    }


def test_evaluation_changes_nothing_and_puts_the_mode_back(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    trainer.task.model.train()
    before = copy.deepcopy(trainer.task.model.state_dict())
    assert trainer.evaluate() == trainer.evaluate()
    assert same(dict(trainer.task.model.state_dict()), dict(before))
    assert all(module.training for module in trainer.task.deployed.modules())


@pytest.mark.parametrize("clip_norm", ["0.001", "null"])
def test_gradients_are_clipped(clip_norm, tmp_path):
    trainer, norms = make_trainer(tiny_config(tmp_path, fit__clip_norm=clip_norm), tmp_path), []

    def measure(optimizer, *_):
        gradients = [p.grad for p in trainer.task.model.parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).double().norm().item())

    trainer.optimizer.register_step_pre_hook(measure)
    trainer.fit()
    if clip_norm == "null":
        assert min(norms) > 0.1
    else:
        assert norms == pytest.approx([0.001] * 4, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(precision, tmp_path):
    trainer, dtypes = make_trainer(tiny_config(tmp_path, precision=precision), tmp_path), set()
    for network in (trainer.task.deployed, trainer.task.teacher):
        network.stages[1].register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    result = trainer.fit()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {p.dtype for p in trainer.task.model.parameters()} == {torch.float32}
    assert all(math.isfinite(float(row["train/loss"])) for row in rows(tmp_path))
    assert math.isfinite(result.scores.miou)


def test_terms_are_weighted(tmp_path):
    images, labels = torch.rand(2, 3, 64, 64), torch.randint(10, (2, 64, 64))
    terms = []
    for weights in ((1.0, 1.0, None, 1.0), (0.5, 3.0, None, 2.0)):
        trainer = make_trainer(tiny_config(tmp_path, student__drop_path=0, distill__logits="true"), tmp_path)
        task = DistillationTask(trainer.task.model, trainer.task.teacher, *weights)
        terms.append({name: value.item() for name, value in task.losses(images, labels).items()})
    plain, weighted = terms
    assert list(plain) == ["ce", "hcl", "pea", "kd_kl"]
    terms = {"ce": plain["ce"], "hcl": 0.5 * plain["hcl"], "pea": 3 * plain["pea"], "kd_kl": 2 * plain["kd_kl"]}
    assert weighted == pytest.approx(terms)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(value, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=3), tmp_path)
    losses, calls = trainer.task.losses, []

    def broken(images, labels):
        calls.append(None)
        terms = losses(images, labels)
        return terms | {"hcl": terms["hcl"] * value} if len(calls) == 4 else terms

    monkeypatch.setattr(trainer.task, "losses", broken)
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    message = str(error.value)
    assert "loss, hcl, grad_norm not finite in epoch 2" in message and "ce" not in message.split("not finite")[0]
    assert str(tmp_path / "last.pt") in message
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


def test_a_gradient_that_is_not_finite_does_not_reach_a_checkpoint(tmp_path, monkeypatch):
    """The loss of the last step is finite; its gradient would make every weight NaN."""
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=2), tmp_path)
    losses, calls = trainer.task.losses, []

    def broken(images, labels):
        calls.append(None)
        terms = losses(images, labels)
        if len(calls) == 4:
            terms["ce"].register_hook(lambda gradient: gradient * math.nan)
        return terms

    monkeypatch.setattr(trainer.task, "losses", broken)
    with pytest.raises(TrainingError, match="grad_norm not finite in epoch 2"):
        trainer.fit()
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())


def spoil(trainer, name, value, after):
    """Makes one element of what the trainer holds `value` before its first step, or as a step's update would."""
    network = trainer.task.teacher if name.startswith("teacher.") else trainer.task.model
    tensor, steps = network.state_dict()[name.removeprefix("teacher.")], []

    def change(*_):
        steps.append(None)
        if len(steps) == after + 1:
            tensor.view(-1)[0] = value

    trainer.optimizer.register_step_post_hook(change)
    change()
    return trainer


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [
        ("base", "embed2_linearproject.weight", math.nan),
        ("base", "skfs.3.fcs.1.bias", math.inf),
        ("gl", "conv_weight", math.nan),
        ("gl", "attn4.proj.bias", math.nan),
        ("ea", "fuse_weights.6", -math.inf),
        ("ea", "patch_embed3.norm.weight", math.nan),
    ],
)
def test_a_weight_that_is_not_finite_is_named(variant, name, value, after, tmp_path):
    """After the step that it spoils none is finite, and the next look comes at the end of the epoch of four steps."""
    trainer = make_trainer(tiny_config(tmp_path, distill__variant=variant, data__train_length=8), tmp_path)
    trainer.stepper.looks = False  # at every step, as on a GPU
    with pytest.raises(TrainingError) as error:
        spoil(trainer, name, value, after).fit()
    assert str(error.value) == (
        "student: loss, ce, hcl, pea, grad_norm not finite in epoch 1 within the last 10 steps up to step 4;"
        f" not finite before: {name}; the last whole checkpoint is none; check the weights that it started from,"
        " or try a lower learning rate or precision=fp32"
    )


def test_a_statistic_that_is_not_finite_is_named_though_no_loss_shows_it(tmp_path):
    with pytest.raises(
        TrainingError, match=r"student: skfs\.1\.conv1\.1\.running_var not finite in epoch 1 .*; the last"
    ):
        spoil(make_trainer(tiny_config(tmp_path), tmp_path), "skfs.1.conv1.1.running_var", math.nan, 0).fit()


@pytest.mark.parametrize("name", ["stages.2.weight", "norm.running_mean"])
def test_a_teachers_weight_that_is_not_finite_is_named(name, tmp_path):
    with pytest.raises(TrainingError, match=f"not finite before: the teacher's {pattern(name)}; the last"):
        spoil(make_trainer(tiny_config(tmp_path), tmp_path), f"teacher.{name}", math.nan, 0).fit()


def test_of_many_weights_that_are_not_finite_a_few_are_named(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    names = [name for name, _ in trainer.task.model.named_parameters()]
    for name in names:
        spoil(trainer, name, math.nan, 0)
    with pytest.raises(TrainingError, match=f"before: {pattern(', '.join(names[:3]))} and {len(names) - 3} more; the"):
        trainer.fit()


def test_weights_are_not_blamed_for_a_loss_that_broke_first(tmp_path, monkeypatch):
    trainer, calls = make_trainer(tiny_config(tmp_path, data__train_length=8), tmp_path), []
    trainer.stepper.looks = False
    losses = trainer.task.losses

    def broken(images, labels):
        calls.append(None)
        terms = losses(images, labels)
        return terms | {"pea": terms["pea"] * (math.nan if len(calls) == 2 else 1)}

    monkeypatch.setattr(trainer.task, "losses", broken)
    with pytest.raises(TrainingError, match="not finite in epoch 1 within the last 10 steps up to step 4; the last"):
        trainer.fit()
    assert not any(p.isfinite().any() for p in trainer.task.model.embed1_linearproject.parameters())


def test_an_empty_parameter_is_no_error(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    trainer.task.model.register_buffer("nothing", torch.empty(0))
    trainer.fit()
    assert len(rows(tmp_path)) == 2


def test_evaluations_are_spaced_and_the_last_epoch_is_evaluated(tmp_path):
    make_trainer(tiny_config(tmp_path, fit__epochs=5, fit__eval_every=2), tmp_path).fit()
    assert [row["val/miou"] != "" for row in rows(tmp_path)] == [False, True, False, True, True]


def test_best_checkpoint_is_that_of_the_best_miou(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=4), tmp_path)
    scores = trainer.evaluate()
    course = iter([0.1, 0.3, 0.2, 0.3])
    monkeypatch.setattr(trainer, "evaluate", lambda: scores._replace(miou=next(course)))
    result = trainer.fit()
    assert (load_checkpoint(result.best)["epoch"], load_checkpoint(result.last)["epoch"]) == (2, 4)
    assert (result.best_miou, result.scores.miou) == (0.3, 0.3)


# Labels.


@pytest.mark.parametrize("quarter", [False, True])
def test_the_cross_entropy_is_at_the_labels_size_and_in_legacy_mode_at_the_logits(quarter):
    logits = torch.randn(2, 10, 6, 9, requires_grad=True)
    labels = torch.randint(10, (2, 22, 36)).where(torch.rand(2, 22, 36) > 0.1, 255)
    weights = torch.rand(10)
    loss = LabelLoss(weights, quarter)
    value = loss(logits, labels)
    if quarter:
        at_size = F.interpolate(labels[:, None].double(), (6, 9), mode="nearest-exact")[:, 0].long()
        scores = logits
        assert torch.equal(nearest_labels(labels, (6, 9)), at_size)
    else:
        at_size, scores = labels, F.interpolate(logits, (22, 36), mode="bilinear")
    expected = F.cross_entropy(scores, at_size, weights, ignore_index=255)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, expected)))
    loss(logits, labels)
    valid = at_size != 255
    right = (scores.argmax(1) == at_size) & valid
    assert loss.take_counts().tolist() == [2 * int(n) for n in (valid.sum(), right.sum(), (~valid).sum(), 0)]
    assert loss.take_counts().tolist() == [0] * 4


def test_pixel_accuracy_and_ignored_pixels_are_logged_with_the_losses(tmp_path, monkeypatch):
    lines, seen = [], []
    trainer = make_trainer(tiny_config(tmp_path, fit__epochs=2, student__drop_path=0, log_every=1), tmp_path)
    trainer.log = lines.append
    cross_entropy = trainer.task.cross_entropy

    def watched(images, labels):
        logits = trainer.task.deployed(images).logits
        seen.append((F.interpolate(logits.detach(), labels.shape[1:], mode="bilinear").argmax(1), labels))
        return {"ce": cross_entropy(logits, labels)}

    monkeypatch.setattr(trainer.task, "losses", watched)
    trainer.fit()
    for epoch, row in enumerate(rows(tmp_path)):
        predicted, labels = (torch.cat(t) for t in zip(*seen[2 * epoch : 2 * epoch + 2], strict=True))
        counted = labels != 255
        accuracy = (predicted == labels)[counted].double().mean().item()
        assert float(row["train/pixel_accuracy"]) == pytest.approx(accuracy)
        assert float(row["train/ignored"]) == pytest.approx(1 - counted.double().mean().item())
        assert f"pixel_accuracy {accuracy:.4f}" in lines[epoch]


@pytest.mark.parametrize("value", [10, 254])
def test_a_label_out_of_range_stops_the_training_on_the_cpu_at_once(value, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config(tmp_path), tmp_path)
    losses = trainer.task.losses
    monkeypatch.setattr(trainer.task, "losses", lambda images, labels: losses(images, labels.fill_(value)))
    with pytest.raises(TrainingError, match=rf"seg_ce: expected labels in \[0, 10\) or ignore_index 255, got {value}"):
        trainer.fit()


def test_labels_out_of_range_that_only_the_counts_tell_stop_the_training_at_the_next_look(tmp_path, monkeypatch):
    """As on a GPU, where the op does not look."""
    trainer = make_trainer(tiny_config(tmp_path, log_every=2, data__train_length=8, fit__epochs=1), tmp_path)
    calls, seg_ce = [], functional.seg_ce

    def counted(*arguments):
        loss, counts = seg_ce(*arguments)
        calls.append(None)
        return loss, counts + torch.tensor([0, 0, 0, 7 if len(calls) == 3 else 0])

    monkeypatch.setattr(functional, "seg_ce", counted)
    message = "student: expected labels from 0 to 9 or 255, got 7 pixels with others in epoch 1 within the last 2 steps"
    with pytest.raises(TrainingError, match=f"{message} up to step 4; set data.check=true"):
        trainer.fit()
    assert len(calls) == 4


def test_logits_of_different_numbers_are_not_distilled(tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.logits: .* equally many logits, got 12 and 10"):
        make_trainer(tiny_config(tmp_path, distill__logits="true", student__num_classes=12), tmp_path)


# The process.


def test_threads_are_set(tmp_path):
    threads = torch.get_num_threads()
    try:
        train(tiny_config(tmp_path / "run", threads=1, distill__enabled=False, fit__epochs=1), quiet)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_keeping_memory_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() == "needs glibc; this is darwin"


def test_peak_memory():
    def work():
        first, second = torch.zeros(2**20), torch.zeros(2**21)
        del first
        third = torch.zeros(2**19)
        return len(second) + len(third)

    held = torch.zeros(2**20)
    result, peak = peak_memory(work, CPU)
    assert result == 2**21 + 2**19 and len(held) == 2**20
    assert peak == pytest.approx(4 * (2**20 + 2**21), rel=1e-3)
