// y = x + 1: the smallest kernel that shows whether this build has code for the GPU at hand.
#pragma once

#include <cstdint>

namespace transkd {

__global__ void selftest_kernel(const float* __restrict__ x, float* __restrict__ y, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + 1.0f;
}

}  // namespace transkd
