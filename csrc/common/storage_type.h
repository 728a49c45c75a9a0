// How the elements of a map are stored, for code that knows neither torch's types nor CUDA's.
#pragma once

#include <cstdint>

namespace transkd {

enum class StorageType : uint8_t { kFloat, kHalf, kBFloat16, kDouble };

constexpr int64_t size_of(StorageType type) {
  return type == StorageType::kDouble ? 8 : type == StorageType::kFloat ? 4 : 2;
}

}  // namespace transkd
