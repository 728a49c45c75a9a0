"""The CUDA kernels of seg_ce, run on the CPU, against the fp64 reference: loss, counts, gradients, classes.

The driver fills every output and the workspace with NaNs before the launches.
"""

import math

import pytest
import torch
from cuda_on_cpu import runner

from transkd_fast.reference.seg_ce import seg_ce, seg_predict

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 2**-8, F16: 2**-10}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
LABEL_TYPES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}
CUTTING = (
    "blocks",
    "side",
    "tile_rows",
    "tile_columns",
    "row_tiles",
    "column_tiles",
    "shares",
    "rounds",
    "weight_blocks",
    "workspace_bytes",
)
# Shape of the logits, height and width of the labels: fourfold, both sides odd, one axis of one size, one size, fewer
# labels than logits, 1 x n, cells of many squares.
SIZES = [
    ((2, 19, 5, 9), (20, 36)),
    ((1, 2, 7, 6), (15, 10)),
    ((1, 41, 4, 6), (4, 13)),
    ((2, 5, 3, 40), (3, 40)),
    ((1, 9, 9, 11), (4, 3)),
    ((1, 3, 1, 7), (4, 25)),
    ((1, 3, 1, 1), (33, 47)),
    ((1, 1, 2, 2), (9, 5)),
]


def make(shape, size, dtype=F32, layout="nchw", label_type=torch.int64, scale=3.0, outside=True):
    """Logits and labels, of which some are ignored and some out of range."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    chance = torch.rand(labels.shape, generator=generator)
    labels[chance < 0.2] = 255
    if outside:
        labels[chance > 0.9] = 254
    return logits.contiguous(memory_format=LAYOUTS[layout]), labels.to(label_type)


def run(logits, labels, weight=None, keep=True, build="plain", seed=0, gradient=None, misaligned=0, **tuning):
    stored = labels.view(F16) if labels.dtype == torch.int16 else labels
    inputs = {
        "logits": runner.Misaligned(logits, misaligned),
        "labels": stored,
        "label_type": LABEL_TYPES[labels.dtype],
        "ignore_index": 255,
        "keep": int(keep),
        "upstream": 0.37,
        "kept_misalignment": misaligned,
        "gradient": runner.Misaligned(torch.empty_like(logits, dtype=gradient), misaligned),
        **({} if weight is None else {"weight": weight}),
        **tuning,
    }
    defines = () if build == "plain" else ("SEG_CE_FEW_TYPES",)
    result = runner.run("seg_ce", inputs, build=build, seed=seed, defines=defines)
    return result, dict(zip(CUTTING, result["cutting"].tolist(), strict=True))


def truth(logits, labels, weight=None):
    exact = logits.double().requires_grad_()
    loss, counts = seg_ce(exact, labels, None if weight is None else weight.double())
    (gradient,) = torch.autograd.grad(loss * 0.37, exact)
    return loss.detach(), counts, gradient


def relative(value, true):
    return ((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


def check(result, logits, labels, weight=None, tolerance=None):
    compute = F64 if logits.dtype == F64 else F32
    tolerance = tolerance or TOLERANCE[compute]
    loss, counts, gradient = truth(logits, labels, weight)
    assert torch.equal(result["counts"], counts)
    assert result["loss"].dtype == compute and relative(result["loss"], loss) < tolerance
    assert torch.equal(result["predicted"], seg_predict(logits.double(), *labels.shape[1:]))
    if "kept" in result:
        total = result["total"].double()
        assert result["kept"].dtype == compute and result["kept"].stride() == logits.stride()
        assert relative(result["kept"].double() * 0.37 / total.clamp(min=1e-30), gradient) < tolerance
        gradient_tolerance = max(tolerance, TOLERANCE[result["gradient"].dtype])
        assert relative(result["gradient"], gradient) < gradient_tolerance


@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
@layouts
def test_value_and_gradients_plain(shape, size, layout):
    maps = make(shape, size, layout=layout)
    result, cut = run(*maps)
    check(result, *maps)
    result, _ = run(*maps, keep=False)
    check(result, *maps)
    assert cut["side"] == (1 if shape[2:] == size else 4 if max(size[0] / shape[2], size[1] / shape[3]) > 2 else 2)


@pytest.mark.parametrize("keep", [True, False])
@layouts
def test_tiles_meet_without_gaps_and_count_no_pixel_twice_plain(layout, keep):
    for (_, _, height, width), size in SIZES[:6]:
        maps = make((1, 3, height, width), size, layout=layout)
        result, cut = run(*maps, keep=keep, threads=12)
        check(result, *maps)
        assert cut["blocks"] > 1


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
@layouts
def test_dtypes_plain(layout, dtype):
    maps = make((2, 19, 5, 9), (20, 36), dtype, layout)
    result, _ = run(*maps)
    check(result, *maps)
    assert result["gradient"].dtype == dtype
    result, _ = run(*make((1, 7, 3, 5), (3, 5), dtype, layout))
    check(result, *make((1, 7, 3, 5), (3, 5), dtype, layout))


@pytest.mark.parametrize("label_type", LABEL_TYPES, ids=str)
@pytest.mark.parametrize("weight_type", [None, F32, BF16, F64], ids=str)
def test_labels_and_weights_of_every_dtype_plain(label_type, weight_type):
    maps = make((1, 6, 3, 4), (11, 17), label_type=label_type)
    weight = None if weight_type is None else torch.tensor([0.5, 1.0, 0.0, 3.0, 0.25, 2.0], dtype=weight_type)
    result, cut = run(*maps, weight)
    check(result, *maps, weight)
    assert cut["weight_blocks"] == (weight_type in (BF16, F64))


def test_labels_that_are_negative_or_larger_than_32_bits_are_out_of_range_plain():
    logits, labels = make((1, 3, 2, 2), (5, 6), outside=False)
    labels[0, 0, :3] = torch.tensor([-1, -(2**40), 2**32 + 1])
    result, _ = run(logits, labels)
    check(result, logits, labels)
    assert result["counts"][3] == 3


@layouts
def test_nothing_to_learn_from_gives_zeros_plain(layout):
    logits, labels = make((1, 5, 3, 4), (9, 13), layout=layout)
    result, _ = run(logits, torch.full_like(labels, 255))
    assert result["loss"] == 0 and result["total"] == 0 and not result["gradient"].any() and not result["kept"].any()
    assert result["counts"].tolist() == [0, 0, 9 * 13, 0]
    result, _ = run(logits, labels, torch.zeros(5))
    assert result["loss"] == 0 and not result["gradient"].any()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_logits_stay_finite_and_accurate_plain(dtype):
    """Of whole numbers that are interpolated with eighths nothing is rounded, however large they are."""
    logits, labels = make((1, 7, 4, 5), (16, 20), dtype)
    logits = logits.round() + 1e4 * (-1.0) ** torch.arange(7, dtype=dtype).view(1, 7, 1, 1)
    result, _ = run(logits, labels)
    check(result, logits, labels)
    logits = logits + 3000 * torch.arange(20, dtype=dtype).view(1, 1, 4, 5).remainder(3)
    result, _ = run(logits, labels)
    check(result, logits, labels, tolerance=1e-5 if dtype == F32 else None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("shape", "size"), [((1, 4, 5, 6), (20, 24)), ((1, 4, 5, 6), (5, 6)), ((1, 3, 4, 6), (4, 9))])
def test_nan_and_inf_come_out_where_eager_has_them_plain(shape, size, bad):
    # The second row and column are read with weight 0 where a position is clamped.
    for place in ((2, 3), (1, 1), (0, 0)):
        logits, labels = make(shape, size)
        logits[(0, 1, *place)] = bad
        result, _ = run(logits, labels)
        loss, counts, gradient = truth(logits, labels)
        assert result["loss"].isfinite() == loss.isfinite()
        assert torch.equal(result["gradient"].isfinite(), gradient.isfinite())
        assert torch.equal(result["counts"], counts)
        assert torch.equal(result["predicted"], seg_predict(logits.double(), *size))


def test_the_first_of_equal_scores_counts_plain():
    logits, labels = make((1, 5, 3, 4), (12, 16))
    logits[:, 3] = logits[:, 1] = 10.0
    result, _ = run(logits, labels)
    check(result, logits, labels)
    assert (result["predicted"] == 1).all() and result["counts"][1] == (labels == 1).sum()


@layouts
def test_the_order_of_blocks_and_threads_does_not_matter_plain(layout):
    maps = make((1, 9, 6, 9), (24, 36), layout=layout)
    first, _ = run(*maps, threads=40)
    for seed in (1, 2):
        again, _ = run(*maps, threads=40, seed=seed)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize(("dtype", "build"), [(F32, "asan"), (BF16, "asan"), (F64, "plain")], ids=str)
def test_gradients_of_many_elements_from_aligned_and_misaligned_bases(dtype, build):
    maps = make((1, 33, 16, 32), (16, 32), dtype)
    result, _ = run(*maps, build=build)
    check(result, *maps)
    again, _ = run(*maps, build=build, misaligned=8)
    assert torch.equal(again["gradient"], result["gradient"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@layouts
def test_misaligned_bases_plain(layout, dtype):
    maps = make((1, 9, 6, 9), (24, 36), dtype, layout)
    result, _ = run(*maps, misaligned=4)
    check(result, *maps)


@pytest.mark.parametrize("build", ["asan", "tsan"])
@layouts
def test_sanitizers_find_nothing(layout, build):
    for shape, size in [((1, 11, 3, 5), (12, 20)), ((1, 3, 4, 5), (7, 5)), ((1, 10, 2, 9), (2, 9))]:
        maps = make(shape, size, layout=layout)
        result, _ = run(*maps, torch.linspace(0.5, 2, shape[1], dtype=BF16), build=build, threads=24)
        check(result, *maps, torch.linspace(0.5, 2, shape[1], dtype=BF16))


def plan(sizes, keep=True, dtype=F32):
    result = runner.run("seg_ce", {"sizes": list(sizes), "keep": int(keep), "type": torch.zeros(1, dtype=dtype)})
    return dict(zip(CUTTING, result["cutting"].tolist(), strict=True))


def test_the_real_maps_fill_a_gpu_and_keep_next_to_nothing_plain():
    cut = plan((2, 19, 128, 256, 512, 1024))
    # Two blocks for each of 132 multiprocessors, little of them overlapping.
    assert 200 <= cut["blocks"] <= 264 and cut["rounds"] == 1
    assert cut["blocks"] * cut["tile_rows"] * cut["tile_columns"] < 1.3 * 2 * 128 * 256
    for sizes in [(8, 19, 128, 256, 512, 1024), (8, 150, 128, 128, 512, 512), (2, 19, 64, 128, 512, 1024)]:
        for keep in (True, False):
            cut = plan(sizes, keep)
            assert cut["blocks"] >= 200 and cut["workspace_bytes"] < 1e-2 * math.prod(sizes[:4]) * 4
    assert plan((2, 19, 1, 1, 512, 512))["shares"] == 64


@pytest.mark.parametrize(
    ("sizes", "what"),
    [((1, 2, 2**16, 2**15, 4, 4), "pixels in a plane"), ((1, 2, 4, 4, 2**16, 2**15), "label pixels of a sample")],
)
def test_calls_too_large_for_32_bit_counts_are_refused_plain(sizes, what):
    with pytest.raises(runner.KernelError, match=rf"seg_ce: expected fewer than 2\^31 {what}"):
        plan(sizes)
