// Buffers, and small tensors of any floating dtype as the compute type and back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/common/tensor.h"

namespace transkd {

// Room that is not filled first.
template <class T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t size) : data_(size > 0 ? new T[size] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

// Calls f with an element of the type that `type` names.
template <class F>
void with_storage(ScalarType type, const F& f) {
  if (type == ScalarType::Double) return f(double{});
  if (type == ScalarType::BFloat16) return f(BFloat16{});
  if (type == ScalarType::Half) return f(Half{});
  f(float{});
}

// A small tensor of any floating dtype as the compute type.
template <class T>
std::vector<T> values_of(const Tensor& tensor) {
  const int64_t count = tensor.numel();
  std::vector<T> values(count);
  with_storage(tensor.scalar_type(), [&](auto element) {
    const auto* const from = static_cast<const decltype(element)*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(load(from[i]));
  });
  return values;
}

// Writes `count` elements into a tensor, from an offset on.
template <class T>
void put_values(const T* from, int64_t offset, int64_t count, const Tensor& tensor) {
  with_storage(tensor.scalar_type(), [&](auto element) {
    auto* const to = static_cast<decltype(element)*>(tensor.mutable_data_ptr()) + offset;
    for (int64_t i = 0; i < count; ++i) store(to + i, static_cast<decltype(load(element))>(from[i]));
  });
}

}  // namespace transkd
