// What the launchers of all ops ask of their tensors and say about them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "common/layout.h"
#include "common/storage_type.h"

namespace transkd {

using torch::headeronly::ScalarType;

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// "[2, 64, 128, 256]".
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return text + "]";
}

inline const char* name_of(Layout layout) {
  return layout == Layout::kContiguous     ? "contiguous"
         : layout == Layout::kChannelsLast ? "channels-last"
                                           : "neither (call .contiguous() first)";
}

inline StorageType storage_type_of(const char* op, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return StorageType::kFloat;
  if (type == ScalarType::Half) return StorageType::kHalf;
  if (type == ScalarType::BFloat16) return StorageType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Double, op,
                  ": expected float32, float64, bfloat16 or float16 tensors; convert them with .float()");
  return StorageType::kDouble;
}

}  // namespace transkd
