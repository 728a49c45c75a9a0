"""SegFormer and the loading of weights, against golden values of the published networks."""

import copy
from pathlib import Path

import golden_io
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.profiler import profile

from transkd_fast.models import (
    MODELS,
    SegFormer,
    StageOutputs,
    WeightsError,
    create,
    load_weights,
    segformer_b0,
    segformer_b1,
    segformer_b2,
)
from transkd_fast.models.segformer import DropPath

GOLDEN_CASES = [case for case in golden_io.load("nets")["cases"] if case["net"].startswith("mit_")]
FACTORIES = {"mit_b0": segformer_b0, "mit_b1": segformer_b1, "mit_b2": segformer_b2}
B0_CHANNELS = (32, 64, 160, 256)
FUSED = ("linear_c1.proj", "linear_c2.proj", "linear_c3.proj", "linear_c4.proj", "linear_fuse.conv")


@pytest.fixture(scope="module")
def b0() -> SegFormer:
    torch.manual_seed(0)
    return segformer_b0().eval()


def randomise_norms(model: nn.Module) -> nn.Module:
    """Moves norms away from the identity, so that a mixed-up one shows."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def published_keys(depths: tuple[int, ...]) -> set[str]:
    """The keys of a published SegFormer file, written out from the list of what the files hold."""
    wb = ("weight", "bias")
    stages = range(1, 5)
    keys = {f"patch_embed{m}.{part}.{p}" for m in stages for part in ("proj", "norm") for p in wb}
    keys |= {f"norm{m}.{p}" for m in stages for p in wb} | {f"linear_c{m}.proj.{p}" for m in stages for p in wb}
    parts = ["norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.dwconv.dwconv"]
    for m, depth in zip(stages, depths, strict=True):
        reduced = ["attn.sr", "attn.norm"] if m < 4 else []
        keys |= {f"block{m}.{i}.{part}.{p}" for i in range(depth) for part in parts + reduced for p in wb}
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return keys | {"linear_fuse.conv.weight", *(f"linear_fuse.bn.{p}" for p in bn), *(f"linear_pred.{p}" for p in wb)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["name"])
def test_golden(case, dtype):
    seed, truth = case["seed"], case["f64"]
    model = FACTORIES[case["net"]]()
    model.load_state_dict(golden_io.hashed_state(model, seed))
    model = model.to(dtype).eval()

    def weighted_mean(name: str, x: torch.Tensor) -> torch.Tensor:
        return (x * golden_io.hashed(seed, name, tuple(x.shape), dtype)).mean()

    images = (2 * golden_io.hashed(seed, "image", (case["B"], 3, *case["hw"]), dtype)).requires_grad_()
    out = model(images)
    probe = weighted_mean("R_logits", out.logits)
    for i in range(4):
        probe = probe + weighted_mean(f"R_feat{i}", out.features[i]) + weighted_mean(f"R_embed{i}", out.embeddings[i])
    probe.backward()

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(gradients) == set(truth["grad_names"])
    digests = [golden_io.digest(gradients[name], 1) for name in truth["grad_names"]]
    actual = {
        "feats": out.features,
        "embeds": out.embeddings,
        "logits": out.logits,
        "probe": probe,
        "grad_image": images.grad,
        "grad_l2": torch.tensor([d["l2"] for d in digests], dtype=torch.float64),
        "grad_dot": torch.tensor([d["dot"] for d in digests], dtype=torch.float64),
    }
    golden_io.compare(actual, {key: truth[key] for key in actual}, golden_io.tolerance(case, dtype), case["name"])


@pytest.mark.parametrize(
    ("factory", "depths", "millions"), [(segformer_b0, (2, 2, 2, 2), "3.72"), (segformer_b2, (3, 4, 6, 3), "27.36")]
)
def test_published_size_and_keys(factory, depths, millions):
    model = factory()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions
    assert set(model.state_dict()) == published_keys(depths)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 97), (64, 130)])
def test_shapes_at_any_size(b0, size):
    images = torch.rand(2, 3, *size)
    out = b0(images)
    assert isinstance(out, StageOutputs)
    height, width = size
    for m, channels in enumerate(B0_CHANNELS):
        height, width = (-(-n // (4 if m == 0 else 2)) for n in (height, width))
        assert out.features[m].shape == (2, channels, height, width)
        assert out.embeddings[m].shape == (2, height * width, channels)
    assert out.logits.shape == (2, 20, *out.features[0].shape[-2:])


def test_features_only_is_the_same_without_logits(b0):
    images = torch.rand(2, 3, 64, 96)
    whole, part = b0(images), b0(images, features_only=True)
    assert part.logits is None
    for a, b in zip(whole.features + whole.embeddings, part.features + part.embeddings, strict=True):
        assert torch.equal(a, b)


def test_eval_is_deterministic_and_per_image(b0):
    images = torch.rand(3, 3, 64, 64)
    assert torch.equal(b0(images).logits, b0(images).logits)
    alone = torch.cat([b0(image[None]).logits for image in images])
    torch.testing.assert_close(b0(images).logits, alone, rtol=1e-4, atol=1e-5)


def published_fusion(model: SegFormer, features: list[torch.Tensor]) -> torch.Tensor:
    """The decoder up to its classifier in the published order: project, upsample, concatenate, convolve."""
    maps = []
    for m in (3, 2, 1, 0):
        x = getattr(model, f"linear_c{m + 1}")["proj"](features[m].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps.append(F.interpolate(x, features[0].shape[-2:], mode="bilinear", align_corners=False))
    return F.relu(model.linear_fuse.bn(model.linear_fuse.conv(torch.cat(maps, 1))))


def fused_modules(model: SegFormer) -> list[nn.Module]:
    return [model.get_submodule(name) for name in FUSED]


def do_nothing(*args) -> None:
    return None


@pytest.mark.parametrize("hooked", [False, True], ids=["folded", "called"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_decoder_equals_the_published_order(size, hooked):
    torch.manual_seed(1)
    model = randomise_norms(segformer_b1(num_classes=7)).double().eval()
    if hooked:
        model.linear_fuse.conv.register_forward_hook(do_nothing)
    out = model(torch.rand(1, 3, *size, dtype=torch.float64))
    expected = model.linear_pred(published_fusion(model, out.features))
    torch.testing.assert_close(out.logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_decoder_fire(b0, kind, name):
    model, calls = copy.deepcopy(b0), []
    module = model.get_submodule(name)
    getattr(module, f"register_{kind}_hook")(lambda *args: calls.append(args[0]))
    model(torch.rand(1, 3, 32, 32)).logits.sum().backward()
    assert calls == [module]


class Doubled(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.module(x)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("way", ["replaced", "assigned forward"])
def test_wrapped_modules_of_the_decoder_are_called(b0, name, way):
    """As libraries of low-rank adapters replace modules, and those that offload weights assign `forward`."""
    images, model = torch.rand(1, 3, 32, 32), copy.deepcopy(b0)
    module = model.get_submodule(name)
    if way == "replaced":
        model.set_submodule(name, Doubled(module))
    else:
        module.forward = Doubled(b0.get_submodule(name)).forward
    out = model(images)
    torch.testing.assert_close(out.logits, model.linear_pred(published_fusion(model, out.features)))
    assert not torch.allclose(out.logits, b0(images).logits)


def test_biases_that_are_not_published(b0):
    """A batch norm folded into the convolution gives it a bias; a projection may have lost its own."""
    model = copy.deepcopy(b0)
    model.linear_fuse.conv = nn.Conv2d(1024, 256, 1)
    model.linear_c2["proj"] = nn.Linear(64, 256, bias=False)
    out = model(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(out.logits, model.linear_pred(published_fusion(model, out.features)))


def test_pruning_the_decoder_takes_effect(b0):
    model, images = copy.deepcopy(b0).double(), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    for module in fused_modules(model):
        prune.random_unstructured(module, "weight", amount=0.5)
    with torch.no_grad():
        for module in fused_modules(model):
            module.weight_orig.mul_(2)  # As an optimizer step: only the pre-hook brings it into `weight`.
    out = model(images)
    for module in fused_modules(model):
        torch.testing.assert_close(module.weight, module.weight_orig * module.weight_mask, rtol=0, atol=0)
        assert (module.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    expected = model.linear_pred(published_fusion(model, out.features))
    torch.testing.assert_close(out.logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization(b0):
    images = torch.rand(1, 3, 64, 64)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(b0), {nn.Linear})
    assert all(type(p) is not nn.Linear for p in fused_modules(quantized)[:4])
    with torch.no_grad():
        expected, actual = b0(images).logits, quantized(images).logits
    assert (actual - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_autocast_does_not_round_the_folded_weights_twice():
    torch.manual_seed(0)
    model = randomise_norms(segformer_b1()).eval()
    features = [torch.randn(2, c, 64 >> m, 64 >> m) for m, c in enumerate(model.channels)]
    exact = published_fusion(copy.deepcopy(model).double(), [x.double() for x in features])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        folded = model.linear_fuse(features, fused_modules(model)[:4])
        published = published_fusion(model, features)
    assert (folded.double() - exact).norm() <= 1.1 * (published.double() - exact).norm()


def test_training_is_stochastic_and_reaches_every_parameter():
    torch.manual_seed(2)
    model = segformer_b0()
    images = torch.rand(2, 3, 64, 64)
    out = model(images)
    assert not torch.equal(out.logits, model(images).logits)
    out.logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_rates_grow_linearly():
    for factory, blocks in ((segformer_b0, 8), (segformer_b2, 16)):
        rates = [module.rate for module in factory().modules() if isinstance(module, DropPath)]
        assert rates == pytest.approx([0.1 * i / (blocks - 1) for i in range(blocks)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(3)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3)).flatten(1)
    assert torch.equal(dropped.amin(1), dropped.amax(1))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.mean() == pytest.approx(1.0, abs=0.04)


def batch_clones(run, batch: int) -> list[list[int]]:
    """Shapes of the activations (first size = batch) that `run` clones, within ATen's own operators too."""
    with profile(record_shapes=True) as record:
        run()
    shapes = [event.input_shapes[0] for event in record.events() if event.name == "aten::clone"]
    return [shape for shape in shapes if shape and shape[0] == batch]


# Where oneDNN has no bf16 convolution (AVX2), torch's own copies whatever it is given: there is nothing to see of ours.
BF16 = [pytest.param(True, id="bf16")] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []


@pytest.mark.parametrize("autocast", [pytest.param(False, id="fp32"), *BF16])
def test_no_layout_copies_between_tokens_and_maps(b0, autocast):
    images = torch.rand(5, 3, 65, 97)

    def features_only():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = b0(images, features_only=True)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in out.features)
        assert all(x.is_contiguous() for x in out.embeddings)

    assert batch_clones(features_only, 5) == [[5, 3, 65, 97]]


def test_no_layout_copies_in_the_backward(b0):
    outputs = b0(torch.rand(5, 3, 65, 97), features_only=True)
    tensors = [*outputs.features, *outputs.embeddings]
    upstream = [torch.randn_like(x) for x in tensors]
    assert batch_clones(lambda: torch.autograd.grad(tensors, list(b0.block1.parameters()), upstream), 5) == []


def test_the_copy_counter_sees_a_copy():
    assert batch_clones(lambda: torch.rand(5, 3, 8, 8).contiguous(memory_format=torch.channels_last), 5)


def test_channels_last_images_give_the_same(b0):
    images = torch.rand(2, 3, 64, 64)
    expected = b0(images).logits
    assert torch.equal(b0(images.contiguous(memory_format=torch.channels_last)).logits, expected)
    assert torch.equal(b0(images.flip(-1).flip(-1)[:, [0, 1, 2]]).logits, expected)


def test_autocast(b0):
    images = torch.rand(2, 3, 64, 64)
    exact = copy.deepcopy(b0).double()(images.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = b0(images)
    assert out.logits.dtype is torch.bfloat16
    for got, want in zip([*out.features, out.logits], [*exact.features, exact.logits], strict=True):
        assert (got.double() - want).abs().max() <= 4e-2 * want.abs().max()


@pytest.mark.parametrize("hooked", [False, True], ids=["folded", "called"])
def test_compile_fullgraph(b0, hooked):
    model, images = copy.deepcopy(b0), torch.rand(2, 3, 33, 65)
    if hooked:
        model.linear_fuse.conv.register_forward_hook(do_nothing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, out = model(images), compiled(images)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(compiled(images, features_only=True).features, expected.features)
    exact = copy.deepcopy(model).double()(images.double()).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager_error, error = ((run(images).logits.double() - exact).norm() for run in (model, compiled))
    assert error <= 1.1 * eager_error


def test_create_by_name():
    model = create("segformer_b1", num_classes=11, drop_path_rate=0.0)
    assert isinstance(model, SegFormer) and model.channels == (64, 128, 320, 512) and model.num_classes == 11
    assert {"segformer_b0", "segformer_b1", "segformer_b2"} <= set(MODELS)
    with pytest.raises(ValueError, match=r"models.create: expected one of segformer_b0, .*, got 'segformer_b9'"):
        create("segformer_b9")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, r"floating dtype.*got torch.uint8.*/ 255"),
        (torch.zeros(3, 64, 64), ValueError, r"shape \[B, 3, H, W\], got \[3, 64, 64\]"),
        (torch.zeros(2, 4, 64, 64), ValueError, r"shape \[B, 3, H, W\], got \[2, 4, 64, 64\]"),
        (torch.zeros(2, 64, 64, 3), ValueError, r"got \[2, 64, 64, 3\]"),
        (torch.zeros(2, 3, 31, 64), ValueError, r"at least 32 x 32 pixels, got 31 x 64"),
    ],
)
def test_bad_images(b0, images, error, message):
    with pytest.raises(error, match=message):
        b0(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (32, 64, 160)}, r"channels to hold 4 positive numbers, got \[32, 64, 160\]"),
        ({"depths": (2, 2, 0, 2)}, r"depths to hold 4 positive numbers"),
        ({"channels": (32, 63, 160, 256)}, r"multiples of num_heads, got 63 and 2"),
        ({"num_classes": 0}, r"num_classes to be at least 1, got 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate in \[0, 1\), got 1.0"),
    ],
)
def test_bad_configuration(options, message):
    config = {"channels": B0_CHANNELS, "depths": (2, 2, 2, 2), "decoder_channels": 256, **options}
    with pytest.raises(ValueError, match=message):
        SegFormer(**config)


@pytest.fixture(scope="module")
def weights(b0) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in b0.state_dict().items()}


def same_weights(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


WAYS = {
    "plain": lambda s: s,
    "data-parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "our run": lambda s: {"model": s, "step": 7, "optimizer": {"state": {}}, "best": 0.5},
    "our student": lambda s: {"student": s, "config": {"lr": 6e-5}},
    "published run": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_load_weights(tmp_path, weights, way):
    path = tmp_path / "weights.pth"
    torch.save(WAYS[way](weights), path)
    for source in (path, str(path), WAYS[way](weights)):
        model = segformer_b0()
        report = load_weights(model, source)
        assert same_weights(model, weights)
        assert (report.loaded, report.unused) == (len(weights), 0)


def test_load_weights_from_safetensors(tmp_path, weights):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(weights, path)
    model = segformer_b0()
    load_weights(model, path)
    assert same_weights(model, weights)


@pytest.mark.parametrize("wrap", ["student.", "module.student.", "student.module."])
def test_student_out_of_a_transkd_file(tmp_path, weights, wrap):
    path = tmp_path / "transkd.pth"
    head = "module." if wrap.startswith("module.") else ""
    state = {f"{wrap}{k}": v for k, v in weights.items()} | {f"{head}skfs.0.conv1.0.weight": torch.zeros(1)}
    torch.save(state, path)
    model = segformer_b0()
    report = load_weights(model, path, prefix="student.")
    assert same_weights(model, weights)
    assert (report.loaded, report.unused) == (len(weights), 1)
    assert str(report) == f"{path}: {len(weights)} tensors loaded, 1 outside the prefix not used"


def rejected(model: nn.Module, source, match: str, prefix: str = "") -> str:
    """Loads, expects the error, and sees that nothing was written."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(model, source, prefix)
    assert same_weights(model, before)
    return str(caught.value)


def test_every_key_that_does_not_fit_is_named(weights):
    state = dict(weights)
    del state["norm1.weight"], state["norm4.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["linear_pred.bias"] = torch.zeros(19)
    state["norm2.bias"] = torch.zeros(64, dtype=torch.int64)
    message = rejected(segformer_b0(), state, "mapping does not fit SegFormer; nothing was loaded")
    assert "2 missing: norm1.weight, norm4.bias\n" in message
    assert "1 unexpected: extra.weight\n" in message
    assert "1 mis-shaped: linear_pred.bias (expected [20], got [19])\n" in message
    assert "1 mis-typed: norm2.bias (expected torch.float32, got torch.int64)" in message


def test_weights_of_another_size(weights):
    message = rejected(segformer_b2(), weights, "seems to hold SegFormer-B0 with 20 classes")
    assert "the module is SegFormer-B2 with 20 classes" in message
    missing = published_keys((3, 4, 6, 3)) - set(weights)
    assert f"{len(missing)} missing: " in message
    assert f", and {len(missing) - 10} more" in message


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda s: {f"student.{k}": v for k, v in s.items()}, "TransKD modules around SegFormer-B0.*prefix='student.'"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("linear_")}, "encoder without its decoder"),
        (lambda s: s | {"linear_pred.weight": torch.zeros(19, 256, 1, 1)}, "SegFormer-B0 with 19 classes"),
        (lambda s: s | {"block1.0.mlp.fc1.weight": torch.zeros(256, 32)}, "PVTv2 with channels"),
        (lambda s: s | {"block1.2.norm1.bias": torch.zeros(32)}, r"a SegFormer with 20 classes.*depths \[3, 2, 2, 2\]"),
        (lambda s: {"segformer.encoder.layer_norm.0.weight": torch.zeros(32)}, "Hugging Face"),
        (lambda s: {"conv1.weight": torch.zeros(())}, "an unknown model with keys such as conv1.weight"),
    ],
)
def test_the_error_says_what_the_file_holds(weights, change, seen):
    rejected(segformer_b0(), change(weights), seen)


def test_prefix_without_keys(weights):
    rejected(segformer_b0(), weights, r"keys that start with 'student.', found none; .*SegFormer-B0", "student.")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_files(tmp_path, weights, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    rejected(segformer_b0(), path, rf"cannot read {path}: .*truncated")


class Unsafe:
    def __reduce__(self):
        return (Path.touch, (Path("must_not_appear"),))


def test_files_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "unsafe.pth"
    torch.save({"model": Unsafe()}, path)
    rejected(segformer_b0(), path, "not loaded for safety")
    assert not (tmp_path / "must_not_appear").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "expected a state dict"),
        ({"epoch": 3, "lr": 0.1}, r"got dict with keys \['epoch', 'lr'\]"),
        ({"model": {}, "student": {}}, r"several state dicts \(model, student\)"),
        ("nowhere.pth", "expected a file of weights at nowhere.pth, found none"),
    ],
)
def test_sources_without_weights(source, message):
    rejected(segformer_b0(), source, message)


def test_files_without_a_state_dict(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(2)], path)
    rejected(segformer_b0(), path, "got list")


def test_modules_without_storage(weights):
    with torch.device("meta"):
        model = segformer_b0()
    with pytest.raises(WeightsError, match="meta device"):
        load_weights(model, weights)
