"""pea on the stages of SegFormer-B0 to B2 at 512 x 1024, whose rows allow wide accesses, and on odd sizes."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

STAGES = ((8, 32768, 32, 64), (8, 8192, 64, 128), (8, 2048, 160, 320), (8, 512, 256, 512))
ODD = ((2, 45, 66, 161),)
BF16 = ("bfloat16", "float32", "bfloat16")  # of activations, parameters and target

OPERANDS = (("__nv_bfloat16", False), ("__half", False), ("float", True), ("float", False), ("double", False))


def _cuda():
    for compute in ("float", "double"):
        yield Cuda(f"pea_finish_kernel<{compute}>")
        # Four units of eight elements.
        yield Cuda(f"pea_scale_kernel<{compute}>", Wide(8, 8))
    for operand, tf32 in OPERANDS:
        arguments = f"<{operand}, {str(tf32).lower()}>"
        tensor_cores = tf32 or operand in ("__nv_bfloat16", "__half")
        # Two units of each tile: x, weight, target and assistant, or residuals; dx and the residual.
        yield Cuda(f"pea_project_kernel{arguments}", Wide(8, 4), tensor_cores)
        yield Cuda(f"pea_gradient_kernel{arguments}", Wide(8, 2), tensor_cores)


def _launch(stages, dtypes=BF16, assisted=False, maps=(False, False), wanted=(True,) * 3, tf32=False):
    """Forward and backward; maps: whether x and target are views of maps."""
    import torch
    from transkd_fast.kernels import pea

    stored, small, of_target = (getattr(torch, dtype) for dtype in dtypes)

    def empty(*shape, dtype=small):
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(batch, length, channels, dtype, is_map):
        if is_map:
            return empty(batch, channels, length, dtype=dtype).transpose(1, 2)
        return empty(batch, length, channels, dtype=dtype)

    xs = [tokens(batch, length, c_in, stored, maps[0]) for batch, length, c_in, _ in stages]
    targets, assistants = (
        [tokens(batch, length, c_out, of_target, is_map) for batch, length, _, c_out in stages]
        for is_map in (maps[1], False)
    )
    weights = [empty(c_out, c_in) for _, _, c_in, c_out in stages]
    biases = [empty(c_out) for _, _, _, c_out in stages]
    scales = [empty(1) for _ in stages] if assisted else []
    flags = [*wanted, *(False, *[assisted] * 3)] if wanted else [False] * 7
    loss, factors, kept = pea.pea_fwd(
        xs,
        weights,
        biases,
        targets,
        assistants if assisted else [],
        scales,
        scales,
        [1.0] * len(stages),
        flags * len(stages),
        tf32,
    )
    if wanted:
        codes = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
        stored, small, of_target = (codes[dtype] for dtype in dtypes)
        of_scales = codes["float64" if dtypes[0] == "float64" else "float32"]
        of_stage = [stored, small, small, -1, *([of_target, of_scales] if assisted else [-1, -1])]
        pea.pea_bwd(torch.empty_like(loss), factors, kept, of_stage * len(stages))


def _triton():
    # Every stage reads x, weight and target, and writes dx and the weight's partial sums, by 16 bytes.
    wide = {"stage_kernel": Wide(8, 4), "finish_kernel": Wide(4), "scale_kernel": Wide(4, 4)}
    yield Triton("stages 1-4 bf16", partial(_launch, STAGES), wide)
    maps = partial(_launch, STAGES[1:3], maps=(True, True))
    yield Triton("stages 2-3 bf16 maps", maps, {"stage_kernel": Wide(8, 4)}, archs=(90,))
    yield Triton("stages 1-2 bf16 loss only", partial(_launch, STAGES[:2], wanted=()), archs=(90,))
    yield Triton("stage 2 bf16 assisted", partial(_launch, STAGES[1:2], assisted=True), archs=(90,))
    single = partial(_launch, STAGES[2:3], ("float32",) * 3)
    yield Triton("stage 3 fp32", single, archs=(90,))
    yield Triton("stage 3 tf32", partial(single, tf32=True), archs=(90,))
    half = partial(_launch, STAGES[1:2], ("float16", "float32", "float32"), maps=(False, True))
    yield Triton("stage 2 fp16, fp32 map", half, archs=(90,))
    yield Triton("stage 1 fp64", partial(_launch, STAGES[:1], ("float64",) * 3, assisted=True), archs=(90,))
    yield Triton("odd sizes", partial(_launch, ODD), archs=(90,))


OP = Op("pea", cuda=tuple(_cuda()), triton=tuple(_triton()))
