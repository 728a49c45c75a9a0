// How class labels are stored, for code that knows neither torch's types nor CUDA's.
#pragma once

#include <cstdint>

namespace transkd {

enum class LabelType : uint8_t { kByte, kShort, kInt, kLong };

}  // namespace transkd
