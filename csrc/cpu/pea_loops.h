// The elementwise loops of pea on CPU.
#pragma once

#include "cpu/common/clones.h"
#include "cpu/common/lanes.h"

namespace transkd {
namespace pea {
namespace {

// What the residuals of a run of rows add up to.
struct Sums {
  double squares = 0, projected = 0, assisted = 0;  // of R^2, R (x W^T + b), R A

  void add(const Sums& other) {
    squares += other.squares;
    projected += other.projected;
    assisted += other.assisted;
  }
};

// P = projection (x W^T + b) + assistant A of one stage.
template <class T>
struct Mix {
  const T* bias;
  T projection, assistant;
};

// R = P - T in place of x W^T, for rows [rows, channels]; adds the sum of R per channel to `columns`.
template <class T, bool kAssisted, bool kColumns>
TRANSKD_INLINE Sums residual_loop(T* products, const Mix<T>& mix, const T* target, const T* assistant, int64_t rows,
                                  int64_t channels, T* columns) {
  Total<T> squares, projected, assisted;
  over_lanes<T>(
      channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
        using L = typename decltype(tag)::Type;
        const L bias(mix.bias + c);
        const T projection = mix.projection, assistant_factor = mix.assistant;
        // Sums of their own: those outside could be what a store changes, for all the compiler knows.
        L column, square, with_p, with_a;
        for (int64_t i = c; i < rows * channels; i += channels) {
          L r = L(products + i) + bias;
          if constexpr (kAssisted) {
            const L p = r, a(assistant + i);
            r = p * projection + a * assistant_factor - L(target + i);
            with_p = with_p + r * p;
            with_a = with_a + r * a;
          } else {
            r = r - L(target + i);
          }
          r.store(products + i);
          square = square + r * r;
          if constexpr (kColumns) column = column + r;
        }
        squares.add(square);
        projected.add(with_p);
        assisted.add(with_a);
        if constexpr (kColumns) column.add_to(columns + c);
      });
  return {squares.sum(), projected.sum(), assisted.sum()};
}

template <class T>
TRANSKD_INLINE Sums residual_of(T* products, const Mix<T>& mix, const T* target, const T* assistant, int64_t rows,
                                int64_t channels, T* columns) {
  if (assistant != nullptr) {
    return columns != nullptr
               ? residual_loop<T, true, true>(products, mix, target, assistant, rows, channels, columns)
               : residual_loop<T, true, false>(products, mix, target, assistant, rows, channels, columns);
  }
  return columns != nullptr ? residual_loop<T, false, true>(products, mix, target, assistant, rows, channels, columns)
                            : residual_loop<T, false, false>(products, mix, target, assistant, rows, channels, columns);
}

// to = factor * from.
template <class T>
TRANSKD_INLINE void scale_loop(const T* from, T factor, int64_t count, T* to, bool past_cache) {
  over_lanes<T>(
      count, [&](auto tag, int64_t i) __attribute__((always_inline)) {
        using L = typename decltype(tag)::Type;
        (L(from + i) * factor).store(to + i, past_cache);
      });
}

// to = factor * the sum of `parts` runs of memory, `stride` apart, in their order.
template <class T>
TRANSKD_INLINE void merge_loop(const T* from, int64_t parts, int64_t stride, T factor, int64_t count, T* to) {
  constexpr int64_t kRun = 256;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t n = count - first < kRun ? count - first : kRun;
    double sums[kRun] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const T* const run = from + part * stride + first;
      for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(run[i]);
    }
    for (int64_t i = 0; i < n; ++i) to[first + i] = static_cast<T>(static_cast<double>(factor) * sums[i]);
  }
}

#define TRANSKD_PEA_LOOPS(T)                                                                                           \
  TRANSKD_CLONES Sums make_residual(T* products, const Mix<T>& mix, const T* target, const T* assistant, int64_t rows, \
                                    int64_t channels, T* columns) {                                                    \
    return residual_of(products, mix, target, assistant, rows, channels, columns);                                     \
  }                                                                                                                    \
  TRANSKD_CLONES void scale(const T* from, T factor, int64_t count, T* to, bool past_cache) {                          \
    scale_loop(from, factor, count, to, past_cache);                                                                   \
  }                                                                                                                    \
  TRANSKD_CLONES void merge(const T* from, int64_t parts, int64_t stride, T factor, int64_t count, T* to) {            \
    merge_loop(from, parts, stride, factor, count, to);                                                                \
  }
TRANSKD_PEA_LOOPS(float)
TRANSKD_PEA_LOOPS(double)
#undef TRANSKD_PEA_LOOPS

}  // namespace
}  // namespace pea
}  // namespace transkd
