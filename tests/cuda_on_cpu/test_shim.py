"""The shim computes what CUDA defines, and every kind of fault that it promises to catch is caught."""

import pytest
import torch
from cuda_on_cpu import runner

DRIVER = "shim_kernels"
BUILDS = list(runner.BUILDS)


def run(kernel, build="plain", seed=0, **inputs):
    return runner.run(DRIVER, {"kernel": kernel, **inputs}, build=build, seed=seed)


def values(*shape):
    return torch.randn(*shape)


def failure(kernel, build, **inputs):
    with pytest.raises(runner.KernelError) as caught:
        run(kernel, build, **inputs)
    return str(caught.value)


def test_every_thread_knows_its_place():
    grid, block = [3, 2, 2], [4, 3, 2]
    out = run("places", grid=grid, block=block)["out"]
    thread = torch.cartesian_prod(*(torch.arange(s) for s in reversed(block))).flip(1)
    place = torch.cartesian_prod(*(torch.arange(s) for s in reversed(grid))).flip(1)
    expected = torch.cat([thread.expand(12, 24, 3), place[:, None].expand(12, 24, 3)], dim=2)
    assert torch.equal(out.long(), expected)


def test_keywords_and_pragmas_of_a_kernel_are_understood():
    x = values(100)
    y = run("keywords", x=x, n=100, block=[32, 1, 1])["y"]
    assert torch.equal(y, 0.5 * x + torch.tensor([2.0, 3.0, 5.0, 7.0]).repeat(25))


def shuffled(x, operand, width):
    """PTX's shfl.sync, lane by lane."""
    lane = torch.arange(32)
    first = lane - lane % width
    last = first + width - 1
    step = operand % 32

    def pick(source, inside):
        return x[torch.where(inside, source, lane)]

    always = torch.ones(32, dtype=torch.bool)
    return torch.stack(
        [
            pick(first + operand % width, always),
            pick(lane - step, lane - step >= first),
            pick(lane + step, lane + step <= last),
            pick(lane ^ step, (lane ^ step) <= last),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("operand", "width"), [(1, 32), (5, 32), (16, 32), (3, 8), (9, 8), (1, 2), (0, 16), (33, 32)])
def test_shuffles_move_what_ptx_says(dtype, operand, width):
    x = torch.randn(64, dtype=dtype)
    out = run(f"shuffles/{dtype.itemsize}", values=x, operand=operand, width=width)["out"]
    assert torch.equal(out, torch.cat([shuffled(x[:32], operand, width), shuffled(x[32:], operand, width)], dim=1))


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_of_a_warp_shuffle_on_their_own(seed):
    x = torch.arange(32, dtype=torch.float32)
    y = run("half_warps", seed=seed, x=x, block=[32, 1, 1])["y"]
    assert y[:16].tolist() == [120.0] * 16
    assert y[16:].tolist() == [376.0 * 16 * 16] * 16


def test_votes_count_the_right_lanes():
    x = torch.randint(0, 4, (64,), dtype=torch.int32)
    x[:32] += 1
    out = run("votes", values=x)["out"].long()
    for begin in (0, 32):
        warp = x[begin : begin + 32]
        bits = 2 ** torch.arange(32)
        expected = torch.stack(
            [
                ((warp > 0) * bits).sum().expand(32),
                (warp > 2).any().expand(32).long(),
                (warp > 0).all().expand(32).long(),
                ((warp[:, None] == warp[None]) * bits).sum(1),
                (x > 0).sum().expand(32),
                torch.tensor(1).expand(32),
                (x > 3).any().long().expand(32),
                torch.tensor(2**32 - 1).expand(32),
            ],
            dim=1,
        )
        got = out[begin : begin + 32].clone()
        got[:, [0, 3, 7]] %= 2**32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("build", BUILDS)
def test_atomics_add_up(build):
    n = 3 * 32
    out = run("atomics", build, grid=[3, 1, 1], block=[32, 1, 1])["out"]
    count_down = 0
    for _ in range(n):
        count_down = 6 if count_down == 0 else count_down - 1
    expected = [n / 2, n / 4, n * (n - 1) / 2, n * 2.0**33, 1 - n, n - 1, 255, n % 10, count_down, 42, 1]
    assert out.tolist() == expected


def test_arithmetic_is_that_of_the_device_functions():
    x = torch.tensor([0.3, -2.5, 3.5, 1e-3, 100.25, -0.75])
    out = run("arithmetic", x=x)["out"]
    half, bf16 = x.half().float(), x.bfloat16().float()
    expected = torch.stack(
        [
            x.abs().rsqrt(),
            x.exp(),
            x * x + 1,
            x.round(),
            x.trunc(),
            half,
            bf16,
            x.clamp(min=0.5) + torch.arange(6.0).clamp(max=3),
            2 * half,
            bf16 + 1,
            -x,
            x + 3 + (3 + 31),
        ],
        dim=1,
    )
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_the_seed_decides_the_order_of_blocks_and_threads():
    def orders(seed):
        out = run("orders", seed=seed, grid=[20, 1, 1], block=[16, 1, 1])
        return out["blocks"].tolist(), out["threads"].tolist()

    blocks, threads = orders(0)
    assert sorted(blocks) == list(range(20)) != blocks
    for first, second in threads:
        assert sorted(first) == [*range(16)] and sorted(t for t in second if t >= 0) != []
        assert first != sorted(first)
    assert any(first != second for first, second in threads)
    assert orders(0) == (blocks, threads)
    assert orders(1)[0] != blocks and orders(1)[1] != threads


def test_a_launch_sees_what_the_launch_before_it_wrote():
    for build in BUILDS:
        y = run("add_one", build, grid=[6, 1, 1], y_shape=[6])["y"]
        assert y.tolist() == [3.0] * 6


TWINS = {
    # kernel: (inputs, from x to the expected y)
    "read_past_end": (dict(x=values(100), n=100, grid=[4, 1, 1], block=[32, 1, 1]), lambda x: x),
    "write_past_end": (dict(x=values(100), n=100, grid=[4, 1, 1], block=[32, 1, 1]), lambda x: x),
    "vector_copy": (dict(x=values(128), n=128, grid=[1, 1, 1], block=[32, 1, 1]), lambda x: x),
    "pack_copy": (dict(x=values(256).half(), n=256, block=[32, 1, 1]), lambda x: x),
    "reverse_dynamic": (dict(x=values(63), block=[63, 1, 1], dynamic_bytes=63 * 4), lambda x: x.flip(0)),
    "reverse_static": (dict(x=values(64), block=[64, 1, 1]), lambda x: x.flip(0)),
    "accumulate_static": (
        dict(x=torch.ones(3, 32), y_shape=[3], grid=[3, 1, 1], block=[32, 1, 1]),
        lambda x: x.sum(1),
    ),
    "accumulate_dynamic": (
        dict(x=torch.ones(3, 32), y_shape=[3], grid=[3, 1, 1], block=[32, 1, 1], dynamic_bytes=4),
        lambda x: x.sum(1),
    ),
    "rotate_block": (dict(x=values(64), block=[64, 1, 1]), lambda x: x.roll(32)),
    "rotate_twice": (dict(x=values(64), block=[64, 1, 1]), lambda x: x),
    "rotate_warp": (dict(x=values(2, 32), block=[64, 1, 1]), lambda x: x.roll(-1, 1)),
    "rotate_warp_after_shuffle": (dict(x=values(32), block=[32, 1, 1]), lambda x: x.roll(-1)),
    "rotate_half_warp": (dict(x=values(2, 16), block=[32, 1, 1]), lambda x: x.roll(-1, 1)),
    "barrier_in_branch": (dict(block=[64, 1, 1]), lambda _: torch.ones(64)),
    "barrier_after_return": (dict(block=[64, 1, 1], n=64), lambda _: torch.ones(64)),
    "shuffle_outside_mask": (
        dict(x=values(32), block=[32, 1, 1]),
        lambda x: torch.cat([x[3].expand(16), x[16:]]),
    ),
    "shuffle_without_own_lane": (dict(x=values(32), block=[32, 1, 1]), lambda x: x.view(16, 2).flip(1).flatten()),
    "shuffle_with_missing_lanes": (
        dict(x=values(32), block=[32, 1, 1]),
        lambda x: torch.cat([x[:16].view(8, 2).flip(1).flatten(), x[16:]]),
    ),
    "shuffle_with_returned_lanes": (
        dict(x=torch.arange(20.0), block=[32, 1, 1], n=20),
        lambda x: x.sum().expand(20),
    ),
    "shuffle_with_odd_width": (
        dict(x=values(2, 16), block=[32, 1, 1]),
        lambda x: torch.cat([x[:, 1:], x[:, -1:]], dim=1),
    ),
    "last_warp_sum": (dict(x=torch.ones(128), y_shape=[1], block=[128, 1, 1]), lambda _: torch.tensor([4.0])),
    "shift_blocks": (dict(x=values(12), grid=[12, 1, 1]), lambda x: x),
}

# What must be said about the broken twin, by which build. Several texts must all be there.
FAULTS = [
    ("read_past_end", "asan", ["heap-buffer-overflow", "READ of size 4", "kernels_for_tests.cuh"]),
    ("write_past_end", "asan", ["heap-buffer-overflow", "WRITE of size 4", "kernels_for_tests.cuh"]),
    ("vector_copy", "asan", ["misaligned address", "float4', which requires 16 byte alignment", "vector_copy"]),
    ("reverse_dynamic", "asan", ["use-after-poison", "WRITE of size 4", "reverse_dynamic"]),
    ("reverse_dynamic", "plain", ["wrote past its 252 bytes of dynamic shared memory", "shim_kernels.cpp"]),
    ("reverse_static", "asan", ["index 64 out of bounds for type 'float [64]'", "reverse_static"]),
    ("rotate_block", "tsan", ["data race", "rotate_block", "TLS"]),
    ("rotate_twice", "tsan", ["data race", "rotate_twice"]),
    ("rotate_warp", "tsan", ["data race", "rotate_warp"]),
    ("rotate_warp_after_shuffle", "tsan", ["data race", "rotate_warp_after_shuffle"]),
    ("rotate_half_warp", "tsan", ["data race", "rotate_half_warp"]),
    (
        "barrier_in_branch",
        "plain",
        ["not all threads of the block come to the same one", "block (0, 0, 0)", "(31, 0, 0) waits at __syncthreads"],
    ),
    (
        "barrier_after_return",
        "plain",
        ["some threads wait while others have returned", "(63, 0, 0) returned from the kernel"],
    ),
    ("shuffle_outside_mask", "plain", ["reads lane 20, which is not in the mask 0xffff", "block (0, 0, 0), thread ("]),
    ("shuffle_without_own_lane", "plain", ["mask 0xffff, which does not name that lane", "kernels_for_tests.cuh"]),
    ("shuffle_with_missing_lanes", "plain", ["divergent barrier", "__shfl_xor_sync with mask 0xffffffff"]),
    ("shuffle_with_returned_lanes", "plain", ["which has returned or does not exist", "__shfl_xor_sync"]),
    ("shuffle_with_odd_width", "plain", ["expected a width of 1, 2, 4, 8, 16 or 32, got 12"]),
    ("last_warp_sum", "tsan", ["data race", "last_warp_sum"]),
    ("shift_blocks", "tsan", ["data race", "shift_blocks"]),
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kernel", TWINS)
def test_a_correct_kernel_passes(kernel, build):
    inputs, expected = TWINS[kernel]
    if kernel == "barrier_after_return":
        inputs = {**inputs, "y_shape": [64]}
    y = run(kernel, build, **inputs)["y"]
    assert torch.equal(y, expected(inputs.get("x")).reshape(y.shape))


@pytest.mark.parametrize(("kernel", "build", "said"), FAULTS)
def test_a_broken_kernel_is_caught(kernel, build, said):
    inputs, _ = TWINS[kernel]
    if kernel == "barrier_after_return":
        inputs = {**inputs, "n": 40}
    report = failure(f"{kernel}/broken", build, **inputs)
    assert [text for text in said if text not in report] == [], report


def test_an_unaligned_base_is_caught_only_where_it_is_not_looked_at():
    inputs = dict(x=runner.Misaligned(values(256).half(), 2), n=256, block=[32, 1, 1])
    y = run("pack_copy", "asan", **inputs)["y"]
    assert torch.equal(y, inputs["x"].tensor)
    assert "misaligned address" in failure("pack_copy/broken", "asan", **inputs)


@pytest.mark.parametrize("where", ["static", "dynamic"])
def test_shared_memory_holds_garbage_at_the_beginning_of_each_block(where):
    inputs, _ = TWINS[f"accumulate_{where}"]
    assert run(f"accumulate_{where}/broken", **inputs)["y"].isnan().all()


LAST_BLOCK = dict(grid=[6, 1, 1], block=[4, 1, 1], y_shape=[1])


@pytest.mark.parametrize("kernel", ["last_block_sum", "last_block_sum/early fences"])
@pytest.mark.parametrize("build", ["plain", "tsan"])
def test_the_last_block_may_read_what_others_fenced(kernel, build):
    x = values(24)
    results = {run(kernel, build, seed, x=x, **LAST_BLOCK)["y"].item() for seed in range(4)}
    assert len(results) == 1
    torch.testing.assert_close(results.pop(), x.double().sum().item(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["no fence before", "no fence after", "no barrier"])
def test_a_last_block_without_its_fences_is_caught(fault):
    report = failure(f"last_block_sum/{fault}", "tsan", x=values(24), **LAST_BLOCK)
    assert "data race" in report and "last_block_sum" in report


def test_a_result_that_depends_on_the_order_of_blocks_shows():
    x = values(24)
    results = {run("last_block_sum/order", seed=seed, x=x, **LAST_BLOCK)["y"].item() for seed in range(8)}
    assert len(results) > 1


MATRICES = {
    "matrix/16x16x16/f16/row/row/f32": (torch.float16, True, True, torch.float32),
    "matrix/16x16x16/f16/col/row/f16": (torch.float16, False, True, torch.float16),
    "matrix/32x8x16/bf16/col/col/f32": (torch.bfloat16, False, False, torch.float32),
    "matrix/8x32x16/bf16/row/row/f32": (torch.bfloat16, True, True, torch.float32),
}


def stored(matrix, row_major, padding=0):
    """A matrix as the kernel wants it: rows or columns one after the other, with a gap after each."""
    rows = matrix if row_major else matrix.t()
    gap = torch.full((rows.shape[0], padding), float("nan"), dtype=matrix.dtype)
    return torch.cat([rows, gap], dim=1).contiguous()


@pytest.mark.parametrize("build", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("row_major", [True, False])
@pytest.mark.parametrize("kernel", MATRICES)
def test_fragments_multiply_matrices(kernel, row_major, build):
    dtype, row_a, row_b, sums = MATRICES[kernel]
    rows, columns, depth, padding = 32, 32, 48, 16
    a, b, c = (0.25 * values(*s) for s in ((rows, depth), (depth, columns), (rows, columns)))
    a, b, c = a.to(dtype), b.to(dtype), c.to(sums)
    out = run(
        kernel,
        build,
        a=stored(a, row_a, padding),
        b=stored(b, row_b, padding),
        c=stored(c, row_major),
        rows=rows,
        columns=columns,
        depth=depth,
        padding=padding,
        row_major=int(row_major),
    )["d"]
    expected = 2 * (a.double() @ b.double() + c.double())
    got = out if row_major else out.t()
    tolerance = 1e-5 if sums == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


TILE = dict(block=[32, 1, 1], y_shape=[16, 16])


def test_a_tile_goes_through_a_fragment_unchanged():
    x = values(16, 16)
    assert torch.equal(run("tile_copy", x=x, **TILE)["y"], x)
    assert run("tile_copy/not filled", x=x, **TILE)["y"].isnan().all()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("pointer", "expected a pointer aligned to 32 bytes, got one 16 bytes past"),
        ("leading", "expected a leading dimension that is a multiple of 4 elements, got 18"),
        ("different pointers", "come with different pointers"),
        ("missing lanes", "some lanes of the warp have returned"),
    ],
)
def test_a_tile_that_a_gpu_would_not_load_is_caught(fault, said):
    report = failure(f"tile_copy/{fault}", "plain", x=values(20, 16), **TILE)
    assert f"load_matrix_sync: {said}" in report or ("load_matrix_sync" in report and said in report)


@pytest.mark.parametrize("sizes", [dict(block=[2048, 1, 1]), dict(block=[8, 1, 65]), dict(grid=[0, 1, 1])])
def test_a_launch_that_no_gpu_does_is_refused(sizes):
    assert "no GPU launches a grid of" in failure(
        "add_one" if "grid" in sizes else "rotate_block", "plain", x=values(1), **sizes
    )


def test_more_dynamic_shared_memory_than_a_block_has_is_refused():
    inputs, _ = TWINS["reverse_dynamic"]
    report = failure("reverse_dynamic", "plain", **{**inputs, "dynamic_bytes": 228 << 10})
    assert "more dynamic shared memory than a block can have" in report


def test_a_driver_that_asks_for_what_the_case_has_not_says_so():
    assert "the case has no operand" in failure("shuffles/4", "plain", values=values(32), width=32)


def test_arrays_keep_their_layout_and_type(tmp_path):
    tensors = {
        "a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "b": torch.randn(3, 4).t().bfloat16(),
        "c": torch.arange(5, dtype=torch.uint8),
        "d": torch.empty(0, 3, dtype=torch.int32),
        "e": torch.randn(10)[3:7].double(),
    }
    decoded = runner._decode(runner._encode(tensors))
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype and torch.equal(decoded[name], tensor)
        assert decoded[name].stride() == tensor.stride()
    with pytest.raises(ValueError, match="expected a dense tensor"):
        runner._encode({"x": torch.randn(4, 4)[:, :2]})
    with pytest.raises(ValueError, match="expected one of"):
        runner._encode({"x": torch.zeros(2, dtype=torch.complex64)})


def test_a_machine_without_cuda_headers_gets_told(monkeypatch, tmp_path):
    monkeypatch.setattr(runner.Path, "is_file", lambda self: False)
    with pytest.raises(runner.BuildError, match="no CUDA headers were found"):
        runner.cuda_headers.__wrapped__()


def test_a_machine_without_a_compiler_gets_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(runner.BuildError, match="no-such-compiler was not found"):
        runner._compiler()


def test_a_source_is_compiled_again_only_when_what_it_includes_has_changed(tmp_path):
    source, header = tmp_path / "part.cpp", tmp_path / "value.h"
    source.write_text('#include "value.h"\nint value() { return VALUE; }\n')

    def compiled(value):
        header.write_text(f"#define VALUE {value}\n")
        return runner._object(runner._compiler(), source, [f"-I{tmp_path}"])

    first, second = compiled(1), compiled(2)
    assert first != second and first.read_bytes() != second.read_bytes()
    made = first.stat().st_ino
    assert compiled(1) == first and first.stat().st_ino == made


def test_what_does_not_compile_is_reported_with_the_compilers_words(tmp_path):
    with pytest.raises(runner.BuildError, match="there is no driver"):
        runner.build("no_such_driver")
    with pytest.raises(runner.BuildError, match="expected build to be one of"):
        runner.build(DRIVER, "fast")
    with pytest.raises(runner.BuildError, match="there is no folder"):
        runner.build(DRIVER, sources_override=tmp_path / "missing")
