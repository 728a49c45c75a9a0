// What the launchers of ops with a batch norm ask of its tensors and settings, on CPU and CUDA alike.
#pragma once

#include <cstdint>
#include <optional>

#include "common/batch_norm.h"
#include "common/contract.h"

namespace transkd {

using OptionalTensor = std::optional<Tensor>;

// A small tensor; `count` elements on `like`'s device, or none where it may be absent.
inline Values small_values_of(const char* op, const char* name, const OptionalTensor& tensor, int64_t count,
                              const Tensor& like, bool required = false) {
  if (!tensor) {
    STD_TORCH_CHECK(!required, op, ": expected ", name, ", got None");
    return {};
  }
  STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() && tensor->device() == like.device(), op,
                  ": expected ", name, " contiguous, with ", count, " elements and on the map's device, got ",
                  shape_of(*tensor));
  // Which of them are written is declared by the schema.
  return {const_cast<void*>(tensor->const_data_ptr()), storage_type_of(op, *tensor)};
}

inline int64_t* counter_of(const char* op, const char* name, const Tensor& counter, const Tensor& like) {
  STD_TORCH_CHECK(
      counter.numel() == 1 && counter.scalar_type() == ScalarType::Long && counter.device() == like.device(), op,
      ": expected ", name, "'s counter as one int64 on the map's device, got ", shape_of(counter));
  return static_cast<int64_t*>(counter.mutable_data_ptr());
}

inline Norm checked_norm(const char* op, int64_t norm, bool may_be_none) {
  STD_TORCH_CHECK(norm >= (may_be_none ? 0 : 1) && norm <= 3, op, ": expected a kind of normalisation of ",
                  may_be_none ? 0 : 1, " to 3, got ", norm);
  return static_cast<Norm>(norm);
}

}  // namespace transkd
