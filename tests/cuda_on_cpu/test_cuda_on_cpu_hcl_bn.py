"""The CUDA kernels of hcl_bn, run on the CPU, against the fp64 reference: moments, loss, sums, statistics, gradients.

The driver fills every output and workspace with NaNs before the launches.
"""

import itertools
import math

import pytest
import torch
from cuda_on_cpu import runner

from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.hcl import LEVEL_WEIGHTS
from transkd_fast.reference.hcl_bn import hcl_bn

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F64: 1e-12, F32: 4e-6, BF16: 2**-8, F16: 2**-10}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
RUNNING, BATCH, TRACKED = 1, 2, 3
# In whole vectors and not, levels left out, overlapping windows, 1 x n and 1 x 1.
SHAPES = [(2, 8, 8, 32), (1, 66, 6, 6), (3, 5, 9, 7), (2, 1, 5, 4), (3, 24, 1, 1), (2, 3, 1, 9)]
CUTTING = ("shared_bytes", "vector", "cell_parts", "strips", "cuts")
# As the launcher does it; then blocks so small that cells, and strips of them, go to blocks of their own.
TUNINGS = {"usual": {}, "cells": {"least_elements": 64}, "strips": {"least_elements": 8, "blocks": 10**6}}


def make(shapes, dtypes=(F32, F32), layout="nchw", norms=(TRACKED, BATCH, RUNNING), offset=0.0, small=F32):
    """A stage for each shape, with the kinds of normalisation in turn; weights bring their gradients to one size."""
    count, chosen = len(shapes), list(itertools.islice(itertools.cycle(norms), len(shapes)))
    inputs = {"norms": chosen, "momenta": [0.2, -1.0] * count, "eps": [1e-3] * count, "parts": [2] * count}
    for m, (shape, norm) in enumerate(zip(shapes, chosen, strict=True)):
        channels = shape[1]
        # A map that is both counts as contiguous.
        memory_format = LAYOUTS[layout if channels > 1 and math.prod(shape[2:]) > 1 else "nchw"]
        for name, dtype, mean in (("u", dtypes[0], offset), ("teacher", dtypes[1], 0.0)):
            values = 0.5 * torch.randn(shape, dtype=F64) + mean
            inputs[f"{name}{m}"] = values.to(dtype).contiguous(memory_format=memory_format)
        inputs[f"weight{m}"] = (1 + torch.randn(channels, dtype=F64) / 4).to(small)
        inputs[f"bias{m}"] = torch.randn(channels, dtype=F64).to(small)
        if norm != BATCH:
            inputs[f"running_mean{m}"] = (torch.randn(channels, dtype=F64) / 4 + offset).to(small)
            inputs[f"running_var{m}"] = (0.2 + torch.rand(channels, dtype=F64) / 4).to(small)
        if norm == TRACKED:
            inputs[f"batches{m}"] = torch.tensor(3)
    inputs["momenta"] = inputs["momenta"][:count]
    inputs["weights"] = [(0.5 + 0.1 * m) * math.prod(shape) for m, shape in enumerate(shapes)]
    return inputs | {"level_weights": LEVEL_WEIGHTS, "upstream": 0.37}


def run(inputs, build="plain", seed=0, misaligned=(0, 0), wanted=None, **tuning):
    stages = range(len(inputs["weights"]))
    if wanted is None:
        wanted = [int(f"{name}{m}" in inputs) for m in stages for name in ("u", "weight", "bias")]
    inputs = {**inputs, "wanted": wanted, **tuning}
    for m, (name, bytes_) in itertools.product(stages, zip(("u", "teacher"), misaligned, strict=True)):
        inputs[f"{name}{m}"] = runner.Misaligned(inputs[f"{name}{m}"], bytes_)
    defines = () if build == "plain" else ("HCL_BN_FEW_TYPES",)
    return runner.run("hcl_bn", inputs, build=build, seed=seed, defines=defines)


def truth(inputs):
    """What the fp64 reference makes of the same inputs, its gradients and running statistics."""
    result, loss, leaves, normalised = {}, 0.0, {}, {}
    for m, (norm, weight) in enumerate(zip(inputs["norms"], inputs["weights"], strict=True)):
        own = {name: inputs[f"{name}{m}"].double() for name in ("u", "weight", "bias") if f"{name}{m}" in inputs}
        leaves |= {f"d{name}{m}": value.requires_grad_() for name, value in own.items()}
        statistics = [inputs[f"{name}{m}"].clone() if f"{name}{m}" in inputs else None
                      for name in ("running_mean", "running_var", "batches")]  # fmt: skip
        running = [None if value is None else value.double() for value in statistics[:2]]
        momentum = inputs["momenta"][m]
        bn = BatchNorm(own.get("weight"), own.get("bias"), *running, statistics[2], norm != RUNNING,
                       None if momentum < 0 else momentum, inputs["eps"][m])  # fmt: skip
        teacher = inputs[f"teacher{m}"].double()
        loss = loss + weight * hcl_bn(own["u"], teacher, bn, inputs["level_weights"])
        names = ("running_mean", "running_var", "batches")
        result |= {f"{name}{m}": value for name, value in zip(names, (*running, statistics[2]), strict=True)
                   if value is not None}  # fmt: skip
        # The same stage from the normalised map on: the sums are over its gradient.
        u = own["u"].detach()
        mean, variance = running if norm == RUNNING else (u.mean((0, 2, 3)), u.var((0, 2, 3), unbiased=False))
        invstd = (variance + inputs["eps"][m]).rsqrt()
        xhat = (u - mean[:, None, None]) * invstd[:, None, None]
        fixed = BatchNorm(None, None, torch.zeros_like(mean), torch.ones_like(mean), None, False, 0.1, 0.0)
        scale, shift = (own[k].detach() if k in own else d for k, d in (("weight", 1.0), ("bias", 0.0)))
        x = xhat * torch.as_tensor(scale).view(-1, 1, 1) + torch.as_tensor(shift).view(-1, 1, 1)
        x.requires_grad_()
        (g,) = torch.autograd.grad(weight * hcl_bn(x, teacher, fixed, inputs["level_weights"]), x)
        result[f"state{m}"] = torch.stack([mean, invstd])
        normalised[f"sums{m}"] = torch.stack([g.sum((2, 3)), (g * xhat).sum((2, 3))], dim=1)
    gradients = torch.autograd.grad(loss * inputs["upstream"], list(leaves.values()))
    result |= dict(zip(leaves, gradients, strict=True)) | normalised | {"loss": loss.detach()}
    return result


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


def check(result, inputs):
    expected = truth(inputs)
    compute = F64 if inputs["u0"].dtype == F64 else F32
    assert result["loss"].dtype == compute
    for name, true in expected.items():
        if name not in result:  # a gradient that was not asked for
            continue
        value, tolerance = result[name], TOLERANCE[compute]
        stored = inputs.get(name.removeprefix("d"))
        if isinstance(stored, torch.Tensor):
            assert value.dtype == stored.dtype and value.stride() == stored.stride()
            tolerance = max(tolerance, TOLERANCE.get(stored.dtype, 0))
        assert relative(value, true) < tolerance, (name, relative(value, true))
    for m, u in enumerate(inputs[f"u{m}"].double() for m in range(len(inputs["weights"]))):
        check_moments(result[f"moments{m}"], u)


def check_moments(moments, u):
    """Whatever the parts are, together they must be the moments of all values."""
    if not len(moments):
        return
    count, mean, squares = moments.unbind(1)
    assert torch.equal(count.sum(0), torch.full_like(mean[0], u.numel() // u.shape[1]))
    assert (moments[count[:, 0] == 0] == 0).all()
    whole = u.transpose(0, 1).flatten(1)
    together = (count * mean).sum(0) / count.sum(0)
    assert ((together - whole.mean(1)).abs() < 1e-6 * whole.std(1, unbiased=False) + 1e-15).all()
    deviations = (squares + count * (mean - together).square()).sum(0)
    assert relative(deviations, (whole - whole.mean(1, keepdim=True)).square().sum(1)) < 4e-6


def cutting(result):
    return [dict(zip(CUTTING, row, strict=True)) for row in result["cutting"].tolist()]


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, F32), (F16, F16)], ids=str)
@layouts
def test_stages_of_all_kinds_plain(layout, dtypes):
    inputs = make(SHAPES, dtypes, layout, small=F64 if F64 in dtypes else dtypes[1])
    result = run(inputs)
    check(result, inputs)
    assert {row["vector"] for row in cutting(result)} == ({0} if F64 in dtypes else {0, 1})


@pytest.mark.parametrize("tuning", ["cells", "strips"])
@layouts
def test_every_way_of_cutting_plain(layout, tuning):
    inputs = make([(1, 4, 8, 32), (1, 40, 4, 8), (1, 3, 7, 17)], layout=layout)
    result = run(inputs, **TUNINGS[tuning])
    check(result, inputs)
    assert any(row["cell_parts" if tuning == "cells" else "strips"] > 1 for row in cutting(result))


def test_a_batch_norm_without_parameters_and_a_part_of_the_gradients_plain():
    inputs = make(SHAPES[:3])
    del inputs["weight0"], inputs["bias0"], inputs["weight2"]
    result = run(inputs, wanted=[1, 0, 0, 0, 1, 0, 0, 0, 1])
    check(result, inputs)
    assert {name for name in result if name.startswith("d")} == {"du0", "dweight1", "dbias2"}


@layouts
def test_a_large_mean_costs_no_digits_plain(layout):
    inputs = make(SHAPES[:3], layout=layout, offset=1000.0, small=F64)
    check(run(inputs), inputs)


@layouts
def test_rows_of_a_group_of_processes_plain(layout):
    """The first process of two, one with two samples, the other with one."""
    inputs = make([(3, 8, 4, 8), (3, 5, 9, 7)], layout=layout, norms=(TRACKED, BATCH))
    expected = truth(inputs)
    mine = dict(inputs)
    for m, pixels in ((0, 32), (1, 63)):
        u, teacher = (inputs[f"{name}{m}"] for name in ("u", "teacher"))
        # An empty part of the first process, which has no row, between them.
        rows = [(part.double().transpose(0, 1).flatten(1)) for part in (u[:2], u[:0], u[2:])]
        mine[f"moments{m}"] = torch.stack(
            [torch.stack([torch.full((u.shape[1],), r.shape[1], dtype=F64),
                          r.mean(1) if r.shape[1] else torch.zeros(u.shape[1], dtype=F64),
                          (r - r.mean(1, keepdim=True)).square().sum(1)]) for r in rows]
        )  # fmt: skip
        mine[f"u{m}"], mine[f"teacher{m}"] = u[:2].clone(), teacher[:2].clone()
        # The whole batch's loss is a mean over three samples, this one's over two.
        mine["weights"] = [w * 2 / 3 for w in inputs["weights"]]
        mine[f"means{m}"] = inputs["upstream"] * expected[f"sums{m}"].sum(0) / (3 * pixels)
    result = run(mine)
    for m in range(2):
        assert relative(result[f"du{m}"], expected[f"du{m}"][:2]) < TOLERANCE[F32]
        assert relative(result[f"sums{m}"], expected[f"sums{m}"][:2]) < TOLERANCE[F32]
        assert relative(result[f"state{m}"], expected[f"state{m}"]) < 1e-12
    for name in ("running_mean0", "running_var0", "batches0"):
        assert relative(result[name], expected[name]) < TOLERANCE[F32]


@pytest.mark.parametrize("tuning", ["usual", "strips"])
@layouts
def test_the_order_of_blocks_and_threads_does_not_matter_plain(layout, tuning):
    inputs = make([(2, 8, 4, 16), (2, 5, 6, 6)], layout=layout)
    first = run(inputs, **TUNINGS[tuning])
    for name, value in run(inputs, seed=1, **TUNINGS[tuning]).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("misaligned", [(4, 0), (0, 8)], ids=str)
@layouts
def test_misaligned_bases_are_read_one_by_one(layout, misaligned):
    inputs = make(SHAPES[:1], layout=layout)
    assert [row["vector"] for row in cutting(run(inputs))] == [1]
    result = run(inputs, build="asan", misaligned=misaligned)
    check(result, inputs)
    assert [row["vector"] for row in cutting(result)] == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@layouts
def test_nan_and_inf_come_out_plain(layout, bad):
    inputs = make([(1, 8, 8, 8), (2, 3, 6, 5)], layout=layout, norms=(TRACKED,))
    inputs["u1"][0, 1, 2, 3] = bad
    result = run(inputs)
    assert not result["loss"].isfinite() and not result["du1"][:, 1].isfinite().any()
    assert result["du1"][:, [0, 2]].isfinite().all() and result["du0"].isfinite().all()
    assert not result["running_mean1"][1].isfinite() and result["running_mean1"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("build, tuning", [("asan", "usual"), ("asan", "strips"), ("tsan", "cells")])
@layouts
def test_sanitizers_find_nothing(layout, build, tuning):
    inputs = make([(3, 4, 4, 8), (1, 34, 3, 4), (3, 1, 1, 1)], layout=layout)
    check(run(inputs, build=build, **TUNINGS[tuning]), inputs)
