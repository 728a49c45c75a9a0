// Device functions of arithmetic that the toolkit's headers do not give to a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "warp.h"

using std::isfinite;
using std::isinf;
using std::isnan;

// CUDA has them for every pair of arithmetic types; one NaN is passed over, as fmin and fmax do.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

// The fast ones of the hardware, here exact.
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __tanhf(float x) { return std::tanh(x); }

// Rounded to nearest, never contracted.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

namespace cuda_on_cpu {

// Conversion to an integer saturates, and NaN becomes 0.
template <class Integer, class Real>
Integer to_integer(Real rounded) {
  using Limits = std::numeric_limits<Integer>;
  if (std::isnan(rounded)) return 0;
  if (rounded <= static_cast<Real>(Limits::min())) return Limits::min();
  if (rounded >= static_cast<Real>(Limits::max())) return Limits::max();
  return static_cast<Integer>(rounded);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_TO_INTEGER(suffix, round)                                                            \
  inline int __float2int_##suffix(float x) { return cuda_on_cpu::to_integer<int>(round(x)); }            \
  inline unsigned __float2uint_##suffix(float x) { return cuda_on_cpu::to_integer<unsigned>(round(x)); } \
  inline long long __float2ll_##suffix(float x) { return cuda_on_cpu::to_integer<long long>(round(x)); } \
  inline int __double2int_##suffix(double x) { return cuda_on_cpu::to_integer<int>(round(x)); }          \
  inline long long __double2ll_##suffix(double x) { return cuda_on_cpu::to_integer<long long>(round(x)); }
CUDA_ON_CPU_TO_INTEGER(rn, std::nearbyint)
CUDA_ON_CPU_TO_INTEGER(rz, std::trunc)
CUDA_ON_CPU_TO_INTEGER(rd, std::floor)
CUDA_ON_CPU_TO_INTEGER(ru, std::ceil)
#undef CUDA_ON_CPU_TO_INTEGER

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }

inline int __float_as_int(float x) { return cuda_on_cpu::unpack<int>(cuda_on_cpu::pack(x)); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::unpack<unsigned>(cuda_on_cpu::pack(x)); }
inline float __int_as_float(int x) { return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(x)); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::unpack<long long>(cuda_on_cpu::pack(x)); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::unpack<double>(cuda_on_cpu::pack(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32); }
inline int __mulhi(int x, int y) { return static_cast<int>((static_cast<int64_t>(x) * y) >> 32); }
