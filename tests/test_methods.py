"""One switch for all distillation methods: what each trains, and that they differ in nothing else."""

from __future__ import annotations

import pytest
import tiny_run
import torch
from tiny_run import quiet, tiny_config

from transkd_fast import models
from transkd_fast.train import ConfigError, build, load_config, methods, train, verify_config
from transkd_fast.train.config import check_config, save_config
from transkd_fast.train.methods import METHODS
from transkd_fast.train.settings import Config, DistillConfig
from transkd_fast.train.tasks import SegmentationTask

# Of each method, its distillation losses and the children of `TransKD` beside the student.
PARTS = {
    "none": ((), ()),
    "kd": (("kd_kl",), ()),
    "cwd": (("cwd_logits",), ()),
    "review": (("hcl",), ("review",)),
    "csf": (("hcl",), ("skfs",)),
    "pea": (("pea",), ("embed",)),
    "transkd-base": (("hcl", "pea"), ("skfs", "embed")),
    "transkd-gl": (("hcl", "pea"), ("skfs", "embed", "attn", "conv")),
    "transkd-ea": (("hcl", "pea"), ("skfs", "embed", "patch_embed", "fuse_weights")),
}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def task_of(config):
    student = build.build_model(config, config.student, 11, "student", quiet)
    if not config.distill.enabled:
        return SegmentationTask(student)
    teacher = build.build_model(config, config.teacher, 11, "teacher", quiet)
    return build.distillation_task(config, build.build_transkd(config, student, teacher), teacher, 11)


def test_all_methods_are_known():
    assert set(PARTS) == set(METHODS)


# The student's own layers beyond the stages hang on the class scores alone.
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_names_and_every_parameter_of_it(method, tmp_path):
    config = tiny_config(tmp_path, **{"distill.method": method})
    task = task_of(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 96, generator=generator)
    labels = torch.randint(0, 11, (3, 64, 96), generator=generator)
    terms = task.losses(images, labels)
    losses, parts = PARTS[method]
    assert set(terms) == {"ce", *losses}
    sum(terms.values()).backward()
    assert [name for name, p in task.model.named_parameters() if p.grad is None] == []
    if config.distill.enabled:
        children = {name.rstrip("1234") for name, _ in task.model.named_children()}
        children = {"embed" if name.endswith("_linearproject") else name for name in children}
        trained = {name for name in children if name not in ("student", "criterion", "logit_criterion")}
        assert trained == set(parts)


def test_students_start_alike_whatever_the_method(tmp_path):
    states = []
    for method in METHODS:
        states.append(task_of(tiny_config(tmp_path, **{"distill.method": method})).deployed.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize("method", ["none", "kd", "cwd", "review"])
def test_methods_train(method, tmp_path):
    config = tiny_config(tmp_path / method, **{"distill.method": method, "fit.epochs": 1, "teacher.fit.epochs": 1})
    result = train(config, quiet)
    assert 0 <= result.student.scores.miou <= 1
    assert (result.teacher is None) == (method == "none")
    saved = load_config(result.run_dir / "config.yaml")
    assert saved.distill == config.distill


@pytest.mark.parametrize("method", ["kd", "cwd", "review"])
def test_verify_compares_the_methods_losses(method, tmp_path):
    report = verify_config(tiny_config(tmp_path, **{"distill.method": method}), quiet)
    assert report.exit_code == 0
    assert {f"loss/{name}" for name in PARTS[method][0]} <= {row.name for row in report.rows}


def test_a_methods_settings_are_its_papers_unless_others_are_given():
    distill = load_config(None, ["distill.method=cwd"]).distill
    assert (distill.logit_temperature, distill.logit_weight) == (4.0, 3.0)
    distill = load_config(None, ["distill.logit_weight=2", "distill.method=cwd"]).distill
    assert (distill.logit_temperature, distill.logit_weight) == (4.0, 2.0)


def test_a_key_that_contradicts_the_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.variant: expected 'base', .*method='kd'.*got 'gl'"):
        load_config(None, ["distill.variant=gl", "distill.method=kd"])
    path = tmp_path / "config.yaml"
    path.write_text("distill: {method: transkd-gl, embeddings: [4]}\n")
    with pytest.raises(ConfigError, match=r"distill\.embeddings: expected \[1, 2, 3, 4\]"):
        load_config(path)
    assert load_config(None, ["distill.variant=gl", "distill.method=transkd-gl"]).distill.variant == "gl"
    with pytest.raises(ConfigError, match=r"distill\.method: expected one of .*got 'best'"):
        load_config(None, ["distill.method=best"])


def test_a_saved_configuration_says_the_same(tmp_path):
    config = load_config(None, ["distill.method=review"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_method_that_was_not_applied_is_refused():
    with pytest.raises(ConfigError, match=r"distill\.\w+: expected .*method='cwd'"):
        check_config(Config(distill=DistillConfig(method="cwd")))


def test_custom_leaves_all_keys():
    distill = load_config(None, ["distill.variant=ea", "distill.logits=true"]).distill
    assert distill.method == methods.CUSTOM and distill.variant == "ea" and distill.logits
