"""What a file of weights holds, and SegFormer at Hugging Face: against written-out names and transformers itself."""

import published_files
import pytest
import torch
from published_files import B0, TEACHER, TINY, TINY_TEACHER, network_shapes, state_of, tiny_segformer, transkd_shapes
from safetensors import safe_open
from safetensors.torch import load_file

from transkd_fast import TransKD, models
from transkd_fast.models import WeightsError, convert
from transkd_fast.models.weights import mismatches

ALL_NETWORKS = dict(models.MODELS)


@pytest.fixture(autouse=True)
def few_networks(monkeypatch):
    """A comparison with the largest networks takes a second."""
    monkeypatch.setitem(models.MODELS, "tiny_segformer", tiny_segformer)
    for name in models.MODELS.keys() - {"tiny_segformer", "segformer_b0", "segformer_b1"}:
        monkeypatch.delitem(models.MODELS, name)


@pytest.fixture
def all_networks(few_networks, monkeypatch):
    for name, network in ALL_NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def unfit(module, state):
    return [key for keys in mismatches(module.state_dict(), state).values() for key in keys]


@pytest.mark.parametrize(("variant", "keys"), [("base", 281), ("gl", 290), ("ea", 305)])
def test_published_transkd_files(variant, keys):
    state = state_of(transkd_shapes(variant, B0, TEACHER, 20), "meta")
    assert len(state) == keys
    found = convert.detect(state)
    assert (found.model, found.num_classes) == ("segformer_b0", 20)
    with torch.device("meta"):
        assert unfit(TransKD(models.create(found.model, 20), **found.wrapper), state) == []
    assert str(found).startswith(
        f"TransKD-{'Base' if variant == 'base' else variant.upper()} around segformer_b0 with 20"
    )
    inner = convert.student_of(state)
    assert inner.keys() == network_shapes(B0, 20).keys() and convert.detect(inner).wrapper is None


def test_networks_are_told_apart(all_networks):
    assert convert.detect(convert.skeleton("segformer_b4", 19).state_dict()) == convert.Detected(
        "segformer_b4", 19, None
    )


def test_the_nearest_network_where_keys_are_missing():
    state = convert.skeleton("segformer_b1", 11).state_dict()
    for key in [key for key in state if key.startswith(("norm", "block1.1.", "linear_pred"))]:
        del state[key]
    assert convert.detect(state) == convert.Detected("segformer_b1", 20, None)
    assert convert.detect(state, num_classes=11).num_classes == 11
    assert convert.detect(state, model="segformer_b0").model == "segformer_b0"


@pytest.mark.parametrize("stages", [(), (1,), (3,), (2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("features", [True, False])
def test_stages_and_features_are_read_off(stages, features):
    if not stages and not features:
        return
    with torch.device("meta"):
        state = TransKD(tiny_segformer(), TINY[0], TINY_TEACHER, features=features, embeddings=stages).state_dict()
    found = convert.detect(state)
    assert (found.wrapper["features"], found.wrapper["embeddings"]) == (features, stages)
    with torch.device("meta"):
        assert unfit(TransKD(tiny_segformer(found.num_classes), **found.wrapper), state) == []


def test_a_missing_projection_is_missing_and_not_another_model():
    state = state_of(transkd_shapes("gl", TINY, TINY_TEACHER, 5), "meta")
    gone = {"embed2_linearproject.weight", "embed4_linearproject.weight", "embed4_linearproject.bias"}
    state = {key: value for key, value in state.items() if key not in gone}
    found = convert.detect(state)
    with torch.device("meta"):
        module = TransKD(tiny_segformer(), **found.wrapper)
    assert set(mismatches(module.state_dict(), state)["missing"]) == gone


def test_what_is_no_network_is_refused():
    with pytest.raises(WeightsError, match=r"one of segformer_b0, .*an unknown model with keys such as a\.b"):
        convert.detect({"a.b": torch.zeros(2)})


def test_a_student_that_was_wrapped_before():
    state = {"student.module.norm1.weight": torch.zeros(1), "conv1.weight": torch.zeros(2)}
    assert convert.published_names(state).keys() == {"student.norm1.weight", "conv1.weight"}


# Hugging Face


@pytest.fixture(scope="session")
def theirs():
    """Their network with random weights in fp64, and its two state dicts."""
    transformers = pytest.importorskip("transformers")
    channels, _, decoder = TINY
    config = transformers.SegformerConfig(
        num_labels=5,
        hidden_sizes=channels,
        depths=(1, 2, 1, 1),
        num_attention_heads=(1, 2, 3, 4),
        decoder_hidden_size=decoder,
    )
    return published_files.fill(transformers.SegformerForSemanticSegmentation(config).double())


@pytest.fixture(scope="session")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


IMAGES = torch.rand(2, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def states(theirs, saved):
    return {"files": load_file(saved / "model.safetensors"), "modules": theirs.state_dict()}


def largest_difference(a, b):
    with torch.no_grad():
        expected = a(IMAGES).logits
        return ((b(IMAGES).logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("layout", ["files", "modules"])
def test_from_hugging_face(theirs, saved, layout):
    state = states(theirs, saved)[layout]
    assert convert.is_hugging_face(state)
    ours = convert.from_hugging_face_config(theirs.config.to_dict()).double().eval()
    ours.load_state_dict(convert.published_names(state))
    assert largest_difference(theirs, ours) < 1e-12
    # Their eps is that of our patch embeddings, not of our blocks.
    assert largest_difference(theirs, convert.with_eps(ours, 1e-6)) > 1e-9


@pytest.mark.parametrize("layout", ["files", "modules"])
def test_to_hugging_face(theirs, saved, layout):
    theirs_there = states(theirs, saved)[layout]
    ours = convert.from_hugging_face_config(theirs.config.to_dict()).double().eval()
    published_files.fill(ours)
    name = "stages" if "segformer.stages.0.layer_norm.weight" in theirs_there else "files"
    converted = convert.to_hugging_face(ours.state_dict(), name)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs_there.items()}
    back = convert.from_hugging_face(converted)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    if layout == "modules":
        before = {key: value.clone() for key, value in theirs_there.items()}
        theirs.load_state_dict(converted)
        difference = largest_difference(theirs, ours)
        theirs.load_state_dict(before)
        assert difference < 1e-12


def test_keys_come_before_values():
    ours = tiny_segformer().state_dict()
    there = convert.to_hugging_face(ours)
    prefix = "segformer.encoder.block.1.0.attention.self."
    assert torch.equal(there[prefix + "key.weight"], ours["block2.0.attn.kv.weight"][:16])
    assert torch.equal(there[prefix + "value.bias"], ours["block2.0.attn.kv.bias"][16:])


def test_what_has_no_partner_keeps_its_name():
    there = convert.to_hugging_face(tiny_segformer().state_dict()) | {"head.weight": torch.zeros(1)}
    lone = "segformer.encoder.block.0.0.attention.self.key.weight"
    del there[lone.replace("key", "value")]
    report = mismatches(tiny_segformer().state_dict(), convert.from_hugging_face(there))
    assert report["missing"] == ["block1.0.attn.kv.weight"] and report["unexpected"] == [lone, "head.weight"]


def test_configuration_there_and_back(theirs):
    ours = convert.from_hugging_face_config(theirs.config.to_dict())
    config = convert.hugging_face_config(ours, ("a", "b", "c", "d", "e"))
    expected = theirs.config.to_dict()
    named = {"id2label", "label2id", "layer_norm_eps", "architectures", "dtype"}
    assert {key: expected[key] for key in config if key not in named} == {
        key: tuple(value) if isinstance(expected[key], tuple) else value
        for key, value in config.items()
        if key not in named
    }
    assert config["id2label"]["4"] == "e" and config["label2id"]["b"] == 1
    assert unfit(convert.from_hugging_face_config(config), ours.state_dict()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "swin"}, "expected model_type 'segformer', got 'swin'"),
        ({"strides": [4, 2, 2, 1]}, r"expected strides \[4, 2, 2, 2\], got \[4, 2, 2, 1\]"),
        ({"mlp_ratios": [4, 4, 8, 4]}, r"expected equal mlp_ratios, got \[4, 4, 8, 4\]"),
    ],
)
def test_configurations_that_are_no_segformer_of_ours(change, message):
    with pytest.raises(WeightsError, match=message):
        convert.from_hugging_face_config(convert.hugging_face_config(tiny_segformer()) | change)


# writing


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    strided = torch.arange(12.0).reshape(3, 4).t()
    convert.save_weights({"a": strided, "b": strided[0]}, path, {"model": "tiny"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "tiny"} and torch.equal(file.get_tensor("a"), strided)
    before = path.read_bytes()

    def broken(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        convert.save_weights({"a": torch.zeros(1)}, path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
