"""The op pea against linear layers and mean-squared errors written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from transkd_fast.functional import pea_loss
from transkd_fast.reference import pea as reference

SIZES = ((3, 5, (4, 6)), (4, 7, (2, 3)))


def arguments(assisted=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    stages = [
        {
            "xs": randn(2, h * w, c_in),
            "weights": randn(c_out, c_in),
            "biases": randn(c_out),
            "targets": randn(2, h * w, c_out),
        }
        | (
            {"assistants": randn(2, h * w, c_out), "projection_scales": randn(1), "assistant_scales": randn(1)}
            if assisted
            else {}
        )
        for c_in, c_out, (h, w) in SIZES
    ]
    return {name: [stage[name] for stage in stages] for name in stages[0]} | {"stage_weights": (0.25, 1.5)}


def as_map(tokens, m):
    return tokens.transpose(1, 2).unflatten(2, SIZES[m][2])


@pytest.mark.parametrize("assisted", (False, True))
def test_agrees_with_mse_of_linear(assisted):
    args = arguments(assisted)
    expected = 0.0
    for m, weight in enumerate(args["stage_weights"]):
        projection = F.linear(args["xs"][m], args["weights"][m], args["biases"][m])
        if assisted:
            projection = args["projection_scales"][m] * projection
            projection = projection + args["assistant_scales"][m] * args["assistants"][m]
        expected = expected + weight * F.mse_loss(projection, args["targets"][m])
    torch.testing.assert_close(pea_loss(**args), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("maps", (("xs",), ("targets",), ("xs", "targets"), ("xs", "targets", "assistants")))
def test_maps_are_tokens(maps):
    args = arguments("assistants" in maps)
    expected = pea_loss(**args)
    for name in maps:
        args[name] = [as_map(t, m).contiguous() for m, t in enumerate(args[name])]
    torch.testing.assert_close(pea_loss(**args), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("assisted", (False, True))
def test_gradcheck(assisted):
    args = arguments(assisted)
    names = [name for name in args if name != "stage_weights"]
    leaves = [t.requires_grad_() for name in names for t in args[name]]

    def op(*tensors):
        lists = {name: tensors[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        return reference.pea(**lists, stage_weights=(0.25, 1.5))

    assert gradcheck(op, leaves)


def test_default_weights_are_the_published_ones():
    x, weight, bias, target = torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(4), torch.ones(1, 2, 4)
    loss = pea_loss([x] * 4, [weight] * 4, [bias] * 4, [target * s for s in (1, 2, 4, 8)])
    assert loss.item() == pytest.approx(0.1 + 0.1 * 4 + 0.5 * 16 + 64)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_inputs_are_computed_in_float32(dtype):
    args = arguments(True, dtype)
    single = {name: [torch.as_tensor(t).float() for t in values] for name, values in args.items()}
    loss = pea_loss(**args)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pea_loss(**single), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pea_loss(**args), loss, rtol=0, atol=0)


def test_student_and_teacher_may_have_different_dtypes():
    args = arguments(dtype=torch.float32)
    expected = pea_loss(**args)
    args["targets"] = [t.double() for t in args["targets"]]
    loss = pea_loss(**args)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), expected)


BAD = {
    "no stage": ({name: [] for name in ("xs", "weights", "biases", "targets")}, ValueError, "at least one stage"),
    "a target missing": ({"targets": [torch.zeros(2, 24, 5)]}, ValueError, "expected targets to have 2 entries"),
    "stage weights": ({"stage_weights": (1.0,)}, ValueError, "expected stage_weights to have 2 entries"),
    "target's tokens": ({"targets": [torch.zeros(2, 23, 5), torch.zeros(2, 6, 7)]}, ValueError, r"targets\[0\]"),
    "target's channels": ({"targets": [torch.zeros(2, 24, 5), torch.zeros(2, 6, 8)]}, ValueError, r"targets\[1\]"),
    "weight's channels": ({"weights": [torch.zeros(5, 4), torch.zeros(7, 4)]}, ValueError, r"weights\[0\].*C_out, 3"),
    "bias": ({"biases": [torch.zeros(5), torch.zeros(5)]}, ValueError, r"biases\[1\]"),
    "empty": ({"xs": [torch.zeros(2, 0, 3), torch.zeros(2, 6, 4)]}, ValueError, "at least one element"),
    "x of two dimensions": ({"xs": [torch.zeros(24, 3), torch.zeros(2, 6, 4)]}, ValueError, r"xs\[0\] to be tokens"),
    "integers": ({"xs": [torch.zeros(2, 24, 3).long(), torch.zeros(2, 6, 4)]}, TypeError, r"xs\[0\]"),
    "assistants alone": ({"assistants": [torch.zeros(2, 24, 5), torch.zeros(2, 6, 7)]}, ValueError, "all together"),
    "device": ({"targets": [torch.zeros(2, 24, 5, device="meta"), torch.zeros(2, 6, 7)]}, ValueError, "on cpu"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        pea_loss(**(arguments(dtype=torch.float32) | change))


def test_bad_scalar_and_assistant():
    args = arguments(True)
    with pytest.raises(ValueError, match=r"assistant_scales\[0\] to have one element"):
        pea_loss(**(args | {"assistant_scales": [torch.ones(2), torch.ones(1)]}))
    with pytest.raises(ValueError, match=r"assistants\[1\]"):
        pea_loss(**(args | {"assistants": [args["assistants"][0], args["assistants"][1][:, :-1]]}))
    image = torch.zeros(2, 5, 6, 4)
    with pytest.raises(ValueError, match=r"targets\[0\]"):
        pea_loss(**(args | {"xs": [as_map(x, m) for m, x in enumerate(args["xs"])], "targets": [image] * 2}))
