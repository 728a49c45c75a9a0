"""cwd on the maps of SegFormer-B2 at 512 x 1024 and their class scores, along both axes, and on views of odd sizes."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

MAPS = [(8, 64, 32768), (8, 128, 8192), (8, 320, 2048), (8, 512, 512)]
SCORES = (8, 19, 32768)
ODD = (2, 63, 32385)
BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
PAIRS = [("float", "float"), ("__nv_bfloat16", "__nv_bfloat16"), ("__half", "__half"), ("__nv_bfloat16", "float")]


def _turned(shape):
    batch, rows, columns = shape
    return batch, columns, rows


def _launch(stages):
    """Forward and backward of stages (shape, axis, dtype of the student, dtype of the teacher)."""
    import torch
    from transkd_fast.kernels import cwd

    students, teachers = (
        [torch.empty(shape, dtype=getattr(torch, dtypes[which]), device="meta") for shape, _, *dtypes in stages]
        for which in (0, 1)
    )
    settings = [dim for _, dim, *_ in stages], [1.0] * len(stages), 2.0
    loss, statistics = cwd.cwd_fwd(students, teachers, *settings)
    cwd.cwd_bwd(torch.empty_like(loss), students, teachers, statistics, *settings)


def _cuda():
    yield Cuda("cwd_merge_kernel<float>")
    yield Cuda("cwd_merge_kernel<double>")
    for strided in ("false", "true"):
        yield Cuda(f"cwd_forward_kernel<double, double, 1, {strided}>")
        yield Cuda(f"cwd_backward_kernel<double, double, 1, {strided}>")
        for student, teacher in PAIRS:
            # The wider type fills 16 bytes; an access of the narrower one then moves fewer.
            vector = 16 // max(BYTES[student], BYTES[teacher])
            loads = sum(BYTES[storage] * vector == 16 for storage in (student, teacher))
            stores = int(BYTES[student] * vector == 16)
            for width, forward, backward in ((vector, Wide(loads), Wide(loads, stores)), (1, Wide(), Wide())):
                arguments = f"<{student}, {teacher}, {width}, {strided}>"
                yield Cuda(f"cwd_forward_kernel{arguments}", forward)
                yield Cuda(f"cwd_backward_kernel{arguments}", backward)


def _triton():
    # Per stage each view is read at least once, and the gradient written, 16 bytes per thread; halves along the strided
    # axis come 8 bytes at a time.
    of_rows = {"part_kernel": Wide(8), "backward_kernel": Wide(8, 4)}
    for name, dim, turn, wide in (("nchw", 2, tuple, of_rows), ("channels-last", 1, _turned, {})):
        usual = [(turn(shape), dim, "bfloat16", "bfloat16") for shape in MAPS]
        yield Triton(f"stages 1-4 bf16 {name}", partial(_launch, usual), wide)
    pairs = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")]
    for dim, shape, count in ((2, MAPS[0], 5), (1, _turned(MAPS[0]), 3)):
        # Of a mixed pair only the wider type fills 16 bytes.
        types = [(shape, dim, student, teacher) for student, teacher in pairs]
        wide = {"part_kernel": Wide(count), "backward_kernel": Wide(count, count // 2)}
        yield Triton(f"fp32, fp16, bf16-fp32, axis {dim}", partial(_launch, types), wide, archs=(90,))
    scores = [(SCORES, 1, "float32", "bfloat16"), (_turned(SCORES), 2, "float32", "bfloat16")]
    yield Triton("scores of both layouts", partial(_launch, scores), archs=(90,))
    odd = [(shape, dim, "bfloat16", "bfloat16") for dim in (2, 1) for shape in (ODD, (1, 1, 1))]
    yield Triton("odd sizes", partial(_launch, odd), archs=(90,))
    double = [(shape, dim, "float64", "float64") for dim, shape in ((2, MAPS[3]), (1, SCORES))]
    yield Triton("fp64", partial(_launch, double), archs=(90,))


OP = Op("cwd", cuda=tuple(_cuda()), triton=tuple(_triton()))
