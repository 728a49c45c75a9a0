"""Profiles of a step: a trace with known costs, steps whose slow parts are known, and what the command leaves."""

from __future__ import annotations

import json
import time

import pytest
import tiny_run
import torch
from PIL import Image
from tiny_run import overrides, quiet, tiny_config

from transkd_fast import cli, functional, models
from transkd_fast.cli import _profile
from transkd_fast.train import profile, trace

SLEEP = 0.03


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def span(name, start, end, cat="cpu_op", tid=1, number=None, **args):
    if number is not None:
        args["Sequence number"] = number
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def part(name, start, end):
    return span(f"transkd::{name}", start, end, "user_annotation")


def node(name, start, end, number=None, tid=1):
    return span(f"autograd::engine::evaluate_function: {name}", start, end, tid=tid, number=number)


def memory(at, size, tid=1, device=0):
    args = {"Bytes": size, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "tid": tid, "args": args}


# One step of 1000 us: what lies in a part, in parts within it, in the backward pass, and in nothing.
STEP = [
    {"ph": "M", "name": "process_name"},
    part("step", 0, 1000),
    part("data", 10, 110),
    part("optimiser", 110, 120),
    part("teacher forward", 130, 230),
    span("aten::mm", 140, 150, number=5),  # without gradients: the same number comes again
    part("student forward", 230, 430),
    span("aten::linear", 240, 420, number=5),
    span("aten::t", 250, 260, number=5),
    span("aten::addmm", 270, 280, number=6),
    part("hcl forward", 430, 500),
    part("csf forward", 440, 480),
    span("Fuse", 450, 470, number=7),
    span("aten::mse_loss", 485, 490, number=9),
    node("MseLossBackward0", 510, 530, 9),
    node("FuseBackward", 540, 600, 8),  # no operator has this number: it is of the one before
    span("aten::mul", 550, 560, number=5),  # within a node: made nothing
    node("torch::autograd::AccumulateGrad", 600, 610),
    node("AddmmBackward0", 620, 700, 6),
    node("TBackward0", 700, 720, 5),
    node("torch::autograd::AccumulateGrad", 730, 740),
    part("optimiser", 800, 900),
    memory(240, 1000),
    memory(455, 300),
    memory(545, -300),
    memory(630, 500),
    memory(650, -1000),
    memory(850, -500),
    memory(990, 64),
    memory(460, 10**9, device=1),
]
COSTS = {  # us, bytes kept, peak
    "data": (100, 0, 0),
    "teacher forward": (100, 0, 0),
    "student forward": (200, 1000, 1000),
    "csf forward": (40, 300, 1300),
    "hcl forward": (30, 0, 0),
    "hcl backward": (20, 0, 0),
    "csf backward": (70, -300, 1300),
    "student backward": (110, -500, 1500),
    "gradient norm": (60, 0, 0),
    "optimiser": (110, -500, 500),
    "unattributed": (160, 64, 64),
}


def test_a_trace_with_known_costs():
    later = [{**e, "ts": e["ts"] + 5000} if "ts" in e else e for e in STEP]
    found = trace.read_steps(later + STEP)
    assert len(found) == 2
    for seconds, costs in found:
        assert seconds == pytest.approx(1e-3)
        shown = {name: (round(1e6 * cost.seconds, 6), cost.kept, cost.peak) for name, cost in costs.items()}
        assert shown == COSTS and list(shown) == list(COSTS)


def test_a_gpu_s_time_is_that_of_its_kernels():
    launch = [
        span("cudaLaunchKernel", at, at + 5, "cuda_runtime", tid, correlation=n)
        for n, (at, tid) in enumerate([(35, 1), (145, 1), (245, 1), (545, 2), (950, 1)])
    ]
    work = [
        span("k", at, at + size, cat, 7, correlation=n)
        for n, (at, size, cat) in enumerate(
            [
                (40, 8, "gpu_memcpy"),
                (300, 50, "kernel"),
                (400, 70, "kernel"),
                (700, 90, "kernel"),
                (960, 20, "gpu_memset"),
            ]
        )
    ]
    # A GPU's backward pass has a thread of its own.
    events = [{**e, "tid": 2} if 500 < e.get("ts", 0) < 750 else e for e in STEP]
    ((seconds, costs),) = trace.read_steps(events + launch + work, "cuda")
    shown = {name: round(1e6 * cost.seconds, 6) for name, cost in costs.items() if cost.seconds}
    assert shown == {"data": 100, "teacher forward": 50, "student forward": 70, "csf backward": 90, "unattributed": 690}
    assert seconds == pytest.approx(1e-3) and costs["csf forward"].peak == 10**9


class Slow(torch.autograd.Function):
    """The identity, with a backward pass that takes its time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLEEP)
        return gradient


class SlowNet(tiny_run.TinyNet):
    def forward(self, images, features_only=False):
        time.sleep(SLEEP)
        outputs = super().forward(images, features_only)
        return outputs._replace(features=[Slow.apply(outputs.features[0]), *outputs.features[1:]])


def adds_up(report):
    for number, step in enumerate(report.steps):
        seconds = [costs[number].seconds for costs in report.parts.values()]
        assert sum(seconds) == pytest.approx(step) and min(seconds) >= 0
    assert sum(map(report.share, report.parts)) == pytest.approx(1)


def least(report, name):
    return min(cost.seconds for cost in report.parts[name])


TKD = ["data", "teacher forward", "student forward", "csf forward", "hcl forward", "pea forward", "ce forward"]
TKD += [f"{name} backward" for name in ("ce", "pea", "hcl", "csf", "student")]


def test_slow_parts_are_found_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", SlowNet)
    pea_loss = functional.pea_loss
    monkeypatch.setattr(functional, "pea_loss", lambda *args, **more: Slow.apply(pea_loss(*args, **more)))
    report = profile.profile_config(tiny_config(tmp_path / "run"), steps=2, warmup=1, log=quiet)
    assert list(report.parts) == [*TKD, "gradient norm", "optimiser", "unattributed"]
    assert len(report.steps) == len(report.plain) == 2
    adds_up(report)
    assert all(least(report, name) > 0 for name in report.parts)
    assert all(least(report, name) >= SLEEP for name in ("student forward", "student backward", "pea backward"))
    # The gradients of a step are given back at the next one's start, and what a forward pass keeps in the backward.
    kept = {name: report.memory(name)[0] for name in report.parts}
    assert kept["student forward"] > 0 > kept["student backward"]
    student = tiny_run.TinyNet(11)
    assert kept["optimiser"] <= -4 * sum(p.numel() for p in student.parameters())
    assert report.memory("ce forward")[1] >= kept["student forward"]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"distill__enabled": "false", "fit__accumulate": 2}, {"ce backward", "student backward", "optimiser"}),
        ({"distill__method": "review", "fit__ema": 0.9}, {"review forward", "review backward", "average of weights"}),
        ({"distill__method": "kd", "compile": "true"}, {"kd_kl forward", "kd_kl backward", "teacher forward"}),
    ],
)
def test_other_methods_have_other_parts(tmp_path, more, parts):
    told = []
    report = profile.profile_config(tiny_config(tmp_path / "run", **more), steps=1, warmup=0, log=told.append)
    adds_up(report)
    assert parts <= set(report.parts) and all(least(report, name) > 0 for name in parts)
    assert not {"csf forward", "pea forward"} & set(report.parts)
    assert any("compile: not in effect" in line for line in told) == ("compile" in more)


def transkd(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def test_the_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ("profile", "--steps", 2, "--warmup", 0, "--out", out, *overrides(tmp_path / "run"))
    assert transkd(*command) == 0
    table = capsys.readouterr().out
    content = json.loads((out / "profile.json").read_text())
    assert list(content["parts"]) == [*TKD, "gradient norm", "optimiser", "unattributed"]
    rows = {line[:16].strip(): line[16:].split() for line in table.splitlines()}
    for name, cells in content["parts"].items():
        assert cells["p20_s"] <= cells["p50_s"] <= cells["p80_s"] and len(cells["seconds"]) == 2
        assert rows[name][:3] == [f"{1e3 * cells[key]:.2f}" for key in ("p20_s", "p50_s", "p80_s")], name
        assert rows[name][5:] == [f"{cells[key] / 2**20:.1f}" for key in ("kept_bytes", "peak_bytes")], name
    assert content["student"] == "tiny" and content["images_per_step"] == 2
    with Image.open(out / "profile.png") as image:
        assert image.format == "PNG" and min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 4
    assert transkd(*command) == 3 and "profile.json is there already" in capsys.readouterr().err
    assert transkd("profile", "--steps", 0) == 3 and "--steps: expected at least 1" in capsys.readouterr().err
    monkeypatch.setattr(_profile.importlib.util, "find_spec", lambda name: None)
    assert transkd("profile", "--out", tmp_path / "other") == 3
    assert "transkd_fast[report]" in capsys.readouterr().err and not (tmp_path / "other").exists()
