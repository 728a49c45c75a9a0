"""gl_mixer on embed 4 at 512 x 1024, which allows wide accesses, and on channels that do not."""

from functools import partial

from gpu_code.declare import Cuda, Op, Triton, Wide

REAL = (8, 512, 256)  # batch, tokens, channels
SMALL_BATCH = (2, 512, 256)
ODD = (3, 45, 66)
PRODUCTS = ("mix_kernel", "products_kernel")


def _cuda():
    for vectors in ("true", "false"):
        yield Cuda(f"gl_mixer_merge_kernel<float, {vectors}>", Wide(1, 1) if vectors == "true" else Wide())
        for storage in ("float", "__nv_bfloat16", "__half"):
            # A float branch of eight halves is twice 16 bytes.
            gate = Wide(1 + 2 * width(storage), 2 + width(storage)) if vectors == "true" else Wide()
            yield Cuda(f"gl_mixer_gate_kernel<{storage}, {vectors}>", gate)
            for tf32 in ("false", "true") if storage == "float" else ("false",):
                arguments = f"<{storage}, {vectors}, {tf32}>"
                tensor_cores = storage != "float" or tf32 == "true"
                wide = vectors == "true"
                # Three rows and three taps of weights, on the way to the first product and to all others.
                forward = Wide(2 * (3 + 3), 1 + 2 * width(storage)) if wide else Wide()
                gradients = Wide(2 * (6 + 3) + 2 * (4 + 6), 3) if wide else Wide()
                yield Cuda(f"gl_mixer_forward_kernel{arguments}", forward, tensor_cores)
                yield Cuda(f"gl_mixer_gradients_kernel{arguments}", gradients, tensor_cores)
    yield Cuda("gl_mixer_gate_kernel<double, false>")
    yield Cuda("gl_mixer_forward_kernel<double, false, false>")
    yield Cuda("gl_mixer_gradients_kernel<double, false, false>")
    yield Cuda("gl_mixer_merge_kernel<double, false>")


def width(storage):
    """Vectors of 16 bytes that the floats to one vector of elements fill."""
    return 1 if storage == "float" else 2


def _launch(sizes, dtype="float32", parameters="float32", tf32=False):
    """Forward and backward with everything wanted."""
    import torch
    from transkd_fast.kernels import gl_mixer

    def empty(*shape, dtype=parameters):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    channels = sizes[2]
    e, u, grad = (empty(*sizes, dtype=dtype) for _ in range(3))
    convolution = empty(channels, channels, 3), empty(channels)
    arguments = e, u, *convolution, *convolution, empty(1), empty(1)
    _, branches = gl_mixer.gl_mixer_fwd(*arguments, True, True, tf32)
    gl_mixer.gl_mixer_bwd(grad, e, u, branches, *arguments[2:], True, [True] * 8, tf32)


def _triton():
    # Loads: three shifted rows and three vectors of four columns of both weights, and in the epilogue u and e.
    wide = {"mix_kernel": Wide(17, 12), "gate_backward_kernel": Wide(6, 3), "products_kernel": Wide(24, 12)}
    amp = partial(_launch, REAL, "bfloat16")
    yield Triton("bf16, fp32 weights", amp, wide, tensor_cores=PRODUCTS)
    small = partial(_launch, SMALL_BATCH, "float16", "float16")
    yield Triton("fp16, batch 2", small, {"mix_kernel": Wide(5, 5)}, archs=(90,), tensor_cores=PRODUCTS)
    yield Triton("tf32", partial(_launch, REAL, tf32=True), wide, archs=(90,), tensor_cores=PRODUCTS)
    yield Triton("fp32, odd sizes", partial(_launch, ODD), archs=(90,))
    yield Triton("fp64", partial(_launch, SMALL_BATCH, "float64", "float64"), archs=(80,))


OP = Op("gl_mixer", cuda=tuple(_cuda()), triton=tuple(_triton()))
