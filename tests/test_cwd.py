"""The op cwd against torch's KL divergence of log-softmaxes."""

import pytest
import torch
import torch.nn.functional as F
from golden_io import compare, load, tolerance
from torch.autograd import gradcheck

from transkd_fast.functional import cwd_loss
from transkd_fast.reference import cwd as reference

# What the published loss computes, where its softmax does not underflow.
CASES = [
    case
    for case in load("losses")["cases"]
    if case.get("norm_type") == "channel"
    and case["divergence"] == "kl"
    and "underflow" not in case["name"]
    and "equal" not in case["name"]
]


def maps(*shape, scale=1.0, offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case, dtype):
    student, teacher = (case[name].to(dtype).requires_grad_() for name in "ST")
    loss = cwd_loss(student, teacher, case["temperature"])
    loss.backward()
    actual = {"loss": loss, "grad_S": student.grad, "grad_T": teacher.grad}
    compare(actual, case["f64"], tolerance(case, dtype))


@pytest.mark.parametrize("temperature", (1.0, 4.0, 0.5))
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 7), (2, 3, 1, 1)])
def test_agrees_with_kl_div(shape, temperature):
    student, teacher = maps(*shape, scale=3, offset=100)
    log_p_s, log_p_t = ((t / temperature).flatten(2).log_softmax(2) for t in (student, teacher))
    expected = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="sum")
    expected = expected * temperature**2 / (shape[0] * shape[1])
    torch.testing.assert_close(cwd_loss(student, teacher, temperature), expected, rtol=1e-12, atol=1e-14)


def test_tokens_are_pixels():
    student, teacher = maps(2, 3, 4, 5)
    tokens = [t.flatten(2).transpose(1, 2) for t in (student, teacher)]
    torch.testing.assert_close(cwd_loss(*tokens, 2.0), cwd_loss(student, teacher, 2.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 5, 3)])
def test_gradcheck(shape):
    student, teacher = maps(*shape)
    assert gradcheck(lambda s: reference.cwd(s, teacher, 2.0), [student.requires_grad_()])


def test_teacher_gets_no_gradient():
    student, teacher = (t.requires_grad_() for t in maps(2, 3, 4, 4))
    cwd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("scale", (1e3, 1e4))
def test_peaked_maps_stay_finite(scale, dtype):
    student, teacher = (t.clamp(-1, 1) * scale for t in maps(2, 3, 4, 4, dtype=dtype))
    student.requires_grad_()
    loss = cwd_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and loss > 0


def test_equal_maps_give_zero():
    student, _ = maps(2, 3, 8, 8, scale=100, dtype=torch.float32)
    student.requires_grad_()
    loss = cwd_loss(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_inputs_are_computed_in_float32(dtype):
    student, teacher = maps(2, 3, 4, 5, dtype=dtype)
    loss = cwd_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cwd_loss(student.float(), teacher.float()), rtol=0, atol=0)
    torch.testing.assert_close(loss, cwd_loss(student, teacher.float()), rtol=0, atol=0)
    assert cwd_loss(student, teacher.double()).dtype == torch.float64


BAD = {
    "shapes": ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)), {}, ValueError, r"cwd: expected teacher.*4, 4\]"),
    "two dimensions": ((torch.zeros(2, 3), torch.zeros(2, 3)), {}, ValueError, "expected student to be a map"),
    "empty": ((torch.zeros(2, 3, 0, 4),) * 2, {}, ValueError, "at least one element"),
    "integers": ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).int()), {}, TypeError, "expected teacher"),
    "zero temperature": ((torch.zeros(1, 1, 2, 2),) * 2, {"temperature": 0.0}, ValueError, "temperature"),
    "negative temperature": ((torch.zeros(1, 1, 2, 2),) * 2, {"temperature": -1.0}, ValueError, "temperature"),
    "infinite temperature": ((torch.zeros(1, 1, 2, 2),) * 2, {"temperature": torch.inf}, ValueError, "temperature"),
    "device": ((torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, device="meta")), {}, ValueError, "on cpu"),
}


@pytest.mark.parametrize(("tensors", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(tensors, options, error, message):
    with pytest.raises(error, match=message):
        cwd_loss(*tensors, **options)
