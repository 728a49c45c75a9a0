"""transkd import, export and report: what they print, write and refuse."""

import onnxruntime
import pytest
import torch
import transformers
from published_files import TINY, TINY_TEACHER, fill, network_shapes, state_of, tiny_segformer, transkd_shapes
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import MODELS, TinyNet, overrides

from transkd_fast import cli, models
from transkd_fast.models import convert
from transkd_fast.models.complexity import count_macs
from transkd_fast.train import tasks
from transkd_fast.train.checkpoint import save_checkpoint
from transkd_fast.train.config import load_config, save_config


@pytest.fixture(autouse=True)
def few_networks(monkeypatch):
    for name in list(models.MODELS):
        monkeypatch.delitem(models.MODELS, name)
    for name, network in {**MODELS, "tiny_segformer": tiny_segformer}.items():
        monkeypatch.setitem(models.MODELS, name, network)


def transkd(*arguments):
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    capsys.readouterr()
    assert transkd(*arguments) == 3
    return capsys.readouterr().err.partition("error: ")[2]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# import


@pytest.mark.parametrize(("variant", "title"), [("base", "Base"), ("gl", "GL"), ("ea", "EA")])
def test_import_of_a_transkd_file(variant, title, tmp_path, capsys):
    state = state_of(transkd_shapes(variant, TINY, TINY_TEACHER, 7))
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "net.pth")
    out = tmp_path / "net.safetensors"
    assert transkd("import", tmp_path / "net.pth", "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"TransKD-{title} around tiny_segformer with 7 classes, for a teacher of 16, 24, 32, 40 channels" in printed
    assert f"{len(state)} tensors, all fit" in printed
    assert same(load_file(out), state)
    with safe_open(out, "pt") as file:
        entries = {"model": "tiny_segformer", "num_classes": "7", "holds": f"transkd-{variant}", "source": "net.pth"}
        assert file.metadata() == {"format": "pt", **entries}
    # The student alone, out of what was written; then the network's own file.
    alone = tmp_path / "student.safetensors"
    assert transkd("import", out, "--student", "--out", alone) == 0
    assert same(load_file(alone), convert.student_of(state))
    assert transkd("import", alone) == 0
    assert "tiny_segformer with 7 classes\n" in capsys.readouterr().out


def test_every_key_that_does_not_fit_is_printed(tmp_path, capsys):
    shapes = network_shapes(TINY, 5)
    gone = [key for key in shapes if key.startswith(("norm", "block2.0.attn"))]
    assert len(gone) > 16
    state = state_of({key: shape for key, shape in shapes.items() if key not in gone} | {"more": (2,)})
    state["linear_c1.proj.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "net.pth")
    assert transkd("import", tmp_path / "net.pth", "--out", tmp_path / "o.safetensors") == 3
    printed = capsys.readouterr()
    lines = [line.strip() for line in printed.out.splitlines()[1:]]
    expected = [f"missing: {key}" for key in gone]
    expected += ["unexpected: more", "mis-shaped: linear_c1.proj.bias (expected [16], got [3])"]
    assert sorted(lines) == sorted(expected)
    assert f"does not fit: {len(gone)} missing, 1 unexpected, 1 mis-shaped; nothing was written" in printed.err
    assert not (tmp_path / "o.safetensors").exists()


def test_bad_input(tmp_path, capsys):
    torch.save(tiny_segformer().state_dict(), tmp_path / "net.pth")
    torch.save({"model": tasks.Task}, tmp_path / "unsafe.pth")
    net = tmp_path / "net.pth"
    for arguments, message in [
        (["import", tmp_path / "none.pth"], "expected a file of weights"),
        (["import", tmp_path / "unsafe.pth"], "not loaded for safety"),
        (["import", net, "--out", tmp_path / "o.pth"], "expected a name that ends with .safetensors"),
        (["import", net, "--out", tmp_path / "no" / "o.safetensors"], "expected a folder at"),
        (["import", net, "--student"], "--student: expected --out"),
        (["import", net, "--model", "b9"], "--model: expected one of tiny, "),
        (["import", net, "--num-classes", "7"], "2 mis-shaped"),
        (["import", net, "--num-classes", "0"], "--num-classes: expected at least 1, got 0"),
        (["export", tmp_path, "--to", "onnx", tmp_path / "o.onnx"], "expected a run folder with student/last.pt or"),
        (["export", net, "--to", "torch", tmp_path / "o.onnx"], "expected a name that ends with .pt2"),
        (["report", tmp_path], "expected a run folder with config.yaml"),
        (["report", tmp_path, "--config", net], "expected a run folder or --config, got both"),
        (["report", "--batch", "0"], "--batch: expected a positive number, got 0"),
    ]:
        assert message in refused(capsys, *arguments), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "unsafe.pth"]


# export


@pytest.fixture
def run_folder(tmp_path):
    """What a run leaves: its configuration and the student's checkpoints, the wrapper's keys in them."""
    network = fill(TinyNet(6))
    folder = tmp_path / "run"
    (folder / "student").mkdir(parents=True)
    save_config(load_config(None, overrides(folder)), folder / "config.yaml")
    state = {f"student.{key}": value for key, value in network.state_dict().items()}
    content = {"classes": list("abcdef"), "model": state | {"skfs.0.more": torch.zeros(1)}}
    save_checkpoint(content, folder / "student" / "best.pt")
    save_checkpoint(content, folder / "student" / "last.pt")
    return folder, network


def test_export_of_a_run_to_onnx(run_folder, tmp_path, capsys):
    folder, network = run_folder
    assert transkd("export", folder, "--to", "onnx", tmp_path / "s.onnx") == 0
    out = capsys.readouterr().out
    assert f"{folder / 'student' / 'last.pt'}: tiny with 6 classes" in out
    assert "checked at 1x64x96, 3x64x96, 1x101x135, 3x101x135: logits differ by at most" in out
    images = torch.rand(2, 3, 80, 112)
    logits = onnxruntime.InferenceSession(tmp_path / "s.onnx").run(None, {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), network(images).logits, rtol=1e-4, atol=1e-4)


def test_export_to_torch(run_folder, tmp_path, capsys):
    folder, network = run_folder
    assert transkd("export", folder / "student" / "last.pt", "--to", "torch", tmp_path / "s.pt2") == 0
    images = torch.rand(2, 3, 80, 112)
    program = torch.export.load(tmp_path / "s.pt2").module()
    torch.testing.assert_close(program(images), network(images).logits, rtol=1e-4, atol=1e-4)
    assert "logits [B, 6, H / 4, W / 4]" in capsys.readouterr().out


def test_export_to_hugging_face_and_back(tmp_path, capsys):
    network = fill(tiny_segformer(4))
    content = {"model": {f"student.{k}": v for k, v in network.state_dict().items()}, "classes": list("wxyz")}
    torch.save(content, tmp_path / "s.pt")
    assert transkd("export", tmp_path / "s.pt", "--to", "huggingface", tmp_path / "hf") == 0
    out = capsys.readouterr().out
    assert "mean 0, standard deviation 1" in out and "transformers gives the same logits at that eps to" in out
    assert transformers.SegformerConfig.from_pretrained(tmp_path / "hf").id2label == dict(enumerate("wxyz"))
    back = tmp_path / "back.safetensors"
    assert transkd("import", tmp_path / "hf" / "model.safetensors", "--out", back) == 0
    assert same(load_file(back), network.state_dict())
    assert "every layer norm has eps 1e-5" in capsys.readouterr().out


# report


def cells(out):
    """The numbers of every row by its name."""
    lines = [line for line in out.splitlines() if " M " in line]
    return {line.partition("  ")[0]: line.split()[-7 - 1 :] for line in lines}


def test_report_keeps_training_modules_out_of_the_student(run_folder, capsys):
    folder, network = run_folder
    size = ["--seconds", "0.01", "data.size=[512,1024]", "distill.variant=gl"]
    assert transkd("report", *size[:2], folder, *size[2:]) == 0
    out = capsys.readouterr().out
    rows = cells(out)
    names = ["teacher tiny_teacher", "teacher without its decoder, as in training"]
    assert list(rows) == [*names, "student tiny, as deployed", "student in training, with losses"]
    parameters = {name: float(row[0]) for name, row in rows.items()}
    deployed = sum(parameter.numel() for parameter in network.parameters())
    assert parameters["student tiny, as deployed"] == round(deployed / 1e6, 2)
    macs = count_macs(network, (1, 3, 512, 1024))
    assert rows["student tiny, as deployed"][2] == f"{macs.layers / 1e9:.2f}"
    in_training = rows["student in training, with losses"]
    assert float(in_training[0]) > deployed / 1e6 and float(in_training[2]) > macs.layers / 1e9 + 0.01
    assert "one image of 512 x 1024" in out and "a forward pass of 1 x 3 x 512 x 1024, cpu, fp32" in out


def test_report_of_a_configuration_without_distillation(tmp_path, capsys):
    given = overrides(tmp_path / "run", distill__enabled="false", student__num_classes=3, teacher__num_classes=3)
    assert transkd("report", "--seconds", "0.01", "--batch", "2", *given) == 0
    out = capsys.readouterr().out
    assert list(cells(out)) == ["student tiny, as deployed"] and "a forward pass of 2 x 3 x 64 x 64" in out
    assert not (tmp_path / "run").exists()
