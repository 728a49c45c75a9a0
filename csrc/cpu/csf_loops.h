// The inner loops of csf on CPU, over one run of memory; all maps are the compute type. Each exists for a plane, where
// neighbours in memory are pixels, and for pixels of a channels-last map, where they are channels.
#pragma once

#include "common/csf_attention.h"
#include "cpu/common/clones.h"
#include "cpu/common/lanes.h"
#include "cpu/csf_maps.h"

namespace transkd {
namespace csf {
namespace {

// Pixels of a channels-last map that one vector of channels visits before the next vector's turn: as many as stay in
// the first cache, so that memory is still read in its order.
constexpr int64_t kGroup = 8;
// Likewise where every visit costs an addition to sums in memory. Also the longest chain of float additions there.
constexpr int64_t kSumGroup = 32;
// The longest chain of float additions over a plane, per lane of a vector.
constexpr int64_t kChain = 64;

// ---- Moments of z, and y's weighted sums.

// sum and squares of z - shift; at most 2 kChain vectors.
template <class T>
TRANSKD_INLINE void plane_moments_loop(const T* z, int64_t pixels, const T* shift, T* sum, T* squares) {
  using Whole = Vector<T>;
  Whole sums[2], products[2];
  const T about = *shift;
  int64_t i = 0;
  for (; i + 2 * Whole::kSize <= pixels; i += 2 * Whole::kSize) {
    for (int k = 0; k < 2; ++k) {
      Whole d;
      d.load(z + i + k * Whole::kSize);
      d.lanes -= about;
      sums[k].lanes += d.lanes;
      products[k].lanes += d.lanes * d.lanes;
    }
  }
  T rest = 0, rest_squares = 0;
  for (; i < pixels; ++i) {
    const T d = z[i] - about;
    rest += d;
    rest_squares += d * d;
  }
  sums[0].lanes += sums[1].lanes;
  products[0].lanes += products[1].lanes;
  *sum = sums[0].sum() + rest;
  *squares = products[0].sum() + rest_squares;
}

template <class T>
TRANSKD_INLINE void pixel_moments_loop(const T* z, int64_t pixels, int64_t channels, const T* shift, T* sum,
                                       T* squares) {
  over_lanes<T>(
      channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
        using L = typename decltype(tag)::Type;
        const L about(shift + c);
        L sums, products;
        for (int64_t p = 0; p < pixels; ++p) {
          const L d = L(z + p * channels + c) - about;
          sums = sums + d;
          products = products + d * d;
        }
        sums.store(sum + c);
        products.store(squares + c);
      });
}

// Joins the moments of `before` pixels with those of `count` more, given about shift; then shift is the mean of all
// (Chan, Golub, LeVeque). It suits the next pixels: where it is far from their mean, the sum of squares is large too.
template <class T>
TRANSKD_INLINE void join_loop(double before, double count, int64_t channels, const T* __restrict sum,
                              const T* __restrict squares, T* __restrict shift, double* __restrict mean,
                              double* __restrict centred) {
  const double share = count / (before + count), part = 1 / count, weight = before * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double from_shift = sum[c] * part, within = squares[c] - sum[c] * from_shift;
    const double distance = shift[c] + from_shift - mean[c];
    centred[c] += (within < 0 ? 0 : within) + distance * distance * weight;
    mean[c] += distance * share;
    shift[c] = static_cast<T>(mean[c]);
  }
}

// sums += times (sum over pixels of y width), in double: y is small, and its mean goes into the attention as it is. A
// pixel of width 0 is read by none, so its NaN does not count.
template <class T>
TRANSKD_INLINE void plane_weighted_loop(const T* y, const T* widths, int64_t pixels, double times, double* sums) {
  using Wide = Vector<double>;
  using Narrow = Vector<T, Wide::kSize * sizeof(T)>;
  constexpr int kSums = 4;
  Wide sum[kSums];
  int64_t i = 0;
  for (; i + kSums * Narrow::kSize <= pixels; i += kSums * Narrow::kSize) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) {
      Narrow value, width;
      value.load(y + i + k * Narrow::kSize);
      width.load(widths + i + k * Narrow::kSize);
      value.lanes = width.lanes > 0 ? value.lanes : typename Narrow::Lanes{};
      sum[k].lanes += __builtin_convertvector(value.lanes, typename Wide::Lanes) *
                      __builtin_convertvector(width.lanes, typename Wide::Lanes);
    }
  }
  double rest = 0;
  for (; i < pixels; ++i) rest += widths[i] > 0 ? static_cast<double>(y[i]) * static_cast<double>(widths[i]) : 0;
  sum[0].lanes = (sum[0].lanes + sum[1].lanes) + (sum[2].lanes + sum[3].lanes);
  *sums += times * (sum[0].sum() + rest);
}

template <class T>
TRANSKD_INLINE void pixel_weighted_loop(const T* y, const T* widths, int64_t pixels, int64_t channels, double times,
                                        double* __restrict sums) {
  for (int64_t p = 0; p < pixels; ++p, y += channels) {
    const double weight = times * static_cast<double>(widths[p]);
    if (weight == 0) continue;
    for (int64_t c = 0; c < channels; ++c) sums[c] += weight * static_cast<double>(y[c]);
  }
}

// ---- Forward: v = scale (z - shift) + offset + up_weight up(y).

// up[x] = offset + weight y[source[x]] for some rows; pairs says that source[x] = x / 2.
template <class T>
TRANSKD_INLINE void expand_loop(const T* __restrict y, int64_t rows, int64_t coarse_width,
                                const int64_t* __restrict source, int64_t width, bool pairs, T weight, T offset,
                                T* __restrict up) {
  for (int64_t r = 0; r < rows; ++r, y += coarse_width, up += width) {
    if (!pairs) {
      for (int64_t x = 0; x < width; ++x) up[x] = offset + weight * y[source[x]];
      continue;
    }
    for (int64_t j = 0; j < width / 2; ++j) up[2 * j] = up[2 * j + 1] = offset + weight * y[j];
    if (width % 2) up[width - 1] = offset + weight * y[width / 2];
  }
}

// spread holds offset + up_weight y with its columns repeated.
template <class T>
TRANSKD_INLINE void plane_fuse_loop(const T* z, const T* spread, const Run& run, int64_t width, T scale, T shift, T* v,
                                    bool stream) {
  for (int64_t r = 0; r < run.rows; ++r, z += run.columns, v += run.columns) {
    const T* const up = spread + run.coarse(r, width) + run.column;
    over_lanes<T>(
        run.columns, [&](auto tag, int64_t x) __attribute__((always_inline)) {
          using L = typename decltype(tag)::Type;
          ((L(z + x) - shift) * scale + L(up + x)).store(v + x, stream);
        });
  }
}

template <class T>
TRANSKD_INLINE void pixel_fuse_loop(const T* z, const T* coarse, const Run& run, int64_t coarse_row, int64_t channels,
                                    const Coefficients<T>& k, int64_t entry, T* v, bool stream) {
  for (int64_t r = 0; r < run.rows; ++r, z += run.columns * channels, v += run.columns * channels) {
    const T* const y = coarse + run.coarse(r, coarse_row);
    for (int64_t first = 0; first < run.columns; first += kGroup) {
      const int64_t last = std::min(first + kGroup, run.columns);
      over_lanes<T>(
          channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
            using L = typename decltype(tag)::Type;
            const L scale(k.scale + entry + c), shift(k.shift + entry + c), offset(k.offset + entry + c);
            const L weight(k.up_weight + entry + c);
            for (int64_t x = first; x < last; ++x) {
              const L add = weight * L(y + run.column_source[x] * channels + c) + offset;
              (scale * (L(z + x * channels + c) - shift) + add).store(v + x * channels + c, stream);
            }
          });
    }
  }
}

// ---- Backward, sums: of G, G (z - shift), G up(y), added to sums [3, channels].

template <class T>
TRANSKD_INLINE void plane_products_loop(const T* grad, const T* z, const T* spread, const Run& run, int64_t width,
                                        T shift, double* sums) {
  using Whole = Vector<T>;
  Whole sum[3][2];
  double rest[3] = {};
  int64_t chain = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int k = 0; k < 3; ++k) {
      sum[k][0].lanes += sum[k][1].lanes;
      rest[k] += sum[k][0].sum();
      sum[k][0].lanes = sum[k][1].lanes = typename Whole::Lanes{};
    }
    chain = 0;
  };
  for (int64_t r = 0; r < run.rows; ++r, grad += run.columns, z += run.columns) {
    const T* const up = spread + run.coarse(r, width) + run.column;
    int64_t x = 0;
    for (; x + 2 * Whole::kSize <= run.columns; x += 2 * Whole::kSize) {
      for (int k = 0; k < 2; ++k) {
        Whole g, value, other;
        g.load(grad + x + k * Whole::kSize);
        value.load(z + x + k * Whole::kSize);
        other.load(up + x + k * Whole::kSize);
        sum[0][k].lanes += g.lanes;
        sum[1][k].lanes += g.lanes * (value.lanes - shift);
        sum[2][k].lanes += g.lanes * other.lanes;
      }
      if (++chain == kChain) flush();
    }
    for (; x < run.columns; ++x) {
      rest[0] += grad[x];
      rest[1] += grad[x] * (z[x] - shift);
      rest[2] += grad[x] * up[x];
    }
  }
  flush();
  for (int k = 0; k < 3; ++k) sums[k] += rest[k];
}

template <class T>
TRANSKD_INLINE void pixel_products_loop(const T* grad, const T* z, const T* coarse, const Run& run, int64_t coarse_row,
                                        int64_t channels, const T* shift, double* sums) {
  for (int64_t r = 0; r < run.rows; ++r, grad += run.columns * channels, z += run.columns * channels) {
    const T* const y = coarse + run.coarse(r, coarse_row);
    for (int64_t first = 0; first < run.columns; first += kSumGroup) {
      const int64_t last = std::min(first + kSumGroup, run.columns);
      over_lanes<T>(
          channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
            using L = typename decltype(tag)::Type;
            const L about(shift + c);
            L sum_g, sum_z, sum_y;
            for (int64_t x = first; x < last; ++x) {
              const L g(grad + x * channels + c);
              sum_g = sum_g + g;
              sum_z = sum_z + g * (L(z + x * channels + c) - about);
              sum_y = sum_y + g * L(y + run.column_source[x] * channels + c);
            }
            sum_g.add_to(sums + c);
            sum_z.add_to(sums + channels + c);
            sum_y.add_to(sums + 2 * channels + c);
          });
    }
  }
}

// ---- Backward, gradients: dz = grad_weight G + z_weight (z - shift) + constant, and the sums of G for dy.

// kZ: whether z counts; kOut: whether dz is wanted at all. sums: of G over the rows, one per column.
template <class T, class Sum, bool kZ, bool kOut>
TRANSKD_INLINE void plane_apply_loop(const T* grad, const T* z, const Run& run, int64_t width, const Coefficients<T>& k,
                                     int64_t entry, Sum* window_sums, T* dz, bool stream) {
  const T weight = k.grad_weight[entry], z_weight = k.z_weight[entry], shift = k.shift[entry];
  const T constant = k.constant[entry];
  for (int64_t r = 0; r < run.rows; ++r, grad += run.columns) {
    Sum* const sums = window_sums + run.coarse(r, width) + run.column;
    over_lanes<T>(
        run.columns, [&](auto tag, int64_t x) __attribute__((always_inline)) {
          using L = typename decltype(tag)::Type;
          const L g(grad + x);
          g.add_to(sums + x);
          L result = g * weight + constant;
          if constexpr (kZ) result = g * weight + ((L(z + r * run.columns + x) - shift) * z_weight + constant);
          if constexpr (kOut) result.store(dz + r * run.columns + x, stream);
        });
  }
}

// sums: of G over the window, one per coarse pixel and channel.
template <class T, class Sum, bool kZ, bool kOut>
TRANSKD_INLINE void pixel_apply_loop(const T* grad, const T* z, const Run& run, int64_t coarse_row, int64_t channels,
                                     const Coefficients<T>& k, int64_t entry, Sum* window_sums, T* dz, bool stream) {
  for (int64_t r = 0; r < run.rows; ++r) {
    Sum* const sums = window_sums + run.coarse(r, coarse_row);
    for (int64_t first = 0; first < run.columns; first += kGroup) {
      const int64_t last = std::min(first + kGroup, run.columns);
      over_lanes<T>(
          channels, [&](auto tag, int64_t c) __attribute__((always_inline)) {
            using L = typename decltype(tag)::Type;
            const L weight(k.grad_weight + entry + c), z_weight(k.z_weight + entry + c), shift(k.shift + entry + c);
            const L constant(k.constant + entry + c);
            for (int64_t x = first; x < last; ++x) {
              const int64_t place = (r * run.columns + x) * channels + c;
              const L g(grad + place);
              g.add_to(sums + run.column_source[x] * channels + c);
              L result = weight * g + constant;
              if constexpr (kZ) result = weight * g + (z_weight * (L(z + place) - shift) + constant);
              if constexpr (kOut) result.store(dz + place, stream);
            }
          });
    }
  }
}

// dy = up_weight (sum of G over the window) + pixel_share m; 0 where no pixel reads y. For `height` coarse rows with
// windows from row_starts on.
template <class T, class Sum>
TRANSKD_INLINE void plane_windows_loop(const Sum* __restrict sums, const int64_t* row_starts, int64_t height,
                                       const int64_t* __restrict starts, int64_t width, bool pairs, T weight, T share,
                                       T* __restrict dy) {
  for (int64_t i = 0; i < height; ++i, sums += starts[width], dy += width) {
    const int64_t rows = row_starts[i + 1] - row_starts[i];
    int64_t j = 0;
    if (pairs && rows > 0) {
      const T constant = share * static_cast<T>(2 * rows);
      for (; j < starts[width] / 2; ++j) dy[j] = weight * static_cast<T>(sums[2 * j] + sums[2 * j + 1]) + constant;
    }
    for (; j < width; ++j) {
      double sum = 0;
      for (int64_t x = starts[j]; x < starts[j + 1]; ++x) sum += sums[x];
      const int64_t pixels = rows * (starts[j + 1] - starts[j]);
      dy[j] = pixels ? weight * static_cast<T>(sum) + share * static_cast<T>(pixels) : 0;
    }
  }
}

template <class T, class Sum>
TRANSKD_INLINE void pixel_windows_loop(const Sum* __restrict sums, const int64_t* row_starts, int64_t height,
                                       const int64_t* __restrict starts, int64_t width, int64_t channels,
                                       const T* __restrict weight, const T* __restrict share, T* __restrict dy) {
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j, sums += channels, dy += channels) {
      const T pixels = static_cast<T>((row_starts[i + 1] - row_starts[i]) * (starts[j + 1] - starts[j]));
      for (int64_t c = 0; c < channels; ++c) {
        dy[c] = pixels > 0 ? weight[c] * static_cast<T>(sums[c]) + share[c] * pixels : 0;
      }
    }
  }
}

// The instruction-set clones of the loops, one set per compute type; one channel means a plane.
#define TRANSKD_CSF_LOOPS(T)                                                                                          \
  TRANSKD_CLONES void add_moments(const T* z, int64_t pixels, int64_t channels, const T* shift, T* sum, T* squares) { \
    if (channels == 1) {                                                                                              \
      plane_moments_loop(z, pixels, shift, sum, squares);                                                             \
    } else {                                                                                                          \
      pixel_moments_loop(z, pixels, channels, shift, sum, squares);                                                   \
    }                                                                                                                 \
  }                                                                                                                   \
  TRANSKD_CLONES void join(double before, double count, int64_t channels, const T* sum, const T* squares, T* shift,   \
                           double* mean, double* centred) {                                                           \
    join_loop(before, count, channels, sum, squares, shift, mean, centred);                                           \
  }                                                                                                                   \
  TRANSKD_CLONES void add_weighted(const T* y, const T* widths, int64_t pixels, int64_t channels, double times,       \
                                   double* sums) {                                                                    \
    if (channels == 1) {                                                                                              \
      plane_weighted_loop(y, widths, pixels, times, sums);                                                            \
    } else {                                                                                                          \
      pixel_weighted_loop(y, widths, pixels, channels, times, sums);                                                  \
    }                                                                                                                 \
  }                                                                                                                   \
  TRANSKD_CLONES void expand(const T* y, int64_t rows, int64_t coarse_width, const int64_t* source, int64_t width,    \
                             bool pairs, T weight, T offset, T* up) {                                                 \
    expand_loop(y, rows, coarse_width, source, width, pairs, weight, offset, up);                                     \
  }                                                                                                                   \
  TRANSKD_CLONES void fuse_plane(const T* z, const T* spread, const Run& run, int64_t width, T scale, T shift, T* v,  \
                                 bool stream) {                                                                       \
    plane_fuse_loop(z, spread, run, width, scale, shift, v, stream);                                                  \
  }                                                                                                                   \
  TRANSKD_CLONES void fuse_pixels(const T* z, const T* coarse, const Run& run, int64_t coarse_row, int64_t channels,  \
                                  const Coefficients<T>& k, int64_t entry, T* v, bool stream) {                       \
    pixel_fuse_loop(z, coarse, run, coarse_row, channels, k, entry, v, stream);                                       \
  }                                                                                                                   \
  TRANSKD_CLONES void add_products_plane(const T* grad, const T* z, const T* spread, const Run& run, int64_t width,   \
                                         T shift, double* sums) {                                                     \
    plane_products_loop(grad, z, spread, run, width, shift, sums);                                                    \
  }                                                                                                                   \
  TRANSKD_CLONES void add_products_pixels(const T* grad, const T* z, const T* coarse, const Run& run,                 \
                                          int64_t coarse_row, int64_t channels, const T* shift, double* sums) {       \
    pixel_products_loop(grad, z, coarse, run, coarse_row, channels, shift, sums);                                     \
  }
TRANSKD_CSF_LOOPS(float)
TRANSKD_CSF_LOOPS(double)
#undef TRANSKD_CSF_LOOPS

// z is null where it does not count, dz where it is not wanted.
#define TRANSKD_CSF_APPLY_LOOPS(T, Sum)                                                                               \
  TRANSKD_CLONES void apply_plane(const T* grad, const T* z, const Run& run, int64_t width, const Coefficients<T>& k, \
                                  int64_t entry, Sum* sums, T* dz, bool stream) {                                     \
    if (!dz) {                                                                                                        \
      plane_apply_loop<T, Sum, false, false>(grad, z, run, width, k, entry, sums, dz, stream);                        \
    } else if (!z) {                                                                                                  \
      plane_apply_loop<T, Sum, false, true>(grad, z, run, width, k, entry, sums, dz, stream);                         \
    } else {                                                                                                          \
      plane_apply_loop<T, Sum, true, true>(grad, z, run, width, k, entry, sums, dz, stream);                          \
    }                                                                                                                 \
  }                                                                                                                   \
  TRANSKD_CLONES void apply_pixels(const T* grad, const T* z, const Run& run, int64_t coarse_row, int64_t channels,   \
                                   const Coefficients<T>& k, int64_t entry, Sum* sums, T* dz, bool stream) {          \
    if (!dz) {                                                                                                        \
      pixel_apply_loop<T, Sum, false, false>(grad, z, run, coarse_row, channels, k, entry, sums, dz, stream);         \
    } else if (!z) {                                                                                                  \
      pixel_apply_loop<T, Sum, false, true>(grad, z, run, coarse_row, channels, k, entry, sums, dz, stream);          \
    } else {                                                                                                          \
      pixel_apply_loop<T, Sum, true, true>(grad, z, run, coarse_row, channels, k, entry, sums, dz, stream);           \
    }                                                                                                                 \
  }                                                                                                                   \
  TRANSKD_CLONES void windows_of_plane(const Sum* sums, const int64_t* row_starts, int64_t height,                    \
                                       const int64_t* starts, int64_t width, bool pairs, T weight, T share, T* dy) {  \
    plane_windows_loop(sums, row_starts, height, starts, width, pairs, weight, share, dy);                            \
  }                                                                                                                   \
  TRANSKD_CLONES void windows_of_pixels(const Sum* sums, const int64_t* row_starts, int64_t height,                   \
                                        const int64_t* starts, int64_t width, int64_t channels, const T* weight,      \
                                        const T* share, T* dy) {                                                      \
    pixel_windows_loop(sums, row_starts, height, starts, width, channels, weight, share, dy);                         \
  }
TRANSKD_CSF_APPLY_LOOPS(float, float)
TRANSKD_CSF_APPLY_LOOPS(float, double)
TRANSKD_CSF_APPLY_LOOPS(double, double)
#undef TRANSKD_CSF_APPLY_LOOPS

}  // namespace
}  // namespace csf
}  // namespace transkd
