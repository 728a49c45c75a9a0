// seg_ce on CUDA: weighted cross-entropy of bilinearly upsampled logits, its gradient, and the classes. The upsampled
// logits are made twice, in registers: for the softmax's normalisation, then for the gradient, which each thread sums
// up per corner of its cell. seg_ce_plan.h says how a call is cut into blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/seg_ce_plan.h"
#include "cuda/seg_ce_tile.cuh"

namespace transkd {
namespace seg_ce {

// exp(x) for x <= 0. The hardware's exp2 of a rounded product has an absolute error of |x| exp(x) 2^-24 and two units
// in the last place: nothing beside the largest term of a softmax, which is 1. Arguments are differences of logits, so
// that their size does not matter. __expf is the same with three more instructions for results below 2^-126.
__device__ __forceinline__ float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return __expf(x);
#endif
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Within two units in the last place, for a divisor of the size of a number of classes.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

template <class T>
__device__ __forceinline__ T weight_of(const Launch<T>& launch, int k) {
  return launch.weight == nullptr ? T(1) : __ldg(launch.weight + k);
}

// Running maximum and sum of exponentials of the pixels of a square, and the first class that has the maximum. A
// maximum that begins finite leaves out -inf, and NaN comes out as a sum of NaN.
template <int kSide, class T>
struct Softmax {
  T most[kSide][kSide], sum[kSide][kSide];
  int best[kSide][kSide];

  __device__ Softmax() {
    constexpr T kLowest = std::numeric_limits<T>::lowest();
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        most[i][j] = kLowest;
        sum[i][j] = 0;
        best[i][j] = 0;
      }
    }
  }

  __device__ __forceinline__ void add(int i, int j, T value, int k) {
    const T ratio = exponential(-std::abs(value - most[i][j]));
    // As in torch NaN is greater than all, and the first one counts; after it the sum is NaN.
    if (!(value <= most[i][j]) && sum[i][j] == sum[i][j]) best[i][j] = k;
    sum[i][j] = value > most[i][j] ? sum[i][j] * ratio + 1 : sum[i][j] + ratio;
    most[i][j] = max(most[i][j], value);
  }
};

// Blocks on a multiprocessor that registers are to last for.
template <class T>
constexpr int kForwardBlocks = std::is_same_v<T, double> ? 1 : 2;

template <class L, int kSide>
__device__ __forceinline__ void read_row_as(const void* labels, int64_t first, uint32_t count, int64_t (&row)[kSide]) {
#pragma unroll
  for (uint32_t j = 0; j < kSide; ++j) {
    if (j < count) row[j] = __ldg(static_cast<const L*>(labels) + first + j);
  }
}

template <int kSide>
__device__ __forceinline__ void read_row(const void* labels, LabelType type, int64_t first, uint32_t count,
                                         int64_t (&row)[kSide]) {
  switch (type) {
    case LabelType::kByte:
      return read_row_as<uint8_t>(labels, first, count, row);
    case LabelType::kShort:
      return read_row_as<int16_t>(labels, first, count, row);
    case LabelType::kInt:
      return read_row_as<int32_t>(labels, first, count, row);
    case LabelType::kLong:
      return read_row_as<int64_t>(labels, first, count, row);
  }
}

// What one class adds to the gradient of a square's four corners: p - [k = label], weighted.
template <int kSide, class T>
struct Gradient {
  T corner[4] = {};

  __device__ __forceinline__ void add_column(const Bilinears<kSide, T>& bilinears, int j, const T (&slope)[kSide]) {
    T top = 0, bottom = 0;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      top += (1 - bilinears.bottom[i]) * slope[i];
      bottom += bilinears.bottom[i] * slope[i];
    }
    corner[0] += (1 - bilinears.right[j]) * top;
    corner[1] += bilinears.right[j] * top;
    corner[2] += (1 - bilinears.right[j]) * bottom;
    corner[3] += bilinears.right[j] * bottom;
  }

  // Where the second corner of an axis is the first one again.
  __device__ __forceinline__ void fold(bool rows, bool columns) {
    if (columns) {
      corner[0] += corner[1];
      corner[2] += corner[3];
      corner[1] = corner[3] = 0;
    }
    if (rows) {
      corner[0] += corner[2];
      corner[1] += corner[3];
      corner[2] = corner[3] = 0;
    }
  }
};

template <int kThreadsOfBlock, class V>
__device__ __forceinline__ V sum_of_block(V value) {
  __syncthreads();
  return sum_block<kThreadsOfBlock>(value);
}

// The labels of a square, -1 where a pixel does not count, and what there is to count. In sum the weights over the
// sums of exponentials take their place.
template <int kSide, class T>
__device__ __forceinline__ T look_up(const Launch<T>& launch, const Tile<T>& tile, const Points<T>& points,
                                     uint32_t round, Softmax<kSide, T>& softmax, int (&labels)[kSide][kSide],
                                     Sums& sums, int& spreads) {
  const Cell<T> cell(launch, tile);
  const Square<kSide> square(launch, points, cell, round);
  const int64_t first = square.first_label(launch, tile);
  T loss = 0, total = 0;
  uint32_t right = 0, ignored = 0, out_of_range = 0;
  bool any_nan = false;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    int64_t row[kSide] = {};
    const uint32_t count = i < static_cast<int>(square.rows) ? square.columns : 0;
    read_row(launch.labels, launch.label_type, first + static_cast<int64_t>(i) * launch.label_width, count, row);
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const bool there = j < static_cast<int>(count), ignore = row[j] == launch.ignore_index;
      const bool outside = row[j] < 0 || row[j] >= launch.classes;
      const int label = there && !ignore && !outside ? static_cast<int>(row[j]) : -1;
      ignored += there && ignore;
      out_of_range += there && outside && !ignore;
      const T infinite = softmax.most[i][j] - softmax.most[i][j];  // makes NaN of an infinite logit, as torch does
      const T sum = softmax.sum[i][j] + infinite;
      T weight = 0;
      if (label >= 0) {
        weight = weight_of(launch, label);
        right += softmax.best[i][j] == label;
        total += weight;
        loss += weight * logarithm(sum);
      }
      any_nan = any_nan || (j < static_cast<int>(count) && sum != sum);
      softmax.sum[i][j] = quotient(weight, sum);
      labels[i][j] = label;
    }
    asm volatile("" ::: "memory");  // else the compiler moves all loads to the front, and has no registers for them
  }
  if (any_nan && (cell.source_row < 0 || cell.source_column < 0)) atomicExch(&spreads, 1);
  sums.total += total;
  sums.right += right;
  sums.ignored += ignored;
  sums.out_of_range += out_of_range;
  return loss;
}

// The gradient of the second source pixel of an axis has 0 times that of the label pixels whose position is clamped,
// which may be NaN. Their cells are two away from it.
template <class T>
__device__ T spread(const Launch<T>& launch, const Tile<T>& tile, const T (&of_cells)[4][kThreads]) {
  const Cell<T> cell(launch, tile);
  const uint32_t columns = launch.tile_columns, cells = launch.tile_rows * columns;
  const bool row = cell.row == 1 && cell.source_row == 0, column = cell.column == 1 && cell.source_column == 0;
  T sum = 0;
  for (uint32_t share = 0, at = cell.row * columns + cell.column; share < launch.shares; ++share, at += cells) {
    if (row) sum += of_cells[1][at - columns] + of_cells[0][at - columns + 1];
    if (column) sum += of_cells[2][at - 1] + of_cells[0][at + columns - 1];
    if (row && column) sum += of_cells[0][at - columns - 1];
  }
  return sum;
}

// The weights in the type of computing.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) seg_ce_weights_kernel(const __grid_constant__ Weights<T> weights) {
  const uint32_t k = blockIdx.x * kFinishThreads + threadIdx.x;
  if (k >= weights.count) return;
  if (weights.type == StorageType::kDouble) {
    weights.to[k] = static_cast<T>(load_as<double>(weights.from, weights.type, k));
  } else {
    weights.to[k] = load_as<float>(weights.from, weights.type, k);
  }
}

template <int kSide, class T>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>)
    seg_ce_forward_kernel(const __grid_constant__ Launch<T> launch) {
  __shared__ Points<T> points;
  __shared__ Sums sums[kThreads];      // of each thread: seldom needed, they would only take registers
  constexpr bool kAlone = kSide == 1;  // each cell has one corner
  __shared__ T corners[2][4][kAlone ? 1 : kThreads];
  __shared__ Tile<T> tile;
  __shared__ int spreads;  // whether label pixels at clamped positions have NaN
  const uint32_t cells = launch.tile_rows * launch.tile_columns;
  const bool keep = launch.kept != nullptr;
  sums[threadIdx.x] = Sums{};
  if (threadIdx.x == 0) {
    tile = tile_of(launch, blockIdx.x);
    spreads = 0;
  }
  __syncthreads();
  fill_tables<kSide>(launch, tile, points);
  __syncthreads();

  for (uint32_t round = 0; round < launch.rounds; ++round) {
    const Bilinears<kSide, T> bilinears(launch, tile, points, round);
    Softmax<kSide, T> softmax;
    for (uint32_t first = 0; first < launch.classes; first += kClasses<T>) {
      const uint32_t classes = min(launch.classes - first, static_cast<uint32_t>(kClasses<T>));
      read_classes(launch, tile, first, classes, points);
      __syncthreads();
      if (!bilinears.empty) {
        for (uint32_t k = 0; k < classes; ++k) {
          bilinears.interpolate(launch, tile, points.value[k],
                                [&](int i, int j, T value) { softmax.add(i, j, value, static_cast<int>(first + k)); });
        }
      }
      __syncthreads();
    }

    int labels[kSide][kSide];
    T loss = look_up(launch, tile, points, round, softmax, labels, sums[threadIdx.x], spreads);

    // Whether the thread adds up what four cells have for the point between them, and where its own cell lies.
    bool between, last_row, last_column;
    {
      const Cell<T> cell(launch, tile);
      between = cell.share == 0 && cell.row + 1 < launch.tile_rows && cell.column + 1 < launch.tile_columns;
      last_row = launch.height == launch.label_height || cell.in_last_row(launch);
      last_column = launch.width == launch.label_width || cell.in_last_column(launch);
    }
    for (uint32_t first = 0; first < launch.classes; first += kClasses<T>) {
      const uint32_t classes = min(launch.classes - first, static_cast<uint32_t>(kClasses<T>));
      read_classes(launch, tile, first, classes, points);
      __syncthreads();
      for (uint32_t k = 0; k < classes; ++k) {
        Gradient<kSide, T> gradient;
        if (!bilinears.empty) {
          const int number = static_cast<int>(first + k);
          const T weight = weight_of(launch, number);
          const auto hits = [&](int i, int j, T difference) {
            const bool hit = labels[i][j] == number;
            if (hit) loss -= weight * difference;
            return hit;
          };
          if (!keep) {
            bilinears.interpolate(launch, tile, points.value[k],
                                  [&](int i, int j, T value) { hits(i, j, value - softmax.most[i][j]); });
            continue;
          }
          T slope[kSide];
          bilinears.interpolate(launch, tile, points.value[k], [&](int i, int j, T value) {
            const T difference = value - softmax.most[i][j];
            slope[i] = exponential(difference) * softmax.sum[i][j];
            if (hits(i, j, difference)) slope[i] -= weight;
            if (i == kSide - 1) gradient.add_column(bilinears, j, slope);
          });
        }
        if (!keep) continue;
        if constexpr (kAlone) {
          if (threadIdx.x < cells) points.value[k][bilinears.point] = gradient.corner[0];
        } else {
          gradient.fold(last_row, last_column);
          T(&of_cells)[4][kThreads] = corners[k % 2];
#pragma unroll
          for (int c = 0; c < 4; ++c) of_cells[c][threadIdx.x] = gradient.corner[c];
          __syncthreads();
          if (between) {
            T sum = 0;
            for (uint32_t share = 0, at = threadIdx.x; share < launch.shares; ++share, at += cells) {
              sum += (of_cells[3][at] + of_cells[2][at + 1]) +
                     (of_cells[1][at + launch.tile_columns] + of_cells[0][at + launch.tile_columns + 1]);
            }
            if (spreads != 0) sum += spread(launch, tile, of_cells);
            points.value[k][bilinears.point + launch.tile_columns + 2] = sum;  // all threads are done with its logits
          }
        }
      }
      __syncthreads();
      // No barrier after it: a thread reads the next classes of the points whose gradient it has written.
      if (keep) write_classes(launch, tile, first, classes, round > 0, points);
    }
    sums[threadIdx.x].loss += loss;
  }

  const Sums mine = Cell<T>(launch, tile).counts(launch) ? sums[threadIdx.x] : Sums{};
  const Sums all = {sum_of_block<kThreads>(mine.loss), sum_of_block<kThreads>(mine.total),
                    sum_of_block<kThreads>(mine.right), sum_of_block<kThreads>(mine.ignored),
                    sum_of_block<kThreads>(mine.out_of_range)};
  if (threadIdx.x == 0) launch.sums[blockIdx.x] = all;
}

// One block.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) seg_ce_finish_kernel(const __grid_constant__ Finish<T> finish) {
  double loss = 0, total = 0;
  unsigned long long right = 0, ignored = 0, out_of_range = 0;
  for (uint32_t block = threadIdx.x; block < finish.blocks; block += kFinishThreads) {
    const Sums& sums = finish.sums[block];
    loss += sums.loss;
    total += sums.total;
    right += sums.right;
    ignored += sums.ignored;
    out_of_range += sums.out_of_range;
  }
  loss = sum_of_block<kFinishThreads>(loss);
  total = sum_of_block<kFinishThreads>(total);
  right = sum_of_block<kFinishThreads>(right);
  ignored = sum_of_block<kFinishThreads>(ignored);
  out_of_range = sum_of_block<kFinishThreads>(out_of_range);
  if (threadIdx.x != 0) return;
  *finish.loss = static_cast<T>(total <= 0 ? 0 : loss / total);
  *finish.total = static_cast<T>(total);
  finish.counts[0] = finish.pixels - static_cast<int64_t>(ignored + out_of_range);
  finish.counts[1] = static_cast<int64_t>(right);
  finish.counts[2] = static_cast<int64_t>(ignored);
  finish.counts[3] = static_cast<int64_t>(out_of_range);
}

// gradient = upstream / total * kept.
template <class T, class S>
__global__ void __launch_bounds__(kScaleThreads) seg_ce_scale_kernel(const __grid_constant__ Scale<T> scale) {
  constexpr int kWidth = 16 / sizeof(S);
  const T total = *scale.total, factor = total <= 0 ? 0 : *scale.upstream / total;
  const auto scaled = [&](T value) { return total <= 0 ? T(0) : factor * value; };
  S* gradient = static_cast<S*>(scale.gradient);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kWidth * kScaleVectors * kScaleThreads);
  const auto place = [&](int u) { return first + (u * kScaleThreads + static_cast<int64_t>(threadIdx.x)) * kWidth; };
  if (scale.vectors && first + kWidth * kScaleVectors * kScaleThreads <= scale.count) {
    Pack<T, kWidth> kept[kScaleVectors];
#pragma unroll
    for (int u = 0; u < kScaleVectors; ++u) kept[u].load(scale.kept + place(u));
#pragma unroll
    for (int u = 0; u < kScaleVectors; ++u) {
      Pack<S, kWidth> out;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) narrow(scaled(kept[u].element[e]), out.element[e]);
      out.store(gradient + place(u));
    }
  } else {
    for (int e = static_cast<int>(threadIdx.x); e < kWidth * kScaleVectors * kScaleThreads; e += kScaleThreads) {
      if (first + e < scale.count) narrow(scaled(__ldg(scale.kept + first + e)), gradient[first + e]);
    }
  }
}

template <int kSide, class T>
__global__ void __launch_bounds__(kThreads, 2) seg_ce_predict_kernel(const __grid_constant__ Launch<T> launch) {
  __shared__ Points<T> points;
  __shared__ Tile<T> tile;
  if (threadIdx.x == 0) tile = tile_of(launch, blockIdx.x);
  __syncthreads();
  fill_tables<kSide>(launch, tile, points);
  __syncthreads();
  for (uint32_t round = 0; round < launch.rounds; ++round) {
    const Bilinears<kSide, T> bilinears(launch, tile, points, round);
    T most[kSide][kSide];
    int best[kSide][kSide] = {};
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) most[i][j] = -std::numeric_limits<T>::infinity();
    }
    for (uint32_t first = 0; first < launch.classes; first += kClasses<T>) {
      const uint32_t classes = min(launch.classes - first, static_cast<uint32_t>(kClasses<T>));
      read_classes(launch, tile, first, classes, points);
      __syncthreads();
      if (!bilinears.empty) {
        for (uint32_t k = 0; k < classes; ++k) {
          bilinears.interpolate(launch, tile, points.value[k], [&](int i, int j, T value) {
            // NaN is greater than all, and the first one counts.
            if (!(value <= most[i][j]) && most[i][j] == most[i][j]) {
              most[i][j] = value;
              best[i][j] = static_cast<int>(first + k);
            }
          });
        }
      }
      __syncthreads();
    }
    const Square<kSide> square(launch, points, Cell<T>(launch, tile), round);
    int64_t* to = launch.predicted + square.first_label(launch, tile);
#pragma unroll
    for (uint32_t i = 0; i < kSide; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < kSide; ++j) {
        if (square.has(i, j)) to[static_cast<int64_t>(i) * launch.label_width + j] = best[i][j];
      }
    }
  }
}

// Calls visit(integral_constant<side>) with what a plan needs.
template <class T, class Visit>
void visit_side(int side, Visit visit) {
  if (side == 1) return visit(std::integral_constant<int, 1>());
  if constexpr (!std::is_same_v<T, double>) {
    if (side == 4) return visit(std::integral_constant<int, 4>());
  }
  visit(std::integral_constant<int, 2>());
}

}  // namespace seg_ce
}  // namespace transkd
