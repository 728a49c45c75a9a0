"""The CUDA kernels of csf, run on the CPU, against the fp64 reference: sums, state, v, running statistics, gradients.

The driver fills every output and workspace with NaNs before the launches.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import runner

from transkd_fast.reference._common import BatchNorm
from transkd_fast.reference.csf import csf

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F64: 1e-11, F32: 5e-6, BF16: 2**-8, F16: 2**-10}
# Sums leave the kernels as doubles, but begin as short chains in the type of computing, of squares about the first
# value of each: where that lies three standard deviations off, they lose a digit.
SUMS = {F64: 1e-12, F32: 4e-6, BF16: 4e-6, F16: 4e-6}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
NONE, RUNNING, BATCH, TRACKED = range(4)
SQUEEZED = 5
# Blocks of 64 threads: a fiber for each thread takes its time.
SMALL = {"threads": 64}


class Case(NamedTuple):
    batch: int
    channels: int
    fine: tuple[int, int]
    coarse: tuple[int, int]


# Twice, in whole vectors and not; twice less one; other ratios; windows that are empty, uneven and wide; sizes of 1.
HALVES = Case(2, 8, (16, 32), (8, 16))
CASES = [
    HALVES,
    Case(3, 8, (15, 16), (8, 8)),
    Case(2, 64, (8, 12), (4, 6)),
    Case(2, 66, (7, 9), (4, 5)),
    Case(1, 3, (13, 17), (7, 9)),
    Case(2, 16, (9, 15), (3, 5)),
    Case(2, 3, (6, 8), (6, 8)),
    Case(2, 8, (4, 6), (8, 12)),
    Case(2, 4, (3, 82), (2, 2)),
    Case(2, 3, (41, 5), (3, 7)),
    Case(3, 1, (6, 6), (3, 3)),
    Case(2, 8, (1, 1), (1, 1)),
    Case(3, 2, (1, 1), (5, 4)),
    Case(3, 1, (1, 1), (1, 1)),
]
FEW = [HALVES, Case(2, 8, (7, 9), (4, 5)), Case(2, 5, (5, 12), (2, 2))]


def make(case, dtypes=(F32, F32), layout="nchw", offset=0.0, small=F32):
    """Maps, the gradient of v, parameters by their place among csf_fuse's, statistics of both batch norms."""
    batch, channels, fine, coarse = case

    # A map that is both counts as contiguous, and y is in z's layout.
    memory_format = LAYOUTS[layout if channels > 1 and math.prod(fine) > 1 else "nchw"]

    def maps(size, dtype, about=0.0):
        values = torch.randn(batch, channels, *size, dtype=F64) + about
        return values.to(dtype).contiguous(memory_format=memory_format)

    inputs = {"z": maps(fine, dtypes[0], offset), "y": maps(coarse, dtypes[1], offset), "grad": maps(fine, dtypes[0])}
    shapes = [(channels,), (channels,), (SQUEEZED, channels), (SQUEEZED,), (SQUEEZED,)]
    shapes += [(channels, SQUEEZED), (channels,)] * 2
    for k, shape in enumerate(shapes):
        inputs[f"parameter{k}"] = (torch.randn(shape, dtype=F64) / 2 + (k in (0, 3))).to(small)
    for prefix, count in (("", channels), ("fc_", SQUEEZED)):
        inputs[f"{prefix}running_mean"] = (torch.randn(count, dtype=F64) + offset).to(small)
        inputs[f"{prefix}running_var"] = (0.5 + torch.rand(count, dtype=F64)).to(small)
        inputs[f"{prefix}batches"] = torch.tensor(3)
    # A squeeze layer over two samples amplifies errors by 1 / eps.
    inputs |= {"norm": TRACKED, "eps": 1e-3, "momentum": 0.2}
    return inputs | {"fc_norm": TRACKED, "fc_eps": 0.5, "fc_momentum": 0.3, "parts": 2}


def given(inputs):
    return [int(name in inputs) for name in ("z", "y", *(f"parameter{k}" for k in range(9)))]


def run(inputs, build="plain", seed=0, misaligned=(0, 0, 0), wanted=None, **tuning):
    inputs = {"wanted": given(inputs) if wanted is None else wanted, **inputs, **tuning}
    if inputs["z"].shape[0] == 1 and "sums" not in inputs and inputs["fc_norm"] >= BATCH:
        inputs["fc_norm"] = RUNNING
    for name, bytes_ in zip(("z", "y", "grad"), misaligned, strict=True):
        inputs[name] = runner.Misaligned(inputs[name], bytes_)
    defines = () if build == "plain" else ("CSF_FEW_TYPES",)
    return runner.run("csf", inputs, build=build, seed=seed, defines=defines)


def truth(inputs):
    """What the fp64 reference makes of the same inputs, its gradients and running statistics."""
    exact = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
             for name, value in inputs.items()}  # fmt: skip
    leaves = {name: exact[name].clone().requires_grad_() for name in exact if name in ("z", "y") or "parameter" in name}
    result = {}

    def batch_norm(prefix, weight):
        norm = inputs[f"{prefix}norm"]
        if norm == NONE:
            return None
        statistics = [None] * 3
        if norm != BATCH:
            names = [f"{prefix}{name}" for name in ("running_mean", "running_var", "batches")]
            statistics = [exact[name].clone() if name in exact else None for name in names]
            result.update({name: value for name, value in zip(names, statistics, strict=True) if value is not None})
        return BatchNorm(leaves.get(f"parameter{weight}"), leaves.get(f"parameter{weight + 1}"), *statistics,
                         norm >= BATCH, inputs.get(f"{prefix}momentum"), inputs[f"{prefix}eps"])  # fmt: skip

    heads = tuple((leaves[f"parameter{k}"], leaves[f"parameter{k + 1}"]) for k in (5, 7))
    v = csf(leaves["z"], leaves["y"], batch_norm("", 0), leaves["parameter2"], batch_norm("fc_", 3), heads)
    result["v"] = v.detach()
    gradients = torch.autograd.grad(v, list(leaves.values()), exact["grad"], allow_unused=True)
    for name, leaf, gradient in zip(leaves, leaves.values(), gradients, strict=True):
        result[f"{name}_gradient"] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def parts_of(map_, count):
    """A map's pixels, part by part, [B, M, pixels]."""
    flat = map_.flatten(2)
    pixels = flat.shape[2]
    length = (-(-pixels // count) + 63) // 64 * 64
    return [flat[:, :, min(p * length, pixels) : min((p + 1) * length, pixels)] for p in range(count)]


def true_sums(inputs):
    """The sums of both directions, and a measure of their terms to compare errors with."""
    z, y, grad = (inputs[name].double() for name in ("z", "y", "grad"))
    ones = torch.ones_like(y, requires_grad=True)
    (windows,) = torch.autograd.grad(F.interpolate(ones, size=z.shape[2:]).sum(), ones)
    up = F.interpolate(y, size=z.shape[2:])
    mean = z.mean((0, 2, 3), keepdim=True) if inputs["norm"] >= BATCH else inputs["running_mean"].double()
    centred = z - mean.reshape(1, -1, 1, 1)
    parts = inputs["parts"]
    sums, sizes = [], []
    for part, coarse in zip(parts_of(z, parts), parts_of(y * windows, parts), strict=True):
        own = part.mean(2) if part.shape[2] else torch.zeros_like(part[:, :, :0].sum(2))
        squares = (part - own[..., None]).square().sum(2)
        sums.append(torch.stack([own, squares, coarse.sum(2)], 1))
        sizes.append(torch.stack([own.abs() + squares.sqrt(), squares, coarse.abs().sum(2)], 1))
    backward, backward_sizes = [], []
    for terms in zip(*(parts_of(map_, parts) for map_ in (grad, grad * centred, grad * up)), strict=True):
        backward.append(torch.stack([term.sum(2) for term in terms], 1))
        backward_sizes.append(torch.stack([term.abs().sum(2) for term in terms], 1))
    return [torch.stack(values, 1) for values in (sums, sizes, backward, backward_sizes)]


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


def check(result, inputs):
    inputs = inputs | ({"fc_norm": RUNNING} if inputs["z"].shape[0] == 1 and inputs["fc_norm"] else {})
    dtype = inputs["z"].dtype
    expected = truth(inputs)
    sums, sizes, backward_sums, backward_sizes = true_sums(inputs)
    assert ((result["sums"] - sums).abs() <= SUMS[dtype] * sizes).all()
    assert ((result["backward_sums"] - backward_sums).abs() <= SUMS[dtype] * backward_sizes + 1e-300).all()
    for name, true in expected.items():
        value = result[name]
        tensor = inputs.get(name.removesuffix("_gradient"), inputs["z"])
        assert value.dtype == tensor.dtype and value.shape == tensor.shape, name
        if not value.is_floating_point():
            assert torch.equal(value, true), name
            continue
        compute = F64 if dtype == F64 else F32
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[compute])
        size = true.abs().max()
        if name.startswith("parameter"):
            # Such a gradient may be nothing but what is left of terms that cancel.
            size = max(true.abs().max() for other, true in expected.items() if other.startswith("parameter"))
        error = (value.double() - true).abs().max() / size.clamp(min=1e-300)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("case", CASES, ids=str)
@layouts
def test_sums_values_and_gradients_plain(layout, case):
    inputs = make(case, layout=layout)
    check(run(inputs, **SMALL), inputs)


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=2)), ids=str)
@layouts
def test_dtypes_plain(layout, dtypes):
    for case in FEW:
        inputs = make(case, dtypes, layout)
        result = run(inputs, **SMALL)
        check(result, inputs)
        whole = case == HALVES or (layout == "channels_last" and case.channels == 8)
        assert set(result["vector"].tolist()) == {int(whole and dtypes[0] == dtypes[1])}


@layouts
def test_float64_plain(layout):
    for case in FEW:
        inputs = make(case, (F64, F64), layout, small=F64)
        result = run(inputs, **SMALL)
        check(result, inputs)
        assert not result["vector"].any()


@pytest.mark.parametrize("small", [F64, BF16, F16], ids=str)
def test_parameters_and_statistics_of_other_dtypes_plain(small):
    inputs = make(FEW[1], small=small)
    check(run(inputs, **SMALL), inputs)


@pytest.mark.parametrize("parts", [1, 3, 4, 5])
@layouts
def test_any_number_of_parts_plain(layout, parts):
    for case, run_length in itertools.product((Case(2, 8, (18, 16), (9, 8)), Case(2, 3, (17, 13), (9, 7))), (8, 128)):
        inputs = make(case, layout=layout) | {"parts": parts}
        check(run(inputs, run=run_length, **SMALL), inputs)


@layouts
def test_blocks_as_large_as_on_a_gpu_plain(layout):
    for case in (Case(2, 4, (40, 64), (20, 32)), Case(2, 3, (39, 31), (20, 16))):
        inputs = make(case, layout=layout) | {"parts": 3}
        check(run(inputs, run=16), inputs)


@pytest.mark.parametrize("norm, fc_norm", list(itertools.product((RUNNING, BATCH, TRACKED), range(4))))
def test_kinds_of_normalisation_plain(norm, fc_norm):
    for layout in LAYOUTS:
        inputs = make(HALVES, layout=layout) | {"norm": norm, "fc_norm": fc_norm}
        if fc_norm == NONE:
            del inputs["parameter3"], inputs["parameter4"]
        check(run(inputs, **SMALL), inputs)


def test_cumulative_averages_plain():
    inputs = make(HALVES)
    del inputs["momentum"], inputs["fc_momentum"]
    check(run(inputs, **SMALL), inputs)


@pytest.mark.parametrize("absent", [("parameter0",), ("parameter1", "parameter4"), ("parameter0", "parameter3"),
                                    ("batches", "fc_batches")], ids=str)  # fmt: skip
def test_parameters_that_are_not_there_plain(absent):
    inputs = {name: value for name, value in make(FEW[1]).items() if name not in absent}
    check(run(inputs, **SMALL), inputs)


def test_parameters_that_shared_memory_has_no_room_for():
    inputs = make(Case(2, 1700, (2, 2), (1, 1)), layout="channels_last")
    check(run(inputs, build="asan", **SMALL), inputs)


@pytest.mark.parametrize("wanted", [(1, 0), (0, 1), (0, 0)])
@layouts
def test_only_wanted_gradients_are_made_plain(layout, wanted):
    for case, norm in itertools.product(FEW[:2], (RUNNING, TRACKED)):
        inputs = make(case, layout=layout) | {"norm": norm}
        every = run(inputs, **SMALL)
        some = run(inputs, wanted=[*wanted, 1, 0, 1, 0, 1, 0, 1, 0, 1], **SMALL)
        names = {name for name in some if name.endswith("_gradient")}
        maps = {name for name, flag in zip(("z_gradient", "y_gradient"), wanted, strict=True) if flag}
        assert names == maps | {f"parameter{k}_gradient" for k in (0, 2, 4, 6, 8)}
        for name, value in some.items():
            assert torch.equal(value, every[name]) or name == "vector", name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@layouts
def test_a_part_of_a_global_batch_gives_its_share_plain(layout, dtype):
    inputs = make(Case(5, 8, (6, 8), (3, 4)), (dtype, dtype), layout)
    full = run(inputs, **SMALL)
    check(full, inputs)
    shares = []
    for first, count in ((0, 1), (1, 3), (4, 1)):
        own = {name: inputs[name][first : first + count].contiguous(memory_format=LAYOUTS[layout])
               for name in ("z", "y", "grad")}  # fmt: skip
        shares.append(run({**inputs, **own, "first": first, "sums": full["sums"],
                           "backward_sums": full["backward_sums"]}, **SMALL))  # fmt: skip
        for name in ("v", "z_gradient", "y_gradient"):
            assert torch.equal(shares[-1][name], full[name][first : first + count]), name
        for name in ("state", "running_mean", "running_var", "batches", "fc_running_mean", "fc_running_var"):
            assert torch.equal(shares[-1][name], full[name]), name
    for k in range(9):
        name = f"parameter{k}_gradient"
        assert relative(sum(share[name].double() for share in shares), full[name].double()) < 1e-5, name


def test_the_state_holds_what_its_sections_say_plain():
    inputs = make(HALVES)
    state = run(inputs, **SMALL)["state"]
    z, y = inputs["z"].double(), inputs["y"].double()
    samples, channels = z.shape[:2]
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    invstd = (var + inputs["eps"]).rsqrt()
    scale, bias, fc, *_ = (inputs[f"parameter{k}"].double() for k in range(9))
    centre = z.mean((2, 3)) - mean
    pooled = centre * scale * invstd + bias + y.mean((2, 3))
    squeezed = pooled @ fc.T
    fc_invstd = (squeezed.var(0, correction=0) + inputs["fc_eps"]).rsqrt()
    normal = (squeezed - squeezed.mean(0)) * fc_invstd
    r = (inputs["parameter3"].double() * normal + inputs["parameter4"].double()).relu()
    logits = [r @ inputs[f"parameter{k}"].double().T + inputs[f"parameter{k + 1}"].double() for k in (5, 7)]
    sections = [mean, invstd, fc_invstd, logits[0] - logits[1], pooled, centre, normal]
    assert state.shape == (2 * channels + SQUEEZED + 3 * samples * channels + samples * SQUEEZED,)
    for k, (value, true) in enumerate(zip(state.split([s.numel() for s in sections]), sections, strict=True)):
        assert relative(value, true.flatten()) < 2e-6, k


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@layouts
def test_a_large_mean_costs_no_digits_plain(layout, dtype):
    for case in FEW:
        inputs = make(case, (dtype, dtype), layout, offset=1000.0)
        check(run(inputs, **SMALL), inputs)


@layouts
def test_running_means_beyond_the_range_of_half_plain(layout):
    inputs = make(HALVES, (F16, F16), layout) | {"norm": RUNNING, "running_mean": torch.full((8,), -1e5), "eps": 1e6}
    inputs["z"] = (inputs["z"] - 6e4).to(F16)
    check(run(inputs, **SMALL), inputs)


@layouts
def test_saturated_attention_plain(layout):
    inputs = make(HALVES, layout=layout)
    inputs["parameter6"][:4] += 2000.0
    inputs["parameter8"][4:] += 2000.0
    check(run(inputs, **SMALL), inputs)


@pytest.mark.parametrize("bad", [math.nan, 1e12])
@layouts
def test_coarse_pixels_that_no_fine_pixel_reads_count_nowhere_plain(layout, bad):
    inputs = make((2, 8, (4, 6), (8, 12)), layout=layout)
    expected = run(inputs)
    check(expected, inputs)
    inputs["y"][:, :, 1::2] = inputs["y"][:, :, :, 1::2] = bad
    result = run(inputs)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@layouts
def test_nan_and_inf_come_out_plain(layout, bad):
    for case, name in itertools.product(FEW, ("z", "y", "grad")):
        inputs = make(case, layout=layout) | {"norm": RUNNING, "fc_norm": RUNNING}
        inputs[name][0, 1, 0, 1] = bad
        result = run(inputs, **SMALL)
        if name == "grad":
            assert result["v"].isfinite().all() and not result["z_gradient"][0, 1, 0, 1].isfinite()
        else:
            # Of this sample, the pixel itself at least; of the other, nothing.
            assert not result["v"][0, 1].isfinite().all() and result["v"][1].isfinite().all()


@pytest.mark.parametrize("case", [HALVES, FEW[1]], ids=str)
@layouts
def test_the_order_of_blocks_and_threads_does_not_matter_plain(layout, case):
    inputs = make(case, layout=layout) | {"parts": 2}
    first = run(inputs, run=8, **SMALL)
    for seed in (1, 2):
        for name, value in run(inputs, seed=seed, run=8, **SMALL).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("misaligned, vector", [((8, 0, 0), (0, 0, 0, 0)), ((0, 4, 0), (0, 0, 0, 0)),
                                                ((0, 0, 8), (1, 1, 0, 0))])  # fmt: skip
@layouts
def test_misaligned_bases_are_read_one_by_one(layout, misaligned, vector, dtype):
    inputs = make(HALVES, (dtype, dtype), layout)
    result = run(inputs, build="asan", misaligned=misaligned, **SMALL)
    check(result, inputs)
    assert tuple(result["vector"].tolist()) == vector


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("build", ["asan", "tsan"])
@layouts
def test_sanitizers_find_nothing(layout, build, dtype):
    cases = CASES if build == "asan" else [Case(2, 8, (3, 8), (2, 4)), Case(2, 3, (5, 4), (2, 2))]
    # The last one is longer than what a block adds up at a time.
    for case in [*cases, Case(1, 3, (30, 20), (15, 10))]:
        inputs = make(case, (dtype, dtype), layout) | {"parts": min(case.batch, 2)}
        check(run(inputs, build=build, run=8, **SMALL), inputs)
