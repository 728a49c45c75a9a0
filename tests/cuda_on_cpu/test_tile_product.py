"""The product of tiles that the CUDA kernels share, run on the CPU, against fp64."""

import pytest
import torch
from cuda_on_cpu import runner

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def run(dtype, transposed=(0, 0), wide=0, depth=64, tf32=0, columns=None, build="plain", seed=0):
    width = 128 if wide else 64
    a, b = torch.randn(64, depth, dtype=F64).to(dtype), torch.randn(depth, width, dtype=F64).to(dtype)
    inputs = {"a": a.mT.contiguous() if transposed[0] else a, "b": b.mT.contiguous() if transposed[1] else b}
    inputs |= {"transposed_a": transposed[0], "transposed_b": transposed[1]}
    inputs |= {"tf32": tf32, "wide": wide, "columns": columns or width}
    return a.double(), b.double(), runner.run("tile_product", inputs, build=build, seed=seed)["sum"]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("wide", [0, 1])
def test_product_in_every_order_and_type_plain(dtype, transposed, wide):
    a, b, sum_ = run(dtype, transposed, wide)
    assert sum_.dtype == (F64 if dtype == F64 else F32)
    torch.testing.assert_close(sum_.double(), a @ b, rtol=0, atol=1e-13 if dtype == F64 else 2e-5)


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_tf32_rounds_the_factors_to_nearest_plain(transposed):
    a, b, sum_ = run(F32, transposed, tf32=1, depth=32)

    def rounded(t):  # to 10 bits of mantissa, ties away from zero
        bits = t.float().view(torch.int32) + 0x1000
        return (bits & ~0x1FFF).view(F32).double()

    torch.testing.assert_close(sum_.double(), rounded(a) @ rounded(b), rtol=0, atol=2e-5)
    assert (sum_.double() - a @ b).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_columns_that_are_not_needed_stay_zero_plain(dtype):
    a, b, sum_ = run(dtype, columns=32)
    torch.testing.assert_close(sum_[:, :32].double(), (a @ b)[:, :32], rtol=0, atol=2e-5)
    assert (sum_[:, 32:] == 0).all()


@pytest.mark.parametrize("build", ["asan", "tsan"])
def test_sanitizers_find_nothing(build):
    for dtype, seed in ((F32, 0), (BF16, 1)):
        a, b, sum_ = run(dtype, (1, 0), build=build, seed=seed, depth=32)
        torch.testing.assert_close(sum_.double(), a @ b, rtol=0, atol=2e-5)
