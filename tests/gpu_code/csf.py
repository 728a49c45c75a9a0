"""csf on the maps of stages 1 to 3 at 512 x 1024, which allow wide accesses, and on those that do not."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

STAGE_1 = (8, 64, 128, 256, 64, 128)  # batch, channels, sizes of z and of y
ODD = (2, 63, 127, 255, 64, 128)
RATIO = (2, 63, 100, 101, 33, 47)
TYPES = ("float", "__nv_bfloat16", "__half")


def _cuda():
    for compute in ("float", "double"):
        yield Cuda(f"csf_attention_kernel<{compute}>")
        yield Cuda(f"csf_attention_backward_kernel<{compute}>")
    for kernel in ("reduce", "fuse", "backward_reduce", "apply"):
        for channels_last in (False, True):
            layout = str(channels_last).lower()
            for storage in ("double", *TYPES):
                yield Cuda(f"csf_{kernel}_kernel<{storage}, false, {layout}>")
            for storage in TYPES:
                yield Cuda(f"csf_{kernel}_kernel<{storage}, true, {layout}>", _wide(kernel, channels_last))


def _wide(kernel, channels_last):
    """What a thread has under way of each map, z or G or both and in channels-last y, and what it writes."""
    if kernel == "reduce":
        return Wide(4 + channels_last)
    if kernel == "fuse":
        return Wide(4, 2 if channels_last else 4)
    if kernel == "backward_reduce":
        return Wide(3 if channels_last else 4)
    return Wide(2 if channels_last else 4, 2)


def _launch(sizes, layout, types=("bfloat16", "bfloat16"), norm=3, small="float32", affine=True):
    """Forward and backward with everything wanted: batch, channels, sizes of z and of y; dtypes of z and of y."""
    import torch
    from transkd_fast.kernels import csf

    def empty(*shape, dtype=small):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def maps(dtype, *shape):
        memory_format = getattr(torch, layout)
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=memory_format)

    batch, channels, height, width, coarse_height, coarse_width = sizes
    squeezed, parts = 32, 8
    z, grad = (maps(types[0], batch, channels, height, width) for _ in range(2))
    y = maps(types[1], batch, channels, coarse_height, coarse_width)
    bn, fc_bn = ([empty(n), empty(n)] if affine else [None, None] for n in (channels, squeezed))
    heads = [empty(channels, squeezed), empty(channels)] * 2
    parameters = [*bn, empty(squeezed, channels), *fc_bn, *heads]
    statistics = [empty(channels), empty(channels), empty(dtype="int64")]
    statistics += [empty(squeezed), empty(squeezed), empty(dtype="int64")]
    sums = csf.csf_reduce(z, y, parts)
    _, state = csf.csf_fuse(z, y, sums, 0, parameters, *statistics, norm, 0.1, 1e-5, norm, 0.1, 1e-5)
    sums = csf.csf_bwd_reduce(grad, z, y, state, parts)
    wanted = [True, True, *(parameter is not None for parameter in parameters)]
    csf.csf_bwd_apply(grad, z, y, sums, state, 0, parameters, norm, norm, wanted)


def _triton():
    # y goes by 8 bytes in NCHW.
    nchw = {"reduce_kernel": Wide(4), "fuse_kernel": Wide(2, 2), "backward_reduce_kernel": Wide(4)}
    channels_last = {"reduce_kernel": Wide(8), "fuse_kernel": Wide(8, 4), "backward_reduce_kernel": Wide(12)}
    nchw["backward_kernel"], channels_last["backward_kernel"] = Wide(4, 2), Wide(8, 5)
    for name, layout, wide in (("nchw", "contiguous_format", nchw), ("channels-last", "channels_last", channels_last)):
        yield Triton(f"stage 1 bf16 {name}", partial(_launch, STAGE_1, layout), wide)
        yield Triton(f"odd sizes {name}", partial(_launch, ODD, layout), archs=(90,))
        yield Triton(f"any ratio {name}", partial(_launch, RATIO, layout), archs=(90,))
    mixed = partial(_launch, STAGE_1, "contiguous_format", ("bfloat16", "float32"), norm=1)
    yield Triton("running statistics, fp32 y", mixed, archs=(90,))
    doubles = partial(_launch, RATIO, "contiguous_format", ("float64", "float64"), small="float64", affine=False)
    yield Triton("fp64, no affine", doubles, archs=(90,))


OP = Op("csf", cuda=tuple(_cuda()), triton=tuple(_triton()))
