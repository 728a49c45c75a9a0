// pea on CUDA: the residuals R = f_p (x W^T + b) + f_a A - T, their squares, and the gradients they are made into.
// pea_plan.h says how a call is cut into blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/pea_parts.cuh"
#include "cuda/pea_plan.h"
#include "cuda/pea_tiles.cuh"

namespace transkd {
namespace pea {

// The products, by what they multiply: tokens by channels, all stored in rows.
template <class X, bool kTf32>
using Projection = TileProduct<X, Order::kRowMajor, Order::kColumnMajor, kTf32, kTile, kTile, kThreads>;  // x W^T
template <class X, bool kTf32>
using InputGradient = TileProduct<X, Order::kRowMajor, Order::kRowMajor, kTf32, kTile, kTile, kThreads>;  // R W
template <class X, bool kTf32>
using WeightGradient = TileProduct<X, Order::kColumnMajor, Order::kRowMajor, kTf32, kTile, kTile, kThreads>;  // R^T x

// Doubles take twice the registers.
template <class X>
constexpr int kBlocksAtOnce = sizeof(X) == 8 ? 1 : 2;

// Whether the next tiles are on their way while these are multiplied: wider types would need too many registers.
template <class X>
constexpr bool kLoadsAhead = sizeof(X) == 2;

__device__ __forceinline__ int padded_depth(int channels) {
  return (channels + kDepthStep - 1) / kDepthStep * kDepthStep;
}

// All tiles of tokens that one block takes of a narrow stage. Dynamic shared memory: the weight, x, R as the products
// take it, and sums where those are of another type.
template <class X, bool kTf32, class T>
__device__ __forceinline__ void project_narrow(const Launch<T>& launch, const StageView<T>& stage, X* memory, T* bias,
                                               ThreadSums<T>& sums) {
  constexpr int kOutTiles = kNarrowOut / kTile;
  X* weight = memory;
  X* x_tile = weight + stage.out_tiles * kTileElements<X>;
  X* residual = x_tile + kTileElements<X>;
  T* sums_tile = reinterpret_cast<T*>(residual + (kRounded<X> ? stage.out_tiles * kTileElements<X> : 0));
  const bool wants_weight = stage.weight_parts != nullptr, wants_x = stage.dx.data != nullptr;

  FactorTile<X> incoming;
  for (uint32_t out_tile = 0; out_tile < stage.out_tiles; ++out_tile) {
    incoming.load_weight(stage, out_tile, 0);
    incoming.put(weight + out_tile * kTileElements<X>);
  }
  for (uint32_t c = threadIdx.x; c < stage.out_tiles * kTile; c += kThreads) {
    bias[c] = c < stage.out ? parameter<T>(stage.bias, c) : T(0);
  }

  Residuals<X> residuals(stage);
  WeightGradient<X, kTf32> weight_gradient[kOutTiles];
  const Channels in(stage.in, 0);
  const uint32_t program = blockIdx.x - stage.first_block;
  for (uint32_t tile = program; tile < stage.tiles; tile += stage.programs) {
    const Tokens tokens(stage, tile);
    incoming.load(stage, stage.x, tokens, in);
    __syncthreads();
    incoming.put(x_tile);
    for (uint32_t out_tile = 0; out_tile < stage.out_tiles; ++out_tile) {
      const Channels out(stage.out, out_tile);
      X* residual_tile = residual + out_tile * kTileElements<X>;
      T* made = kRounded<X> ? sums_tile : reinterpret_cast<T*>(residual_tile);
      residuals.load_targets(stage, tokens, out);
      Projection<X, kTf32> projection;
      __syncthreads();
      projection.add(x_tile, kTileLeading<X>, weight + out_tile * kTileElements<X>, kTileLeading<X>,
                     padded_depth(in.count), out.count);
      projection.store(made, kTileLeading<T>);
      __syncthreads();
      residuals.make(stage, tokens, out, bias + out_tile * kTile, made, residual_tile, sums);
      __syncthreads();
      if (stage.bias_parts != nullptr) add_column_part(made, sums.of_channel[out_tile]);
    }
    if (wants_weight) {
#pragma unroll
      for (uint32_t t = 0; t < kOutTiles; ++t) {
        if (t < stage.out_tiles) {
          weight_gradient[t].add(residual + t * kTileElements<X>, kTileLeading<X>, x_tile, kTileLeading<X>, kTile,
                                 in.count);
        }
      }
    }
    if (wants_x) {
      InputGradient<X, kTf32> input_gradient;
      for (uint32_t t = 0; t < stage.out_tiles; ++t) {
        input_gradient.add(residual + t * kTileElements<X>, kTileLeading<X>, weight + t * kTileElements<X>,
                           kTileLeading<X>, padded_depth(Channels(stage.out, t).count), in.count);
      }
      __syncthreads();
      input_gradient.store(sums_tile, kTileLeading<T>);
      __syncthreads();
      store_input_gradient(stage, tokens, in, sums_tile, residuals.f_p());
    }
  }

  if (wants_weight) {
    T* to = stage.weight_parts + static_cast<int64_t>(program) * stage.out * stage.in;
#pragma unroll
    for (uint32_t out_tile = 0; out_tile < kOutTiles; ++out_tile) {
      if (out_tile >= stage.out_tiles) continue;
      __syncthreads();
      weight_gradient[out_tile].store(sums_tile, kTileLeading<T>);
      __syncthreads();
      store_weight_part(stage, out_tile, 0, sums_tile, to);
    }
  }
  if (stage.bias_parts != nullptr) {
    T* to = stage.bias_parts + static_cast<int64_t>(program) * stage.out_tiles * kTile;
    for (uint32_t t = 0; t < stage.out_tiles; ++t) store_column_sums(sums.of_channel[t], to + t * kTile);
  }
  store_block_sums(launch, stage, sums);
}

// One tile of residuals of a wide stage. Dynamic shared memory: x and the weight; in the same place later sums, and
// behind them R as X where it is rounded.
template <class X, bool kTf32, class T>
__device__ __forceinline__ void project_wide(const Launch<T>& launch, const StageView<T>& stage, X* memory, T* bias,
                                             ThreadSums<T>& sums) {
  X* x_tile = memory;
  X* weight_tile = memory + kTileElements<X>;
  T* sums_tile = reinterpret_cast<T*>(memory);
  X* residual_tile = reinterpret_cast<X*>(sums_tile + (kRounded<X> ? kTileElements<T> : 0));

  // Blocks that share x come one after the other.
  const uint32_t index = blockIdx.x - stage.first_block;
  const uint32_t tile = index / stage.out_tiles, out_tile = index % stage.out_tiles;
  const Tokens tokens(stage, tile);
  const Channels out(stage.out, out_tile);
  if (threadIdx.x < kTile) {
    bias[threadIdx.x] = threadIdx.x < out.count ? parameter<T>(stage.bias, out.first + threadIdx.x) : T(0);
  }
  Residuals<X> residuals(stage);
  residuals.load_targets(stage, tokens, out);

  Projection<X, kTf32> projection;
  FactorTile<X> x, weight;
  x.load(stage, stage.x, tokens, Channels(stage.in, 0));
  weight.load_weight(stage, out_tile, 0);
  for (uint32_t in_tile = 0; in_tile < stage.in_tiles; ++in_tile) {
    __syncthreads();
    x.put(x_tile);
    weight.put(weight_tile);
    __syncthreads();
    if (in_tile + 1 < stage.in_tiles) {
      x.load(stage, stage.x, tokens, Channels(stage.in, in_tile + 1));
      weight.load_weight(stage, out_tile, in_tile + 1);
    }
    projection.add(x_tile, kTileLeading<X>, weight_tile, kTileLeading<X>,
                   padded_depth(Channels(stage.in, in_tile).count), out.count);
  }
  __syncthreads();
  projection.store(sums_tile, kTileLeading<T>);
  __syncthreads();
  residuals.make(stage, tokens, out, bias, sums_tile, residual_tile, sums);
  __syncthreads();

  if (stage.residual_tiles != nullptr) {
    const int64_t width = static_cast<int64_t>(stage.out_tiles) * kTile;
    X* to = static_cast<X*>(stage.residual_tiles) + static_cast<int64_t>(tile) * kTile * width + out_tile * kTile;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(thread_now() + k * kThreads, false);
      const X* from = residual_tile + unit.token * kTileLeading<X> + unit.channel;
      Packed<X, kUnit> packed;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) packed.set(e, widen(from[e]));
      packed.store(to + unit.token * width + unit.channel);
    }
  }
  if (stage.bias_parts != nullptr) {
    add_column_part(sums_tile, sums.of_channel[0]);
    store_column_sums(sums.of_channel[0],
                      stage.bias_parts + (static_cast<int64_t>(tile) * stage.out_tiles + out_tile) * kTile);
  }
  store_block_sums(launch, stage, sums);
}

// Dynamic shared memory: Plan::Step::shared_bytes.
template <class X, bool kTf32>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<X>)
    pea_project_kernel(const __grid_constant__ Launch<ComputeType<X>> launch) {
  using T = ComputeType<X>;
  extern __shared__ uint4 shared_memory[];
  __shared__ T bias[kNarrowOut];
  __shared__ ThreadSums<T> sums;
  sums.clear();
  uint32_t m = 0;
  while (m + 1 < launch.stages && blockIdx.x >= launch.stage[m + 1].first_block) ++m;
  const StageView<T>& stage = launch.stage[m];
  X* memory = reinterpret_cast<X*>(shared_memory);
  if constexpr (!std::is_same_v<X, double>) {
    if (stage.narrow) return project_narrow<X, kTf32>(launch, stage, memory, bias, sums);
  }
  project_wide<X, kTf32>(launch, stage, memory, bias, sums);
}

// dx of a tile of tokens and input channels: R W.
template <class X, bool kTf32, class T>
__device__ __forceinline__ void make_input_gradient(const StageView<T>& stage, uint32_t index, X* memory) {
  X* residual_tile = memory;
  X* weight_tile = memory + kTileElements<X>;
  T* sums_tile = reinterpret_cast<T*>(memory);
  const uint32_t tile = index / stage.in_tiles, in_tile = index % stage.in_tiles;
  const Channels in(stage.in, in_tile);
  InputGradient<X, kTf32> product;
  FactorTile<X> residual, weight;
  residual.load_residuals(stage, tile, 0);
  weight.load_weight(stage, 0, in_tile);
  for (uint32_t out_tile = 0; out_tile < stage.out_tiles; ++out_tile) {
    __syncthreads();
    residual.put(residual_tile);
    weight.put(weight_tile);
    __syncthreads();
    const auto load_next = [&] {
      if (out_tile + 1 == stage.out_tiles) return;
      residual.load_residuals(stage, tile, out_tile + 1);
      weight.load_weight(stage, out_tile + 1, in_tile);
    };
    if constexpr (kLoadsAhead<X>) load_next();
    product.add(residual_tile, kTileLeading<X>, weight_tile, kTileLeading<X>,
                padded_depth(Channels(stage.out, out_tile).count), in.count);
    if constexpr (!kLoadsAhead<X>) load_next();
  }
  __syncthreads();
  product.store(sums_tile, kTileLeading<T>);
  __syncthreads();
  const T f_p = stage.projection_scale.data != nullptr ? parameter<T>(stage.projection_scale, 0) : T(1);
  store_input_gradient(stage, Tokens(stage, tile), in, sums_tile, f_p);
}

// A part of a tile of dweight: R^T x over some tiles of tokens.
template <class X, bool kTf32, class T>
__device__ __forceinline__ void make_weight_gradient(const StageView<T>& stage, uint32_t index, X* memory) {
  X* residual_tile = memory;
  X* x_tile = memory + kTileElements<X>;
  T* sums_tile = reinterpret_cast<T*>(memory);
  const uint32_t in_tile = index % stage.in_tiles, out_tile = index / stage.in_tiles % stage.out_tiles;
  const uint32_t split = index / stage.in_tiles / stage.out_tiles;
  const uint32_t first = split * stage.split_tiles, end = min(first + stage.split_tiles, stage.tiles);
  const Channels in(stage.in, in_tile);
  WeightGradient<X, kTf32> product;
  FactorTile<X> residual, x;
  residual.load_residuals(stage, first, out_tile);
  x.load(stage, stage.x, Tokens(stage, first), in);
  for (uint32_t tile = first; tile < end; ++tile) {
    __syncthreads();
    residual.put(residual_tile);
    x.put(x_tile);
    __syncthreads();
    const auto load_next = [&] {
      if (tile + 1 == end) return;
      residual.load_residuals(stage, tile + 1, out_tile);
      x.load(stage, stage.x, Tokens(stage, tile + 1), in);
    };
    if constexpr (kLoadsAhead<X>) load_next();
    product.add(residual_tile, kTileLeading<X>, x_tile, kTileLeading<X>, kTile, in.count);
    if constexpr (!kLoadsAhead<X>) load_next();
  }
  __syncthreads();
  product.store(sums_tile, kTileLeading<T>);
  __syncthreads();
  store_weight_part(stage, out_tile, in_tile, sums_tile,
                    stage.weight_parts + static_cast<int64_t>(split) * stage.out * stage.in);
}

// Of the wide stages. Dynamic shared memory: Plan::Step::gradient_shared_bytes.
template <class X, bool kTf32>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<X>)
    pea_gradient_kernel(const __grid_constant__ Launch<ComputeType<X>> launch) {
  using T = ComputeType<X>;
  extern __shared__ uint4 shared_memory[];
  // Stages without a block here have the first block of the next one that has.
  uint32_t m = 0;
  for (uint32_t k = 0; k < launch.stages; ++k) {
    if (launch.stage[k].residual_tiles != nullptr && blockIdx.x >= launch.stage[k].first_gradient_block) m = k;
  }
  const StageView<T>& stage = launch.stage[m];
  X* memory = reinterpret_cast<X*>(shared_memory);
  const uint32_t index = blockIdx.x - stage.first_gradient_block;
  if (index < stage.dx_blocks) {
    make_input_gradient<X, kTf32>(stage, index, memory);
  } else {
    make_weight_gradient<X, kTf32>(stage, index - stage.dx_blocks, memory);
  }
}

template <class T>
__device__ __forceinline__ void merge_parts(const Merge<T>& merge, T* of_thread) {
  const uint32_t elements = kThreads / merge.threads, mine = threadIdx.x / elements;
  const uint32_t element = (blockIdx.x - merge.first_block) * elements + threadIdx.x % elements;
  T sum = 0;
  if (element < merge.count) {
    const T* from = merge.from + element;
#pragma unroll 8
    for (uint32_t part = mine; part < merge.parts; part += merge.threads) sum += __ldg(from + part * merge.stride);
  }
  of_thread[threadIdx.x] = sum;
  __syncthreads();
  if (mine > 0 || element >= merge.count) return;
  for (uint32_t other = 1; other < merge.threads; ++other) sum += of_thread[other * elements + threadIdx.x];
  merge.to[element] = merge.projection_scale.data ? parameter<T>(merge.projection_scale, 0) * sum : sum;
}

// Sum of one of the block sums over a range of blocks; every thread gets it.
__device__ __forceinline__ double sum_of_blocks(const double* block_sums, int which, uint32_t first, uint32_t count) {
  double sum = 0;
#pragma unroll 4
  for (uint32_t k = threadIdx.x; k < count; k += kThreads) {
    sum += __ldg(block_sums + (static_cast<int64_t>(first) + k) * kBlockSums + which);
  }
  __syncthreads();
  return sum_block<kThreads>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) pea_finish_kernel(const __grid_constant__ Finish<T> finish) {
  __shared__ T of_thread[kThreads];
  if (blockIdx.x + 1 < gridDim.x) {
    uint32_t k = 0;
    while (k + 1 < finish.merges && blockIdx.x >= finish.merge[k + 1].first_block) ++k;
    return merge_parts(finish.merge[k], of_thread);
  }
  if (finish.loss != nullptr) {
    const double loss = sum_of_blocks(finish.block_sums, 0, 0, finish.call_blocks);
    if (threadIdx.x == 0) *finish.loss = static_cast<T>(loss);
  }
  for (uint32_t m = 0; m < finish.stages; ++m) {
    const auto& stage = finish.stage[m];
    if (stage.scales != nullptr) {
      const double projection = sum_of_blocks(finish.block_sums, 1, stage.first_block, stage.blocks);
      const double assistant = sum_of_blocks(finish.block_sums, 2, stage.first_block, stage.blocks);
      if (threadIdx.x == 0) {
        stage.scales[0] = static_cast<T>(projection);
        stage.scales[1] = static_cast<T>(assistant);
      }
    }
    if (threadIdx.x == 0) {
      const T factor = static_cast<T>(stage.factor);
      T* factors = finish.factors + m * kStageFactors;
      factors[0] = factor;
      factors[1] = -factor;
      factors[2] = stage.assistant_scale.data ? factor * parameter<T>(stage.assistant_scale, 0) : T(0);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) pea_scale_kernel(const __grid_constant__ ScaleLaunch<T> launch) {
  uint32_t k = 0;
  while (k + 1 < launch.jobs && blockIdx.x >= launch.job[k + 1].first_block) ++k;
  const ScaleJob& job = launch.job[k];
  const T factor = *launch.upstream * __ldg(launch.factors + job.place);
  const Map from{const_cast<void*>(job.from), job.from_type, false, job.wide}, to{job.to, job.to_type, false, job.wide};
  const int64_t first = static_cast<int64_t>(blockIdx.x - job.first_block) * kScaleElements;
#pragma unroll
  for (int u = 0; u < kScaleElements / kUnit / kThreads; ++u) {
    const int64_t at = first + (u * kThreads + static_cast<int64_t>(threadIdx.x)) * kUnit;
    if (at >= job.count) break;
    const int valid = static_cast<int>(min(job.count - at, static_cast<int64_t>(kUnit)));
    T values[kUnit];
    load_unit(from, at, 1, valid, values);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) values[e] *= factor;
    store_unit<true>(to, at, 1, valid, values);
  }
}

// Calls visit(TypeTag<X>(), bool_constant<TF32>) with what a launch needs.
template <class T, class Visit>
void visit_instance(const Variant& variant, Visit visit) {
  if constexpr (!std::is_same_v<T, double>) {
    if (variant.tf32) return visit(TypeTag<float>(), std::true_type());
  }
  visit_storage<T>(variant.x, [&](auto x) { visit(x, std::false_type()); });
}

}  // namespace pea
}  // namespace transkd
