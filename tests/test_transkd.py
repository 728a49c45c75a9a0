"""The TransKD wrapper: golden values of the published one, keys, ablations, robustness, bad inputs."""

import copy
import io
import re

import pytest
import torch
import torch.distributed as dist
from golden_io import compare, hashed, hashed_state, load, tolerance
from torch import nn
from torch.func import functional_call

from transkd_fast.models import StageOutputs, segformer_b0
from transkd_fast.nn import HCLLoss
from transkd_fast.reference import legacy
from transkd_fast.reference.hcl import hcl
from transkd_fast.transkd import TransKD

DTYPES = (torch.float64, torch.float32)
STUDENT, TEACHER = (4, 4, 10, 16), (8, 8, 20, 32)
SMALL = [(name, case) for name in ("skf_base", "skf_gl", "skf_ea") for case in load(name)["cases"]]
REAL = load("real_channels")


class Given(nn.Module):
    """A student that returns what it was given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs


def golden_model(case, outputs, dtype):
    ctor = case["ctor"]
    stages, weights = legacy.embedding_stages(ctor["embed"])
    model = TransKD(
        Given(outputs),
        ctor["in_channels"],
        ctor["out_channels"],
        case["variant"],
        ctor["mid_channel"],
        legacy=True,
        embeddings=stages,
        embedding_weights=[weights.get(m, 0.0) for m in (1, 2, 3, 4)],
        num_heads=ctor.get("num_heads", (1, 2, 5, 8))[3],
        mixer_residual=ctor.get("add", False),
    )
    return model.to(dtype).train(case["train"])


def leaf(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).requires_grad_()


def gradient(tensor):
    return None if tensor is None else tensor.grad


def golden_results(case, state, inputs, teacher, probes, dtype):
    """Runs a case and collects what its golden record holds."""
    image = leaf(inputs["image"], dtype)
    feats, embeds = ([leaf(t, dtype) for t in inputs[name]] for name in ("feats", "embeds"))
    logits = leaf(inputs["logits"], dtype)
    model = golden_model(case, StageOutputs(feats, embeds, logits), dtype)
    model.load_state_dict(state(model), strict=True)
    other = copy.deepcopy(model)
    other.student = model.student

    without_teacher = other(image)
    assert without_teacher.losses == {} and without_teacher.logits is logits
    results = {"fused": without_teacher.fused, "proj": without_teacher.projected}
    probe = None
    if probes is not None:
        maps = [*without_teacher.fused, *without_teacher.projected, logits]
        probe = sum((t * r).sum() for t, r in zip(maps, probes, strict=True))
        results["probe"] = probe
    if teacher is not None:
        maps, tokens = ([t.to(dtype) for t in tensors] for tensors in teacher)
        output = model(image, StageOutputs(maps, tokens, None))
        assert output.fused is None and output.projected is None and output.logits is logits
        stages = model.embeddings
        mse = [nn.functional.mse_loss(p, tokens[m - 1]) for m, p in zip(stages, without_teacher.projected, strict=True)]
        results |= {
            "hcl": output.losses["hcl"],
            "hcl_feaw": legacy.hcl_feature_weighted(without_teacher.fused, maps),
            "pea": mse,
            "total": sum(output.losses.values()),
        }
    model, scalar = (model, results["total"]) if case["want"] == "train" else (other, probe)
    scalar.backward()
    return results | {
        "grad_feats": [gradient(t) for t in feats],
        "grad_embeds": [gradient(t) for t in embeds],
        "grad_image": gradient(image),
        "grad_params": {name: p.grad for name, p in model.named_parameters()},
        "buffers_after": dict(model.named_buffers()),
    }


def compare_golden(results, case, dtype):
    checked = {name: value for name, value in case["f64"].items() if name not in ("logits_same", "grad_logits_max")}
    compare(results, checked, tolerance(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("file", "case"), SMALL, ids=[f"{name}-{case['name']}" for name, case in SMALL])
def test_golden_small_channels(file, case, dtype):
    params = load(file)["params"][case["params_key"]]
    teacher = (case["teacher_feats"], case["teacher_embeds"]) if case["want"] == "train" else None
    probes = [*case["R_fused"], *case["R_proj"], case["R_logits"]] if case["want"] == "probe" else None
    compare_golden(golden_results(case, lambda model: params, case, teacher, probes, dtype), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REAL["cases"], ids=lambda case: case["name"])
def test_golden_real_channels(case, dtype):
    inputs = dict(REAL["inputs"][case["input"]])
    seed, batch = inputs["seed"], inputs["B"]
    # The original draws an image for variant EA only.
    image = 2 * hashed(seed, "image", (batch, 3, *inputs["image_hw"]))
    inputs["image"] = image if case["variant"] == "ea" else None
    maps = [(batch, c, *t.shape[2:]) for c, t in zip(case["ctor"]["out_channels"], inputs["feats"], strict=True)]
    tokens = [(batch, t.shape[1], c) for c, t in zip(case["ctor"]["out_channels"], inputs["embeds"], strict=True)]
    teacher = [
        [2 * hashed(seed, f"tfeat{k}", shape) for k, shape in enumerate(maps)],
        [2 * hashed(seed, f"tembed{k}", shape) for k, shape in enumerate(tokens)],
    ]
    probes = [hashed(seed, f"Rf{k}", shape) for k, shape in enumerate(maps)]
    probes += [hashed(seed, f"Rp{k}", shape) for k, shape in enumerate(tokens)]
    probes.append(hashed(seed, "Rl", inputs["logits"].shape))
    state = lambda model: hashed_state(model, case["param_seed"])  # noqa: E731
    compare_golden(golden_results(case, state, inputs, teacher, probes, dtype), case, dtype)


def outputs(channels, batch=2, hw=(33, 49), requires_grad=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    feats, embeds = [], []
    height, width = hw[0], hw[1]
    for m, c in enumerate(channels):
        stride = 4 if m == 0 else 2
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        feats.append(torch.randn(batch, c, height, width, generator=generator).to(dtype))
        embeds.append(torch.randn(batch, height * width, c, generator=generator).to(dtype))
    logits = torch.randn(batch, 5, *feats[0].shape[2:], generator=generator).to(dtype)
    for tensor in (*feats, *embeds, logits):
        tensor.requires_grad_(requires_grad)
    return StageOutputs(feats, embeds, logits)


def small(student=None, **options):
    torch.manual_seed(0)
    return TransKD(student or Given(outputs(STUDENT, requires_grad=True)), STUDENT, TEACHER, mid_channels=8, **options)


IMAGES = torch.rand(2, 3, 33, 49, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("variant", "keys"), [("base", 281), ("gl", 290), ("ea", 305)])
@pytest.mark.parametrize("legacy_rule", (False, True))
def test_published_keys(variant, keys, legacy_rule):
    student = segformer_b0()
    model = TransKD(student, (32, 64, 160, 256), (64, 128, 320, 512), variant, legacy=legacy_rule)
    state = model.state_dict()
    assert len(state) == keys
    own = {name for name in state if not name.startswith("student.")}
    linear = {f"embed{m}_linearproject.{p}" for m in (1, 2, 3, 4) for p in ("weight", "bias")}
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    csf = {f"skfs.{i}.{c}.0.weight" for i in range(4) for c in ("conv1", "conv2")}
    csf |= {f"skfs.{i}.{c}.1.{p}" for i in range(4) for c in ("conv1", "conv2") for p in bn}
    csf |= {f"skfs.{i}.{name}" for i in (1, 2, 3) for name in ("fc.0.weight", "fc1.0.weight")}
    csf |= {f"skfs.{i}.fc.1.{p}" for i in (1, 2, 3) for p in bn}
    csf |= {f"skfs.{i}.fcs.{j}.{p}" for i in (1, 2, 3) for j in (0, 1) for p in ("weight", "bias")}
    extra = {
        "base": set(),
        "gl": {"atten_weight", "conv_weight", "attn4.qkv.weight", "attn4.proj.weight", "attn4.proj.bias"}
        | {f"conv{i}.{p}" for i in (1, 2) for p in ("weight", "bias")},
        "ea": {f"patch_embed{m}.{n}.{p}" for m in (1, 2, 3, 4) for n in ("proj", "norm") for p in ("weight", "bias")}
        | {f"fuse_weights.{i}" for i in range(8)},
    }
    assert own == linear | csf | extra[variant]
    trained = {name for name, _ in model.named_parameters()}
    assert ("skfs.1.fc1.0.weight" in trained) == legacy_rule
    assert trained | {name for name, _ in model.named_buffers()} == state.keys()
    model.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("embed", range(6))
def test_published_projection_keys(embed):
    """A published state dict of every option `embed` loads strictly and gives the projections it stands for."""
    stages, _ = legacy.embedding_stages(embed)
    model = small(embeddings=stages, features=False)
    sizes = {m: (TEACHER[m - 1], STUDENT[m - 1]) for m in stages}
    weights = {m: torch.randn(size) for m, size in sizes.items()}
    biases = {m: torch.randn(size[0]) for m, size in sizes.items()}
    published = {f"{legacy.projection_key(embed, m)}.weight": weights[m] for m in stages}
    published |= {f"{legacy.projection_key(embed, m)}.bias": biases[m] for m in stages}
    model.load_state_dict(published, strict=True)
    expected = [model.student.outputs.embeddings[m - 1] @ weights[m].T + biases[m] for m in stages]
    torch.testing.assert_close(model(IMAGES).projected, expected)


@pytest.mark.parametrize("variant", ("base", "gl", "ea"))
def test_a_real_student_trains(variant):
    torch.manual_seed(0)
    model = TransKD(segformer_b0(), (32, 64, 160, 256), (64, 128, 320, 512), variant)
    images = torch.rand(2, 3, 64, 96)
    output = model(images, outputs((64, 128, 320, 512), hw=(64, 96)))
    (sum(output.losses.values()) + output.logits.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(images).logits, model.student(images).logits, rtol=0, atol=0)


def test_strict_loading_names_published_keys():
    model = small(variant="gl")
    state = model.state_dict()
    state["skfs.9.conv1.0.weight"] = state.pop("attn4.qkv.weight")
    with pytest.raises(RuntimeError, match=r"(?s)attn4\.qkv\.weight.*skfs\.9\.conv1\.0\.weight") as error:
        model.load_state_dict(state)
    assert "Missing key" in str(error.value) and "Unexpected key" in str(error.value)


def test_initial_scalars():
    model = small(variant="gl")
    assert model.atten_weight.item() == model.conv_weight.item() == 1
    scales = [small(variant="ea").fuse_weights[str(i)].item() for i in range(8)]
    assert scales == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize("variant", ("base", "gl", "ea"))
def test_names_survive_copies_saving_and_functional_calls(variant):
    model = small(variant=variant).eval()
    expected = model(IMAGES)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = TransKD(model.student, STUDENT, TEACHER, variant, mid_channels=8).eval()
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for actual in (twin(IMAGES), functional_call(twin, model.state_dict(), (IMAGES,))):
        torch.testing.assert_close(actual.fused, expected.fused, rtol=0, atol=0)
        torch.testing.assert_close(actual.projected, expected.projected, rtol=0, atol=0)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert all(t.abs().max() == 0 for t in functional_call(model, zeros, (IMAGES,)).projected)
    model.student = nn.Identity()
    assert copy.deepcopy(model).state_dict().keys() == twin.state_dict().keys()


def test_ablations_build_only_what_they_use():
    no_features = small(features=False)
    assert not any(name.startswith("skfs") for name in no_features.state_dict())
    assert small(embeddings=()).state_dict().keys() == {k for k in small().state_dict() if k.startswith("skfs")}
    assert not small(features=False, embeddings=()).state_dict()
    teacher = outputs(TEACHER, seed=1)
    assert no_features(IMAGES, teacher).losses.keys() == {"pea"}
    assert small(embeddings=())(IMAGES, teacher).losses.keys() == {"hcl"}
    assert small(embeddings=(2, 4), feature_loss="cwd")(IMAGES, teacher).losses.keys() == {"cwd", "pea"}
    assert small(features=False, embeddings=())(IMAGES, teacher).losses == {}
    output = small(features=False, embeddings=(2,))(IMAGES)
    assert output.fused == [] and [t.shape[2] for t in output.projected] == [8]
    keys = {f"patch_embed{m}.proj.weight" for m in (1, 3)} | {f"fuse_weights.{i}" for i in (0, 2, 4, 6)}
    state = small(variant="ea", embeddings=(3, 1)).state_dict()
    assert {k for k in state if k.startswith("fuse_weights") or k.endswith("proj.weight")} == keys


def test_losses_are_those_of_the_maps():
    teacher = outputs(TEACHER, seed=1)
    weights = (0.1, 0.2, 0.3, 0.4)
    model = small(feature_loss="cwd", feature_weights=weights, temperature=4.0, embedding_weights=weights).eval()
    losses, output = model(IMAGES, teacher).losses, model(IMAGES)
    cwd = [legacy.cwd(*pair, "channel", "kl", 4.0) for pair in zip(output.fused, teacher.features, strict=True)]
    mse = [nn.functional.mse_loss(*pair) for pair in zip(output.projected, teacher.embeddings, strict=True)]
    for name, terms in (("cwd", cwd), ("pea", mse)):
        expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=0)


class Twice(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class TwiceHCL(HCLLoss):
    def forward(self, student_maps, teacher_maps):
        return 2 * super().forward(student_maps, teacher_maps)


def double(module, inputs, output):
    return 2 * output


HOOKED = {
    "the last norm": lambda model: model.skfs[0].conv2[1],
    "its convolution": lambda model: model.skfs[2].conv2,
    "a stage's pre-hook": lambda model: model.skfs[1].conv2[1],
}


@pytest.mark.parametrize("where", HOOKED)
def test_hooks_of_the_last_norms_run(where):
    teacher, model = outputs(TEACHER, seed=1), small(embeddings=())
    module = HOOKED[where](model)
    if "pre-hook" in where:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 3 * inputs[0].abs(),))
    else:
        module.register_forward_hook(double)
    twin = copy.deepcopy(model)
    maps = twin.skfs(twin.student.outputs.features)
    expected = sum(hcl(s, t) for s, t in zip(maps, teacher.features, strict=True))
    torch.testing.assert_close(model(IMAGES, teacher).losses["hcl"], expected, rtol=1e-5, atol=0)


def test_a_criterion_of_another_class_or_with_hooks_is_called():
    teacher = outputs(TEACHER, seed=1)
    model, other, hooked = (small(embeddings=()) for _ in range(3))
    other.criterion = TwiceHCL()
    hooked.criterion.register_forward_hook(double)
    losses = []
    for each in (model, other, hooked):
        each.load_state_dict(model.state_dict())
        losses.append(each(IMAGES, teacher).losses["hcl"])
    torch.testing.assert_close(losses[1:], [2 * losses[0]] * 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ("training", "frozen", "eval", "another class"))
def test_hcl_is_that_of_the_maps_and_so_are_its_gradients_and_statistics(mode):
    teacher, weights, levels = outputs(TEACHER, seed=1), (0.1, 0.2, 0.3, 0.4), (0.0, 0.25, 2.0)
    model = small(feature_weights=weights, level_weights=levels, embeddings=()).train(mode != "eval")
    if mode == "frozen":
        model.skfs[1].conv2[1].eval()
    if mode == "another class":
        model.skfs[0].conv2[1] = Twice(TEACHER[3])
    twin = copy.deepcopy(model)
    pairs = zip(weights, twin.skfs(twin.student.outputs.features), teacher.features, strict=True)
    expected = sum(weight * hcl(s, t, levels) for weight, s, t in pairs)
    loss = model(IMAGES, teacher).losses["hcl"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    leaves = [[*m.parameters(), *m.student.outputs.features] for m in (model, twin)]
    gradients = [torch.autograd.grad(value, ls) for value, ls in zip((loss, expected), leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()), rtol=1e-5, atol=1e-6)


def test_class_scores_are_distilled_where_that_is_asked_for():
    given, teacher = outputs(STUDENT, requires_grad=True), outputs(TEACHER, seed=1)
    only = {"features": False, "embeddings": (), "logits": True}
    losses = small(Given(given), **only, logit_temperature=3.0)(IMAGES, teacher).losses
    assert losses.keys() == {"kd_kl"}
    log_s, log_t = ((logits / 3).log_softmax(1) for logits in (given.logits, teacher.logits))
    torch.testing.assert_close(losses["kd_kl"], 9 * (log_t.exp() * (log_t - log_s)).sum(1).mean())
    losses["kd_kl"].backward()
    assert given.logits.grad.any()
    for bad, message in (
        (teacher._replace(logits=None), "logits from the teacher, which are distilled, got None; run it with"),
        (teacher._replace(logits=teacher.logits[:, :4]), r"teacher's logits to have shape \[2, 5, 9, 13\]"),
        (outputs(TEACHER, requires_grad=True), "frozen teacher, got logits that requires"),
    ):
        with pytest.raises(ValueError, match=message):
            small(Given(given), **only)(IMAGES, bad)
    with pytest.raises(ValueError, match="logits from the student, which are distilled, got None"):
        small(Given(given._replace(logits=None)), embeddings=(), logits=True)(IMAGES, teacher)


@pytest.mark.parametrize("feature_loss", ("hcl", "cwd"))
def test_maps_are_resized_to_the_teachers_where_that_is_asked_for(feature_loss):
    teacher, options = outputs(TEACHER, hw=(65, 49)), {"feature_loss": feature_loss, "embeddings": ()}
    with pytest.raises(ValueError, match=r"features\[0\] to fit the student's .*, or set resize_student=True"):
        small(**options)(IMAGES, teacher)
    model = small(**options, resize_student=True).eval()
    resized = [
        nn.functional.interpolate(s, t.shape[2:], mode="bilinear")
        for s, t in zip(model(IMAGES).fused, teacher.features, strict=True)
    ]
    expected = small(**options).criterion(resized, teacher.features)
    torch.testing.assert_close(model(IMAGES, teacher).losses[feature_loss], expected)


@pytest.mark.parametrize("variant", ("base", "gl", "ea"))
@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (2, 4), (4,)])
def test_the_embedding_loss_is_that_of_the_projections_and_so_are_its_gradients(variant, stages):
    teacher, weights = outputs(TEACHER, seed=1), (0.1, 0.2, 0.3, 0.4)
    model = small(variant=variant, embeddings=stages, embedding_weights=weights, features=False)
    projected = model(IMAGES).projected
    targets = [teacher.embeddings[m - 1] for m in stages]
    mse = [nn.functional.mse_loss(*pair) for pair in zip(projected, targets, strict=True)]
    expected = sum(weights[m - 1] * term for m, term in zip(stages, mse, strict=True))
    loss = model(IMAGES, teacher).losses["pea"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    leaves = [*model.parameters(), *(model.student.outputs.embeddings[m - 1] for m in stages)]
    gradients = (torch.autograd.grad(value, leaves) for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_batch_of_one_takes_no_other_weights():
    """Outside legacy mode a sample's maps in evaluation do not depend on its batch, and batch 1 trains."""
    pair = outputs(STUDENT)
    single = StageOutputs([t[:1] for t in pair.features], [t[:1] for t in pair.embeddings], pair.logits[:1])
    model = small(Given(pair)).eval()
    together = model(IMAGES)
    model.student = Given(single)
    alone = model(IMAGES[:1])
    torch.testing.assert_close(alone.fused, [t[:1] for t in together.fused], rtol=1e-5, atol=1e-5)
    model.train()
    before = model.skfs[1].fc[1].running_mean.clone()
    sum(model(IMAGES[:1], outputs(TEACHER, batch=1)).losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.skfs[1].fc[1].running_mean, before)
    assert model.skfs[1].fc[1].num_batches_tracked == 0 and model.skfs[1].conv1[1].num_batches_tracked == 1


@pytest.mark.parametrize("variant", ("base", "gl", "ea"))
def test_autocast(variant):
    model, teacher = small(variant=variant).eval(), outputs(TEACHER, seed=1)
    expected = model(IMAGES, teacher).losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(IMAGES, teacher).losses
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=2e-2, atol=0)


@pytest.mark.parametrize("variant", ("gl", "ea"))
def test_compiles_without_graph_breaks(variant):
    model, teacher = small(variant=variant), outputs(TEACHER, seed=1)
    twin = small(variant=variant)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, actual = model(IMAGES, teacher).losses, compiled(IMAGES, teacher).losses
        sum(expected.values()).backward()
        sum(actual.values()).backward()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(list(twin.buffers()), list(model.buffers()), rtol=1e-5, atol=1e-6)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ("base", "gl", "ea"))
@pytest.mark.parametrize("batch", (1, 2))
def test_distributed_data_parallel_finds_no_unused_parameter(process_group, variant, batch):
    model = nn.parallel.DistributedDataParallel(small(Given(outputs(STUDENT, batch)), variant=variant))
    for _ in range(2):
        sum(model(IMAGES[:batch], outputs(TEACHER, batch, seed=1)).losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {name.removeprefix("module.") for name in model.state_dict()} == small(variant=variant).state_dict().keys()


def changed(outputs, kind, index, tensor):
    tensors = list(getattr(outputs, kind))
    tensors[index] = tensor
    return outputs._replace(**{kind: tensors})


GOOD = outputs(TEACHER, seed=1)
BAD_TEACHERS = {
    "trainable": (outputs(TEACHER, requires_grad=True), ValueError, r"frozen teacher, got features\[0\] that requires"),
    "a tuple": (tuple(GOOD), TypeError, "expected the teacher to give StageOutputs, got tuple"),
    "three stages": (GOOD._replace(features=GOOD.features[:3]), ValueError, "expected 4 features from the teacher"),
    "channels": (outputs(STUDENT), ValueError, r"teacher's features\[0\] to have shape \[B, 8, H, W\]"),
    "image size": (outputs(TEACHER, hw=(65, 49)), ValueError, r"features\[0\] to fit the student's.*same images"),
    "batch": (outputs(TEACHER, batch=3), ValueError, r"features\[0\] to fit"),
    "tokens": (changed(GOOD, "embeddings", 1, GOOD.embeddings[1][:, 1:]), ValueError, r"embeddings\[1\] to fit"),
    "token channels": (
        changed(GOOD, "embeddings", 2, GOOD.embeddings[1]),
        ValueError,
        r"embeddings\[2\] to have shape",
    ),
}


@pytest.mark.parametrize(("teacher", "error", "message"), BAD_TEACHERS.values(), ids=BAD_TEACHERS)
def test_bad_teacher(teacher, error, message):
    with pytest.raises(error, match=message):
        small()(IMAGES, teacher)


def test_inference_tensors_of_the_teacher():
    with torch.inference_mode():
        teacher = outputs(TEACHER)
    model = small()
    with pytest.raises(ValueError, match="no_grad"):
        model(IMAGES, teacher)
    with torch.no_grad():
        assert model(IMAGES, teacher).losses["hcl"].isfinite()


def test_bad_student():
    with pytest.raises(ValueError, match=r"student's features\[2\] to have shape \[B, 10, H, W\]"):
        small(Given(outputs((4, 4, 11, 16))))(IMAGES)
    with pytest.raises(TypeError, match="expected the student to give StageOutputs, got Tensor"):
        small(nn.Identity())(IMAGES)


@pytest.mark.parametrize("stage", (1, 2, 3, 4))
def test_a_student_whose_strides_are_not_the_assistants(stage):
    given = outputs(STUDENT)
    wrong = changed(given, "embeddings", stage - 1, given.embeddings[stage - 1].repeat(1, 2, 1))
    shapes = [[2, 3, 33, 49], *(list(t.shape) for t in given.features)]
    tokens = given.embeddings[stage - 1].shape[1]
    source = "the images" if stage == 1 else f"features[{stage - 2}]"
    message = (
        f"student's embeddings[{stage - 1}] to have {tokens} tokens like the assistant of {source} {shapes[stage - 1]},"
        f" got {[2, 2 * tokens, STUDENT[stage - 1]]}"
    )
    for embeddings in ((stage,), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=re.escape(message)):
            small(Given(wrong), variant="ea", embeddings=embeddings)(IMAGES)
    small(Given(wrong), variant="ea", embeddings={1, 2, 3, 4} - {stage})(IMAGES)
    small(Given(wrong))(IMAGES)


BAD_OPTIONS = {
    "variant": ({"variant": "large"}, "variant to be one of 'base', 'gl', 'ea', got 'large'"),
    "feature loss": ({"feature_loss": "mse"}, "feature_loss to be one of"),
    "stage": ({"embeddings": (0, 1)}, "stages from 1 to 4"),
    "feature weights": ({"feature_weights": (1.0,)}, "feature_weights to have 4 entries"),
    "embedding weights": ({"embedding_weights": (1.0,) * 5}, "embedding_weights to have 4 entries"),
    "mixer without stage 4": ({"variant": "gl", "embeddings": (1, 2)}, "include stage 4"),
    "assistants of nothing": ({"variant": "ea", "embeddings": ()}, "name a stage"),
    "heads": ({"variant": "gl", "num_heads": 5}, "num_heads to divide dim 16, got 5"),
    "temperature": ({"feature_loss": "cwd", "temperature": 0.0}, "temperature to be positive"),
    "level weights": ({"level_weights": (0.5, 0.25)}, "level_weights to be 3 finite numbers"),
    "logit temperature": ({"logits": True, "logit_temperature": -1.0}, "temperature to be positive"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="student_channels to have 4 entries"):
        TransKD(nn.Identity(), STUDENT[:3], TEACHER)


def test_models_without_patch_embeddings_distil_their_features():
    """As `timm`'s features_only models: no embeddings, and nothing asks for them."""
    channels = (4, 6, 8, 10)

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, c, 1) for c in channels)

        def forward(self, images):
            maps = [conv(images[:, :, :: 2**m, :: 2**m]) for m, conv in enumerate(self.convs)]
            return StageOutputs(maps, [], maps[0])

    model = TransKD(Student(), channels, channels, embeddings=(), mid_channels=8)
    images = torch.rand(2, 3, 32, 32)
    teacher = StageOutputs([m.detach() + 1 for m in model.student(images).features], [], None)
    losses = model(images, teacher).losses
    assert list(losses) == ["hcl"]
    losses["hcl"].backward()
    assert all(p.grad is not None for conv in model.student.convs for p in conv.parameters())
    with pytest.raises(ValueError, match="expected 4 embeddings from the student, got 0"):
        TransKD(Student(), channels, channels, mid_channels=8)(images)


@pytest.mark.parametrize(("variant", "millions"), [("base", "4.56"), ("gl", "5.22"), ("ea", "5.53")])
def test_published_sizes(variant, millions):
    """The published sizes count the second squeeze layer, which outside legacy mode is a buffer."""
    model = TransKD(segformer_b0(), (32, 64, 160, 256), (64, 128, 320, 512), variant, legacy=True)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions
