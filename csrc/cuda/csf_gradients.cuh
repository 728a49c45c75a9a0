// What csf_apply_kernel does:
//   dz = grad_weight G + z_weight (z - shift) + constant,  dy = up_weight (sum of G over the window) + pixel_share m,
// m being the number of the window's pixels. Every fine pixel lies in one window, so both come of one walk.
#pragma once

#include <cstdint>

#include "cuda/csf_block.cuh"

namespace transkd {
namespace csf {

// NCHW where every coarse row and column stands for two fine ones: a thread takes V neighbours of two rows.
template <class Z>
__device__ __forceinline__ void apply_to_rows(const Pass<ComputeType<Z>>& pass) {
  using T = ComputeType<Z>;
  constexpr int V = kWidth<Z, true>;
  const Place<false> place(pass, V);
  const int64_t origin = place.origin(pass, pass.pixels);
  const uint32_t entry = place.entry(pass);
  const Z* grad = static_cast<const Z*>(pass.grad) + origin;
  const Z* z = static_cast<const Z*>(pass.z) + origin;
  const T grad_weight = pass.coefficients.grad_weight[entry], z_weight = pass.coefficients.z_weight[entry];
  const T shift = pass.coefficients.shift[entry], constant = pass.coefficients.constant[entry];
  const T up_weight = pass.coefficients.up_weight[entry], pixel_share = pass.coefficients.pixel_share[entry];

  const uint32_t width = pass.columns.out, row_vectors = width / V;
  const Range units(place.cut, pass.share, pass.rows.in * row_vectors);
  const uint32_t unit = units.begin + place.team;
  if (unit >= units.end) return;
  const uint32_t row = unit / row_vectors, column = unit % row_vectors;
  const uint32_t pixel = 2 * row * width + column * V;
  const uint32_t rows = min(pass.rows.out - 2 * row, 2u), step = rows == 2 ? width : 0;
  Packed<Z, V> g[2], x[2];
#pragma unroll
  for (uint32_t r = 0; r < 2; ++r) {
    g[r].load(grad + pixel + r * step);
    x[r].load(z + pixel + r * step);
  }
  if (pass.y_gradient != nullptr) {
    Packed<Z, V / 2> coarse;
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      const T first = g[0].get(v) + g[0].get(v + 1), second = rows == 2 ? g[1].get(v) + g[1].get(v + 1) : 0;
      coarse.set(v / 2, up_weight * (first + second) + pixel_share * static_cast<T>(2 * rows));
    }
    const int64_t to = place.origin(pass, pass.coarse_pixels) + row * pass.columns.in + column * (V / 2);
    coarse.store(static_cast<Z*>(pass.y_gradient) + to);
  }
  if (pass.out == nullptr) return;
#pragma unroll
  for (uint32_t r = 0; r < 2; ++r) {
    if (r >= rows) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T distance = x[r].get(v) - shift;
      g[r].set(v, grad_weight * g[r].get(v) + z_weight * distance + constant);
    }
    g[r].store(static_cast<Z*>(pass.out) + origin + pixel + r * width);
  }
}

// The gradients of one coarse pixel and of what the lanes of a team find in its window. All threads of a warp call it
// together, since they exchange sums; those whose pixel is not `valid` do nothing else.
template <class Z, bool kVector, bool kChannelsLast>
__device__ __forceinline__ void apply_to_window(const Pass<ComputeType<Z>>& pass, const Place<kChannelsLast>& place,
                                                uint32_t pixel, bool valid) {
  using T = ComputeType<Z>;
  constexpr int V = kWidth<Z, kVector>, kUnroll = kVector ? 2 : 16 / sizeof(T);
  constexpr int kAtOnce = V > 2 ? 2 : V;  // channels: the coefficients of all of them take too many registers
  const uint32_t entry = place.entry(pass);
  if (kChannelsLast && !valid) return;
  const uint32_t lane = kChannelsLast ? 0 : place.lane, lanes = kChannelsLast ? 1 : pass.lanes;
  const uint32_t coarse_row = pixel / pass.columns.in, coarse_column = pixel % pass.columns.in;
  const uint32_t top = pass.rows.start(coarse_row), bottom = pass.rows.start(coarse_row + 1);
  const uint32_t left = pass.columns.start(coarse_column), right = pass.columns.start(coarse_column + 1);
  const T pixels = static_cast<T>((bottom - top) * (right - left));
  const uint32_t columns = right - left;
  uint32_t column = lane, rows = valid && lane < columns ? bottom - top : 0;  // rows that are left
  int64_t next = place.origin(pass, pass.pixels) + place.offset(pass, top * pass.columns.out + left + lane);
  T sums[V] = {};
  while (rows > 0) {
    Packed<Z, V> g[kUnroll], x[kUnroll];
    int64_t at[kUnroll];
    bool inside[kUnroll];
    // Where the window has ended, its last pixel again: with unconditional loads all are under way at once.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      inside[u] = rows > 0;
      at[u] = u == 0 || inside[u] ? next : at[max(u, 1) - 1];
      g[u].load(static_cast<const Z*>(pass.grad) + at[u]);
      x[u].load(static_cast<const Z*>(pass.z) + at[u]);
      column += lanes;
      next += place.offset(pass, lanes);
      if (column >= columns && rows > 0) {
        next += place.offset(pass, static_cast<int64_t>(pass.columns.out) + lane - column);
        column = lane;
        --rows;
      }
    }
#pragma unroll
    for (int first = 0; first < V; first += kAtOnce) {
      const auto grad_weight = read_here<kAtOnce>(pass.coefficients.grad_weight + entry + first);
      const auto z_weight = read_here<kAtOnce>(pass.coefficients.z_weight + entry + first);
      const auto shift = read_here<kAtOnce>(pass.coefficients.shift + entry + first);
      const auto constant = read_here<kAtOnce>(pass.coefficients.constant + entry + first);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          const T value = g[u].get(first + v), distance = x[u].get(first + v) - shift.get(v);
          if (inside[u]) sums[first + v] += value;
          g[u].set(first + v, grad_weight.get(v) * value + z_weight.get(v) * distance + constant.get(v));
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (inside[u] && pass.out != nullptr) g[u].store(static_cast<Z*>(pass.out) + at[u]);
    }
  }
  if (pass.y_gradient == nullptr) return;
  if constexpr (!kChannelsLast) sums[0] = sum_lanes(sums[0], 1, lanes);
  if (!valid || lane != 0) return;
  CoarsePack<Z, V, kVector> result;
#pragma unroll
  for (int first = 0; first < V; first += kAtOnce) {
    const auto up_weight = read_here<kAtOnce>(pass.coefficients.up_weight + entry + first);
    const auto pixel_share = read_here<kAtOnce>(pass.coefficients.pixel_share + entry + first);
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) {
      const T value = up_weight.get(v) * sums[first + v] + pixel_share.get(v) * pixels;
      result.pack.set(first + v, pixels == 0 ? 0 : value);  // also where the weights are not finite
    }
  }
  const int64_t to = place.origin(pass, pass.coarse_pixels);
  result.store(pass.y_gradient, pass.y_type, to + place.offset(pass, pixel));
}

// Channels-last, and NCHW at any other ratio, where a team of lanes takes a window.
template <class Z, bool kVector, bool kChannelsLast>
__device__ __forceinline__ void apply_to_windows(const Pass<ComputeType<Z>>& pass) {
  const Place<kChannelsLast> place(pass, kWidth<Z, kVector>);
  const Range coarse(place.cut, pass.share, pass.coarse_pixels);
  const uint32_t pixel = coarse.begin + place.team;
  apply_to_window<Z, kVector>(pass, place, pixel, place.active(pass) && pixel < coarse.end);
}

}  // namespace csf
}  // namespace transkd
