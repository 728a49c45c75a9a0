"""Files to deploy: against the network, in onnxruntime, torch.export and transformers."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from published_files import fill, tiny_segformer
from tiny_run import TinyNet
from torch import nn

from transkd_fast import functional
from transkd_fast.models import StageOutputs, convert, export
from transkd_fast.models.export import ExportError, export_hugging_face, export_onnx, export_torch

# Neither the traced sizes nor those that the export itself compares.
SIZES = [(1, 64, 64), (1, 70, 129), (4, 64, 64), (4, 70, 129)]


@pytest.fixture(scope="session")
def network():
    return fill(tiny_segformer(drop_path_rate=0.0))


@pytest.fixture(scope="session")
def written(network, tmp_path_factory):
    """One traced program in both forms: tracing takes most of the time."""
    folder = tmp_path_factory.mktemp("export")
    program = export._program(export.Logits(network))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_program", lambda logits: program)
        worst = [export_torch(network, folder / "s.pt2"), export_onnx(network, folder / "s.onnx")]
    assert all(0 <= difference < 1e-5 for difference in worst)
    assert sorted(path.name for path in folder.iterdir()) == ["s.onnx", "s.pt2"]
    return folder


@pytest.fixture(scope="session")
def onnx(written):
    return onnxruntime.InferenceSession(written / "s.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def program(written):
    return torch.export.load(written / "s.pt2").module()


def expected(network, images):
    with torch.no_grad():
        return network(images).logits


@pytest.mark.parametrize("size", SIZES)
def test_onnx_has_the_logits_at_any_size(network, onnx, size):
    images = torch.rand(size[0], 3, *size[1:])
    logits = onnx.run(None, {"images": images.numpy()})[0]
    truth = expected(network, images)
    assert np.abs(logits - truth.numpy()).max() < 1e-5 * truth.abs().max()
    assert onnx.get_inputs()[0].shape == ["batch", 3, "height", "width"]


@pytest.mark.parametrize("size", SIZES)
def test_torch_program_has_the_logits_at_any_size(network, program, size):
    images = torch.rand(size[0], 3, *size[1:])
    torch.testing.assert_close(program(images), expected(network, images), rtol=1e-5, atol=1e-5)


class Wrong(TinyNet):
    """Another network where it is traced."""

    def forward(self, images, features_only=False):
        outputs = super().forward(images)
        factor = 1.01 if torch.compiler.is_compiling() else 1.0
        return outputs._replace(logits=factor * outputs.logits)


class OneSize(TinyNet):
    def forward(self, images, features_only=False):
        outputs = super().forward(images)
        return outputs._replace(logits=outputs.logits + (1 if images.shape[-1] == 192 else 2))


class Fused(TinyNet):
    def forward(self, images, features_only=False):
        outputs = super().forward(images)
        weight = self.head.weight
        return outputs._replace(logits=outputs.logits + functional.kd_kl_loss(weight, weight.detach()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Wrong, r"not written: its logits differ from the network's by 1\.0e-02 of the largest"),
        (OneSize, "torch.export cannot export OneSize with free batch and image size"),
        (Fused, "expected a network of torch's own operators, got transkd_fast"),
    ],
)
def test_no_file_is_left_that_disagrees(kind, message, tmp_path):
    path = tmp_path / "s.pt2"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=message):
        export_torch(kind(5).eval(), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_says_how_to_install_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"the package {package} is missing; .*transkd_fast\[export\]"):
        export_onnx(TinyNet(5), tmp_path / "s.onnx")


# Hugging Face


def test_hugging_face_folder(network, tmp_path):
    folder = tmp_path / "hf"
    difference = export_hugging_face(network, folder, ("a", "b", "c", "d", "e"))
    assert list(tmp_path.iterdir()) == [folder]
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        truth = convert.with_eps(network, 1e-5)(images).logits
        torch.testing.assert_close(theirs(images).logits, truth, rtol=1e-4, atol=1e-4)
    assert 0 < difference.eps < 1e-2 * difference.largest
    assert difference.library < 1e-5 * difference.largest and difference.library < difference.eps
    assert theirs.config.id2label == dict(enumerate("abcde"))


def test_their_processor_leaves_images_in_0_to_1(network, tmp_path):
    settings = export._processor()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    kind = getattr(transformers, settings["image_processor_type"])
    processor = kind.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0].permute(1, 2, 0), torch.from_numpy(image) / 255)


def test_a_folder_that_transformers_reads_otherwise_is_not_left(network, tmp_path, monkeypatch):
    rename = convert.to_hugging_face

    def swapped(state):
        """Keys and values the wrong way round, as if the rows were read so."""
        return rename({k: v.roll(v.shape[0] // 2, 0) if ".kv." in k else v for k, v in state.items()})

    monkeypatch.setattr(export, "to_hugging_face", swapped)
    with pytest.raises(ExportError, match="not written: transformers' logits differ"):
        export_hugging_face(network, tmp_path / "hf")
    monkeypatch.setattr(export, "to_hugging_face", lambda state: dict(list(rename(state).items())[1:]))
    with pytest.raises(ExportError, match="does not load the weights as they are"):
        export_hugging_face(network, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_eps_is_still_measured(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    difference = export_hugging_face(network, tmp_path / "hf")
    assert difference.library is None and difference.eps > 0


class Other(nn.Module):
    def forward(self, images):
        return StageOutputs([], [], images)


def test_what_hugging_face_cannot_take(network, tmp_path):
    with pytest.raises(ExportError, match="expected a SegFormer, the only network here that transformers has"):
        export_hugging_face(Other(), tmp_path / "hf")
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(ExportError, match="expected a folder without files, or a name that is free"):
            export_hugging_face(network, target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
