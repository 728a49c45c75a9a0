"""hcl on the maps of SegFormer-B2 at 512 x 1024, which allow wide accesses, and on maps of odd sizes, which do not."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

MAPS = [(8, 64, 128, 256), (8, 128, 64, 128), (8, 320, 32, 64), (8, 512, 16, 32)]
ODD = (2, 63, 127, 255)
BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
PAIRS = [("float", "float"), ("__nv_bfloat16", "__nv_bfloat16"), ("__half", "__half"), ("__nv_bfloat16", "float")]


def _cuda():
    for channels_last in ("false", "true"):
        yield Cuda(f"hcl_forward_kernel<double, double, 1, {channels_last}>")
        yield Cuda(f"hcl_backward_kernel<double, double, 1, {channels_last}>")
        for student, teacher in PAIRS:
            # The wider type fills 16 bytes; an access of the narrower one then moves fewer.
            vector = 16 // max(BYTES[student], BYTES[teacher])
            loads = sum(BYTES[storage] * vector == 16 for storage in (student, teacher))
            stores = int(BYTES[student] * vector == 16)
            for width, forward, backward in ((vector, Wide(loads), Wide(loads, stores)), (1, Wide(), Wide())):
                arguments = f"<{student}, {teacher}, {width}, {channels_last}>"
                yield Cuda(f"hcl_forward_kernel{arguments}", forward)
                yield Cuda(f"hcl_backward_kernel{arguments}", backward)


def _launch(stages):
    """Forward and backward of stages (shape, dtype of the student, dtype of the teacher, layout)."""
    import torch
    from transkd_fast.kernels import hcl

    def empty(shape, dtype, layout):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=getattr(torch, layout))

    students = [empty(shape, dtype, layout) for shape, dtype, _, layout in stages]
    teachers = [empty(shape, dtype, layout) for shape, _, dtype, layout in stages]
    weights = [1.0] * len(stages), [0.5, 0.25, 0.125]
    loss, tables = hcl.hcl_fwd(students, teachers, *weights)
    hcl.hcl_bwd(torch.empty_like(loss), students, teachers, tables, *weights)


def _triton():
    odd = []
    for name, layout in (("nchw", "contiguous_format"), ("channels-last", "channels_last")):
        # Per stage each map is read at least once, and the gradient written, 16 bytes per thread.
        usual = [(shape, "bfloat16", "bfloat16", layout) for shape in MAPS]
        wide = {"sum_kernel": Wide(8), "backward_kernel": Wide(8, 4)}
        yield Triton(f"stages 1-4 bf16 {name}", partial(_launch, usual), wide)
        # Of a mixed pair only the wider type fills 16 bytes.
        pairs = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")]
        types = [(MAPS[0], student, teacher, layout) for student, teacher in pairs]
        wide = {"sum_kernel": Wide(5), "backward_kernel": Wide(5, 2)}
        yield Triton(f"fp32, fp16, bf16-fp32 {name}", partial(_launch, types), wide, archs=(90,))
        odd.append((ODD, "bfloat16", "bfloat16", layout))
    # Sizes of 1 are constants to Triton, and with them loops and levels fall away.
    edge = [((1, 1, 1, 1), "contiguous_format"), ((2, 3, 1, 9), "channels_last"), ((2, 3, 9, 1), "contiguous_format")]
    edge = [(shape, "float32", "float32", layout) for shape, layout in [*edge, ((2, 3, 3, 4), "channels_last")]]
    yield Triton("edge sizes", partial(_launch, edge), archs=(90,))
    yield Triton("odd sizes, nchw and channels-last", partial(_launch, odd), archs=(90,))


OP = Op("hcl", cuda=tuple(_cuda()), triton=tuple(_triton()))
