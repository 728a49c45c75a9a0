// The memory layout of a map.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace transkd {

using torch::stable::Tensor;

enum class Layout { kContiguous, kChannelsLast, kOther };

// Layout of a [B, C, H, W] map; a map that is both (C = 1 or H = W = 1) counts as contiguous.
inline Layout layout_of(const Tensor& map) {
  if (map.is_contiguous()) return Layout::kContiguous;
  const int64_t order[4] = {1, 3, 2, 0};  // from the fastest dimension to the slowest
  int64_t expected = 1;
  for (const int64_t dim : order) {
    if (map.size(dim) != 1 && map.stride(dim) != expected) return Layout::kOther;
    expected *= map.size(dim);
  }
  return Layout::kChannelsLast;
}

}  // namespace transkd
