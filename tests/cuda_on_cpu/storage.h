// The storage types of the archive's arrays, as the kernels name them.
#pragma once

#include <stdexcept>

#include "archive.h"
#include "common/storage_type.h"

namespace cuda_on_cpu {

inline transkd::StorageType type_of(const Array& array) {
  switch (array.type()) {
    case Type::f32:
      return transkd::StorageType::kFloat;
    case Type::f16:
      return transkd::StorageType::kHalf;
    case Type::bf16:
      return transkd::StorageType::kBFloat16;
    case Type::f64:
      return transkd::StorageType::kDouble;
    default:
      throw std::runtime_error("expected floating tensors");
  }
}

}  // namespace cuda_on_cpu
