"""The CUDA kernels of pea, run on the CPU, against the fp64 reference and its autograd: loss and all gradients.

The driver fills every output and the workspace with NaNs before the launches.
"""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from cuda_on_cpu import runner

from transkd_fast.reference.pea import pea

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Of outputs stored in a type, and of products whose factors are rounded to it.
TOLERANCE = {F64: 1e-13, F32: 4e-6, BF16: 2**-7, F16: 2**-10}
TF32 = 2**-9
ROLES = ("x", "weight", "bias", "target", "assistant", "projection_scale", "assistant_scale")
# Batch, tokens, C_in, C_out.
SMALL = [(1, 1, 5, 10), (3, 7, 10, 66), (1, 45, 66, 5), (3, 45, 5, 160), (2, 70, 16, 24), (1, 130, 1, 1)]
REAL = [(1, 70, 32, 64), (2, 33, 64, 128), (1, 70, 160, 320), (1, 20, 256, 512)]
FEW = [(2, 70, 16, 72), (1, 45, 72, 40), (3, 9, 10, 66)]
# As the launcher does it; with few programs, each of several tiles; all stages wide, with dweight in several parts.
TUNINGS = {
    "usual": {},
    "persistent": {"programs": 2, "merge_threads": 1},
    "wide": {"narrow": 0, "least_split": 1},
}
# What a block of sm_86 and sm_89 can have, less what the kernels have besides.
SHARED_BYTES = (99 - 12) * 1024
CUTTING = ("narrow", "tiles", "blocks", "dx_blocks", "splits", "vectors")


@dataclass
class Call:
    """Tensors by role, one per stage, and what goes with them."""

    tensors: dict[str, list[torch.Tensor]]
    stage_weights: list[float]
    wanted: list[tuple[int, ...]]
    options: dict = field(default_factory=dict)
    upstream: float = 0.37


def make(sizes, dtypes=(F32, F32, F32), layouts="ttt", assisted=True, parameters=None, wanted=None, **options):
    """dtypes and layouts of x, target, assistant: t token-major, c channel-major; parameters: their dtype, or x's."""
    double = F64 in dtypes
    dtypes = [F64] * 3 if double else dtypes

    def embedding(batch, tokens, channels, dtype, layout):
        t = torch.randn(batch, tokens, channels, dtype=F64).to(dtype)
        return t.mT.contiguous().mT if layout == "c" else t

    tensors = {role: [] for role in ROLES}
    for batch, tokens, in_, out in sizes:
        tensors["x"].append(embedding(batch, tokens, in_, dtypes[0], layouts[0]))
        # What x's type can hold: the products round the weight to it.
        weight = (torch.randn(out, in_, dtype=F64) / math.sqrt(in_)).to(dtypes[0])
        tensors["weight"].append(weight.to(parameters or dtypes[0]))
        tensors["bias"].append(torch.randn(out, dtype=F64).to(parameters or dtypes[0]))
        tensors["target"].append(embedding(batch, tokens, out, dtypes[1], layouts[1]))
        tensors["assistant"].append(embedding(batch, tokens, out, dtypes[2], layouts[2]))
        tensors["projection_scale"].append(torch.tensor([1.25], dtype=parameters or dtypes[0]))
        tensors["assistant_scale"].append(torch.tensor([-0.75], dtype=parameters or dtypes[0]))
    if not assisted:
        for role in ROLES[4:]:
            tensors[role] = []
    weights = [batch * tokens * out * (0.5 + 0.1 * m) for m, (batch, tokens, _, out) in enumerate(sizes)]
    flags = wanted or (1, 1, 1, 1, *(3 * (int(assisted),)))
    return Call(tensors, weights, [flags] * len(sizes), {"tf32": 0} | options)


def join(*calls):
    """One call with the stages of several."""
    tensors = {role: [t for call in calls for t in call.tensors[role]] for role in ROLES}
    weights, wanted = ([v for call in calls for v in getattr(call, name)] for name in ("stage_weights", "wanted"))
    return Call(tensors, weights, wanted, calls[0].options)


def run(call, build="plain", seed=0, misaligned=0, **options):
    inputs = {
        f"{role}{m}": runner.Misaligned(t, misaligned) for role, ts in call.tensors.items() for m, t in enumerate(ts)
    }
    inputs |= {"stage_weights": list(map(float, call.stage_weights)), "upstream": call.upstream}
    inputs |= {"wanted": [int(flag) for flags in call.wanted for flag in flags]}
    defines = () if build == "plain" else ("PEA_FEW_TYPES",)
    return runner.run("pea", inputs | call.options | options, build=build, seed=seed, defines=defines)


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


def check(result, call):
    exact = {role: [t.double().requires_grad_() for t in ts] for role, ts in call.tensors.items()}
    optional = [exact[role] or None for role in ROLES[4:]]
    loss = pea(*(exact[role] for role in ROLES[:4]), call.stage_weights, *optional)
    compute = F64 if call.tensors["x"][0].dtype == F64 else F32
    assert result["loss"].dtype == compute
    # The squares of residuals that are made of rounded products; those of halves are exact here.
    assert relative(result["loss"], loss.detach()) < (TF32 if call.options["tf32"] else TOLERANCE[compute])
    names, upstream = set(), torch.tensor(call.upstream, dtype=F64)
    for m, flags in enumerate(call.wanted):
        product = call.tensors["x"][m].dtype
        # The residual is rounded to it for the products.
        rounded = TF32 if call.options["tf32"] and product == F32 else TOLERANCE[product]
        for role, flag in zip(ROLES, flags, strict=True):
            if not flag:
                continue
            tensor, key = call.tensors[role][m], role if "scale" not in role else "scales"
            names.add(f"{key}_gradient{m}")
            gradient = result[f"{key}_gradient{m}"]
            if key == "scales":
                gradient, dtype = gradient[ROLES.index(role) - 5].reshape(1), compute
            else:
                dtype = tensor.dtype
                # One residual serves both.
                like = call.tensors["target"][m] if role == "assistant" and flags[3] else tensor
                assert gradient.stride() == like.stride()
            assert gradient.dtype == dtype
            (true,) = torch.autograd.grad(loss, exact[role][m], upstream, retain_graph=True)
            tolerance = max(TOLERANCE[dtype], rounded if role in ("x", "weight") else TOLERANCE[compute])
            if call.options["tf32"]:
                tolerance = max(tolerance, 2 * TF32)
            if key == "scales":  # sums of terms of both signs
                tolerance *= 20
            assert relative(gradient, true) < tolerance, (role, m)
    assert {name for name in result if "_gradient" in name} == names


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("layout", "tc")
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_stages_of_all_sizes_plain(dtype, layout, tuning):
    call = make(SMALL, (dtype,) * 3, layout * 3, **TUNINGS[tuning])
    result = run(call)
    check(result, call)
    assert result["launches"] <= 3
    plain = make(SMALL[1:4], (dtype,) * 3, layout * 3, assisted=False, **TUNINGS[tuning])
    check(run(plain), plain)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_channels_of_the_real_stages_plain(dtype):
    call = make(REAL, (dtype,) * 3, parameters=F32, assisted=False)
    result = run(call)
    check(result, call)
    assert result["launches"] == 3


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("layouts", ["".join(layouts) for layouts in itertools.product("tc", repeat=3)])
def test_layouts_may_differ_plain(layouts, narrow):
    dtypes = (F32, BF16, F16) if layouts[0] == "t" else (BF16, F32, BF16)
    call = make(FEW, dtypes, layouts, narrow=narrow)
    check(run(call), call)


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("dtypes", list(itertools.permutations((F32, BF16, F16))), ids=str)
def test_dtypes_may_differ_plain(dtypes, narrow):
    for parameters, layouts in ((BF16, "tct"), (F64, "ctc")):
        call = make(FEW[:2], dtypes, layouts, parameters=parameters, narrow=narrow)
        check(run(call), call)


def test_stages_may_differ_in_everything_plain():
    calls = [
        make(SMALL[:2], (F32, F32, BF16), "tct"),
        make(FEW, (BF16, F32, F16), "ctt", parameters=F32),
        make(SMALL[2:4], (F16, F16, F16), "ccc"),
        make(FEW[:2], (F32, BF16, F32), "ttt"),
        make(SMALL[4:], (BF16, BF16, BF16), "tcc"),
    ]
    call = join(*calls)
    assert len(call.stage_weights) > 8, "expected more stages than a launch can take"
    check(run(call), call)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_only_what_is_wanted_is_made_plain(tuning):
    for k, role in enumerate(ROLES):
        call = make(FEW[:2], (BF16, F32, BF16), "tct", wanted=tuple(int(k == j) for j in range(7)), **TUNINGS[tuning])
        result = run(call)
        check(result, call)
        made = {name.rstrip("01") for name in result if name[-1] in "01" and "_gradient" not in name}
        kept = {"x": "dx", "weight": "dweight", "bias": "dbias", "target": "residual", "assistant": "residual"}
        assert made == {kept.get(role, "scales")}
        assert result["launches"] == (3 if role in ("x", "weight") else 2)  # the second stage is wide
    call = make(FEW[:2], wanted=(0,) * 7, **TUNINGS[tuning])
    result = run(call)
    check(result, call)
    assert set(result) == {"loss", "factors", "launches"} and result["launches"] == 2


@pytest.mark.parametrize("layouts", ["ttt", "ccc"])
def test_tf32_is_used_where_it_is_asked_for_plain(layouts):
    for narrow in (0, 1):
        call = make(FEW, layouts=layouts, narrow=narrow, tf32=1)
        result = run(call)
        check(result, call)
        exact = run(Call(call.tensors, call.stage_weights, call.wanted, call.options | {"tf32": 0}))
        assert relative(result["x_gradient0"], exact["x_gradient0"].double()) > 1e-5
    halves = make(FEW[:1], (BF16,) * 3, layouts)
    for name, value in run(halves).items():
        assert torch.equal(value, run(halves, tf32=1)[name]), "TF32 is for fp32 only"


def test_weights_are_rounded_to_the_type_of_x_plain():
    call = make(FEW[:2], (BF16,) * 3, parameters=F32)
    call.tensors["weight"] = [w + 1e-3 * torch.randn_like(w) for w in call.tensors["weight"]]
    rounded = Call(call.tensors | {"weight": [w.bfloat16().float() for w in call.tensors["weight"]]},
                   call.stage_weights, call.wanted, call.options)  # fmt: skip
    expected = run(rounded)
    for name, value in run(call).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("layout", "tc")
def test_the_order_of_blocks_and_threads_does_not_matter_plain(layout, tuning):
    call = join(make(FEW, layouts=layout * 3), make(FEW[:1], (BF16,) * 3, layout * 3))
    first = run(call, **TUNINGS[tuning])
    for seed in (1, 2):
        again = run(call, seed=seed, **TUNINGS[tuning])
        assert again.keys() == first.keys()
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("build", ["plain", "asan"])
@pytest.mark.parametrize("layout", "tc")
def test_misaligned_bases_are_read_one_by_one(layout, build):
    for narrow in (0, 1):
        call = join(make([(1, 64, 16, 64)], layouts=layout * 3), make([(1, 64, 16, 64)], (BF16,) * 3, layout * 3))
        result = run(call, build=build, misaligned=4, kept_misalignment=4, narrow=narrow)
        check(result, call)


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_come_out_where_they_belong_plain(bad, narrow):
    for dtype, layout in ((F32, "t"), (BF16, "c")):
        call = make(FEW[:2], (dtype,) * 3, layout * 3, assisted=False, narrow=narrow)
        call.tensors["x"][0][1, 67, 3] = bad
        result = run(call)
        assert not result["loss"].isfinite()
        gradient = result["x_gradient0"]
        assert not gradient[1, 67].isfinite().any()
        assert gradient[0].isfinite().all() and gradient[1, :67].isfinite().all() and gradient[1, 68:].isfinite().all()
        assert not result["bias_gradient0"].isfinite().any()
        for role in ROLES[:4]:
            assert result[f"{role}_gradient1"].isfinite().all(), role


def test_large_half_residuals_do_not_overflow_plain():
    call = make(FEW[:1], (F16,) * 3, assisted=False, wanted=(0, 0, 1, 1, 0, 0, 0))
    call.tensors["target"][0] *= 1e4
    call.stage_weights = [1.0]
    check(run(call), call)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("build", ["asan", "tsan"])
def test_sanitizers_find_nothing(build, tuning):
    few = [(1, 66, 16, 72), (2, 5, 5, 10)] if build == "tsan" else [*FEW, *SMALL[:3]]
    call = join(make(few, (F32, BF16, F32), "tct"), make(few[:2], (BF16, F32, F16), "ctc", parameters=F32))
    check(run(call, build=build, **TUNINGS[tuning]), call)


def plan(sizes, dtype=BF16, channel_major=0, **tuning):
    numbers = [int(size) for stage in sizes for size in stage]
    result = runner.run("pea", {"sizes": numbers, "type": torch.zeros(1, dtype=dtype), "channel_major": channel_major,
                                **tuning})  # fmt: skip
    rows = [dict(zip(CUTTING, row, strict=True)) for row in result["cutting"].tolist()]
    return rows, {name: value.item() for name, value in result.items() if name != "cutting"}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channel_major", [0, 1])
@pytest.mark.parametrize("batch", [2, 8])
def test_the_stages_of_segformer_b2_fill_a_gpu_plain(batch, channel_major, dtype):
    sizes = [(batch, 32768, 32, 64), (batch, 8192, 64, 128), (batch, 2048, 160, 320), (batch, 512, 256, 512)]
    stages, whole = plan(sizes, dtype, channel_major)
    assert [row["narrow"] for row in stages] == [1, 1, 0, 0]
    assert all(row["vectors"] for row in stages)
    assert whole["launches"] == 3
    assert all(row["blocks"] >= 200 for row in stages[:2])
    for row in stages[2:]:
        assert row["tiles"] * row["blocks"] >= 128 and row["dx_blocks"] >= 64 and row["splits"] >= 4
    assert whole["shared_bytes"] <= SHARED_BYTES


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_every_size_fits_into_the_shared_memory_of_a_block_plain(dtype):
    sizes = [(b, n, i, o) for b in (1, 3) for n in (1, 4097) for i in (1, 64, 65, 2048) for o in (1, 128, 129, 2048)]
    for tuning in TUNINGS.values():
        assert plan(sizes, dtype, **tuning)[1]["shared_bytes"] <= SHARED_BYTES


def test_calls_too_large_for_32_bit_counts_are_refused_plain():
    with pytest.raises(runner.KernelError, match=r"pea: expected fewer than 2\^31 tokens.*split the batch"):
        plan([(2**16, 2**15, 1, 1)])
