"""Triton kernels with the faults that the gates must find, and a sound one. They are compiled, never run."""

import triton
import triton.language as tl


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def stack_frame(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    index = tl.load(x + at)
    written: tl.constexpr = """{
        .local .align 4 .b32 kept[64];
        .reg .b64 base, place;
        .reg .b32 offset;
        mov.u64 base, kept;
        and.b32 offset, $1, 63;
        mad.wide.u32 place, offset, 4, base;
        st.local.u32 [place], $1;
        ld.local.u32 $0, [base + 8];
    }"""
    tl.store(y + at, tl.inline_asm_elementwise(written, "=r,r", [index], tl.int32, is_pure=True, pack=1))


@triton.jit
def spill(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    sums = tl.load(x + at)
    for k in range(n):
        sums = sums * tl.load(x + k) + k
    tl.store(y + at, sums)


@triton.jit
def product(x, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile, input_precision=PRECISION))
