// exp and ln of vectors, over the ranges that softmaxes need.
#pragma once

#include <cstdint>

#include "cpu/common/vector.h"

namespace transkd {
namespace detail {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  using Integer = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 0x1.8p23f + 127;  // a number of this size ends in n + 127
  static constexpr float kSmallest = -0x1.5d589ep6f;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr Bits kRootHalf = 0x3f3504f3;
  // Minimax of (exp(r) - 1 - r) / r^2 over |r| <= ln 2 / 2, the highest power first.
  static constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  // Of (ln((1 + s) / (1 - s)) - 2 s) / s, in s^2, without the factor s^2.
  static constexpr float kLn[] = {2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3};
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  using Integer = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kSmallest = -0x1.6232bdd7abcd2p9;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr Bits kRootHalf = 0x3fe6a09e667f3bcd;
  // Taylor's series; its rest is below 1e-17.
  static constexpr double kExp[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0,
                                    1 / 362880.0,     1 / 40320.0,     1 / 5040.0,     1 / 720.0,
                                    1 / 120.0,        1 / 24.0,        1 / 6.0,        1 / 2.0};
  static constexpr double kLn[] = {2. / 23, 2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13,
                                   2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3};
};

}  // namespace detail

// x = exp(x) for x <= 0 or NaN, within 1 unit in the last place; 0 where the result is below the smallest normal
// number.
template <class T, int Bytes>
TRANSKD_INLINE void exponential(Vector<T, Bytes>& x) {
  using C = detail::ExpConstants<T>;
  using Lanes = typename Vector<T, Bytes>::Lanes;
  typedef typename C::Bits Bits __attribute__((vector_size(Bytes)));
  constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
  const Lanes shifted = x.lanes * kLog2E + C::kRound;
  const Lanes n = shifted - C::kRound;
  const Lanes r = x.lanes - n * C::kLn2High - n * C::kLn2Low;
  Lanes series = Lanes{} + C::kExp[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < sizeof(C::kExp) / sizeof(T); ++k) series = series * r + C::kExp[k];
  const Lanes power = (Lanes)((Bits)shifted << C::kMantissa);
  const Lanes result = (series * (r * r) + r + T(1)) * power;
  x.lanes = x.lanes < C::kSmallest ? Lanes{} : result;
}

// x = ln(x) for normal x > 0 or NaN, within 1 unit in the last place.
template <class T, int Bytes>
TRANSKD_INLINE void logarithm(Vector<T, Bytes>& x) {
  using C = detail::ExpConstants<T>;
  using Lanes = typename Vector<T, Bytes>::Lanes;
  typedef typename C::Bits Bits __attribute__((vector_size(Bytes)));
  typedef typename C::Integer Integers __attribute__((vector_size(Bytes)));
  const Integers exponent = (Integers)((Bits)x.lanes - C::kRootHalf) >> C::kMantissa;
  const Lanes f = (Lanes)((Bits)x.lanes - ((Bits)exponent << C::kMantissa)) - T(1);
  const Lanes n = __builtin_convertvector(exponent, Lanes);
  const Lanes s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
  Lanes series = Lanes{} + C::kLn[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < sizeof(C::kLn) / sizeof(T); ++k) series = series * z + C::kLn[k];
  const Lanes result = n * C::kLn2High + (f - (half_square - (s * (half_square + series * z) + n * C::kLn2Low)));
  x.lanes = result + (x.lanes - x.lanes);  // NaN stays
}

}  // namespace transkd
