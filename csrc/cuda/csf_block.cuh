// What the kernels of csf are made of: where a thread works, how y is read, how a block adds up, and the team of
// threads that runs csf_attention.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/csf_plan.h"

namespace transkd {
namespace csf {

// Neighbours that a thread takes at a time: channels in channels-last, else pixels of a row. Of y in NCHW it is those
// that they read: a row of y may be no whole number of wider vectors.
template <class Z, bool kVector>
constexpr int kWidth = kVector ? 16 / sizeof(Z) : 1;
template <class Z, bool kVector, bool kChannelsLast>
constexpr int kCoarseWidth = kVector && !kChannelsLast ? kWidth<Z, kVector> / 2 : kWidth<Z, kVector>;

// What a thread works on. In channels-last, `channel` is the first of its channels.
template <bool kChannelsLast>
struct Place {
  uint32_t cut, sample, channel;
  uint32_t team, lane;

  template <class T>
  __device__ Place(const Pass<T>& pass, int width) : team(threadIdx.x / pass.lanes), lane(threadIdx.x % pass.lanes) {
    if constexpr (kChannelsLast) {
      const uint32_t rest = blockIdx.x / pass.channel_groups;
      cut = rest % pass.cuts;
      sample = rest / pass.cuts;
      channel = (blockIdx.x % pass.channel_groups * pass.lanes + lane) * width;
    } else {
      const uint32_t plane = blockIdx.x / pass.cuts;
      cut = blockIdx.x % pass.cuts;
      sample = plane / pass.channels;
      channel = plane % pass.channels;
    }
  }

  // Whether it has channels at all.
  template <class T>
  __device__ bool active(const Pass<T>& pass) const {
    return !kChannelsLast || channel < pass.channels;
  }

  // Where its first pixel lies in a map with so many pixels in a plane.
  template <class T>
  __device__ int64_t origin(const Pass<T>& pass, uint32_t pixels) const {
    const uint32_t first = sample * pass.channels;  // planes fit into 32 bits
    return kChannelsLast ? static_cast<int64_t>(first) * pixels + channel
                         : static_cast<int64_t>(first + channel) * pixels;
  }

  // Where another pixel lies after that one.
  template <class T>
  __device__ int64_t offset(const Pass<T>& pass, int64_t pixels) const {
    return kChannelsLast ? pixels * pass.channels : pixels;
  }

  // The same for another channel of the sample.
  __device__ Place at(uint32_t other) const {
    Place place = *this;
    place.channel = other;
    return place;
  }

  // In a matrix [batch, channels].
  template <class T>
  __device__ uint32_t entry(const Pass<T>& pass) const {
    return sample * pass.channels + channel;
  }
};

// A run of pixels.
struct Range {
  uint32_t begin, end;

  // What cut `cut` has of `pixels`, `share` a cut.
  __device__ Range(uint32_t cut, uint32_t share, uint32_t pixels)
      : begin(clip(cut, share, pixels)), end(clip(cut + 1, share, pixels)) {}
  __device__ Range(uint32_t first, uint32_t past) : begin(first), end(past) {}

  __device__ uint32_t size() const { return end - begin; }
  // Its pixels from `done` on, `most` of them.
  __device__ Range after(uint32_t done, uint32_t most) const {
    const uint32_t first = begin + min(done, size());
    return {first, first + min(most, end - first)};
  }

 private:
  __device__ static uint32_t clip(uint64_t cut, uint32_t share, uint32_t pixels) {
    return static_cast<uint32_t>(min(cut * share, static_cast<uint64_t>(pixels)));
  }
};

// Coefficients of neighbouring channels, read where they are used: kept through a loop, those of eight channels would
// take more registers than there are.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> read_here(const T* from) {
  asm volatile("" ::: "memory");  // else the compiler moves the load out of the loop
  Packed<T, N> packed;
  packed.load(from);
  return packed;
}

// Row and column of the units that a thread takes in turn.
struct Walk {
  uint32_t row, column;

  __device__ Walk(uint32_t first, const Grid& grid) : row(first / grid.width), column(first % grid.width) {}

  __device__ void next(const Grid& grid) {
    row += grid.rows_on;
    column += grid.columns_on;
    if (column >= grid.width) {
      column -= grid.width;
      ++row;
    }
  }
};

// N neighbours in a map that is stored as y: as z is in the vector variants, by a type known at run time in the others.
template <class Z, int N, bool kVector>
struct CoarsePack {
  using T = ComputeType<Z>;
  Packed<std::conditional_t<kVector, Z, T>, N> pack;

  __device__ __forceinline__ void load(const void* map, StorageType type, int64_t at) {
    if constexpr (kVector) {
      pack.load(static_cast<const Z*>(map) + at);
    } else {
      pack.set(0, load_as<T>(map, type, at));
    }
  }
  __device__ __forceinline__ void store(void* map, StorageType type, int64_t at) const {
    if constexpr (kVector) {
      pack.store(static_cast<Z*>(map) + at);
    } else {
      store_as(pack.get(0), map, type, at);
    }
  }
};

// Where y lies for a unit of fine pixels: V neighbours in a row in NCHW, one pixel in channels-last.
template <int V, bool kChannelsLast, class T>
__device__ __forceinline__ uint32_t coarse_pixel(const Pass<T>& pass, const Walk& walk) {
  if constexpr (V > 1 && !kChannelsLast) {
    return walk.row / 2 * pass.columns.in + walk.column * (V / 2);
  } else {
    return pass.rows.source(walk.row) * pass.columns.in + pass.columns.source(walk.column);
  }
}

// A value near the mean that z's type can hold: half's range may end below a running mean.
template <class Z>
__device__ __forceinline__ double near(double mean) {
  return std::is_same_v<Z, __half> ? min(max(mean, -65504.0), 65504.0) : mean;
}

// Shared memory of a block: three sums of every channel, of the warps and of the whole block.
template <bool kChannelsLast>
struct BlockSums {
  static constexpr int kChannels = kChannelsLast ? kBlockChannels : 1;
  double of_warp[kReduceThreads<kChannelsLast> / kWarp][3][kChannels];
  double total[3][kChannels];  // thread k's are those of channel k; no other thread touches them
};

// Adds up one of the three numbers over each warp, of the threads' channel v.
template <bool kChannelsLast, int kChannels>
__device__ __forceinline__ void add_up_warp(BlockSums<kChannelsLast>& sums, int which, int v, uint32_t lanes,
                                            double value) {
  const uint32_t lane = threadIdx.x % kWarp;
  value = sum_lanes(value, lanes);
  if (lane < lanes) sums.of_warp[threadIdx.x / kWarp][which][lane * kChannels + v] = value;
}

// Adds what the warps have to the totals. The warps' sums may be overwritten afterwards.
template <bool kChannelsLast, int kChannels>
__device__ __forceinline__ void add_up_block(BlockSums<kChannelsLast>& sums, uint32_t lanes) {
  __syncthreads();
  if (threadIdx.x < lanes * kChannels) {
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      double total = sums.total[which][threadIdx.x];
      for (uint32_t warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums.of_warp[warp][which][threadIdx.x];
      sums.total[which][threadIdx.x] = total;
    }
  }
  __syncthreads();
}

// Before the first of them.
template <bool kChannelsLast, int kChannels>
__device__ __forceinline__ void clear_totals(BlockSums<kChannelsLast>& sums, uint32_t lanes) {
  if (threadIdx.x >= lanes * kChannels) return;
#pragma unroll
  for (int which = 0; which < 3; ++which) sums.total[which][threadIdx.x] = 0;
}

// The channel whose totals thread k of a block has after add_up_block; pass.channels or more in threads that have none.
template <bool kChannelsLast, int kChannels, class T>
__device__ __forceinline__ uint32_t block_channel(const Pass<T>& pass, const Place<kChannelsLast>& place) {
  if (threadIdx.x >= pass.lanes * kChannels) return pass.channels;
  return place.channel - place.lane * kChannels + threadIdx.x;
}

// Where the first of a channel's three sums goes; the others follow pass.channels apart.
template <bool kChannelsLast, class T>
__device__ __forceinline__ double* sums_of(const Pass<T>& pass, const Place<kChannelsLast>& place, uint32_t channel) {
  return pass.sums + (static_cast<int64_t>(place.sample) * pass.cuts + place.cut) * 3 * pass.channels + channel;
}

}  // namespace csf
}  // namespace transkd
