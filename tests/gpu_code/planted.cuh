// Kernels with the faults that the gates must find, and a sound one. They are compiled, never run.
#pragma once

#include <cstdint>

#include "cuda/common/tile_product.cuh"

namespace transkd {

template <int V>
struct alignas(4 * V) Vector {
  float value[V];
};

template <int V>
__global__ void copy(const float* __restrict__ x, float* __restrict__ y, int64_t n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i < n) *reinterpret_cast<Vector<V>*>(y + i) = *reinterpret_cast<const Vector<V>*>(x + i);
}

// A local array with an index known only when it runs.
__global__ void stack_frame(const int* __restrict__ x, int* __restrict__ y, int n) {
  int counts[64] = {};
  for (int i = 0; i < n; ++i) ++counts[x[i] & 63];
  for (int i = 0; i < 64; ++i) y[i] = counts[i];
}

// 160 sums in use at once, where 1024 threads a block leave 64 registers to each.
__global__ void __launch_bounds__(1024) spill(const float* __restrict__ x, float* __restrict__ y, int n) {
  float sums[160];
#pragma unroll
  for (int i = 0; i < 160; ++i) sums[i] = x[i];
  for (int k = 0; k < n; ++k) {
    const float scale = x[k];
#pragma unroll
    for (int i = 0; i < 160; ++i) sums[i] = sums[i] * scale + sums[(i + 1) % 160];
  }
#pragma unroll
  for (int i = 0; i < 160; ++i) y[i * 1024 + threadIdx.x] = sums[i];
}

// The product of a tile with itself, by tensor cores or not.
template <class S, bool kTf32>
__global__ void __launch_bounds__(256) product(const S* __restrict__ x, float* __restrict__ y) {
  constexpr int kLeading = leading_of<S>(64), kSumLeading = leading_of<float>(64);
  __shared__ __align__(32) S tile[64 * kLeading];
  __shared__ __align__(32) float sum[64 * kSumLeading];
  for (int i = threadIdx.x; i < 64 * kLeading; i += 256) tile[i] = x[i];
  __syncthreads();
  TileProduct<S, Order::kRowMajor, Order::kRowMajor, kTf32> product;
  product.add(tile, kLeading, tile, kLeading, 64);
  product.store(sum, kSumLeading);
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kSumLeading; i += 256) y[i] = sum[i];
}

}  // namespace transkd
