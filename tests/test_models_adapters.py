"""Networks of others: timm's hierarchical backbones, factories of one's own, and the dry run before training."""

from __future__ import annotations

import sys

import pytest
import timm
import tiny_run
import torch
from tiny_run import TinyNet, tiny_config

from transkd_fast import TransKD, models
from transkd_fast.models import StageOutputs, describe
from transkd_fast.models.semantic_fpn import SemanticFPN
from transkd_fast.train import ConfigError, train


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def pvt():
    torch.manual_seed(0)
    return models.create("timm:pvt_v2_b0", num_classes=7).eval()


def test_a_backbones_maps_and_embeddings_are_timms_own(pvt):
    images = torch.rand(2, 3, 64, 96)
    whole = timm.create_model("pvt_v2_b0", pretrained=False).eval()
    # timm names the modules of a features_only model otherwise.
    own = {key.replace("stages_", "stages."): value for key, value in pvt.backbone.state_dict().items()}
    missing, unexpected = whole.load_state_dict(own, strict=False)
    assert not unexpected and all(key.startswith("head") for key in missing)
    config = whole.pretrained_cfg
    x = (images - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.no_grad():
        outputs = pvt(images)
        x = whole.patch_embed(x)
        for m, stage in enumerate(whole.stages):
            embedding = x if stage.downsample is None else stage.downsample(x)  # [B, H, W, C]
            torch.testing.assert_close(outputs.embeddings[m], embedding.flatten(1, 2), rtol=1e-5, atol=1e-5)
            x = stage(x)  # [B, C, H, W]
            torch.testing.assert_close(outputs.features[m], x, rtol=1e-5, atol=1e-5)
            x = x if m == 3 or whole.stages[m + 1].downsample is not None else x.permute(0, 2, 3, 1)
    assert outputs.logits.shape == (2, 7, 16, 24)
    assert pvt.channels == (32, 64, 160, 256) and pvt.embedding_stages == 4


def test_every_parameter_learns_and_no_buffer_is_in_the_state(pvt):
    model = models.create("timm:pvt_v2_b0", num_classes=7)
    outputs = model(torch.rand(2, 3, 64, 64))
    # The embeddings are on the way to the features.
    outputs.logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not {"mean", "std"} & set(model.state_dict())
    assert model.eval()(torch.rand(1, 3, 64, 64), features_only=True).logits is None


def test_a_backbone_without_patch_embeddings_says_so(tmp_path):
    model = models.create("timm:resnet18", num_classes=4)
    assert model.embedding_stages == 0 and model.channels == (64, 128, 256, 512)
    lines = describe("student", model, torch.rand(2, 3, 64, 64))
    assert len(lines) == 5 and all("no patch embedding" in line for line in lines[1:])
    distilled = TransKD(model, model.channels, model.channels, embeddings=())
    with torch.no_grad():
        target = model.eval()(torch.rand(2, 3, 64, 64))
    assert distilled(torch.rand(2, 3, 64, 64), target).losses.keys() == {"hcl"}
    config = tiny_config(tmp_path / "run", **{"student.model": "timm:resnet18", "teacher.model": "timm:resnet18"})
    with pytest.raises(ConfigError, match=r"distill\.embeddings: expected \[\].*no patch embeddings.*embeddings=\[\]"):
        train(config, lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_windowed_backbone_takes_other_sizes_than_its_pretraining(caplog):
    model = models.create("timm:swin_tiny_patch4_window7_224", num_classes=4, drop_path_rate=0.1)
    lines = describe("teacher", model, torch.rand(1, 3, 64, 96))
    assert "features [1, 768, 2, 3], embedding [1, 6, 768]" in lines[4]
    assert not caplog.records


def test_a_backbone_without_stochastic_depth_says_so(caplog):
    model = models.create("timm:densenet121", num_classes=4, drop_path_rate=0.1)
    assert "densenet121 has no stochastic depth: drop_path=0.1 is not used" in caplog.text
    assert len(describe("teacher", model, torch.rand(1, 3, 64, 64))) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_224", "strides 4, 8, 16, 32"),
        ("timm:no_such_model", "timm cannot make it"),
        ("no.such.module:factory", "No module named 'no'"),
        ("json:nothing", "expected a function nothing in json"),
        ("torch.nn:Flatten", "takes num_classes, got Flatten"),
        ("tiny_run:whole_run", "takes num_classes"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, name, message):
    with pytest.raises(ConfigError, match=rf"student\.model: .*({message})"):
        train(tiny_config(tmp_path, **{"student.model": name}), lambda line: None)


OWN = """
from torch import nn
from transkd_fast import StageOutputs

def student(num_classes):
    return Adapter(num_classes)

class Adapter(nn.Module):
    channels = (4, 4, 4, 4)

    def __init__(self, num_classes):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if m == 0 else 4, 4, s, s) for m, s in enumerate((4, 2, 2, 2)))
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, images, features_only=False):
        features, x = [], images
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        tokens = [f.flatten(2).transpose(1, 2) for f in features]
        return StageOutputs(features, tokens, None if features_only else self.head(features[0]))
"""


def test_a_network_of_ones_own_is_trained(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    lines = []
    options = {"student.model": "my_networks:student", "fit.epochs": 1}
    result = train(tiny_config(tmp_path / "run", **options), lines.append)
    assert 0 <= result.student.scores.miou <= 1
    assert any(line.startswith("student: Adapter, images [2, 3, 64, 64] as they are, logits [2, ") for line in lines)
    assert any(line.startswith("teacher stage 4: features [2, 24, 2, 2], embedding [2, 4, 24]") for line in lines)


class Wrong(TinyNet):
    def forward(self, images, features_only=False):
        features, embeddings, logits = super().forward(images, features_only)
        return {
            "a tuple": (features, embeddings, logits),
            "coarse first": StageOutputs(features[::-1], embeddings[::-1], logits),
            "three embeddings": StageOutputs(features, embeddings[:3], logits),
            "no logits": StageOutputs(features, embeddings, None),
        }[self.fault]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a tuple", "expected StageOutputs from its forward, got tuple"),
        ("coarse first", r"expected features \[\[1, 4, 16, 16\].*got \[\[1, 16, 2, 2\]"),
        ("three embeddings", "expected patch embeddings .* or none"),
        ("no logits", "expected logits, got None"),
    ],
)
def test_the_dry_run_names_what_is_wrong(fault, message):
    model = Wrong(5)
    model.fault = fault
    with pytest.raises(ValueError, match=f"student: {message}"):
        describe("student", model, torch.zeros(1, 3, 64, 64))


def test_semantic_fpn_adds_up_levels_at_stride_4():
    torch.manual_seed(0)
    decoder = SemanticFPN((3, 4, 5, 6), 7, pyramid_channels=8, channels=10).double().eval()
    maps = [
        torch.randn(2, c, *size).double()
        for c, size in zip((3, 4, 5, 6), [(19, 26), (10, 13), (5, 7), (3, 4)], strict=True)
    ]
    logits = decoder(maps)
    assert logits.shape == (2, 7, 19, 26)
    # Level 3 alone: with all others' last convolutions silent, only it is left, three doublings above its own size.
    for level in (0, 1, 2):
        torch.nn.init.zeros_(decoder.levels[level][-1][0].weight)
        torch.nn.init.constant_(decoder.levels[level][-1][1].bias, 0)
    x = decoder.smooth[3](decoder.lateral[3](maps[3]))
    for block, size in zip(decoder.levels[3], [(5, 7), (10, 13), (19, 26)], strict=True):
        x = torch.nn.functional.interpolate(block(x), size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(maps), decoder.classifier(x), rtol=1e-10, atol=1e-10)
