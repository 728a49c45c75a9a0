"""The op gl_mixer against convolutions written as sums of shifted products."""

import pytest
import torch
from torch.autograd import gradcheck

from transkd_fast.functional import gl_mixer
from transkd_fast.reference import gl_mixer as reference


def arguments(batch=2, tokens=5, channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "e": (batch, tokens, channels),
        "u": (batch, tokens, channels),
        "conv_a_weight": (channels, channels, 3),
        "conv_a_bias": (channels,),
        "conv_b_weight": (channels, channels, 3),
        "conv_b_bias": (channels,),
        "attention_weight": (1,),
        "conv_weight": (1,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def shifted_convolution(e, weight, bias):
    """Sums per sample, so that nothing can leak over its ends."""
    out = bias.expand(e.shape).clone()
    for shift, tap in zip((-1, 0, 1), weight.unbind(2), strict=True):
        for n in range(e.shape[1]):
            if 0 <= n + shift < e.shape[1]:
                out[:, n] += e[:, n + shift] @ tap.T
    return out


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (3, 2)])
def test_agrees_with_shifted_products(batch, tokens, residual):
    args = arguments(batch, tokens)
    value = shifted_convolution(args["e"], args["conv_a_weight"], args["conv_a_bias"])
    gate = shifted_convolution(args["e"], args["conv_b_weight"], args["conv_b_bias"])
    expected = args["attention_weight"] * args["u"] + args["conv_weight"] * value / (1 + (-gate).exp())
    expected = expected + args["e"] if residual else expected
    torch.testing.assert_close(gl_mixer(**args, residual=residual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", (False, True))
def test_gradcheck(residual):
    leaves = [t.requires_grad_() for t in arguments(channels=3).values()]
    assert gradcheck(lambda *tensors: reference.gl_mixer(*tensors, residual=residual), leaves)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_inputs_are_computed_in_float32(dtype):
    args = arguments(dtype=dtype)
    mix = gl_mixer(**args)
    assert mix.dtype == dtype
    torch.testing.assert_close(mix, gl_mixer(**{k: t.float() for k, t in args.items()}).to(dtype), rtol=0, atol=0)
    single = arguments(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gl_mixer(**single)
    torch.testing.assert_close(inside, gl_mixer(**single), rtol=0, atol=0)


BAD = {
    "u's shape": ({"u": torch.zeros(2, 4, 4)}, ValueError, r"gl_mixer: expected u to have shape \[2, 5, 4\]"),
    "a map": ({"e": torch.zeros(2, 4, 5, 5)}, ValueError, "expected e to have shape"),
    "empty": ({"e": torch.zeros(2, 0, 4), "u": torch.zeros(2, 0, 4)}, ValueError, "at least one element"),
    "kernel 1": ({"conv_a_weight": torch.zeros(4, 4, 1)}, ValueError, "conv_a_weight"),
    "bias": ({"conv_b_bias": torch.zeros(3)}, ValueError, "conv_b_bias"),
    "a vector for a scalar": ({"conv_weight": torch.zeros(4)}, ValueError, "conv_weight to have one element"),
    "a number for a scalar": ({"attention_weight": 1.0}, TypeError, "attention_weight to be a tensor, got float"),
    "integers": ({"e": torch.zeros(2, 5, 4).long()}, TypeError, "expected e"),
    "device": ({"u": torch.zeros(2, 5, 4, device="meta")}, ValueError, "expected u on cpu"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        gl_mixer(**(arguments(dtype=torch.float32) | change))
