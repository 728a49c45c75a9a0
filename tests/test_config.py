"""The configuration: round trips, and errors that name the key."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
from tiny_run import pattern

from transkd_fast.train.config import ConfigError, load_config, save_config
from transkd_fast.train.settings import Config

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def leaves(config, prefix=""):
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def test_defaults_are_valid():
    assert load_config(None) == Config()


def test_file_then_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nfit: {lr: 1.0e-3, epochs: 7}\ndata: {size: [64, 128]}\nteacher: {fit: {batch_size: 5}}\n")
    config = load_config(path, ["fit.lr=2e-3", "fit.clip_norm=null", "distill.embeddings=[4]", "teacher.fit.epochs=9"])
    assert (config.seed, config.fit.lr, config.fit.epochs, config.fit.clip_norm) == (3, 2e-3, 7, None)
    assert (config.data.size, config.distill.embeddings) == ([64, 128], [4])
    assert (config.teacher.fit.batch_size, config.teacher.fit.epochs) == (5, 9)
    assert config.fit.batch_size == Config().fit.batch_size


def test_later_overrides_win():
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_saved_configuration_reads_back_equal(tmp_path):
    # Every key away from its default, so that one which is lost on the way shows.
    changed = load_config(
        None,
        [
            "run_dir=elsewhere", "seed=5", "device=cpu", "precision=bf16", "backend=eager", "threads=3",
            "keep_memory=false", "resume=true", "log_every=3", "log_gradients=true", "tensorboard=true",
                "checkpoint_every=5", "checkpoint_minutes=2", "on_nonfinite=skip", "skip_limit=3", "compile=true",
                "channels_last=true", "teacher.expect_miou=0.5", "data.name=camvid", "data.root=/data",
            "data.size=[64,96]", "data.augment=published", "data.scale=[0.5,2]", "data.flip=0.25",
            "data.jitter=0.125", "data.train_length=9", "data.val_length=8", "data.cache=false", "data.workers=2",
            "data.check=false", "data.train_split=more", "data.allow_orphans=true", "data.coarse=true",
            "data.conditions=[fog]",
            "student.model=segformer_b1", "student.weights=s.pt", "student.num_classes=20",
            "student.drop_path=0.25", "teacher.model=segformer_b1", "teacher.weights=t.pt", "teacher.num_classes=20",
            "teacher.drop_path=0.5", "student.weights_prefix=student.", "teacher.weights_prefix=t.",
            *(
                f"{fit}.{setting}"
                for fit in ("fit", "teacher.fit")
                for setting in (
                    "epochs=3", "batch_size=7", "lr=0.1", "weight_decay=0.25", "betas=[0.5,0.75]", "warmup_steps=4",
                    "power=2", "accumulate=2", "ema=0.5", "clip_norm=null", "class_weights=[1,2.5]", "eval_every=6",
                )
            ),
            "distill.enabled=false", "distill.variant=gl", "distill.mid_channels=32", "distill.legacy=true",
            "distill.feature_loss=null", "distill.feature_weight=0.5", "distill.feature_stage_weights=[1,2,3,4]",
            "distill.embeddings=[2,4]", "distill.embedding_weight=0.25", "distill.embedding_stage_weights=[4,3,2,1]",
            "distill.temperature=4", "distill.feature_level_weights=[1,0,2]", "distill.logits=true",
            "distill.logit_weight=0.5", "distill.logit_temperature=3", "distill.resize_student=true",
            "distill.fusion=review", "distill.logit_loss=cwd",
            "legacy.quarter_labels=true",
            "verify.batches=5", "verify.batch_size=6", "verify.limit_fp32=1e-6", "verify.limit_bf16=0.125",
            "verify.precision=fp32",
        ],
    )  # fmt: skip
    defaults = dict(leaves(Config()))
    # A method sets other keys; tests/test_methods.py reads one back.
    assert [key for key, value in leaves(changed) if value == defaults[key]] == ["distill.method"]
    save_config(changed, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == changed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load(path):
    assert asdict(load_config(path)) != asdict(Config())


def test_there_are_shipped_configurations():
    assert {"camvid_tiny.yaml", "demo.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize(
    ("override", "key", "closest"),
    [
        ("fit.lrr=1", "fit.lrr", "fit.lr"),
        ("lr=1", "lr", "fit.lr"),
        ("data.sise=[64,64]", "data.sise", "data.size"),
        ("teacher.fit.epoch=1", "teacher.fit.epoch", "teacher.fit.epochs"),
        ("distil.variant=gl", "distil", "distill"),
        ("precison=bf16", "precison", "precision"),
    ],
)
def test_unknown_key_is_named_with_the_closest(override, key, closest, tmp_path):
    with pytest.raises(ConfigError, match=pattern(f"unknown key {key!r}; did you mean {closest!r}?")):
        load_config(None, [override])
    path = tmp_path / "c.yaml"
    *parents, last = override.split("=")[0].split(".")
    opening = "".join(f"{{{parent}: " for parent in parents)
    path.write_text(f"{opening}{{{last}: {override.split('=')[1]}}}{'}' * len(parents)}")
    with pytest.raises(ConfigError, match=pattern(f"{path}: unknown key {key!r}; did you mean {closest!r}?")):
        load_config(path)


def test_unknown_key_unlike_any_other_gets_no_hint():
    with pytest.raises(ConfigError, match=r"unknown key 'zzzzzz'$"):
        load_config(None, ["zzzzzz=1"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("fit.epochs=many", "fit.epochs"),
        ("fit.epochs=1.5", "fit.epochs"),
        ("fit.epochs=null", "fit.epochs"),
        ("fit.lr=", "fit.lr"),
        ("fit.clip_norm=off", "fit.clip_norm"),
        ("resume=maybe", "resume"),
        ("data.size=64", "data.size"),
        ("data.size=[64,wide]", "data.size[1]"),
        ("data.name=null", "data.name"),
        ("data=null", "data"),
        ("fit=3", "fit"),
        ("seed={a: 1}", "seed"),
    ],
)
def test_wrong_type_names_the_key(override, key):
    with pytest.raises(ConfigError, match=pattern(f"bad value for {key!r}")):
        load_config(None, [override])


RANGES = {
    "run_dir": ["''"],
    "seed": ["-1"],
    "device": ["tpu", "''"],
    "precision": ["fp64", "FP32"],
    "on_nonfinite": ["ignore"],
    "checkpoint_every": ["0"],
    "checkpoint_minutes": ["0"],
    "skip_limit": ["-1"],
    "fit.accumulate": ["0"],
    "fit.ema": ["0", "1", "1.5"],
    "teacher.expect_miou": ["0", "1.5"],
    "backend": ["gpu"],
    "threads": ["0", "-2"],
    "log_every": ["0"],
    "data.name": ["cityscape"],
    "data.size": ["[64]", "[64,64,3]", "[16,64]", "[64,-64]", "[]"],
    "data.augment": ["crop"],
    "data.scale": ["[0,1]", "[2,1]", "[1]", "[nan,1]", "[1,inf]"],
    "data.flip": ["1.5", "-0.1", "nan"],
    "data.jitter": ["1", "-0.1", "nan"],
    "data.workers": ["-1"],
    "data.train_length": ["0"],
    "data.val_length": ["-1"],
    "student.model": ["segformer_b9"],
    "teacher.model": ["b0"],
    "student.drop_path": ["1", "-0.5", "nan"],
    "teacher.num_classes": ["1", "-3"],
    "distill.variant": ["big"],
    "distill.feature_loss": ["kl", "none"],
    "distill.mid_channels": ["0"],
    "distill.temperature": ["0", "nan", "inf"],
    "distill.feature_weight": ["-1", "nan", "inf"],
    "distill.embedding_weight": ["-0.5"],
    "distill.logit_weight": ["-1", "nan"],
    "distill.logit_temperature": ["0", "inf"],
    "distill.feature_level_weights": ["[1,1]", "[1,1,-1]", "[1,1,nan]"],
    "distill.feature_stage_weights": ["[1,1,1]", "[1,1,1,-1]", "[1,1,1,nan]"],
    "distill.embedding_stage_weights": ["[1,1,1,1,1]", "[inf,1,1,1]"],
    "distill.embeddings": ["[0]", "[5]", "[1,1]"],
    "verify.batches": ["0"],
    "verify.batch_size": ["0"],
    "verify.limit_fp32": ["0", "-1", "nan", "inf"],
    "verify.limit_bf16": ["nan"],
}
FIT_RANGES = {
    "epochs": ["0", "-1"],
    "batch_size": ["0"],
    "lr": ["0", "-1", "nan", "inf"],
    "power": ["0", "nan", "inf"],
    "eval_every": ["0"],
    "weight_decay": ["-0.1", "nan", "inf"],
    "warmup_steps": ["-1"],
    "betas": ["[0.9]", "[0.9,1]", "[-0.1,0.9]", "[nan,0.9]"],
    "clip_norm": ["0", "-1", "nan"],
    "class_weights": ["[1,-1]", "[1,nan]", "[0,0]", "[]"],
}
CASES = [(key, value) for key, values in RANGES.items() for value in values]
CASES += [(f"{p}.{k}", v) for p in ("fit", "teacher.fit") for k, values in FIT_RANGES.items() for v in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_out_of_range_names_the_key(key, value):
    with pytest.raises(ConfigError, match=f"^{pattern(key)}: expected .*, got "):
        load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["distill.variant=gl", "distill.embeddings=[1,2]"], "distill.embeddings"),
        (["distill.variant=ea", "distill.embeddings=[]"], "distill.embeddings"),
        (["distill.feature_loss=null", "distill.embeddings=[]"], "distill.enabled"),
    ],
)
def test_contradictions_name_a_key(overrides, key):
    with pytest.raises(ConfigError, match=f"^{pattern(key)}: expected "):
        load_config(None, overrides)


@pytest.mark.parametrize("override", ["fit.lr", "", "=3", "--fit.lr", "fit..lr=3", ".fit=3", "fit.=3"])
def test_override_of_another_form(override):
    with pytest.raises(ConfigError, match=pattern(f"override {override!r}: expected the form dotted.key=value")):
        load_config(None, [override])


@pytest.mark.parametrize("value", ["[a", "'x", "${nope}", "${"])
def test_override_whose_value_cannot_be_read(value):
    with pytest.raises(ConfigError, match="run_dir"):
        load_config(None, [f"run_dir={value}"])


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=pattern(f"{tmp_path / 'none.yaml'}: no such file")):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"- 1\n", b"a: [", b"seed: 1\nseed: 2\n", b"\xff\xfe\x80"], ids=repr)
def test_file_that_is_no_configuration(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=pattern(str(path))):
        load_config(path)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ConfigError, match=pattern(str(tmp_path))):
        load_config(tmp_path)
