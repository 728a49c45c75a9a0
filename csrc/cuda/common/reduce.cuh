// Sums in a fixed order, within a warp, a block and a grid.
#pragma once

namespace transkd {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the lanes whose numbers differ in the bits [first, end), both powers of two; every lane gets it. The whole
// warp calls it.
template <class T>
__device__ __forceinline__ T sum_lanes(T value, unsigned first = 1, unsigned end = kWarpSize) {
  for (unsigned bit = first; bit < end; bit *= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// Sum over a block of kThreads threads; every thread gets it. The barrier in it also orders shared memory; another must
// lie between two calls.
template <int kThreads, class T>
__device__ __forceinline__ T sum_block(T value) {
  constexpr unsigned kWarps = kThreads / kWarpSize;
  __shared__ T of_warp[kWarps];
  value = sum_lanes(value);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

// Counts the block in; true in the block that comes last of `blocks`. That one sees what all of them wrote to global
// memory before. Read it with __ldcg: this multiprocessor's first-level cache may hold older values.
__device__ __forceinline__ bool comes_last(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace transkd
