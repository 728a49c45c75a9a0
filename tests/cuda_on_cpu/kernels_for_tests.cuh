// Small kernels for test_shim.py: what the shim must compute, and planted faults beside their correct twins.
#pragma once

#include <mma.h>

#include <cstdint>
#include <type_traits>

namespace shim_kernels {

constexpr unsigned kAll = 0xffffffffu;

__constant__ int table[4] = {2, 3, 5, 7};

// Per thread: its place, packed; once for every thread of the grid.
__global__ void places(int* __restrict__ out) {
  const dim3 size = blockDim;
  const unsigned in_block = threadIdx.x + size.x * (threadIdx.y + size.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* mine = out + (block * size.x * size.y * size.z + in_block) * 6;
  mine[0] = threadIdx.x;
  mine[1] = threadIdx.y;
  mine[2] = threadIdx.z;
  mine[3] = blockIdx.x;
  mine[4] = blockIdx.y;
  mine[5] = blockIdx.z;
}

struct Parameters {
  float scale;
  int64_t n;
};

__host__ __device__ __forceinline__ float scaled(float x, const Parameters& parameters) { return x * parameters.scale; }

template <typename T>
__global__ void __launch_bounds__(128)
    keywords(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ Parameters parameters) {
  __shared__ T staged[128];
#pragma unroll
  for (int64_t i = threadIdx.x; i < parameters.n; i += blockDim.x) {
    staged[threadIdx.x] = __ldg(x + i);
    __syncwarp();
    __stcs(y + i, static_cast<T>(scaled(static_cast<float>(staged[threadIdx.x]), parameters)) + T(table[i % 4]));
  }
}

template <typename T>
__global__ void shuffles(const T* __restrict__ x, T* __restrict__ out, int operand, int width) {
  const int i = threadIdx.x;
  const T value = x[i];
  const int n = blockDim.x;
  out[i] = __shfl_sync(kAll, value, operand, width);
  out[n + i] = __shfl_up_sync(kAll, value, operand, width);
  out[2 * n + i] = __shfl_down_sync(kAll, value, operand, width);
  out[3 * n + i] = __shfl_xor_sync(kAll, value, operand, width);
}

// Two halves of a warp that shuffle a different number of times, each with its own mask.
__global__ void half_warps(const float* __restrict__ x, float* __restrict__ out) {
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  float sum = x[threadIdx.x];
  for (int repeat = 0; repeat < (threadIdx.x < 16 ? 1 : 3); ++repeat) {
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(mask, sum, d);
  }
  out[threadIdx.x] = sum;
}

__global__ void votes(const int* __restrict__ x, int* __restrict__ out) {
  const int i = threadIdx.x;
  const int value = x[i];
  int* mine = out + i * 8;
  mine[7] = static_cast<int>(__activemask());
  mine[0] = static_cast<int>(__ballot_sync(kAll, value > 0));
  mine[1] = __any_sync(kAll, value > 2);
  mine[2] = __all_sync(kAll, value > 0);
  mine[3] = static_cast<int>(__match_any_sync(kAll, value));
  mine[4] = __syncthreads_count(value > 0);
  mine[5] = __syncthreads_and(value >= 0);
  mine[6] = __syncthreads_or(value > 3);
}

struct Totals {
  float real;
  int sum, minimum, maximum, exchanged, compared, orred;
  unsigned wrapped, count_down;
  unsigned long long large;
  double precise;
};

__global__ void atomics(Totals* totals) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&totals->real, 0.5f);
  atomicAdd(&totals->precise, 0.25);
  atomicAdd(&totals->sum, i);
  atomicAdd(&totals->large, 1ull << 33);
  atomicMin(&totals->minimum, -i);
  atomicMax(&totals->maximum, i);
  atomicOr(&totals->orred, 1 << (i % 8));
  atomicInc(&totals->wrapped, 9u);
  atomicDec(&totals->count_down, 6u);
  atomicExch(&totals->exchanged, 42);
  atomicCAS(&totals->compared, 0, i + 1);
}

__global__ void arithmetic(const float* __restrict__ x, float* __restrict__ out) {
  const float value = x[threadIdx.x];
  float* mine = out + threadIdx.x * 12;
  mine[0] = rsqrtf(fabsf(value));
  mine[1] = __expf(value);
  mine[2] = fmaf(value, value, 1.0f);
  mine[3] = static_cast<float>(__float2int_rn(value));
  mine[4] = static_cast<float>(__float2int_rz(value));
  mine[5] = __half2float(__float2half_rn(value));
  mine[6] = __bfloat162float(__float2bfloat16_rn(value));
  mine[7] = max(value, 0.5f) + min(static_cast<float>(threadIdx.x), 3.0f);
  const float2 pair = __half22float2(__floats2half2_rn(value, -value));
  mine[8] = pair.x - pair.y;
  const float2 wide = __bfloat1622float2(__floats2bfloat162_rn(value, 1.0f));
  mine[9] = wide.x + wide.y;
  mine[10] = __uint_as_float(__float_as_uint(value) ^ 0x80000000u);
  const float4 four = make_float4(value, 1.0f, 2.0f, 3.0f);
  const int2 two = make_int2(__popc(7u), __clz(1));
  mine[11] = four.x + four.w + static_cast<float>(two.x + two.y);
}

// In which order blocks, and threads between two barriers, really run.
__global__ void orders(int* counter, int* __restrict__ blocks, int* __restrict__ threads) {
  __shared__ int arrived;
  if (threadIdx.x == 0) {
    blocks[atomicAdd(counter, 1)] = blockIdx.x;
    arrived = 0;
  }
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    const int place = atomicAdd(&arrived, 1);
    threads[blockIdx.x * 2 * blockDim.x + place] = threadIdx.x;
    __syncthreads();
  }
}

template <bool kBroken>
__global__ void read_past_end(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + (kBroken ? 1 : 0)];
}

template <bool kBroken>
__global__ void write_past_end(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = i < n ? x[i] : 0.0f;
  if (kBroken ? i <= n : i < n) y[i] = value;
}

template <bool kBroken>
__global__ void vector_copy(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int shift = kBroken ? 1 : 0;
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x) + shift;
  if (i + 4 <= n) *reinterpret_cast<float4*>(y + i - shift) = *reinterpret_cast<const float4*>(x + i);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

// The base address decides whether 16-byte accesses are allowed; the broken one does not look.
template <bool kBroken>
__global__ void pack_copy(const __half* __restrict__ x, __half* __restrict__ y, int n) {
  using Vector = Pack<__half, 8>;
  const int i = threadIdx.x;
  if (kBroken || reinterpret_cast<uintptr_t>(x) % sizeof(Vector) == 0) {
    if (8 * i + 8 <= n) reinterpret_cast<Vector*>(y)[i] = reinterpret_cast<const Vector*>(x)[i];
  } else {
    for (int j = 8 * i; j < min(8 * i + 8, n); ++j) y[j] = x[j];
  }
}

template <bool kBroken>
__global__ void reverse_dynamic(const float* __restrict__ x, float* __restrict__ y) {
  extern __shared__ __align__(16) float dynamic[];
  dynamic[threadIdx.x + (kBroken ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = dynamic[blockDim.x - 1 - threadIdx.x + (kBroken ? 1 : 0)];
}

template <bool kBroken>
__global__ void reverse_static(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[64];
  turned[threadIdx.x + (kBroken ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = turned[63 - threadIdx.x];
}

// Sums what each block left in shared memory; the broken one forgets to begin with zeros.
template <bool kBroken, bool kDynamic>
__global__ void accumulate(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float fixed[1];
  extern __shared__ __align__(16) float dynamic[];
  float* sum = kDynamic ? dynamic : fixed;
  if (!kBroken && threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) y[blockIdx.x] = *sum;
}

template <bool kBroken>
__global__ void rotate_block(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[64];
  turned[threadIdx.x] = x[threadIdx.x];
  if (!kBroken) __syncthreads();
  y[threadIdx.x] = turned[(threadIdx.x + 32) % 64];
}

// The barrier before the second write is missing.
template <bool kBroken>
__global__ void rotate_twice(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[64];
  float value = x[threadIdx.x];
  for (int repeat = 0; repeat < 2; ++repeat) {
    turned[threadIdx.x] = value;
    __syncthreads();
    value = turned[(threadIdx.x + 32) % 64];
    if (!kBroken) __syncthreads();
  }
  y[threadIdx.x] = value;
}

template <bool kBroken>
__global__ void rotate_warp(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[64];
  turned[threadIdx.x] = x[threadIdx.x];
  if (!kBroken) __syncwarp();
  y[threadIdx.x] = turned[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// A shuffle brings lanes together, but orders no memory accesses.
template <bool kBroken>
__global__ void rotate_warp_after_shuffle(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[32];
  const float value = x[threadIdx.x];
  turned[threadIdx.x] = value;
  const float first = __shfl_sync(kAll, value, 0);
  if (!kBroken) __syncwarp();
  y[threadIdx.x] = turned[(threadIdx.x + 1) % 32] + 0.0f * first;
}

// Each half of the warp may use its own barrier, but then only that half's values.
template <bool kBroken>
__global__ void rotate_half_warp(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float turned[32];
  turned[threadIdx.x] = x[threadIdx.x];
  const int half = threadIdx.x / 16;
  __syncwarp(half == 0 ? 0x0000ffffu : 0xffff0000u);
  y[threadIdx.x] = kBroken ? turned[(threadIdx.x + 16) % 32] : turned[half * 16 + (threadIdx.x + 1) % 16];
}

template <bool kBroken>
__global__ void barrier_in_branch(float* __restrict__ y) {
  if (kBroken && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.0f;
}

template <bool kBroken>
__global__ void barrier_after_return(float* __restrict__ y, int n) {
  if (kBroken && static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = 1.0f;
}

template <bool kBroken>
__global__ void shuffle_outside_mask(const float* __restrict__ x, float* __restrict__ y) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) value = __shfl_sync(0x0000ffffu, value, kBroken ? 20 : 3);
  y[threadIdx.x] = value;
}

template <bool kBroken>
__global__ void shuffle_without_own_lane(const float* __restrict__ x, float* __restrict__ y) {
  y[threadIdx.x] = __shfl_xor_sync(kBroken ? 0x0000ffffu : kAll, x[threadIdx.x], 1);
}

template <bool kBroken>
__global__ void shuffle_with_missing_lanes(const float* __restrict__ x, float* __restrict__ y) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) value = __shfl_xor_sync(kBroken ? kAll : 0x0000ffffu, value, 1);
  __syncthreads();
  y[threadIdx.x] = value;
}

template <bool kBroken>
__global__ void shuffle_with_returned_lanes(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = threadIdx.x;
  if (kBroken && i >= n) return;
  float sum = i < n ? x[i] : 0.0f;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  if (i < n) y[i] = sum;
}

template <bool kBroken>
__global__ void shuffle_with_odd_width(const float* __restrict__ x, float* __restrict__ y) {
  y[threadIdx.x] = __shfl_down_sync(kAll, x[threadIdx.x], 1, kBroken ? 12 : 16);
}

enum class Fault { kNone, kNoFenceBefore, kNoFenceAfter, kNoBarrier, kOrder };

// The last block to arrive sums what all blocks have left. kOrder: every block adds to the result, in any order.
template <Fault kFault>
__global__ void last_block_sum(const float* __restrict__ x, float* partial, unsigned* counter, float* y) {
  __shared__ bool is_last;
  if (kFault == Fault::kOrder) {
    atomicAdd(y, x[blockIdx.x * blockDim.x + threadIdx.x]);
    return;
  }
  partial[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (kFault != Fault::kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kFault != Fault::kNoFenceBefore) __threadfence();
    is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (kFault != Fault::kNoFenceAfter) __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += partial[i];
  *y = sum;
}

// The same, with the fence of every thread before the barrier instead of one thread's after it.
__global__ void last_block_sum_with_early_fences(const float* __restrict__ x, float* partial, unsigned* counter,
                                                 float* y) {
  __shared__ bool is_last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  __threadfence();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += partial[i];
  *y = sum;
}

// The last warp of the block sums what all warps have left in shared memory.
template <bool kBroken>
__global__ void last_warp_sum(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float partial[4];
  __shared__ unsigned arrived;
  if (threadIdx.x == 0) arrived = 0;
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;
  partial[threadIdx.x / 32] = x[threadIdx.x];
  if (!kBroken) __threadfence_block();
  const bool is_last = atomicAdd(&arrived, 1u) == blockDim.x / 32 - 1;
  __threadfence_block();
  if (!is_last) return;
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
  *y = sum;
}

// Blocks of one launch do not wait for one another; those of the next launch do.
__global__ void add_one(float* x) { x[blockIdx.x] += 1.0f; }

template <bool kBroken>
__global__ void shift_blocks(const float* __restrict__ x, float* y) {
  y[blockIdx.x] = x[blockIdx.x];
  if (kBroken && blockIdx.x > 0) y[blockIdx.x] += 0.0f * y[blockIdx.x - 1];
}

// d = 2 (a b + c), one warp per tile of d; all matrices dense, c and d in `layout`.
template <int m, int n, int k, typename T, typename LayoutA, typename LayoutB, typename Sum>
__global__ void matrix_product(const T* a, const T* b, const Sum* c, Sum* d, int rows, int columns, int depth,
                               int padding, nvcuda::wmma::layout_t layout) {
  using namespace nvcuda;
  constexpr bool row_a = std::is_same_v<LayoutA, wmma::row_major>, row_b = std::is_same_v<LayoutB, wmma::row_major>;
  const int tile_row = blockIdx.y * m, tile_column = blockIdx.x * n;
  const int leading_a = (row_a ? depth : rows) + padding, leading_b = (row_b ? columns : depth) + padding;
  const int leading = layout == wmma::mem_row_major ? columns : rows;
  wmma::fragment<wmma::matrix_a, m, n, k, T, LayoutA> left;
  wmma::fragment<wmma::matrix_b, m, n, k, T, LayoutB> right;
  wmma::fragment<wmma::accumulator, m, n, k, Sum> sum, start;
  wmma::fill_fragment(sum, 0.0f);
  for (int j = 0; j < depth; j += k) {
    wmma::load_matrix_sync(left, a + (row_a ? tile_row * leading_a + j : j * leading_a + tile_row), leading_a);
    wmma::load_matrix_sync(right, b + (row_b ? j * leading_b + tile_column : tile_column * leading_b + j), leading_b);
    wmma::mma_sync(sum, left, right, sum);
  }
  const int corner =
      layout == wmma::mem_row_major ? tile_row * leading + tile_column : tile_column * leading + tile_row;
  wmma::load_matrix_sync(start, c + corner, leading, layout);
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] = Sum(2.0f) * (sum.x[i] + start.x[i]);
  wmma::store_matrix_sync(d + corner, sum, leading, layout);
}

enum class TileFault { kNone, kPointer, kLeading, kDifferentPointers, kMissingLanes, kNotFilled };

// Copies a tile through an accumulator.
template <TileFault kFault>
__global__ void tile_copy(const float* x, float* y) {
  using namespace nvcuda;
  if (kFault == TileFault::kMissingLanes && threadIdx.x >= 16) return;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile;
  const float* from = x;
  if (kFault == TileFault::kPointer) from += 4;
  if (kFault == TileFault::kDifferentPointers) from += 8 * (threadIdx.x / 16);
  if (kFault != TileFault::kNotFilled) {
    wmma::load_matrix_sync(tile, from, kFault == TileFault::kLeading ? 18 : 16, wmma::mem_row_major);
  }
  wmma::store_matrix_sync(y, tile, 16, wmma::mem_row_major);
}

}  // namespace shim_kernels
