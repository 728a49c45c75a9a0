"""Sound and faulty kernels: the tests see every gate fail on them."""

from gpu_code.declare import Cuda, Op, Triton, Wide

LOADS_AND_STORES = Wide(loads=1, stores=1)


def _launch(kernel, dtype="float32", **arguments):
    import torch

    from gpu_code import planted_kernels

    x, y = (torch.empty(16384, dtype=getattr(torch, dtype), device="meta") for _ in range(2))
    getattr(planted_kernels, kernel)[(1,)](x, y, **arguments)


def _product(dtype, precision="ieee", size=64):
    _launch("product", dtype, SIZE=size, PRECISION=precision)


OP = Op(
    "planted",
    header="tests/gpu_code/planted.cuh",
    cuda=(
        Cuda("copy<4>", LOADS_AND_STORES),
        Cuda("copy<1>", LOADS_AND_STORES),
        Cuda("stack_frame"),
        Cuda("spill"),
        Cuda("product<__nv_bfloat16, false>", tensor_cores=True),
        Cuda("product<float, true>", tensor_cores=True),
        Cuda("product<float, false>", tensor_cores=True),
    ),
    triton=(
        Triton("aligned", lambda: _launch("copy", n=4096, BLOCK=1024), {"copy": LOADS_AND_STORES}),
        Triton("unaligned", lambda: _launch("copy", n=4095, BLOCK=1024), {"copy": LOADS_AND_STORES}),
        Triton("index", lambda: _launch("stack_frame", "int32", BLOCK=128)),
        Triton("tile", lambda: _launch("spill", n=9, BLOCK=4096, maxnreg=32)),
        Triton("bf16", lambda: _product("bfloat16"), tensor_cores=("product",)),
        Triton("tf32", lambda: _product("float32", "tf32"), tensor_cores=("product",)),
        Triton("fp32", lambda: _product("float32", size=16), tensor_cores=("product",)),
    ),
)
