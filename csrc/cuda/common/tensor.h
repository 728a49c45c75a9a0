// What every launcher asks of its tensors.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/layout.h"
#include "cuda/common/storage_type.h"

namespace transkd {

using torch::headeronly::ScalarType;

inline StorageType storage_type_of(const char* op, const Tensor& map) {
  const ScalarType type = map.scalar_type();
  if (type == ScalarType::Float) return StorageType::kFloat;
  if (type == ScalarType::Half) return StorageType::kHalf;
  if (type == ScalarType::BFloat16) return StorageType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Double, op, ": expected float32, float64, bfloat16 or float16 maps");
  return StorageType::kDouble;
}

}  // namespace transkd
