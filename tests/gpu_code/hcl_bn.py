"""hcl_bn on the maps of SegFormer-B2 at 512 x 1024, which allow wide accesses, and on odd sizes, which do not."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

MAPS = [(8, 64, 128, 256), (8, 128, 64, 128), (8, 320, 32, 64), (8, 512, 16, 32)]
ODD = (2, 63, 127, 255)
LAYOUTS = ("contiguous_format", "channels_last")
BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
PAIRS = [("float", "float"), ("__nv_bfloat16", "__nv_bfloat16"), ("__half", "__half"), ("__nv_bfloat16", "float")]
SCALAR = ["double", "transkd::hcl_bn::AnyType", *BYTES]


def _cuda():
    for compute in ("float", "double"):
        yield Cuda(f"hcl_bn_statistics_kernel<{compute}>")
        yield Cuda(f"hcl_bn_coefficients_kernel<{compute}>")
    for channels_last in ("false", "true"):
        yield Cuda(f"hcl_bn_reduce_kernel<double, false, {channels_last}>")
        for storage in BYTES:
            yield Cuda(f"hcl_bn_reduce_kernel<{storage}, true, {channels_last}>", Wide(4))
            yield Cuda(f"hcl_bn_reduce_kernel<{storage}, false, {channels_last}>")
        for storage in SCALAR:
            yield Cuda(f"hcl_bn_forward_kernel<{storage}, {storage}, 1, {channels_last}>")
            yield Cuda(f"hcl_bn_backward_kernel<{storage}, {storage}, 1, {channels_last}>")
        for u, teacher in PAIRS:
            # The wider type fills 16 bytes, an access of the narrower one moves fewer; two are under way at a time.
            vector = 16 // max(BYTES[u], BYTES[teacher])
            loads = 2 * sum(BYTES[storage] * vector == 16 for storage in (u, teacher))
            stores = 2 * int(BYTES[u] * vector == 16)
            yield Cuda(f"hcl_bn_forward_kernel<{u}, {teacher}, {vector}, {channels_last}>", Wide(loads))
            yield Cuda(f"hcl_bn_backward_kernel<{u}, {teacher}, {vector}, {channels_last}>", Wide(loads, stores))


def _launch(stages, norms, affine="float32", means=False):
    """All raw ops on stages (shape, dtype of u, dtype of the teacher, layout), of these kinds of normalisation."""
    import torch
    from transkd_fast.kernels import hcl_bn

    from transkd_fast.ops.hcl_bn import kept_shapes, stages_of

    def empty(shape, dtype, layout="contiguous_format"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=getattr(torch, layout))

    us = [empty(shape, dtype, layout) for shape, dtype, _, layout in stages]
    teachers = [empty(shape, dtype, layout) for shape, _, dtype, layout in stages]
    small = [None if affine is None else empty(u.shape[1:2], affine) for u in us for _ in range(2)]
    moments = hcl_bn.hcl_bn_reduce(us, [64, 32, 8, 2][: len(us)])
    moments = [rows if norm != 1 else rows[:0] for rows, norm in zip(moments, norms, strict=True)]
    running = [empty(u.shape[1:2], "float32") for u, norm in zip(us, norms, strict=True) if norm != 2 for _ in range(2)]
    batches = [empty((), "int64") for norm in norms if norm == 3]
    weights = [1.0] * len(us), [0.5, 0.25, 0.125]
    tenths = [0.1] * len(us)
    loss, *flats = hcl_bn.hcl_bn_fwd(us, teachers, moments, small, running, batches, norms, tenths, tenths, *weights)
    kept = [stages_of(flat, shapes) for flat, shapes in zip(flats, kept_shapes(us), strict=True)]
    of_group = [torch.empty_like(state) for state in kept[1]] if means else []
    wanted = [True, affine is not None, affine is not None] * len(us)
    hcl_bn.hcl_bn_bwd(torch.empty_like(loss), us, teachers, *kept, of_group, small, norms, *weights, wanted)


def _triton():
    # Per stage each map is read at least once, and the gradient written, 16 bytes per thread.
    wide = {"reduce_kernel": Wide(4), "sum_kernel": Wide(8), "backward_kernel": Wide(8, 4)}
    for name, layout in zip(("nchw", "channels-last"), LAYOUTS, strict=True):
        usual = [(shape, "bfloat16", "bfloat16", layout) for shape in MAPS]
        yield Triton(f"stages 1-4 bf16 {name}", partial(_launch, usual, [3] * 4), wide, archs=(90,))
    wide = {"reduce_kernel": Wide(2), "sum_kernel": Wide(4), "backward_kernel": Wide(4, 2)}
    both = [(MAPS[0], "bfloat16", "bfloat16", layout) for layout in LAYOUTS]
    yield Triton("bf16, nchw and channels-last", partial(_launch, both, [3, 3]), wide, archs=(80, 100))
    # Of a mixed pair only the wider type fills 16 bytes.
    pairs = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
    types = [(MAPS[0], u, teacher, LAYOUTS[m % 2]) for m, (u, teacher) in enumerate(pairs)]
    wide = {"reduce_kernel": Wide(4), "sum_kernel": Wide(6), "backward_kernel": Wide(6, 3)}
    call = partial(_launch, types, [1, 2, 3, 3], affine="bfloat16", means=True)
    yield Triton("fp32, fp16, bf16-fp32, fp32-bf16", call, wide, archs=(90,))
    double = [(MAPS[1], "float64", "float64", layout) for layout in LAYOUTS]
    yield Triton("fp64", partial(_launch, double, [3, 2], affine="float64"), archs=(90,))
    # Sizes of 1 are constants to Triton, and with them loops and levels fall away.
    edge = [((1, 1, 1, 1), "contiguous_format"), ((2, 3, 1, 9), "channels_last")]
    edge = [(shape, "float32", "float32", layout) for shape, layout in edge]
    yield Triton("edge sizes", partial(_launch, edge, [1, 3], affine=None), archs=(90,))
    odd = [(ODD, "bfloat16", "bfloat16", layout) for layout in LAYOUTS]
    yield Triton("odd sizes, nchw and channels-last", partial(_launch, odd, [3, 3]), archs=(90,))


OP = Op("hcl_bn", cuda=tuple(_cuda()), triton=tuple(_triton()))
