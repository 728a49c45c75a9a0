"""What the benches measure: the cases of the targets, in an order that suits short runs."""

import importlib
from itertools import product

import pytest
import torch
from bench_rows import BENCH

# isort: split
from harness import rows, targets

from transkd_fast import backends

BENCHES = sorted(path.stem for path in BENCH.glob("bench_*.py") if path.stem != "bench_step")


def bench_of(op):
    return importlib.import_module(f"bench_{op}")


def test_committed_targets_name_cases_that_the_benches_have():
    for promised in targets.load():
        bench = bench_of(promised.op)
        assert set(promised.layout) <= set(bench.LAYOUTS)
        assert set(product(promised.size, promised.batch)) <= set(bench.CASES[promised.device]), promised


@pytest.mark.parametrize("op", ["csf", "head"])
def test_the_bench_with_default_malloc_runs_the_cases_of_its_targets(op):
    bench, asked = bench_of(op), []
    for layout in bench.LAYOUTS:
        getattr(bench, f"test_{op}_with_default_malloc")(layout, asked.append)
    ids = {f"test_{op}[{p.id}]": p.values for p in bench.parameters(["cpu"])}
    promised = [target for target in targets.load() if target.malloc and target.op == op]
    cases = {(t.device, *t.size, *t.batch, *t.layout) for target in promised for t in target.single()}
    assert cases == {ids[test] for test in asked}


def test_only_benches_with_default_malloc_have_targets_of_it():
    assert {target.op for target in targets.load() if target.malloc} == {"csf", "head"}


@pytest.mark.parametrize(
    ("op", "first"),
    [
        ("csf", [("stage 1", 8), ("stage 1", 2)]),
        ("cwd", [("stages 1-4", 8), ("stage 1", 8)]),
        ("gl_mixer", [("stage 4", 8), ("stage 4", 2)]),
        ("hcl", [("stages 1-4", 8), ("stage 1", 8)]),
        ("hcl_bn", [("stages 1-4", 8), ("stage 1", 8)]),
        ("head", [("base", 8), ("base", 2)]),
        ("pea", [("stages 1-4", 8), ("stages 1-2", 8)]),
        ("seg_ce", [("19 classes", 8), ("19 classes", 2)]),
    ],
)
def test_judged_cases_run_first_on_a_gpu(op, first):
    bench = bench_of(op)
    order = [parameter.values for parameter in bench.parameters(["cuda"])]
    expected = [("cuda", *case, layout) for case in first for layout in bench.LAYOUTS]
    assert order[: len(expected)] == expected
    promised = [target for target in targets.load() if target.op == op and target.device == "cuda"]
    judged = [
        any(size in t.size and batch in t.batch and layout in t.layout for t in promised)
        for _, size, batch, layout in order
    ]
    assert judged == sorted(judged, reverse=True) and judged[0]


@pytest.mark.parametrize("bench", BENCHES)
def test_graphs_of_all_gpu_cases_are_compiled_without_a_reset(bench):
    # One may be left over from the CPU's cases.
    cases = importlib.import_module(bench).parameters(["cuda"])
    assert len(cases) < torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("op", ["csf", "cwd", "gl_mixer", "hcl", "hcl_bn", "pea", "seg_ce"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_graphs_are_dropped_only_where_there_are_too_many(device, op, monkeypatch):
    class Enough(Exception):
        pass

    def enough(device):
        raise Enough

    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(device))
    monkeypatch.setattr(torch, "Generator", enough)
    with pytest.raises(Enough):
        getattr(bench_of(op), f"test_{op}")(device, "stage 1", 8, "nchw", "bf16", None)
    assert resets == ([device] if device == "cpu" else [])


def test_every_op_with_a_bench_has_targets_for_each_of_its_kernels():
    promised = {(t.op, backend) for t in targets.load() for backend in t.backend}
    for op, states in backends.table().items():
        if (BENCH / f"bench_{op}.py").exists():
            kernels = {name for name in rows.KERNELS if states[name] != "no kernel for this op yet"}
            assert {(op, name) for name in kernels} <= promised, f"{op}: add targets to bench/targets.toml"
