// float <-> bfloat16 / half on bit patterns, branch-free so that the compiler vectorises the loops around them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace transkd {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace detail {

TRANSKD_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TRANSKD_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace detail

TRANSKD_INLINE float load(float value) { return value; }
TRANSKD_INLINE double load(double value) { return value; }

TRANSKD_INLINE float load(BFloat16 value) { return detail::as_float(static_cast<uint32_t>(value.bits) << 16); }

TRANSKD_INLINE float load(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  // Made from the integer, not by scaling a denormal float, so that it survives torch.set_flush_denormal(True).
  const uint32_t subnormal = detail::as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return detail::as_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

TRANSKD_INLINE void store(float* place, float value) { *place = value; }
TRANSKD_INLINE void store(double* place, double value) { *place = value; }

// Round to nearest, ties to even; every NaN becomes the quiet one.
TRANSKD_INLINE void store(BFloat16* place, float value) {
  const uint32_t bits = detail::as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  place->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

TRANSKD_INLINE void store(Half* place, float value) {
  const uint32_t bits = detail::as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding one half lines the last kept bit up with 2^-24: the addition itself rounds to nearest even.
  const uint32_t subnormal = detail::as_bits(detail::as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  place->bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

}  // namespace transkd
