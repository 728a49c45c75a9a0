// The inner loops of hcl on CPU, over one run of memory; s, t and out are the compute type.
#pragma once

#include "common/hcl_pyramid.h"
#include "cpu/common/clones.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace {

// d = s - t of one vector, added to a sum, its square to another.
template <class T>
TRANSKD_INLINE void add_difference(const T* s, const T* t, Vector<T>& sum, Vector<T>& squares) {
  Vector<T> d, other;
  d.load(s);
  other.load(t);
  d.lanes -= other.lanes;
  sum.lanes += d.lanes;
  squares.lanes += d.lanes * d.lanes;
}

// Rows of one plane, cut into S column segments: sums [S] of d; returns the sum of d^2. Row by row, so that memory is
// read in its order; S is a constant so that the sums of all segments stay in registers meanwhile, two vectors of each,
// so that an addition need not wait for the one before.
template <class T, int S>
TRANSKD_INLINE T rows_loop(const T* s, const T* t, int64_t rows, const Axis& columns, T* sums) {
  using V = Vector<T>;
  V sum[S][2], squares[2];
  T single_sum[S] = {}, single_squares = 0;
  for (int64_t r = 0; r < rows; ++r, s += columns.size, t += columns.size) {
#pragma GCC unroll 7
    for (int j = 0; j < S; ++j) {
      const int64_t end = columns.edge[j + 1];
      int64_t i = columns.edge[j];
      for (; i + 2 * V::kSize <= end; i += 2 * V::kSize) {
        add_difference(s + i, t + i, sum[j][0], squares[0]);
        add_difference(s + i + V::kSize, t + i + V::kSize, sum[j][1], squares[1]);
      }
      if (i + V::kSize <= end) {
        add_difference(s + i, t + i, sum[j][0], squares[0]);
        i += V::kSize;
      }
      for (; i < end; ++i) {
        const T d = s[i] - t[i];
        single_sum[j] += d;
        single_squares += d * d;
      }
    }
  }
  for (int j = 0; j < S; ++j) sums[j] = sum[j][0].sum() + sum[j][1].sum() + single_sum[j];
  return squares[0].sum() + squares[1].sum() + single_squares;
}

template <class T>
TRANSKD_INLINE T rows_of_segments(const T* s, const T* t, int64_t rows, const Axis& columns, T* sums) {
  switch (columns.segments) {
    case 1:
      return rows_loop<T, 1>(s, t, rows, columns, sums);
    case 2:
      return rows_loop<T, 2>(s, t, rows, columns, sums);
    case 3:
      return rows_loop<T, 3>(s, t, rows, columns, sums);
    case 4:
      return rows_loop<T, 4>(s, t, rows, columns, sums);
    case 5:
      return rows_loop<T, 5>(s, t, rows, columns, sums);
    case 6:
      return rows_loop<T, 6>(s, t, rows, columns, sums);
    default:
      static_assert(kMaxSegments == 7);
      return rows_loop<T, 7>(s, t, rows, columns, sums);
  }
}

// Pixels of a channels-last map: adds d to sums [channels]; returns the sum of d^2.
template <class T>
TRANSKD_INLINE T pixels_loop(const T* s, const T* t, int64_t pixels, int64_t channels, T* sums) {
  using V = Vector<T>;
  V squares[2];
  T single_squares = 0;
  const auto add = [&](int64_t c, V & of_vector) __attribute__((always_inline)) {
    V sum;
    sum.load(sums + c);
    add_difference(s + c, t + c, sum, of_vector);
    sum.store(sums + c);
  };
  for (int64_t p = 0; p < pixels; ++p, s += channels, t += channels) {
    int64_t c = 0;
    for (; c + 2 * V::kSize <= channels; c += 2 * V::kSize) {
      add(c, squares[0]);
      add(c + V::kSize, squares[1]);
    }
    if (c + V::kSize <= channels) {
      add(c, squares[0]);
      c += V::kSize;
    }
    for (; c < channels; ++c) {
      const T d = s[c] - t[c];
      sums[c] += d;
      single_squares += d * d;
    }
  }
  return squares[0].sum() + squares[1].sum() + single_squares;
}

// out = alpha (s - t) + level[segment] over rows of one plane.
template <class T, bool kStream>
TRANSKD_INLINE void rows_backward_loop(const T* __restrict s, const T* __restrict t, int64_t rows, const Axis& columns,
                                       T alpha, const T* __restrict level, T* __restrict out) {
  for (int64_t r = 0; r < rows; ++r, s += columns.size, t += columns.size, out += columns.size) {
    for (int j = 0; j < columns.segments; ++j) {
      const T add = level[j];
      int64_t i = columns.edge[j];
      const int64_t end = columns.edge[j + 1];
      if constexpr (kStream) {
        using Whole = Vector<T>;
        for (; i + Whole::kSize <= end; i += Whole::kSize) {
          Whole d, other;
          d.load(s + i);
          other.load(t + i);
          d.lanes = alpha * (d.lanes - other.lanes) + add;
          d.stream(out + i);
        }
      }
      for (; i < end; ++i) out[i] = alpha * (s[i] - t[i]) + add;
    }
  }
}

// out = alpha (s - t) + level[channel] over pixels of one cell.
template <class T, bool kStream>
TRANSKD_INLINE void pixels_backward_loop(const T* __restrict s, const T* __restrict t, int64_t pixels, int64_t channels,
                                         T alpha, const T* __restrict level, T* __restrict out) {
  for (int64_t p = 0; p < pixels; ++p, s += channels, t += channels, out += channels) {
    int64_t c = 0;
    if constexpr (kStream) {
      using Whole = Vector<T>;
      for (; c + Whole::kSize <= channels; c += Whole::kSize) {
        Whole d, other, add;
        d.load(s + c);
        other.load(t + c);
        add.load(level + c);
        d.lanes = alpha * (d.lanes - other.lanes) + add.lanes;
        d.stream(out + c);
      }
    }
    for (; c < channels; ++c) out[c] = alpha * (s[c] - t[c]) + level[c];
  }
}

// The instruction-set clones of the loops, one set per compute type.
#define TRANSKD_HCL_LOOPS(T)                                                                             \
  TRANSKD_CLONES T add_rows(const T* s, const T* t, int64_t rows, const Axis& columns, T* sums) {        \
    return rows_of_segments<T>(s, t, rows, columns, sums);                                               \
  }                                                                                                      \
  TRANSKD_CLONES T add_pixels(const T* s, const T* t, int64_t pixels, int64_t channels, T* sums) {       \
    return pixels_loop<T>(s, t, pixels, channels, sums);                                                 \
  }                                                                                                      \
  TRANSKD_CLONES void rows_backward(const T* s, const T* t, int64_t rows, const Axis& columns, T alpha,  \
                                    const T* level, T* out, bool stream) {                               \
    if (stream) {                                                                                        \
      rows_backward_loop<T, true>(s, t, rows, columns, alpha, level, out);                               \
    } else {                                                                                             \
      rows_backward_loop<T, false>(s, t, rows, columns, alpha, level, out);                              \
    }                                                                                                    \
  }                                                                                                      \
  TRANSKD_CLONES void pixels_backward(const T* s, const T* t, int64_t pixels, int64_t channels, T alpha, \
                                      const T* level, T* out, bool stream) {                             \
    if (stream) {                                                                                        \
      pixels_backward_loop<T, true>(s, t, pixels, channels, alpha, level, out);                          \
    } else {                                                                                             \
      pixels_backward_loop<T, false>(s, t, pixels, channels, alpha, level, out);                         \
    }                                                                                                    \
  }
TRANSKD_HCL_LOOPS(float)
TRANSKD_HCL_LOOPS(double)
#undef TRANSKD_HCL_LOOPS

}  // namespace
}  // namespace transkd
