// Mean and centred squares of long runs of values per channel, in float arithmetic on values less a shift near their
// mean, so that an offset costs no digits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common/clones.h"
#include "cpu/common/lanes.h"
#include "cpu/common/tensor.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace {

// The longest chain of float additions, per lane of a vector.
constexpr int64_t kMomentChain = 64;

// sum and squares of z - shift; at most 2 kMomentChain vectors.
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

#define TRANSKD_MOMENT_LOOPS(T)                                                                                       \
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
  }
TRANSKD_MOMENT_LOOPS(float)
TRANSKD_MOMENT_LOOPS(double)
#undef TRANSKD_MOMENT_LOOPS

// Mean and centred squares of `pixels` pixels of `lanes` channels each, from an element on.
template <class T>
void moments(const Reader<T>& z, int64_t offset, int64_t pixels, int64_t lanes, std::vector<T>& buffer,
             std::vector<T>& scratch, double* mean, double* squares) {
  constexpr int64_t kBuffer = 4096, kFewest = 32;  // elements taken at a time; pixels, however many channels they have
  const int64_t chain = lanes == 1 ? 2 * kMomentChain * Vector<T>::kSize : kMomentChain;
  const int64_t at_once = std::clamp<int64_t>(kBuffer / lanes, std::min(chain, kFewest), chain);
  buffer.resize(z.buffer(at_once * lanes));
  scratch.assign(3 * lanes, 0);
  T *const shift = scratch.data(), *const sum = shift + lanes, *const products = sum + lanes;
  std::fill(mean, mean + lanes, 0.0);
  std::fill(squares, squares + lanes, 0.0);
  for (int64_t p = 0; p < pixels; p += at_once) {
    const int64_t count = std::min(at_once, pixels - p);
    const T* from = z.read(offset + p * lanes, count * lanes, buffer.data());
    if (p == 0) {
      const int64_t some = std::min(count, std::max<int64_t>(1, at_once / 8));
      add_moments(from, some, lanes, shift, sum, products);
      for (int64_t c = 0; c < lanes; ++c) shift[c] = sum[c] / static_cast<T>(some);
    }
    add_moments(from, count, lanes, shift, sum, products);
    join(static_cast<double>(p), static_cast<double>(count), lanes, sum, products, shift, mean, squares);
  }
}

}  // namespace
}  // namespace transkd
