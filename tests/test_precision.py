"""When float32 products may run in TF32."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from transkd_fast.ops import _precision
from transkd_fast.ops._precision import tf32_allowed


def on_cuda(dtype=torch.float32):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, dtype=dtype, device="cuda")


@pytest.fixture
def switch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_torchs_switch_decides(switch):
    for precision, allowed in (("ieee", False), ("tf32", True)):
        switch.fp32_precision = precision
        assert tf32_allowed(on_cuda()) == allowed
        assert not tf32_allowed(on_cuda(torch.bfloat16)) and not tf32_allowed(torch.empty(2))


def test_autocast_allows_it(switch):
    switch.fp32_precision = "ieee"
    torch.set_autocast_enabled("cuda", True)  # the context manager does nothing where there is no GPU
    try:
        assert tf32_allowed(on_cuda()) and not tf32_allowed(torch.empty(2))
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not tf32_allowed(on_cuda())


def test_a_compiled_graph_follows_the_switch(switch):
    torch.compiler.reset()
    step = torch.compile(lambda x: x + (1 if _precision._switch() else 2), fullgraph=True, backend="eager")
    for precision, expected in (("ieee", 2), ("tf32", 1), ("ieee", 2)):
        switch.fp32_precision = precision
        assert step(torch.zeros(1)).item() == expected
