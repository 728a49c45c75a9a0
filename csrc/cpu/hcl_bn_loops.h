// The inner loops of hcl_bn on CPU, over one run of memory; u, t and out are the compute type. Each exists for a plane,
// where neighbours in memory are pixels, and for pixels of a channels-last map, where they are channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/hcl_pyramid.h"
#include "cpu/common/clones.h"
#include "cpu/common/lanes.h"

namespace transkd {
namespace hcl_bn {
namespace {

// Pixels of a channels-last map that one vector of channels visits before the next vector's turn: as many as stay in
// the first cache, so that memory is still read in its order.
constexpr int64_t kGroup = 8;
// Likewise where every visit costs an addition to sums in memory. Also the longest chain of float additions there.
constexpr int64_t kSumGroup = 32;
// Of a band of one plane: with w = u - shift and d = BN(u) - t, the sums of d and w per column segment, of d^2 and d w
// over all.
struct BandSums {
  double d[kMaxSegments] = {}, w[kMaxSegments] = {};
  double squares = 0, products = 0;
};

// BN(u) = scale (u - shift) + offset.
template <class T>
struct OfPlane {
  T scale, shift, offset;
};

// Adds some rows, cut into S column segments, S a constant so that the sums of all segments stay in registers while
// memory is read in its order.
template <class T, int S>
TRANSKD_INLINE void plane_sums_of_segments(const T* u, const T* t, int64_t rows, const Axis& columns, OfPlane<T> k,
                                           BandSums* sums) {
  using V = Vector<T>;
  V d_sum[S], w_sum[S], squares[2], products[2];
  T d_single[S] = {}, w_single[S] = {}, square = 0, product = 0;
  const auto add = [&](int64_t i, int j, int which) __attribute__((always_inline)) {
    V w, d;
    w.load(u + i);
    d.load(t + i);
    w.lanes -= k.shift;
    d.lanes = w.lanes * k.scale + k.offset - d.lanes;
    d_sum[j].lanes += d.lanes;
    w_sum[j].lanes += w.lanes;
    squares[which].lanes += d.lanes * d.lanes;
    products[which].lanes += d.lanes * w.lanes;
  };
  for (int64_t r = 0; r < rows; ++r, u += columns.size, t += columns.size) {
#pragma GCC unroll 7
    for (int j = 0; j < S; ++j) {
      const int64_t end = columns.edge[j + 1];
      int64_t i = columns.edge[j];
      for (; i + 2 * V::kSize <= end; i += 2 * V::kSize) {
        add(i, j, 0);
        add(i + V::kSize, j, 1);
      }
      if (i + V::kSize <= end) {
        add(i, j, 0);
        i += V::kSize;
      }
      for (; i < end; ++i) {
        const T w = u[i] - k.shift, d = w * k.scale + k.offset - t[i];
        d_single[j] += d;
        w_single[j] += w;
        square += d * d;
        product += d * w;
      }
    }
  }
  for (int j = 0; j < S; ++j) {
    sums->d[j] += static_cast<double>(d_sum[j].sum()) + static_cast<double>(d_single[j]);
    sums->w[j] += static_cast<double>(w_sum[j].sum()) + static_cast<double>(w_single[j]);
  }
  squares[0].lanes += squares[1].lanes;
  products[0].lanes += products[1].lanes;
  sums->squares += static_cast<double>(squares[0].sum()) + static_cast<double>(square);
  sums->products += static_cast<double>(products[0].sum()) + static_cast<double>(product);
}

template <class T>
TRANSKD_INLINE void plane_sums_loop(const T* u, const T* t, int64_t rows, const Axis& columns, OfPlane<T> k,
                                    BandSums* sums) {
  switch (columns.segments) {
    case 1:
      return plane_sums_of_segments<T, 1>(u, t, rows, columns, k, sums);
    case 2:
      return plane_sums_of_segments<T, 2>(u, t, rows, columns, k, sums);
    case 3:
      return plane_sums_of_segments<T, 3>(u, t, rows, columns, k, sums);
    case 4:
      return plane_sums_of_segments<T, 4>(u, t, rows, columns, k, sums);
    case 5:
      return plane_sums_of_segments<T, 5>(u, t, rows, columns, k, sums);
    case 6:
      return plane_sums_of_segments<T, 6>(u, t, rows, columns, k, sums);
    default:
      static_assert(kMaxSegments == 7);
      return plane_sums_of_segments<T, 7>(u, t, rows, columns, k, sums);
  }
}

// Per channel, where the maps are channels-last.
template <class T>
struct Normaliser {
  const T *scale, *shift, *offset;
};

// Some rows of a cell, of `pixels` each; row r stands r row_step elements after the first one.
template <class T>
struct PixelRows {
  const T* data;
  int64_t row_step;
};

// Adds the sums of d, w and d w to sums [3, channels], that of d^2 to squares. There are several rows only where they
// have kSumGroup pixels together.
template <class T>
TRANSKD_INLINE void pixel_sums_loop(const PixelRows<T>& u, const PixelRows<T>& t, int64_t rows, int64_t pixels,
                                    int64_t channels, const Normaliser<T>& normaliser, double* sums,
                                    Total<T>& squares) {
  for (int64_t first = 0; first < pixels; first += kSumGroup) {
    const int64_t last = std::min(first + kSumGroup, pixels);
    over_lanes<T>(
        channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
          using L = typename decltype(tag)::Type;
          const L scale(normaliser.scale + c), shift(normaliser.shift + c), offset(normaliser.offset + c);
          L d_sum, w_sum, product, square;
          for (int64_t r = 0; r < rows; ++r) {
            const T* const u_row = u.data + r * u.row_step;
            const T* const t_row = t.data + r * t.row_step;
            for (int64_t i = first * channels + c; i < last * channels; i += channels) {
              const L w = L(u_row + i) - shift;
              const L d = w * scale + offset - L(t_row + i);
              d_sum = d_sum + d;
              w_sum = w_sum + w;
              product = product + d * w;
              square = square + d * d;
            }
          }
          d_sum.add_to(sums + c);
          w_sum.add_to(sums + channels + c);
          product.add_to(sums + 2 * channels + c);
          squares.add(square);
        });
  }
}

// out = u_weight (u - shift) + t_weight t + level[segment] over rows of one plane.
template <class T>
TRANSKD_INLINE void plane_backward_loop(const T* u, const T* t, int64_t rows, const Axis& columns, T u_weight, T shift,
                                        T t_weight, const T* level, T* out, bool stream) {
  for (int64_t r = 0; r < rows; ++r, u += columns.size, t += columns.size, out += columns.size) {
    for (int j = 0; j < columns.segments; ++j) {
      const int64_t begin = columns.edge[j];
      const T add = level[j];
      over_lanes<T>(
          columns.edge[j + 1] - begin, [&](auto tag, int64_t x) __attribute__((always_inline)) {
            using L = typename decltype(tag)::Type;
            const L result = (L(u + begin + x) - shift) * u_weight + (L(t + begin + x) * t_weight + add);
            result.store(out + begin + x, stream);
          });
    }
  }
}

// Per channel, where the maps are channels-last.
template <class T>
struct Slope {
  const T *u_weight, *shift, *t_weight;
};

// out = u_weight (u - shift) + t_weight t + level over pixels of one cell.
template <class T>
TRANSKD_INLINE void pixel_backward_loop(const T* u, const T* t, int64_t pixels, int64_t channels, const Slope<T>& slope,
                                        const T* level, T* out, bool stream) {
  for (int64_t first = 0; first < pixels; first += kGroup) {
    const int64_t last = std::min(first + kGroup, pixels);
    over_lanes<T>(
        channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
          using L = typename decltype(tag)::Type;
          const L u_weight(slope.u_weight + c), shift(slope.shift + c), t_weight(slope.t_weight + c), add(level + c);
          for (int64_t i = first * channels + c; i < last * channels; i += channels) {
            const L result = (L(u + i) - shift) * u_weight + (L(t + i) * t_weight + add);
            result.store(out + i, stream);
          }
        });
  }
}

// The instruction-set clones of the loops, one set per compute type.
#define TRANSKD_HCL_BN_LOOPS(T)                                                                                        \
  TRANSKD_CLONES void add_rows(const T* u, const T* t, int64_t rows, const Axis& columns, OfPlane<T> k,                \
                               BandSums* sums) {                                                                       \
    plane_sums_loop(u, t, rows, columns, k, sums);                                                                     \
  }                                                                                                                    \
  TRANSKD_CLONES void add_pixels(const PixelRows<T>& u, const PixelRows<T>& t, int64_t rows, int64_t pixels,           \
                                 int64_t channels, const Normaliser<T>& normaliser, double* sums, Total<T>& squares) { \
    pixel_sums_loop(u, t, rows, pixels, channels, normaliser, sums, squares);                                          \
  }                                                                                                                    \
  TRANSKD_CLONES void rows_backward(const T* u, const T* t, int64_t rows, const Axis& columns, T u_weight, T shift,    \
                                    T t_weight, const T* level, T* out, bool stream) {                                 \
    plane_backward_loop(u, t, rows, columns, u_weight, shift, t_weight, level, out, stream);                           \
  }                                                                                                                    \
  TRANSKD_CLONES void pixels_backward(const T* u, const T* t, int64_t pixels, int64_t channels, const Slope<T>& slope, \
                                      const T* level, T* out, bool stream) {                                           \
    pixel_backward_loop(u, t, pixels, channels, slope, level, out, stream);                                            \
  }
TRANSKD_HCL_BN_LOOPS(float)
TRANSKD_HCL_BN_LOOPS(double)
#undef TRANSKD_HCL_BN_LOOPS

}  // namespace
}  // namespace hcl_bn
}  // namespace transkd
