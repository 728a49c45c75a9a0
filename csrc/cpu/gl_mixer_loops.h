// The elementwise loops of gl_mixer on CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "cpu/common/clones.h"
#include "cpu/common/lanes.h"

namespace transkd {
namespace gl_mixer {
namespace {

// e^x for x <= 0, branch-free; NaN stays NaN.
TRANSKD_INLINE float decay(float x) {
  constexpr float kLeast = -104;       // where the result is 0
  constexpr float kRound = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  x = x < kLeast ? kLeast : x;
  const float shifted = x * 1.44269504f + kRound, whole = shifted - kRound;
  const float r = (x - whole * 0x1.62e4p-1f) - whole * 1.42860682e-6f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345195e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // In two steps: the last results are subnormal.
  const int32_t n = static_cast<int32_t>(transkd::detail::as_bits(shifted) - transkd::detail::as_bits(kRound));
  const int32_t half = n / 2;
  const auto power = [](int32_t k) { return transkd::detail::as_float(static_cast<uint32_t>(k + 127) << 23); };
  return p * power(half) * power(n - half);
}
TRANSKD_INLINE double decay(double x) { return std::exp(x); }

// sigmoid(x) and its derivative, without overflow.
template <class T>
struct Gate {
  T open, slope;

  TRANSKD_INLINE explicit Gate(T x) {
    const T e = decay(x > 0 ? -x : x), q = 1 / (1 + e);
    open = x > 0 ? q : e * q;
    slope = e * q * q;
  }
};

// The scalars of the mix.
template <class T>
struct Scales {
  T attention, conv;
};

// Adds the bias to branches [rows, 2, channels] and makes out [rows, channels]; residual may be null.
template <class T, bool kResidual>
TRANSKD_INLINE void mix_loop(T* __restrict branches, const T* __restrict bias, const T* __restrict u,
                             const T* __restrict residual, const Scales<T>& scales, int64_t rows, int64_t channels,
                             T* __restrict out) {
  const T attention = scales.attention, conv = scales.conv;
  for (int64_t r = 0; r < rows; ++r) {
    T *const value = branches + 2 * r * channels, *const gate = value + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T a = value[c] + bias[c], g = gate[c] + bias[channels + c];
      value[c] = a;
      gate[c] = g;
      const T mix = attention * u[r * channels + c] + conv * (a * Gate<T>(g).open);
      out[r * channels + c] = kResidual ? mix + residual[r * channels + c] : mix;
    }
  }
}

// d [rows, 2, channels] = gradients of both branches.
template <class T>
TRANSKD_INLINE void branches_loop(const T* __restrict grad, const T* __restrict branches, T conv, int64_t rows,
                                  int64_t channels, T* __restrict d) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = 2 * r * channels + c;
      const Gate<T> gate(branches[i + channels]);
      const T scaled = conv * grad[r * channels + c];
      d[i] = scaled * gate.open;
      d[i + channels] = scaled * branches[i] * gate.slope;
    }
  }
}

// local [rows, channels] = a sigmoid(g).
template <class T>
TRANSKD_INLINE void local_loop(const T* __restrict branches, int64_t rows, int64_t channels, T* __restrict local) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = 2 * r * channels + c;
      local[r * channels + c] = branches[i] * Gate<T>(branches[i + channels]).open;
    }
  }
}

// The sum of a b.
template <class T>
TRANSKD_INLINE double product_loop(const T* a, const T* b, int64_t count) {
  Total<T> sum;
  over_lanes<T>(
      count, [&](auto tag, int64_t i) __attribute__((always_inline)) {
        using L = typename decltype(tag)::Type;
        sum.add(L(a + i) * L(b + i));
      });
  return sum.sum();
}

// columns += the sum over rows of d [rows, columns].
template <class T>
TRANSKD_INLINE void columns_loop(const T* d, int64_t rows, int64_t count, double* columns) {
  over_lanes<T>(
      count, [&](auto tag, int64_t c) __attribute__((always_inline)) {
        using L = typename decltype(tag)::Type;
        L sum;
        for (int64_t r = 0; r < rows; ++r) sum = sum + L(d + r * count + c);
        sum.add_to(columns + c);
      });
}

// to = factor * from, and to += from.
template <class T>
TRANSKD_INLINE void scale_loop(const T* __restrict from, T factor, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
}
template <class T>
TRANSKD_INLINE void add_loop(const T* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

#define TRANSKD_GL_MIXER_LOOPS(T)                                                                                    \
  TRANSKD_CLONES void mix(T* branches, const T* bias, const T* u, const T* residual, const Scales<T>& scales,        \
                          int64_t rows, int64_t channels, T* out) {                                                  \
    if (residual != nullptr) {                                                                                       \
      mix_loop<T, true>(branches, bias, u, residual, scales, rows, channels, out);                                   \
    } else {                                                                                                         \
      mix_loop<T, false>(branches, bias, u, residual, scales, rows, channels, out);                                  \
    }                                                                                                                \
  }                                                                                                                  \
  TRANSKD_CLONES void branch_gradients(const T* grad, const T* branches, T conv, int64_t rows, int64_t channels,     \
                                       T* d) {                                                                       \
    branches_loop(grad, branches, conv, rows, channels, d);                                                          \
  }                                                                                                                  \
  TRANSKD_CLONES void make_local(const T* branches, int64_t rows, int64_t channels, T* local) {                      \
    local_loop(branches, rows, channels, local);                                                                     \
  }                                                                                                                  \
  TRANSKD_CLONES double sum_of_products(const T* a, const T* b, int64_t count) { return product_loop(a, b, count); } \
  TRANSKD_CLONES void add_columns(const T* d, int64_t rows, int64_t count, double* columns) {                        \
    columns_loop(d, rows, count, columns);                                                                           \
  }                                                                                                                  \
  TRANSKD_CLONES void scale(const T* from, T factor, int64_t count, T* to) { scale_loop(from, factor, count, to); }  \
  TRANSKD_CLONES void add(const T* from, int64_t count, T* to) { add_loop(from, count, to); }
TRANSKD_GL_MIXER_LOOPS(float)
TRANSKD_GL_MIXER_LOOPS(double)
#undef TRANSKD_GL_MIXER_LOOPS

}  // namespace
}  // namespace gl_mixer
}  // namespace transkd
