"""The command line: what the commands print and the codes they exit with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_run
import torch
from tiny_run import overrides, tiny_config

from transkd_fast import backends, cli, models
from transkd_fast.train import run
from transkd_fast.train.loop import Trainer
from transkd_fast.train.verify import Row

TORCH = torch.__version__.split("+")[0]


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def transkd(*arguments):
    """The exit code, whether it is returned or raised, as the shell would see it."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def refused(capsys, *arguments):
    """The message of a command that must fail on bad input."""
    assert transkd(*arguments) == 3
    err = capsys.readouterr().err
    assert "Traceback" not in err
    _, separator, message = err.strip().splitlines()[-1].partition(": error: ")
    assert separator
    return message


def empty(folder):
    """A configuration file that changes nothing."""
    path = folder / "empty.yaml"
    path.write_text("{}\n")
    return path


# env


def test_env_lists_ops_and_reasons(capsys, monkeypatch):
    monkeypatch.delitem(backends._registry["cwd"], "triton")
    assert transkd("env") == 0
    out = capsys.readouterr().out
    assert out.startswith("transkd_fast ")
    assert f"torch {TORCH}" in out
    lines = out.split("backends per op:\n")[1].splitlines()
    assert [line.strip() for line in lines if not line.startswith("    ")] == sorted(backends.table())
    assert "    triton  no kernel for this op yet" in lines and "    eager   can run" in lines


def test_env_as_json(capsys):
    assert transkd("env", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ops"] == backends.table()
    assert report["packages"]["torch"] == TORCH
    assert report["build"]["extensions"]["_C"] == {"loaded": True, "reason": None}


def test_env_without_the_extension_says_why(capsys, monkeypatch):
    reason = "libsomething.so: cannot open shared object file"
    monkeypatch.setattr(backends._extension, "_modules", {})
    monkeypatch.setattr(backends._extension, "_reasons", {"_C": reason, "_C_cuda": "this torch has no CUDA"})
    assert transkd("env") == 0
    out = capsys.readouterr().out
    assert f"_C: not loaded: {reason}" in out and "_C_cuda: not loaded: this torch has no CUDA" in out
    assert f"    cpu     {reason}" in out


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "transkd_fast", "env", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ops"].keys() >= {"csf", "cwd", "gl_mixer", "hcl", "hcl_bn", "pea", "seg_ce"}


# train and eval


def miou_of(out):
    return next(line.split()[1:] for line in out.splitlines() if line.startswith("mIoU"))


def test_train_then_eval_on_real_networks(tmp_path, capsys):
    run_dir = tmp_path / "run"
    config = tmp_path / "c.yaml"
    config.write_text("fit: {epochs: 7}\nstudent: {drop_path: 0.2}\n")
    assert transkd("train", "--config", config, *overrides(run_dir, **tiny_run.SEGFORMER)) == 0
    trained = capsys.readouterr().out
    assert trained.rstrip().endswith(f"run folder {run_dir}") and "images/s in training" in trained
    saved = tiny_config(run_dir, **tiny_run.SEGFORMER, student__drop_path=0.2)
    assert run.load_config(run_dir / "config.yaml") == saved
    assert transkd("eval", run_dir) == 0
    evaluated = capsys.readouterr().out
    assert miou_of(evaluated) == miou_of(trained)[1:]
    assert "sky" in evaluated and "pixels counted" in evaluated
    assert transkd("eval", run_dir / "teacher" / "best.pt", "data.val_length=1") == 0


def test_resume(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert transkd("train", *overrides(run_dir)) == 130
    assert "resume=true" in capsys.readouterr().err
    assert "set resume=true" in refused(capsys, "train", *overrides(run_dir))
    assert transkd("train", *overrides(run_dir, resume=True)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "fit.lrr=1"], "did you mean 'fit.lr'?"),
        (["train", "fit.lr"], "expected the form dotted.key=value"),
        (["train", "fit.lr=0"], "fit.lr: expected a positive number, got 0.0"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
        (["train", "data.name=camvid", "data.root=/nowhere"], "/nowhere: expected a folder with images/train"),
        (["train", "device=cuda:99"], "device: 'cuda:99' is not there"),
        (["train", "student.weights=/nowhere/s.pt"], "expected a file of weights at /nowhere/s.pt"),
        (["train", "resume=true", "run_dir=/nowhere/run"], "run_dir: expected a run to resume in /nowhere/run"),
        (["eval", "/nowhere/run"], "/nowhere/run: expected a checkpoint"),
        (["verify", "distill.enabled=false"], "distill.enabled: expected true"),
        (["verify", "verify.batches=9"], "verify.batches: expected at most 2"),
        (["train", "precision=fp8"], "precision: expected one of 'fp32', 'bf16'"),
    ],
)
def test_bad_input_is_exit_3_and_a_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    tiny = [f"{key}={value}" for key, value in tiny_run.SETTINGS.items()]
    if "data.name=camvid" in rest:
        tiny += ["data.train_length=null", "data.val_length=null"]
    options, given = (rest[:2], rest[2:]) if rest[0] == "--config" else ([], rest)
    arguments = arguments if command == "eval" else [command, *options, *tiny, *given]
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--lr", "3"], "unrecognized arguments: --lr"),
        (["eval"], "the following arguments are required: checkpoint"),
        (["fit"], "invalid choice: 'fit'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_exit_3_for_2_has_a_meaning(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_a_missing_package_says_how_to_install_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("transkd_fast.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    message = refused(capsys, "train")
    assert message == "the package omegaconf is missing; install with `pip install 'transkd_fast[train]'`"


def test_help_is_success(capsys):
    assert transkd("train", "--help") == 0
    assert "--config" in capsys.readouterr().out


# verify


def test_verify_agrees(tmp_path, capsys):
    assert transkd("verify", *overrides(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "verify: agree (" in out and "loss/hcl" in out and "images/s" in out and "MiB peak" in out
    assert [line.split() for line in out.splitlines() if line.startswith("hcl_bn ")] == [
        ["hcl_bn", "cpu", "1", "calls"]
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_verify_names_the_backend_of_every_op(variant, tmp_path, capsys):
    assert transkd("verify", *overrides(tmp_path / "run", distill__variant=variant)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("calls")]
    fused = {"csf": "3", "hcl_bn": "1", "pea": "1", "seg_ce": "1"} | ({"gl_mixer": "1"} if variant == "gl" else {})
    assert {op: number for op, backend, number, _ in lines if backend == "cpu"}.items() >= fused.items()
    assert not fused.keys() & {op for op, backend, *_ in lines if backend != "cpu"}


def test_verify_prints_every_tensor_when_asked(tmp_path, capsys):
    assert transkd("verify", "--all", *overrides(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    count = int(out.split("verify: agree (")[1].split()[0])
    assert sum(line.startswith(("loss/", "grad/", "buffer/")) for line in out.splitlines()) == count
    assert "--all" not in out


def test_verify_disagrees(tmp_path, capsys, monkeypatch):
    kernel = torch.ops.transkd_fast.hcl_bn_bwd

    def wrong(*arguments):
        return [1.01 * gradient for gradient in kernel(*arguments)]

    monkeypatch.setattr(torch.ops.transkd_fast, "hcl_bn_bwd", wrong)
    assert transkd("verify", *overrides(tmp_path / "run")) == 1
    out = capsys.readouterr().out
    assert "verify: DISAGREE (" in out
    assert any(line.startswith("grad/") and line.endswith("DISAGREES") for line in out.splitlines())


def test_verify_without_a_fused_kernel(tmp_path, capsys):
    assert transkd("verify", *overrides(tmp_path / "run", backend="eager")) == 2
    assert "verify: NOTHING FUSED RAN" in capsys.readouterr().out


def test_verify_with_a_backend_that_cannot_run(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(backends._registry["hcl_bn"], "cpu")
    assert "backend='cpu' cannot run: no kernel" in refused(
        capsys, "verify", *overrides(tmp_path / "run", backend="cpu")
    )


# demo


def test_demo_fails_when_the_student_did_not_learn(tmp_path, capsys):
    assert transkd("demo", "--config", empty(tmp_path), *overrides(tmp_path / "run", fit__epochs=1)) == 1
    captured = capsys.readouterr()
    assert "the student did not learn enough: expected +15 points of mIoU and 5 classes above 20 % IoU" in captured.err
    for row in ("verify ", "training ", "teacher mIoU ", "student mIoU before ", "student mIoU after ", "run folder "):
        assert f"\n{row}" in captured.out
    assert (tmp_path / "run" / "summary.json").exists()


def test_demo_succeeds_when_it_learnt_and_overwrites_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli._training, "DEMO_GAIN", -1.0)
    monkeypatch.setattr(cli._training, "DEMO_CLASSES", 0)
    assert transkd("demo", "--config", empty(tmp_path), *overrides(tmp_path / "run", fit__epochs=1)) == 0
    assert transkd("demo", "--config", empty(tmp_path), *overrides(tmp_path / "run", fit__epochs=1)) == 0
    assert capsys.readouterr().out.endswith(f" {tmp_path / 'run-2'}\n")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"run", "run-2"}


@pytest.mark.parametrize(("row", "fused", "code"), [(Row("loss/ce", 1.0, 0.0, 0.1), 1, 1), (None, 0, 2)])
def test_demo_passes_on_what_verify_found(row, fused, code, tmp_path, monkeypatch):
    monkeypatch.setattr(cli._training, "DEMO_GAIN", -1.0)
    monkeypatch.setattr(cli._training, "DEMO_CLASSES", 0)
    compare = run.verify_run

    def verify_run(config):
        report = compare(config)
        report.rows += [row] if row is not None else []
        report.fused_runs = fused
        return report

    monkeypatch.setattr(run, "verify_run", verify_run)
    assert transkd("demo", "--config", empty(tmp_path), *overrides(tmp_path / "run", fit__epochs=1)) == code


def test_demo_wants_a_configuration(capsys):
    assert "required: --config" in refused(capsys, "demo")


def test_an_error_nobody_foresaw_is_no_verdict(tmp_path, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("as if")

    monkeypatch.setattr(run, "verify", broken)
    assert transkd("verify", *overrides(tmp_path / "run")) == 4
    assert "ZeroDivisionError: as if" in capsys.readouterr().err


def test_an_unknown_backend_in_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRANSKD_FAST_BACKEND", "gpu")
    message = refused(capsys, "train", *overrides(tmp_path / "run"))
    assert "environment variable TRANSKD_FAST_BACKEND" in message and "'gpu'" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "train", *overrides(tmp_path / "file" / "run"))
