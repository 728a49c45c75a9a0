// What the blocks of pea's kernels have in common: residuals made of a tile of products, sums of a block, and how tiles
// of gradients leave it.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/pea_plan.h"
#include "cuda/pea_tiles.cuh"

namespace transkd {
namespace pea {

// Whether the products take R as another type than it is computed in.
template <class X>
constexpr bool kRounded = sizeof(X) == 2;

// What each thread of a block has summed, in shared memory: registers are for the products.
template <class T>
struct ThreadSums {
  double of_block[kBlockSums][kThreads];
  T of_channel[kNarrowOut / kTile][kThreads];

  __device__ void clear() {
#pragma unroll
    for (int which = 0; which < kBlockSums; ++which) of_block[which][threadIdx.x] = 0;
#pragma unroll
    for (int t = 0; t < kNarrowOut / kTile; ++t) of_channel[t][threadIdx.x] = 0;
  }
};

template <class T>
__device__ void store_block_sums(const Launch<T>& launch, const StageView<T>& stage, const ThreadSums<T>& sums) {
  double* to = launch.block_sums + static_cast<int64_t>(launch.first_block + blockIdx.x) * kBlockSums;
#pragma unroll 1
  for (int which = 0; which < kBlockSums; ++which) {
    __syncthreads();
    const double sum = sum_block<kThreads>(sums.of_block[which][threadIdx.x]);
    if (threadIdx.x == 0) to[which] = which == 0 ? sum * stage.loss_share : sum;
  }
}

// What turns a tile of x W^T into one of residuals.
template <class X>
class Residuals {
 public:
  using T = ComputeType<X>;

  __device__ __forceinline__ explicit Residuals(const StageView<T>& stage)
      : assisted_(stage.assistant.data != nullptr),
        f_p_(assisted_ ? parameter<T>(stage.projection_scale, 0) : T(1)),
        f_a_(assisted_ ? parameter<T>(stage.assistant_scale, 0) : T(0)) {}

  __device__ __forceinline__ void load_targets(const StageView<T>& stage, const Tokens& tokens,
                                               const Channels& channels) {
    const bool along_tokens = stage.target.channel_major;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(k, along_tokens, tokens, channels);
      load_unit(stage.target, place_of(stage, along_tokens, tokens, channels, unit), 1, unit.valid, target_[k]);
    }
  }

  // tile: x W^T in, R out, 0 beyond the map; rounded: R as X, where that is another type. bias: of the tile's channels.
  __device__ __forceinline__ void make(const StageView<T>& stage, const Tokens& tokens, const Channels& channels,
                                       const T* bias, T* tile, X* rounded, ThreadSums<T>& sums) const {
    const bool along_tokens = stage.target.channel_major;
    const int step = along_tokens ? kTileLeading<T> : 1, rounded_step = along_tokens ? kTileLeading<X> : 1;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(k, along_tokens, tokens, channels);
      T assistant[kUnit] = {};
      if (assisted_) {
        const bool major = stage.assistant.channel_major;
        load_unit(stage.assistant, place_of(stage, major, tokens, channels, unit),
                  step_of(stage, major, along_tokens, channels), unit.valid, assistant);
      }
      T* place = tile + unit.token * kTileLeading<T> + unit.channel;
      T residual[kUnit], squares = 0, by_projection = 0, by_assistant = 0;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        residual[e] = 0;
        if (e < unit.valid) {
          const T projection = place[e * step] + bias[unit.channel + (along_tokens ? 0 : e)];
          residual[e] = (assisted_ ? f_p_ * projection + f_a_ * assistant[e] : projection) - target_[k][e];
          squares += residual[e] * residual[e];
          by_projection += residual[e] * projection;
          by_assistant += residual[e] * assistant[e];
        }
        place[e * step] = residual[e];
      }
      const int thread = thread_now();
      sums.of_block[0][thread] += squares;
      sums.of_block[1][thread] += by_projection;
      sums.of_block[2][thread] += by_assistant;
      if constexpr (kRounded<X>) {
        X* to = rounded + unit.token * kTileLeading<X> + unit.channel;
        if (along_tokens) {
#pragma unroll
          for (int e = 0; e < kUnit; ++e) to[e * rounded_step] = stored_as<X>(residual[e]);
        } else {
          Packed<X, kUnit> packed;
#pragma unroll
          for (int e = 0; e < kUnit; ++e) packed.set(e, residual[e]);
          packed.store(to);
        }
      }
      if (stage.residual.data != nullptr) {
        const bool major = stage.residual.channel_major;
        store_unit(stage.residual, place_of(stage, major, tokens, channels, unit),
                   step_of(stage, major, along_tokens, channels), unit.valid, residual);
      }
    }
  }

  __device__ T f_p() const { return f_p_; }

 private:
  bool assisted_;
  T f_p_, f_a_;
  T target_[kUnits][kUnit];
};

// Threads of a block that share the sum of a tile's channel over its tokens.
constexpr int kColumnThreads = kThreads / kTile;

// Adds the thread's part of the sum of channel thread % kTile.
template <class T>
__device__ __forceinline__ void add_column_part(const T* tile, T* of_channel) {
  const int thread = thread_now(), channel = thread % kTile, first = thread / kTile * (kTile / kColumnThreads);
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kTile / kColumnThreads; ++i) sum += tile[(first + i) * kTileLeading<T> + channel];
  of_channel[thread] += sum;
}

template <class T>
__device__ __forceinline__ void store_column_sums(const T* of_channel, T* to) {
  __syncthreads();
  if (threadIdx.x >= kTile) return;
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kColumnThreads; ++i) sum += of_channel[i * kTile + threadIdx.x];
  to[threadIdx.x] = sum;
}

// A tile of f_p R W from shared memory.
template <class T>
__device__ __forceinline__ void store_input_gradient(const StageView<T>& stage, const Tokens& tokens,
                                                     const Channels& channels, const T* tile, T f_p) {
  const bool along_tokens = stage.dx.channel_major;
  const int step = along_tokens ? kTileLeading<T> : 1;
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const Unit unit(k, along_tokens, tokens, channels);
    const T* from = tile + unit.token * kTileLeading<T> + unit.channel;
    T values[kUnit];
#pragma unroll
    for (int e = 0; e < kUnit; ++e) values[e] = f_p * from[e * step];
    store_unit(stage.dx, place_of(stage, along_tokens, tokens, channels, unit), 1, unit.valid, values);
  }
}

// A tile of a part of R^T x from shared memory; `to` is the part.
template <class T>
__device__ __forceinline__ void store_weight_part(const StageView<T>& stage, uint32_t out_tile, uint32_t in_tile,
                                                  const T* tile, T* to) {
  const Channels out(stage.out, out_tile), in(stage.in, in_tile);
  const int column = threadIdx.x % kTile;
  if (column >= in.count) return;
  for (int row = threadIdx.x / kTile; row < out.count; row += kThreads / kTile) {
    to[(static_cast<int64_t>(out.first) + row) * stage.in + in.first + column] = tile[row * kTileLeading<T> + column];
  }
}

}  // namespace pea
}  // namespace transkd
