// The memory layout of a map.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace transkd {

using torch::stable::Tensor;

enum class Layout { kContiguous, kChannelsLast, kOther };

inline bool is_channels_last(const Tensor& map) {
  const int64_t order[4] = {1, 3, 2, 0};  // from the fastest dimension to the slowest
  int64_t expected = 1;
  for (const int64_t dim : order) {
    if (map.size(dim) != 1 && map.stride(dim) != expected) return false;
    expected *= map.size(dim);
  }
  return true;
}

// Layout of a [B, C, H, W] map; a map that is both (C = 1 or H = W = 1) counts as contiguous.
inline Layout layout_of(const Tensor& map) {
  return map.is_contiguous() ? Layout::kContiguous : is_channels_last(map) ? Layout::kChannelsLast : Layout::kOther;
}

}  // namespace transkd
