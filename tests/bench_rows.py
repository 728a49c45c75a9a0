"""Rows, targets and cases for the tests of the benches, whose modules it makes importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import tables  # noqa: E402, F401
import torch  # noqa: E402
from harness import cases, rows, targets  # noqa: E402
from harness.rows import Figures, Row  # noqa: E402


def row(backend="cpu", ms=1.0, **changes):
    values = dict.fromkeys(rows.KEY, "") | {"batch": 2, "threads": 2, "op": "hcl", "size": "stages 1-4"}
    values |= {"backend": backend, "dtype": "fp32", "layout": "nchw", "device_type": "cpu", "device": "CPU"}
    values |= {"baseline": "eager", "measured_at": "2026-01-02T00:00:00", "load_before": 0.0, "rounds": 3}
    values |= {mode: Figures(ms, ms, ms) for mode in rows.MODES}
    return Row(**{**values, **changes})


def target(**changes):
    values = {"op": "hcl", "backend": ("cpu",), "device": "cpu", "size": ("stages 1-4",), "batch": (2,)}
    values |= {"dtype": ("fp32",), "layout": ("nchw",), "measure": "speedup_total", "source": "", "against": "eager"}
    return targets.Target(**{**values, "at_least": 5.0, **changes})


class OneRound:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            function()


def problem(**changes):
    values = {"op": "hcl", "size": "stages 1-4", "batch": 2, "shape": "2x3", "dtype": "fp32", "layout": "nchw"}
    return cases.Problem(**{**values, "device": torch.device("cpu"), **changes})


def square_case(backend="eager", function=None, **changes):
    """A case whose truth is sum x^2; `function` computes something else."""
    x = torch.arange(1.0, 7.0).reshape(2, 3).requires_grad_()
    upstream = torch.tensor(0.37, dtype=torch.float64)
    exact = x.detach().double()
    truth = exact.square().sum(), [2 * 0.37 * exact]
    function = function or (lambda x: x.square().sum())
    return cases.gradient_case(problem(**changes), backend, lambda: function(x), [x], [], truth, upstream)
