"""The reference's shared parts, hcl with and without batch norm, and the published variants, against golden values."""

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load, tolerance
from torch import nn
from torch.autograd import gradcheck

from transkd_fast.reference import legacy
from transkd_fast.reference._common import BatchNorm, batch_norm, nearest_index, upsample
from transkd_fast.reference.hcl import hcl
from transkd_fast.reference.hcl_bn import hcl_bn

GOLDEN = load("losses")
HCL_CASES = [case for case in GOLDEN["cases"] if case["kind"] == "hcl"]
CWD_CASES = [case for case in GOLDEN["cases"] if case["kind"] != "hcl"]
DTYPES = (torch.float64, torch.float32)


def golden_loss(loss_function, case, dtype):
    student, teacher = (case[name].to(dtype).requires_grad_() for name in "ST")
    loss = loss_function(student, teacher)
    loss.backward()
    return {"loss": loss, "grad_S": student.grad, "grad_T": teacher.grad}


def pooled(x, level):
    """Averages over F.adaptive_avg_pool2d's windows, written out."""
    height, width = x.shape[2:]
    rows = [x[:, :, i * height // level : -(-(i + 1) * height // level)].mean(2) for i in range(level)]
    x = torch.stack(rows, 2)
    columns = [x[..., i * width // level : -(-(i + 1) * width // level)].mean(3) for i in range(level)]
    return torch.stack(columns, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HCL_CASES, ids=lambda case: case["name"])
def test_hcl_golden(case, dtype):
    compare(golden_loss(legacy.hcl_by_height, case, dtype), case["f64"], tolerance(case, dtype))
    height, width = case["S"].shape[2:]
    if height <= width or min(height, width) > 4:
        compare(golden_loss(hcl, case, dtype), case["f64"], tolerance(case, dtype))


@pytest.mark.parametrize(
    ("hw", "levels"),
    [
        ((9, 13), ((4, 0.5), (2, 0.25), (1, 0.125))),
        ((8, 3), ((2, 0.5), (1, 0.25))),
        ((4, 9), ((2, 0.5), (1, 0.25))),
        ((12, 2), ((1, 0.5),)),
        ((5, 1), ()),
        ((1, 6), ()),
    ],
)
def test_hcl_against_pooling_written_out(hw, levels):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, *hw, dtype=torch.float64)
    expected = F.mse_loss(student, teacher)
    for level, weight in levels:
        own = F.mse_loss(pooled(student, level), pooled(teacher, level))
        torchs = F.mse_loss(*(F.adaptive_avg_pool2d(t, level) for t in (student, teacher)))
        torch.testing.assert_close(own, torchs, rtol=1e-12, atol=0)
        expected = expected + weight * own
    expected = expected / (1 + sum(weight for _, weight in levels))
    torch.testing.assert_close(hcl(student, teacher), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hw", [(5, 6), (3, 7), (1, 2)])
def test_hcl_gradcheck(hw):
    torch.manual_seed(0)
    assert gradcheck(hcl, list(torch.randn(2, 2, 2, *hw, dtype=torch.float64).requires_grad_().unbind()))


def statistics(channels, dtype=torch.float64, training=True, momentum=0.1):
    torch.manual_seed(1)
    values = torch.rand(4, channels, dtype=torch.float64).to(dtype) + 0.5
    return BatchNorm(*values, torch.tensor(0), training, momentum)


@pytest.mark.parametrize("training", (True, False))
def test_hcl_bn_gradcheck(training):
    torch.manual_seed(0)
    u, teacher = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64)
    bn = statistics(2, training=training)

    def op(u, weight, bias):
        return hcl_bn(u, teacher, BatchNorm(weight, bias, *(t.clone() for t in bn[2:5]), *bn[5:]))

    assert gradcheck(op, [t.clone().requires_grad_() for t in (u, bn.weight, bn.bias)])


@pytest.mark.parametrize("training", (True, False))
def test_hcl_bn_is_hcl_of_batch_norm(training):
    torch.manual_seed(0)
    u, teacher = torch.randn(2, 3, 4, 9, 13, dtype=torch.float64)
    bn, module = statistics(4, training=training), nn.BatchNorm2d(4, dtype=torch.float64).train(training)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(module, name).data.copy_(getattr(bn, name))
    torch.testing.assert_close(hcl_bn(u, teacher, bn), hcl(module(u), teacher), rtol=1e-12, atol=0)
    torch.testing.assert_close(bn.running_var, module.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_hcl_of_half_maps_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 9, 13).to(dtype)
    loss = hcl(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, hcl(student.float(), teacher.float()), rtol=0, atol=0)
    torch.testing.assert_close(loss, hcl(student, teacher.float()), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(hcl(student, teacher), loss, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", (0.1, 0.3, None))
@pytest.mark.parametrize("stored", (torch.float64, torch.float32))
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 3, 1, 1)])
def test_batch_norm_is_torchs(shape, stored, momentum):
    torch.manual_seed(0)
    bn, module = statistics(3, stored, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(module, name).data.copy_(getattr(bn, name))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if stored == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 5
        torch.testing.assert_close(batch_norm(x, bn), module(x), **tolerance)
    torch.testing.assert_close(bn.running_mean.double(), module.running_mean, **tolerance)
    torch.testing.assert_close(bn.running_var.double(), module.running_var, **tolerance)
    assert bn.num_batches_tracked == 3
    module.eval()
    torch.testing.assert_close(batch_norm(x, bn._replace(training=False)), module(x), **tolerance)


def test_batch_norm_without_running_statistics():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    module = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    for training in (True, False):
        torch.testing.assert_close(batch_norm(x, BatchNorm(None, None, None, None, None, training)), module(x))


def test_batch_norm_of_a_single_value_raises():
    bn = statistics(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.zeros(1, 3, 1, 1, dtype=torch.float64), bn)
    assert bn.num_batches_tracked == 0
    assert batch_norm(torch.zeros(1, 3, 1, 1, dtype=torch.float64), bn._replace(training=False)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CWD_CASES, ids=lambda case: case["name"])
def test_legacy_cwd_golden(case, dtype):
    if dtype == torch.float32 and not case["f32_vs_f64"]["worst"] < 1e-3:
        # Underflow or cancellation to zero: the original's float32 run is another function.
        dtype = torch.float64
    function = legacy.cwd if case["kind"] == "cwd" else legacy.cwd_embedding

    def loss_function(student, teacher):
        return function(student, teacher, case["norm_type"], case["divergence"], case["temperature"])

    actual = golden_loss(loss_function, case, dtype)
    if "equal" in case["name"]:
        assert actual["loss"].abs() < 1e-15 and actual["grad_S"].abs().max() < 1e-15
    else:
        compare(actual, case["f64"], tolerance(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GOLDEN["pyramids"], ids=lambda case: case["name"])
def test_pyramids_golden(case, dtype):
    actual = {}
    for name, function in (
        ("hcl", lambda s, t: torch.stack([hcl(*pair) for pair in zip(s, t, strict=True)]).sum()),
        ("hcl_feaw", legacy.hcl_feature_weighted),
    ):
        maps = [[t.to(dtype).requires_grad_() for t in case[key]] for key in "ST"]
        loss = function(*maps)
        loss.backward()
        actual |= {name: loss, f"grad_{name}": [t.grad for t in maps[0]]}
    compare(actual, case["f64"], tolerance(case, dtype))


def test_legacy_cross_entropy_golden():
    case = GOLDEN["ce"]
    logits = case["logits"].double().requires_grad_()
    loss = legacy.cross_entropy_2d(logits, case["target"], torch.tensor(case["class_weight"], dtype=torch.float64))
    loss.backward()
    compare({"loss": loss, "grad": logits.grad}, case["f64"], 1e-9)


def test_legacy_cross_entropy_of_void_alone_is_nan():
    weight = torch.tensor([1.0, 0.0])
    assert legacy.cross_entropy_2d(torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 3, dtype=torch.long), weight).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_index_is_interpolates(dtype):
    for in_size in (1, 2, 3, 7, 13):
        for out_size in (*range(1, 100), 513):
            row = torch.arange(in_size, dtype=dtype).view(1, 1, 1, -1).requires_grad_()
            up = F.interpolate(row, size=(1, out_size), mode="nearest")
            up.sum().backward()
            index = nearest_index(out_size, in_size)
            assert torch.equal(index, up.flatten().long()), (in_size, out_size)
            assert torch.equal(index.bincount(minlength=in_size), row.grad.flatten().long()), (in_size, out_size)
    assert nearest_index(82, 2)[41] == 0 and (41 * 2) // 82 == 1


def test_upsampling_takes_the_same_pixels_in_every_precision():
    maps = torch.randn(1, 2, 3, 2)
    for width in range(1, 200):
        up = upsample(maps, (4, width))
        assert torch.equal(up, F.interpolate(maps, size=(4, width), mode="nearest"))
        assert torch.equal(upsample(maps.double(), (4, width)), up.double()), width


def test_unknown_normaliser_and_divergence():
    maps = torch.zeros(2, 1, 2, 3, 3)
    with pytest.raises(ValueError, match="expected normaliser to be one of"):
        legacy.cwd(*maps, "pixel", "kl")
    with pytest.raises(ValueError, match="expected divergence to be one of"):
        legacy.cwd(*maps, "channel", "js")


def test_embed_option():
    assert legacy.embedding_stages(0) == ((), {})
    assert legacy.embedding_stages(3) == ((3,), {3: 1.0})
    assert legacy.embedding_stages(5) == ((1, 2, 3, 4), {1: 0.1, 2: 0.1, 3: 0.5, 4: 1.0})
    assert legacy.projection_key(3, 3) == "embed1_linearproject"
    assert legacy.projection_key(5, 3) == "embed3_linearproject"
    with pytest.raises(ValueError, match="0 to 5"):
        legacy.embedding_stages(6)
