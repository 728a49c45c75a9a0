"""The op csf and the golden values of one CSF stage."""

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load, tolerance
from torch import nn
from torch.autograd import gradcheck

from transkd_fast.functional import BatchNorm, csf
from transkd_fast.nn import CSF
from transkd_fast.reference import csf as reference

CASES = load("sk_block")["cases"]
DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_stage(case, dtype):
    ctor, expected = case["ctor"], case["f64"]
    pair = [ctor["in_channel"]] * 2, [ctor["out_channel"]] * 2
    module = CSF(*pair, ctor["mid_channel"], ctor["reduce"], legacy=True)[int(ctor["fuse"])].to(dtype)
    module.load_state_dict(case["params"])
    module.train(case["train"])
    x = case["x"].to(dtype).requires_grad_()
    y = None if case["y"] is None else case["y"].to(dtype).requires_grad_()
    out, res = module(x, y)
    probe = (out * case["R_out"]).sum() + (res * case["R_res"]).sum()
    probe.backward()
    actual = {
        "out": out,
        "res": res,
        "probe": probe,
        "grad_x": x.grad,
        "grad_y": None if y is None else y.grad,
        "grad_params": {name: p.grad for name, p in module.named_parameters()},
        "buffers_after": {name: b.clone() for name, b in module.named_buffers()},
    }
    module(x, y)
    actual["buffers_after_two"] = dict(module.named_buffers())
    compare(actual, expected, tolerance(case, dtype))


def arguments(batch=2, mid=3, squeezed=5, hw=(5, 6), hw_y=(3, 4), dtype=torch.float64, training=True, momentum=0.1):
    torch.manual_seed(0)

    def bn(channels):
        counter = torch.tensor(2)
        values = torch.rand(4, channels, dtype=torch.float64) + 0.5
        return BatchNorm(*values.to(dtype), counter, training, momentum)

    z, y = torch.randn(batch, mid, *hw, dtype=torch.float64), torch.randn(batch, mid, *hw_y, dtype=torch.float64)
    fc = torch.randn(squeezed, mid, dtype=torch.float64)
    heads = [torch.randn(shape, dtype=torch.float64) for shape in ((mid, squeezed), (mid,)) * 2]
    z, y, fc, w_0, b_0, w_1, b_1 = (t.to(dtype) for t in (z, y, fc, *heads))
    return {
        "z": z,
        "y": y,
        "bn": bn(mid),
        "fc_weight": fc,
        "fc_bn": bn(squeezed),
        "heads": ((w_0, b_0), (w_1, b_1)),
    }


def modules_like(bn):
    module = nn.BatchNorm2d(bn.weight.numel(), bn.eps, bn.momentum).to(bn.weight.dtype)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        getattr(module, name).data.copy_(getattr(bn, name))
    return module.train(bn.training)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("batch", (2, 3))
def test_agrees_with_torch_modules(training, momentum, batch):
    args = arguments(batch, training=training, momentum=momentum)
    bn, fc_bn = modules_like(args["bn"]), modules_like(args["fc_bn"])
    for _ in range(2):
        v = csf(**args)
        x, up = bn(args["z"]), F.interpolate(args["y"], (5, 6), mode="nearest")
        r = fc_bn(F.conv2d((x + up).mean((2, 3), keepdim=True), args["fc_weight"][..., None, None])).relu()
        l_0, l_1 = (F.conv2d(r, w[..., None, None], b) for w, b in args["heads"])
        a = (l_0 - l_1).sigmoid()
        torch.testing.assert_close(v, a * x + (1 - a) * up, rtol=1e-12, atol=1e-12)
    for ours, theirs in ((args["bn"], bn), (args["fc_bn"], fc_bn)):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == (4 if training else 2)


@pytest.mark.parametrize("fc_bn", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(("batch", "hw", "hw_y"), [(2, (5, 4), (3, 2)), (1, (4, 4), (2, 2)), (3, (2, 3), (5, 4))])
def test_gradcheck(batch, hw, hw_y, training, fc_bn):
    args = arguments(batch, hw=hw, hw_y=hw_y, training=training)
    leaves = [args["z"], args["y"], args["fc_weight"], *args["heads"][0], *args["heads"][1]]
    leaves += [args["bn"].weight, args["bn"].bias, args["fc_bn"].weight, args["fc_bn"].bias]

    def op(z, y, fc_weight, w_0, b_0, w_1, b_1, weight, bias, fc_gamma, fc_beta):
        bn = args["bn"]._replace(weight=weight, bias=bias)
        squeeze = args["fc_bn"]._replace(weight=fc_gamma, bias=fc_beta) if fc_bn else None
        # Copies: gradcheck calls many times, and training moves the running statistics.
        bn, squeeze = (b and BatchNorm(*b[:2], *(t.clone() for t in b[2:5]), *b[5:]) for b in (bn, squeeze))
        return reference.csf(z, y, bn, fc_weight, squeeze, ((w_0, b_0), (w_1, b_1)))

    assert gradcheck(op, [t.clone().requires_grad_() for t in leaves])


def test_squeeze_of_a_single_value_uses_running_statistics_unchanged():
    training, evaluation = arguments(1), arguments(1)
    evaluation["fc_bn"] = evaluation["fc_bn"]._replace(training=False)
    before = [t.clone() for t in training["fc_bn"][2:5]]
    torch.testing.assert_close(csf(**training), csf(**evaluation), rtol=0, atol=0)
    for tensor, old in zip(training["fc_bn"][2:5], before, strict=True):
        assert torch.equal(tensor, old)
    assert training["bn"].num_batches_tracked == 3


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_maps_are_computed_in_float32(dtype):
    half, single = arguments(dtype=dtype), arguments(dtype=dtype)
    single = {**single, "z": single["z"].float(), "y": single["y"].float()}
    v = csf(**half)
    assert v.dtype == dtype
    torch.testing.assert_close(v, csf(**single).to(dtype), rtol=0, atol=0)
    assert half["bn"].running_mean.dtype == dtype
    torch.testing.assert_close(half["bn"].running_mean, single["bn"].running_mean, rtol=0, atol=0)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = csf(**arguments(dtype=torch.float32))
    torch.testing.assert_close(inside, csf(**arguments(dtype=torch.float32)), rtol=0, atol=0)


@pytest.mark.parametrize("view", ("channels_last", "expanded", "strided"))
def test_layouts_agree(view):
    args = arguments()
    expected = csf(**args)
    args = arguments()
    if view == "channels_last":
        args["z"] = args["z"].contiguous(memory_format=torch.channels_last)
        args["y"] = args["y"].contiguous(memory_format=torch.channels_last)
    elif view == "strided":
        args["z"] = torch.stack([args["z"], args["z"]], dim=-1)[..., 0]
    else:
        args["y"] = args["y"][:, :, :1, :1].expand(-1, -1, 3, 4)
        expected = csf(**{**arguments(), "y": args["y"].contiguous()})
    torch.testing.assert_close(csf(**args), expected, rtol=1e-12, atol=1e-12)


def test_nan_comes_out():
    args = arguments()
    args["z"][0, 0, 0, 0] = torch.nan
    assert csf(**args).isnan().any()


BAD = {
    "y of other channels": (
        {"y": torch.zeros(2, 4, 3, 4)},
        ValueError,
        r"csf: expected y to have shape \[2, 3, h, w\]",
    ),
    "y of another batch": ({"y": torch.zeros(3, 3, 3, 4)}, ValueError, "expected y"),
    "z without a batch": ({"z": torch.zeros(3, 5, 6)}, ValueError, "expected z"),
    "z empty": ({"z": torch.zeros(0, 3, 5, 6), "y": torch.zeros(0, 3, 3, 4)}, ValueError, "at least one element"),
    "y empty": ({"y": torch.zeros(2, 3, 0, 4)}, ValueError, "at least one element"),
    "z of integers": ({"z": torch.zeros(2, 3, 5, 6, dtype=torch.int32)}, TypeError, "expected z to be float16"),
    "z no tensor": ({"z": [1.0]}, TypeError, "expected z to be a tensor, got list"),
    "y on another device": ({"y": torch.zeros(2, 3, 3, 4, device="meta")}, ValueError, "expected y on cpu"),
    "squeeze layer": ({"fc_weight": torch.zeros(5, 4)}, ValueError, "expected fc_weight"),
    "three heads": ({"heads": ((torch.zeros(3, 5), torch.zeros(3)),) * 3}, ValueError, "2 entries"),
    "head's width": ({"heads": ((torch.zeros(3, 4), torch.zeros(3)),) * 2}, ValueError, r"heads\[0\] weight"),
    "no batch norm": ({"bn": nn.BatchNorm2d(3)}, TypeError, "expected bn to be a BatchNorm"),
    "batch norm's width": ({"bn": BatchNorm(*torch.ones(4, 2))}, ValueError, "bn.weight"),
    "squeeze batch norm's width": ({"fc_bn": BatchNorm(*torch.ones(4, 3))}, ValueError, "fc_bn.weight"),
    "half the statistics": ({"bn": BatchNorm(*torch.ones(3, 3), None)}, ValueError, "both running_mean"),
    "uncounted average": ({"bn": BatchNorm(*torch.ones(4, 3), momentum=None)}, ValueError, "num_batches_tracked"),
    "single value": ({"z": torch.zeros(1, 3, 1, 1), "y": torch.zeros(1, 3, 1, 1)}, ValueError, "more than 1 value"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    args = arguments(dtype=torch.float32) | change
    with pytest.raises(error, match=message):
        csf(**args)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        csf(**arguments(), backend="fastest")
