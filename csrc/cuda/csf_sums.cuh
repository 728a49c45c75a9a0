// What one thread adds up over a run of pixels, in the type of computing: at most Pass::run values of each kind.
//
// Values are taken less the first one that the thread meets: an offset of all of them costs no digits, and an unusual
// first value few, since the run is short.
//
// All loads of a turn take place, where pixels have run out of one that was there before: so they are under way
// together, and the compiler need not keep each number by itself for the case that it was not loaded.
#pragma once

#include <cstdint>

#include "cuda/csf_block.cuh"

namespace transkd {
namespace csf {

// Of z.
template <class Z, int V, bool kChannelsLast>
struct FineSums {
  using T = ComputeType<Z>;
  static constexpr int kUnit = kChannelsLast ? 1 : V, kUnroll = V > 1 ? 4 : 16 / sizeof(T);

  Packed<Z, V> first;
  T sums[V] = {}, squares[V] = {};
  uint32_t count = 0;  // of pixels

  // z: the first pixel of the thread's channels.
  __device__ __forceinline__ FineSums(const Pass<T>& pass, const Place<kChannelsLast>& place, const Z* z, Range range) {
    first.clear();
    const uint32_t stride = pass.teams * kUnit;
    if (!place.active(pass)) range.end = 0;
    uint32_t pixel = range.begin + place.team * kUnit;
    if (pixel < range.end) first.load(z + place.offset(pass, pixel));
    while (pixel < range.end) {
      Packed<Z, V> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t at = pixel + u * stride;
        pack[u].load(z + place.offset(pass, at < range.end ? at : pixel));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u, pixel += stride) {
        if (pixel >= range.end) continue;
        count += kUnit;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T distance = pack[u].get(v) - first.get(kChannelsLast ? v : 0);
          sums[v] += distance;
          squares[v] += distance * distance;
        }
      }
    }
  }

  // The sum of one channel's differences from another value.
  __device__ __forceinline__ double sum(int channel, double about) const {
    return own(sums, channel) + count * distance(channel, about);
  }

  // The sum of their squares.
  __device__ __forceinline__ double square(int channel, double about) const {
    const double d = distance(channel, about);
    return own(squares, channel) + d * (2 * own(sums, channel) + count * d);
  }

 private:
  __device__ __forceinline__ double distance(int channel, double about) const { return first.get(channel) - about; }

  __device__ __forceinline__ static double own(const T (&of)[V], int channel) {
    if (kChannelsLast) return of[channel];
    double sum = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += of[v];
    return sum;
  }
};

// Of y, every value counted as often as fine pixels read it.
template <class Z, bool kVector, bool kChannelsLast>
struct CoarseSums {
  using T = ComputeType<Z>;
  static constexpr int V = kCoarseWidth<Z, kVector, kChannelsLast>, kUnit = kChannelsLast ? 1 : V,
                       kUnroll = kChannelsLast ? 1 : 2;
  static constexpr int kChannels = kChannelsLast ? V : 1;

  CoarsePack<Z, V, kVector> first;
  T sums[kChannels] = {};
  uint32_t count = 0;  // of fine pixels

  // y: where the first pixel of the thread's channels lies.
  __device__ __forceinline__ CoarseSums(const Pass<T>& pass, const Place<kChannelsLast>& place, int64_t y,
                                        Range range) {
    const uint32_t stride = pass.teams * kUnit;
    if (!place.active(pass)) range.end = 0;
    uint32_t pixel = range.begin + place.team * kUnit;
    Walk walk(pixel / kUnit, pass.coarse);
    first.pack.clear();
    while (pixel < range.end) {
      CoarsePack<Z, V, kVector> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t at = pixel + u * stride;
        pack[u].load(pass.y, pass.y_type, y + place.offset(pass, at < range.end ? at : pixel));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u, walk.next(pass.coarse), pixel += stride) {
        if (pixel >= range.end) continue;
        const uint32_t rows = pass.rows.start(walk.row + 1) - pass.rows.start(walk.row);
        uint32_t columns = 2;
        if constexpr (kUnit == 1) columns = pass.columns.start(walk.column + 1) - pass.columns.start(walk.column);
        // What no fine pixel reads counts nowhere, whatever stands there.
        if (rows * columns == 0) continue;
        if (count == 0) first = pack[u];
        count += rows * columns * kUnit;
        const T window = static_cast<T>(rows * columns);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int c = kChannelsLast ? v : 0;
          sums[c] += window * (pack[u].pack.get(v) - first.pack.get(c));
        }
      }
    }
  }

  __device__ __forceinline__ double total(int channel) const {
    return sums[channel] + static_cast<double>(count) * first.pack.get(channel);
  }
};

// Of G, of G (z - shift) and of G up(y), over fine pixels.
template <class Z, bool kVector, bool kChannelsLast>
struct Products {
  using T = ComputeType<Z>;
  static constexpr int V = kWidth<Z, kVector>, kUnit = kChannelsLast ? 1 : V,
                       kUnroll = kChannelsLast && kVector ? 1 : 16 / sizeof(T) / (kVector ? 2 : 1);
  static constexpr int kCoarse = kCoarseWidth<Z, kVector, kChannelsLast>, kChannels = kChannelsLast ? V : 1;

  T grad[kChannels] = {}, z[kChannels] = {}, y[kChannels] = {};

  __device__ __forceinline__ Products(const Pass<T>& pass, const Place<kChannelsLast>& place,
                                      const Packed<Z, kChannels>& shift, Range range) {
    const int64_t origin = place.origin(pass, pass.pixels), coarse_origin = place.origin(pass, pass.coarse_pixels);
    const uint32_t stride = pass.teams * kUnit;
    if (!place.active(pass)) range.end = 0;
    uint32_t pixel = range.begin + place.team * kUnit;
    Walk walk(pixel / kUnit, pass.fine);
    while (pixel < range.end) {
      Packed<Z, V> g[kUnroll], x[kUnroll];
      CoarsePack<Z, kCoarse, kVector> up[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u > 0 && pixel + u * stride < range.end) walk.next(pass.fine);
        const uint32_t here = pixel + u * stride < range.end ? pixel + u * stride : pixel;
        const int64_t at = origin + place.offset(pass, here);
        g[u].load(static_cast<const Z*>(pass.grad) + at);
        x[u].load(static_cast<const Z*>(pass.z) + at);
        const uint32_t coarse = coarse_pixel<V, kChannelsLast>(pass, walk);
        up[u].load(pass.y, pass.y_type, coarse_origin + place.offset(pass, coarse));
      }
      walk.next(pass.fine);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u, pixel += stride) {
        if (pixel >= range.end) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int c = kChannelsLast ? v : 0;
          const T value = g[u].get(v);
          grad[c] += value;
          z[c] += value * (x[u].get(v) - shift.get(c));
          y[c] += value * up[u].pack.get(v * kCoarse / V);
        }
      }
    }
  }
};

}  // namespace csf
}  // namespace transkd
