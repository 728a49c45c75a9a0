// What the plans of all ops ask about sizes and addresses; plain C++.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace transkd {

// The value as the kernels count it, in 32 bits.
inline uint32_t checked(const char* op, int64_t value, const char* what) {
  if (value >= int64_t{1} << 31) {
    throw std::runtime_error(std::string(op) + ": expected fewer than 2^31 " + what + ", got " + std::to_string(value) +
                             "; split the batch");
  }
  return static_cast<uint32_t>(value);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace transkd
