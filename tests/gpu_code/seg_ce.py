"""seg_ce for every ratio of labels to logits: storage types and layouts share their kernels."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

REAL = (8, 19, 128, 256), (512, 1024)  # of SegFormer's logits, and of their labels


def _cuda():
    for compute, sides in (("float", (1, 2, 4)), ("double", (1, 2))):
        yield Cuda(f"seg_ce_weights_kernel<{compute}>")
        yield Cuda(f"seg_ce_finish_kernel<{compute}>")
        for side in sides:
            yield Cuda(f"seg_ce_forward_kernel<{side}, {compute}>")
            yield Cuda(f"seg_ce_predict_kernel<{side}, {compute}>")
    # Four units of 16 bytes that are stored; of floats to halves two are read for each.
    for compute, storage, loads in (("double", "double", 4), ("float", "float", 4), ("float", "__half", 8)):
        yield Cuda(f"seg_ce_scale_kernel<{compute}, {storage}>", Wide(loads, 4))
    yield Cuda("seg_ce_scale_kernel<float, __nv_bfloat16>", Wide(8, 4))


def _launch(shape, size, dtype="bfloat16", labels="int64", channels_last=False, weighted=True):
    """Forward, backward and prediction."""
    import torch
    from transkd_fast.kernels import seg_ce

    logits = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    indices = torch.empty((shape[0], *size), dtype=getattr(torch, labels), device="meta")
    weight = torch.empty(shape[1], dtype=torch.float32, device="meta") if weighted else None
    loss, _, total, kept = seg_ce.seg_ce_fwd(logits, indices, weight, 255, True)
    code = ("float32", "float16", "bfloat16", "float64").index(dtype)
    seg_ce.seg_ce_bwd(torch.empty_like(loss), total, kept, code)
    seg_ce.seg_ce_predict(logits, *size)


def _triton():
    # Labels, and what is kept; logits are read between their pixels, by each thread its own.
    wide = {"loss_kernel": Wide(2, 2), "finish_kernel": Wide(2, 2), "predict_kernel": Wide(0, 2)}
    yield Triton("19 classes bf16", partial(_launch, *REAL), wide | {"scale_kernel": Wide(4, 2)})
    channels_last = partial(_launch, *REAL, labels="uint8", channels_last=True, weighted=False)
    yield Triton("19 classes bf16 channels-last", channels_last, archs=(90,))
    yield Triton("150 classes fp32", partial(_launch, (8, 150, 128, 128), (512, 512), "float32"), archs=(90,))
    yield Triton("19 classes fp64", partial(_launch, *REAL, "float64"), archs=(90,))
    yield Triton("same size", partial(_launch, REAL[0], REAL[0][2:], "float16"), archs=(90,))
    yield Triton("smaller odd sizes", partial(_launch, (2, 3, 33, 65), (21, 50), "float32", "int32"), archs=(90,))


OP = Op("seg_ce", cuda=tuple(_cuda()), triton=tuple(_triton()))
