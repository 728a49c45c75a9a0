"""The comparison of fused against eager: it agrees with right kernels, and finds wrong ones."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_run
import torch
from tiny_run import pattern, quiet, tiny_config

from transkd_fast import BackendError, backends, models
from transkd_fast.models import WeightsError
from transkd_fast.train import ConfigError, build, run, train, verify_config, verify_run
from transkd_fast.train.checkpoint import load_checkpoint
from transkd_fast.train.tasks import DistillationTask
from transkd_fast.train.verify import Row, _difference, verify


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def report_of(tmp_path, **settings):
    return verify_config(tiny_config(tmp_path / "run", **settings), quiet)


def change_kernel(monkeypatch, name, change, calls=None):
    """Passes the result or the gradients that an op's compiled `name` gives through `change`; `calls` counts from 1."""
    kernel, count = getattr(torch.ops.transkd_fast, name), []

    def changed(*arguments):
        result = kernel(*arguments)
        count.append(None)
        if calls is not None and len(count) not in calls:
            return result
        if isinstance(result, torch.Tensor):
            return change(result)
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else [change(each) for each in result]

    monkeypatch.setattr(torch.ops.transkd_fast, name, changed)
    return count


# Calls per batch.
RUNS = {"csf": 3, "hcl_bn": 1, "pea": 1, "seg_ce": 1}


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
@pytest.mark.parametrize("networks", [{}, tiny_run.SEGFORMER])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_kernels_agree(networks, precision, variant, tmp_path):
    report = report_of(tmp_path, precision=precision, verify__batches=2, distill__variant=variant, **networks)
    assert [(row.name, row.difference, row.bound) for row in report.disagreements] == []
    assert (report.exit_code, report.precision) == (0, precision)
    assert report.verdict == f"agree ({len(report.rows)} tensors)"
    expected = RUNS | ({"gl_mixer": 1} if variant == "gl" else {})
    fused = {op for op, states in backends.table().items() if states["cpu"] is None}
    assert report.runs == {(op, "cpu" if op in fused else "eager"): 2 * runs for op, runs in expected.items()}
    assert set(expected) <= fused
    assert report.fused_runs == sum(2 * runs for op, runs in expected.items() if op in fused)
    for measured in (report.checked, report.eager):
        assert measured.images_per_second > 0 and measured.peak_bytes > 2**10


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_every_term_and_every_trained_tensor_is_compared(variant, tmp_path):
    config = tiny_config(tmp_path / "run", distill__variant=variant)
    student, teacher = tiny_run.TinyNet(10), tiny_run.TinyTeacher(10)
    model = build.build_transkd(config, student, teacher)
    names = [f"grad/{name}" for name, _ in model.named_parameters()]
    names += [f"buffer/{name}" for name, _ in model.named_buffers()]
    report = verify_config(config, quiet)
    assert report.exit_code == 0
    assert [row.name for row in report.rows] == [
        *("loss/ce", "loss/hcl", "loss/pea"),
        *sorted(names),
    ]


def test_eager_alone_is_exit_2(tmp_path):
    report = report_of(tmp_path, backend="eager")
    assert (report.exit_code, report.verdict, report.fused_runs) == (2, "NOTHING FUSED RAN", 0)
    assert {backend for _, backend in report.runs} == {"eager"}


def test_no_compiled_extension_is_exit_2(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda backend: None if backend == "eager" else "not here")
    assert report_of(tmp_path).exit_code == 2


def test_a_gradient_that_is_off_by_a_hundredth_is_found(tmp_path, monkeypatch):
    calls = change_kernel(monkeypatch, "hcl_bn_bwd", lambda gradient: 1.01 * gradient)
    report = report_of(tmp_path)
    assert len(calls) >= 1
    assert report.exit_code == 1 and report.verdict.startswith("DISAGREE")
    wrong = {row.name for row in report.disagreements}
    assert all(name.startswith("grad/") for name in wrong)
    # CSF's gradients come from hcl alone, and are off by the whole hundredth.
    differences = [row.difference for row in report.rows if row.name.startswith("grad/skfs.") and row.name in wrong]
    assert max(differences) == pytest.approx(0.01, rel=0.05)


def test_a_fused_map_that_is_off_by_a_hundredth_is_found(tmp_path, monkeypatch):
    assert len(change_kernel(monkeypatch, "csf_fuse", lambda v: 1.01 * v)) == 0
    report = report_of(tmp_path)
    wrong = {row.name for row in report.disagreements}
    assert report.exit_code == 1 and {"loss/hcl", "grad/skfs.3.conv2.0.weight", "grad/skfs.1.fc.0.weight"} <= wrong
    # What csf itself updates comes from its inputs; the fused map moves what is behind it.
    assert "buffer/skfs.1.conv1.1.running_mean" not in wrong and "buffer/skfs.1.conv2.1.running_mean" in wrong


def test_gradients_of_the_fusion_that_are_off_by_a_hundredth_are_found(tmp_path, monkeypatch):
    change_kernel(monkeypatch, "csf_bwd_apply", lambda gradient: 1.01 * gradient)
    report = report_of(tmp_path)
    wrong = {row.name for row in report.disagreements}
    assert report.exit_code == 1 and all(name.startswith("grad/") for name in wrong)
    # Stage 1's come from one wrong kernel, the coarser ones' from several.
    for name in ("fcs.0.weight", "fcs.1.bias", "conv1.0.weight", "conv1.1.bias"):
        assert f"grad/skfs.3.{name}" in wrong


@pytest.mark.parametrize(
    ("argument", "name"), [(6, "conv1.1.running_var"), (7, "conv1.1.num_batches_tracked"), (9, "fc.1.running_var")]
)
def test_statistics_that_a_kernel_moves_too_far_are_found(argument, name, tmp_path, monkeypatch):
    kernel = torch.ops.transkd_fast.csf_fuse

    def changed(*arguments):
        result = kernel(*arguments)
        arguments[argument].mul_(2)
        return result

    monkeypatch.setattr(torch.ops.transkd_fast, "csf_fuse", changed)
    report = report_of(tmp_path)
    assert [row.name for row in report.disagreements] == [f"buffer/skfs.{stage}.{name}" for stage in (1, 2, 3)]


# Per term the settings that make it take part, its op, and a gradient that comes from it alone.
LOSSES = {
    "ce": ({}, "seg_ce", "student.head.weight"),
    "hcl": ({}, "hcl_bn", "skfs.2.conv2.1.weight"),
    "cwd": ({"distill__feature_loss": "cwd", "distill__temperature": 2.0}, "cwd", "skfs.2.conv2.1.weight"),
    # Far above the cross-entropy, so that the gradient is its own.
    "kd_kl": ({"distill__logits": "true", "distill__logit_weight": 1e4}, "cwd", "student.head.weight"),
}


@pytest.mark.parametrize(("term", "settings", "op", "alone"), [(name, *rest) for name, rest in LOSSES.items()])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_every_loss_that_is_off_by_a_hundredth_is_found(term, settings, op, alone, direction, tmp_path, monkeypatch):
    calls = change_kernel(monkeypatch, f"{op}_{direction}", lambda right: 1.01 * right)
    report = report_of(tmp_path, **settings)
    assert len(calls) >= 1
    assert report.exit_code == 1 and f"loss/{term}" in [row.name for row in report.rows]
    wrong = {row.name: row.difference for row in report.disagreements}
    if direction == "fwd":
        assert wrong == pytest.approx({f"loss/{term}": 0.01}, rel=1e-2)
    else:
        assert all(name.startswith("grad/") for name in wrong)
        assert wrong[f"grad/{alone}"] == pytest.approx(0.01, rel=0.05)


def test_moments_of_a_folded_batch_norm_that_are_off_by_a_hundredth_are_found(tmp_path, monkeypatch):
    change_kernel(monkeypatch, "hcl_bn_reduce", lambda moments: 1.01 * moments)
    report = report_of(tmp_path)
    wrong = {row.name for row in report.disagreements}
    assert report.exit_code == 1 and {f"buffer/skfs.{stage}.conv2.1.running_mean" for stage in range(4)} <= wrong


@pytest.mark.parametrize(("argument", "name"), [(4, "running_mean"), (5, "num_batches_tracked")])
def test_statistics_that_a_loss_moves_too_far_are_found(argument, name, tmp_path, monkeypatch):
    kernel = torch.ops.transkd_fast.hcl_bn_fwd

    def changed(*arguments):
        result = kernel(*arguments)
        arguments[argument][0].mul_(2)  # of the finest stage
        return result

    monkeypatch.setattr(torch.ops.transkd_fast, "hcl_bn_fwd", changed)
    assert [row.name for row in report_of(tmp_path).disagreements] == [f"buffer/skfs.3.conv2.1.{name}"]


# Per kernel the gradients that come from it alone, and are off by as much as it is.
PEA = {
    "base": [f"embed{m}_linearproject.{p}" for m in (1, 2, 3, 4) for p in ("weight", "bias")],
    "gl": ["embed1_linearproject.weight", "atten_weight", "conv_weight", "conv2.weight", "attn4.qkv.weight"],
    "ea": ["embed4_linearproject.bias", "fuse_weights.0", "fuse_weights.7", "patch_embed1.proj.weight"],
}
MIXER = ["atten_weight", "conv_weight", "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "attn4.proj.bias"]


@pytest.mark.parametrize(
    ("variant", "name", "alone"),
    [*((variant, "pea_bwd", alone) for variant, alone in PEA.items()), ("gl", "gl_mixer_bwd", MIXER)],
)
def test_gradients_of_embeddings_that_are_off_by_a_hundredth_are_found(variant, name, alone, tmp_path, monkeypatch):
    calls = change_kernel(monkeypatch, name, lambda gradient: 1.01 * gradient)
    report = report_of(tmp_path, distill__variant=variant)
    assert len(calls) >= 1 and report.exit_code == 1 and report.verdict.startswith("DISAGREE")
    wrong = {row.name: row.difference for row in report.disagreements}
    assert all(name.startswith("grad/") for name in wrong) and not any("skfs" in name for name in wrong)
    assert {n: wrong.get(f"grad/{n}") for n in alone} == pytest.approx(dict.fromkeys(alone, 0.01), rel=0.05)


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_an_embedding_loss_that_is_off_by_a_hundredth_is_found(variant, tmp_path, monkeypatch):
    change_kernel(monkeypatch, "pea_fwd", lambda loss: 1.01 * loss)
    report = report_of(tmp_path, distill__variant=variant)
    assert [row.name for row in report.disagreements] == ["loss/pea"]
    assert report.exit_code == 1 and report.disagreements[0].difference == pytest.approx(0.01, rel=1e-2)


def test_a_mixed_embedding_that_is_off_by_a_hundredth_is_found(tmp_path, monkeypatch):
    change_kernel(monkeypatch, "gl_mixer_fwd", lambda out: 1.01 * out)
    report = report_of(tmp_path, distill__variant="gl")
    wrong = {row.name for row in report.disagreements}
    # The projection's gradient is a product with the mix itself.
    assert report.exit_code == 1 and {"loss/pea", "grad/embed4_linearproject.weight"} <= wrong
    assert not any("embed3" in name or "skfs" in name for name in wrong)


KERNELS = {"csf_fuse": 3, "csf_bwd_apply": 3}  # and how often a batch calls them
KERNELS |= {f"{op}_{direction}": 1 for op in ("hcl_bn", "pea", "gl_mixer", "seg_ce") for direction in ("fwd", "bwd")}


@pytest.mark.parametrize("name", KERNELS)
def test_rounding_is_no_disagreement(name, tmp_path, monkeypatch):
    calls = change_kernel(monkeypatch, name, lambda value: (1 + 1e-6) * value)
    assert report_of(tmp_path, distill__variant="gl").exit_code == 0 and calls


@pytest.mark.parametrize(("name", "calls"), KERNELS.items())
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [0, 1])
def test_what_is_not_finite_in_one_batch_disagrees(name, calls, value, batch, tmp_path, monkeypatch):
    change_kernel(monkeypatch, name, lambda right: right * value, calls={batch * calls + 1})
    report = report_of(tmp_path, verify__batches=2, distill__variant="gl")
    assert report.exit_code == 1
    assert not any(math.isfinite(row.difference) for row in report.disagreements)


def test_limits_are_those_of_the_configuration(tmp_path, monkeypatch):
    change_kernel(monkeypatch, "hcl_bn_fwd", lambda loss: 1.01 * loss)
    assert report_of(tmp_path, verify__limit_fp32=0.02).exit_code == 0
    assert report_of(tmp_path, verify__limit_fp32=0.005).exit_code == 1


@pytest.mark.parametrize(
    ("difference", "eager", "agrees"),
    [
        (0.1, 0.0, True),
        (0.11, 0.0, False),
        (0.19, 0.1, True),
        (0.21, 0.1, False),
        (math.nan, 0.0, False),
        (math.nan, math.nan, False),
        (0.11, math.nan, False),
        (0.11, math.inf, False),
        (math.inf, math.inf, False),
        (math.inf, 0.0, False),
    ],
)
def test_a_row_agrees_within_its_bound(difference, eager, agrees):
    assert Row("loss/x", difference, eager, 0.1).agrees is agrees


def test_randomness_is_off_and_the_task_is_left_as_it_was(tmp_path):
    config = tiny_config(tmp_path / "run", student__drop_path=0.9)
    dataset = build.build_dataset(config, "train")
    student = build.build_model(config, config.student, 10, "student", quiet)
    teacher = build.build_model(config, config.teacher, 10, "teacher", quiet)
    task = DistillationTask(build.build_transkd(config, student, teacher), teacher)
    task.model.eval()
    before = copy.deepcopy((task.model.state_dict(), teacher.state_dict()))
    loader = build.build_loader(config, dataset, config.fit, "verify", train=True)
    batches = [(images, labels.long()) for images, labels in loader][:1]
    report = verify(task, batches, config)
    assert report.exit_code == 0
    assert student.drop.p == 0.9 and not any(module.training for module in task.model.modules())
    for old, new in zip(before, (task.model.state_dict(), teacher.state_dict()), strict=True):
        assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
    assert all(p.grad is None for p in task.model.parameters())


def test_stochastic_depth_of_a_real_network_is_off(tmp_path):
    assert report_of(tmp_path, student__drop_path=0.9, **tiny_run.SEGFORMER).exit_code == 0


def test_a_backend_without_a_kernel_is_refused_rather_than_replaced(tmp_path, monkeypatch):
    monkeypatch.delitem(backends._registry["hcl_bn"], "cpu")
    with pytest.raises(BackendError, match="backend='cpu' cannot run: no kernel for this op yet"):
        report_of(tmp_path, backend="cpu")


def test_more_batches_than_the_data_yields(tmp_path):
    with pytest.raises(ConfigError, match=r"verify\.batches: expected at most 2, all that the data yields, got 3"):
        report_of(tmp_path, verify__batches=3)


def test_nothing_to_verify_without_distillation(tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.enabled: expected true"):
        report_of(tmp_path, distill__enabled=False)


def test_verification_of_a_run_takes_its_weights(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run")
    train(config, quiet)
    tasks, compare = [], run.verify
    monkeypatch.setattr(run, "verify", lambda task, *rest: (tasks.append(task), compare(task, *rest))[1])
    assert verify_run(config, quiet).exit_code == 0
    for model, name in ((tasks[0].model, "student"), (tasks[0].teacher, "teacher")):
        saved = load_checkpoint(tmp_path / "run" / name / "last.pt")["model"]
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_verification_of_a_run_without_whole_checkpoints(tmp_path):
    config = tiny_config(tmp_path / "run")
    with pytest.raises(WeightsError, match=pattern(str(tmp_path / "run" / "student" / "last.pt"))):
        verify_run(config, quiet)


def test_a_term_of_weight_0_is_compared_all_the_same(tmp_path, monkeypatch):
    change_kernel(monkeypatch, "hcl_bn_fwd", lambda loss: 5 * loss)
    report = report_of(tmp_path, distill__feature_weight=0)
    assert [row.name for row in report.disagreements] == ["loss/hcl"]


def test_a_gradient_that_one_side_lacks_is_a_disagreement():
    assert _difference(None, torch.ones(1), 1.0) == math.inf
    assert _difference(torch.ones(1), None, 1.0) == math.inf
