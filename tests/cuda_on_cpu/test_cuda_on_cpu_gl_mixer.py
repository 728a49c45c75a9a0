"""The CUDA kernels of gl_mixer, run on the CPU, against the fp64 reference: the mix and all gradients.

The driver fills every output and the workspace with NaNs before the launches.
"""

import itertools
import math

import pytest
import torch
from cuda_on_cpu import runner

from transkd_fast.reference.gl_mixer import gl_mixer

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Of what is stored in a dtype, relative to the largest value.
TOLERANCE = {F64: 1e-12, F32: 3e-6, BF16: 2**-8, F16: 2**-11}
TF32 = 2**-10  # rounds both factors to 11 bits
NAMES = ("e", "u", "conv_a_weight", "conv_a_bias", "conv_b_weight", "conv_b_bias", "attention_weight", "conv_weight")
ALL = (1,) * len(NAMES)
# (samples, tokens, channels): samples of one token, tiles across samples, several tiles, odd and whole vectors.
CASES = [(1, 1, 1), (3, 1, 10), (3, 2, 5), (1, 7, 66), (3, 7, 8), (3, 45, 10), (3, 45, 40), (1, 45, 160), (2, 70, 66)]
FEW = [(3, 45, 40), (2, 7, 5)]


def make(case, e=F32, u=None, weight=F32, residual=False):
    samples, tokens, channels = case
    shapes = [(samples, tokens, channels)] * 2
    shapes += [(channels, channels, 3), (channels,)] * 2 + [(), ()]
    values = [torch.randn(shape, dtype=F64) for shape in shapes]
    for k in (2, 4):
        values[k] /= math.sqrt(3 * channels)
    dtypes = [e, u or e] + [F64 if e == F64 and weight == F32 else weight] * 6
    inputs = {name: value.to(dtype) for name, value, dtype in zip(NAMES, values, dtypes, strict=True)}
    grad = torch.randn(shapes[0], dtype=F64).to(e)
    return inputs | {"grad": grad, "residual": int(residual), "tf32": 0, "keep": 1, "wanted": ALL}


def run(inputs, build="plain", seed=0, **tuning):
    defines = () if build == "plain" else ("GL_MIXER_FEW_TYPES",)
    return runner.run("gl_mixer", {**inputs, **tuning}, build=build, seed=seed, defines=defines)


def tensor(value):
    return value.tensor if isinstance(value, runner.Misaligned) else value


def truth(inputs):
    """The reference in fp64 with what the kernels multiply: weights are rounded to e's dtype."""
    leaves = {name: tensor(inputs[name]).double() for name in NAMES}
    for name in ("conv_a_weight", "conv_b_weight"):
        leaves[name] = leaves[name].to(tensor(inputs["e"]).dtype).double()
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = gl_mixer(*leaves.values(), residual=bool(inputs["residual"]))
    gradients = torch.autograd.grad(out, list(leaves.values()), tensor(inputs["grad"]).double())
    return {"out": out.detach()} | {f"{name}_gradient": g for name, g in zip(NAMES, gradients, strict=True)}


def check(result, inputs):
    e = tensor(inputs["e"])
    names = ["out", *(f"{name}_gradient" for name, flag in zip(NAMES, inputs["wanted"], strict=True) if flag)]
    assert {name for name in result if name == "out" or name.endswith("_gradient")} == set(names)
    expected = truth(inputs)
    for name in names:
        value, true = result[name], expected[name]
        like = tensor(inputs["e" if name == "out" else name.removesuffix("_gradient")])
        assert value.dtype == like.dtype and value.shape == like.shape, name
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[F64 if e.dtype == F64 else F32])
        if inputs["tf32"]:
            tolerance = TF32
        elif name in ("e_gradient", "conv_a_weight_gradient", "conv_b_weight_gradient"):
            # What the convolutions pass back is rounded to e's dtype, then the sum of it to its own.
            tolerance += TOLERANCE[e.dtype]
        # What is left of terms that cancel is as exact as their sum of squares.
        size = max(true.abs().max().item(), e.numel() ** 0.5 / 4 if value.dim() == 0 else 0, 1e-300)
        error = (value.double() - true).abs().max().item() / size
        assert error < tolerance, (name, error, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mix_and_its_gradients_plain(case):
    for residual in (False, True):
        inputs = make(case, residual=residual)
        check(run(inputs), inputs)


@pytest.mark.parametrize("dtypes", [(BF16, None, BF16), (F16, None, F16), (BF16, F32, F32), (F16, BF16, F32),
                                    (F32, BF16, F16), (F32, F16, F64), (BF16, F16, F64), (F64, None, F64),
                                    (F64, None, BF16)], ids=str)  # fmt: skip
def test_dtypes_plain(dtypes):
    for case in FEW:
        inputs = make(case, *dtypes, residual=case == FEW[0])
        result = run(inputs)
        check(result, inputs)
        whole = case == FEW[0] and F64 not in dtypes
        assert result["forward_vectors"] == result["backward_vectors"] == int(whole)


def test_every_parameter_may_have_a_dtype_of_its_own_plain():
    inputs = make(FEW[0], BF16)
    for name, dtype in zip(NAMES[2:], (F32, F16, BF16, F32, F64, F16), strict=True):
        inputs[name] = inputs[name].to(dtype)
    check(run(inputs), inputs)


def test_tf32_products_plain():
    inputs = make((2, 45, 40), residual=True) | {"tf32": 1}
    result = run(inputs)
    check(result, inputs)
    assert not torch.equal(result["out"], run(inputs | {"tf32": 0})["out"])


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_weights_in_parts_and_sums_of_many_blocks_plain(dtype):
    inputs = make((2, 100, 40), dtype)
    whole = run(inputs, least_rows=1000)
    assert whole["parts"] == 1 and whole["launches"] == 3
    for least_rows, blocks, vectors in ((1, 264, 1), (1, 12, 0), (100, 20, 1)):
        result = run(inputs, least_rows=least_rows, blocks=blocks, vectors=vectors)
        check(result, inputs)
        assert result["parts"] > 1 and result["launches"] == 4
        assert result["forward_vectors"] == int(vectors and dtype != F64)


WANTED = [tuple(int(k == only) for k in range(8)) for only in range(8)]
WANTED += [
    (0,) * 8,
    (1, 1, 0, 0, 0, 0, 0, 0),
    (0, 0, 1, 1, 0, 0, 0, 0),
    (0, 0, 0, 0, 1, 1, 1, 0),
    (1, 0, 0, 0, 1, 0, 0, 1),
]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_only_wanted_gradients_are_made_plain(wanted):
    for case in ((2, 45, 8), (2, 7, 5)):
        inputs = make(case)
        every, some = run(inputs, least_rows=1), run(inputs | {"wanted": wanted}, least_rows=1)
        check(some, inputs | {"wanted": wanted})
        for name in some:
            if name.endswith("_gradient"):
                assert torch.equal(some[name], every[name]), name
        products, any_weight = wanted[0] or wanted[2] or wanted[4], wanted[2] or wanted[4]
        sums = wanted[3] or wanted[5] or wanted[6] or wanted[7]
        several = any_weight and every["parts"] > 1
        assert some["launches"] == 1 + any(wanted) + bool(products or sums) + bool(several)


def test_without_a_backward_only_the_mix_is_made_plain():
    inputs = make(FEW[0])
    result = run(inputs | {"keep": 0})
    assert set(result) == {"out", "forward_vectors", "launches"} and result["launches"] == 1
    assert torch.equal(result["out"], run(inputs)["out"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_branches_are_the_convolutions_plain(dtype):
    inputs = make((3, 45, 40), dtype)
    branches = run(inputs)["branches"]
    assert branches.dtype == F32
    x = inputs["e"].double().transpose(1, 2)
    for k, name in enumerate(("conv_a", "conv_b")):
        true = torch.nn.functional.conv1d(x, inputs[f"{name}_weight"].double(), inputs[f"{name}_bias"].double(),
                                          padding=1).transpose(1, 2)  # fmt: skip
        assert (branches[:, :, k].double() - true).abs().max() < TOLERANCE[dtype] * true.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_samples_do_not_leak_into_one_another_plain(dtype, bad):
    for case in ((3, 45, 40), (3, 2, 5)):
        inputs = make(case, dtype)
        wanted = (1, 1, 0, 0, 0, 0, 0, 0)
        clean = run(inputs | {"wanted": wanted})
        for name in ("e", "u", "grad"):
            poisoned = inputs | {name: inputs[name].clone(), "wanted": wanted}
            poisoned[name][1] = bad
            result = run(poisoned)
            for output in ("out", "e_gradient", "u_gradient"):
                for sample in (0, 2):
                    assert torch.equal(result[output][sample], clean[output][sample]), (name, output)
        assert not result["e_gradient"][1].isfinite().any()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_saturated_gates_stay_finite_plain(dtype):
    inputs = make((2, 7, 8), dtype)
    inputs["conv_b_bias"][:4] = 3e4
    inputs["conv_b_bias"][4:] = -3e4
    result = run(inputs)
    check(result, inputs)
    assert all(value.isfinite().all() for name, value in result.items() if name.endswith("_gradient"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_order_of_blocks_and_threads_does_not_matter_plain(dtype):
    inputs = make((3, 45, 40), dtype)
    first = run(inputs, least_rows=1)
    for seed in (1, 2):
        for name, value in run(inputs, seed=seed, least_rows=1).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_misaligned_bases_are_read_one_by_one(dtype):
    for name in ("e", "u", "grad", "conv_b_weight"):
        inputs = make((2, 7, 8), dtype, weight=dtype)
        inputs[name] = runner.Misaligned(inputs[name], 8)
        result = run(inputs, build="asan")
        check(result, inputs)
        assert (result["forward_vectors"], result["backward_vectors"]) == (int(name == "grad"), 0)
    inputs = make((2, 7, 8), dtype) | {"keep": 1}
    for name in ("conv_a_bias", "attention_weight", "conv_weight"):
        inputs[name] = runner.Misaligned(inputs[name], 4)
    result = run(inputs, build="asan")
    check(result, inputs)
    assert result["forward_vectors"] == result["backward_vectors"] == 1


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("build", ["asan", "tsan"])
def test_sanitizers_find_nothing(build, dtype):
    cases = CASES if build == "asan" else [(2, 40, 8), (3, 2, 5)]
    for case, residual in zip(cases, itertools.cycle((True, False))):
        inputs = make(case, dtype, residual=residual)
        check(run(inputs, build=build, least_rows=1), inputs)
