// The kernels of hcl_bn around the passes over both maps: moments of u, the statistics that come of them, and the
// coefficients of u's gradient.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/hcl_bn_plan.h"

namespace transkd {
namespace hcl_bn {

template <class Launch>
__device__ __forceinline__ uint32_t stage_of(const Launch& launch, uint32_t block) {
  uint32_t m = 0;
  while (m + 1 < launch.stages && block >= launch.stage[m + 1].first_block) ++m;
  return m;
}

// Every stride-th unit of a part of a channel's values (ReduceStage), and where it lies.
class UnitWalk {
 public:
  __device__ UnitWalk(const ReduceStage& stage, uint32_t first, uint32_t end, uint32_t stride)
      : index_(first),
        end_(end),
        stride_(stride),
        column_(first % stage.line_units),
        line_units_(stage.line_units),
        column_stride_(stride % stage.line_units),
        at_(first / stage.line_units * stage.line_step + static_cast<int64_t>(column_) * stage.unit_step),
        jump_(stride / stage.line_units * stage.line_step + static_cast<int64_t>(column_stride_) * stage.unit_step),
        wrap_(stage.line_step - static_cast<int64_t>(line_units_) * stage.unit_step) {}

  __device__ bool valid() const { return index_ < end_; }
  __device__ int64_t at() const { return at_; }
  __device__ void next() {
    index_ += stride_;
    column_ += column_stride_;
    at_ += jump_;
    if (column_ >= line_units_) {
      column_ -= line_units_;
      at_ += wrap_;
    }
  }

 private:
  uint32_t index_, end_, stride_, column_, line_units_, column_stride_;
  int64_t at_, jump_, wrap_;
};

// moments [parts, 3, channels]: of every part the number of values, their mean, and the squares about it.
//
// Values are taken less the first one that the thread meets in a run: an offset of all of them costs no digits, and an
// unusual first value few, since the run is short. Runs go on as doubles, about the first value of the part.
template <class S, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kVector&& kChannelsLast ? 2 : 4)
    hcl_bn_reduce_kernel(const __grid_constant__ SmallLaunch<ReduceStage> launch) {
  using T = ComputeType<S>;
  constexpr int V = kVector ? 16 / sizeof(S) : 1, kChannels = kChannelsLast ? V : 1, kPixels = V / kChannels;
  constexpr int kUnroll = kVector ? 4 : 16 / sizeof(T), kTurns = kRun / (kUnroll * kPixels);
  constexpr int kChains = kChannelsLast ? V : kVector ? 2 : 1;
  const ReduceStage& stage = launch.stage[stage_of(launch, blockIdx.x)];
  const uint32_t rest = blockIdx.x - stage.first_block;
  const uint32_t part = kChannelsLast ? rest / stage.channel_groups : rest % stage.parts;
  const uint32_t first_channel =
      kChannelsLast ? rest % stage.channel_groups * (stage.lanes * kChannels) : rest / stage.parts;
  const uint32_t lane = threadIdx.x % stage.lanes, team = threadIdx.x / stage.lanes;
  const uint32_t channel = first_channel + lane * kChannels;
  const uint32_t begin = static_cast<uint32_t>(
      min(static_cast<unsigned long long>(part) * stage.share, static_cast<unsigned long long>(stage.units)));
  const uint32_t end = begin + min(stage.share, stage.units - begin);
  const bool active = channel < stage.channels && begin < end;
  const auto plane_of = [&](uint32_t c) {
    return static_cast<const S*>(stage.u) + (kChannelsLast ? c : static_cast<int64_t>(c) * stage.pixels);
  };
  const S* u = plane_of(channel);

  const int64_t begin_at = UnitWalk(stage, begin, end, 1).at();
  Packed<S, kChannels> about;
  about.clear();
  if (active) about.load(u + begin_at);
  double sums[kChannels] = {}, squares[kChannels] = {};
  UnitWalk walk(stage, begin + team, active ? end : 0, kThreads / stage.lanes);
  while (walk.valid()) {
    Packed<S, kChannels> first;
    first.load(u + walk.at());
    T sum[kChains] = {}, square[kChains] = {};
    uint32_t count = 0;
    for (int turn = 0; turn < kTurns && walk.valid(); ++turn) {
      Packed<S, V> pack[kUnroll];
      bool valid[kUnroll];
      int64_t at = walk.at();
      // Where units have run out, one that was there is loaded again: so all loads are under way together.
#pragma unroll
      for (int k = 0; k < kUnroll; ++k, walk.next()) {
        valid[k] = walk.valid();
        if (valid[k]) at = walk.at();
        pack[k].load(u + at);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (!valid[k]) continue;
        count += kPixels;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T distance = pack[k].get(v) - first.get(kChannelsLast ? v : 0);
          sum[v % kChains] += distance;
          square[v % kChains] += distance * distance;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      double own = sum[c], own_square = square[c];
      if constexpr (!kChannelsLast) {
#pragma unroll
        for (int k = 1; k < kChains; ++k) {
          own += sum[k];
          own_square += square[k];
        }
      }
      const double distance = static_cast<double>(first.get(c)) - about.get(c);
      sums[c] += own + count * distance;
      squares[c] += own_square + distance * (2 * own + count * distance);
    }
  }

  __shared__ double of_warp[kThreads / kWarp][2][kChannelsLast ? kReduceChannels : 1];
  const uint32_t warp = threadIdx.x / kWarp;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const double sum = sum_lanes(sums[c], stage.lanes), square = sum_lanes(squares[c], stage.lanes);
    if (threadIdx.x % kWarp < stage.lanes) {
      of_warp[warp][0][lane * kChannels + c] = sum;
      of_warp[warp][1][lane * kChannels + c] = square;
    }
  }
  __syncthreads();
  const uint32_t own = first_channel + threadIdx.x;
  if (threadIdx.x >= stage.lanes * kChannels || own >= stage.channels) return;
  double sum = 0, square = 0;
  for (uint32_t w = 0; w < kThreads / kWarp; ++w) {
    sum += of_warp[w][0][threadIdx.x];
    square += of_warp[w][1][threadIdx.x];
  }
  ChannelMoments moments;
  moments.count = static_cast<double>(end - begin) * kPixels;
  if (begin < end) {
    moments.mean = widen(plane_of(own)[begin_at]) + sum / moments.count;
    moments.squares = square - sum * (sum / moments.count);
    if (moments.squares < 0) moments.squares = 0;  // NaN stays
  }
  double* to = stage.moments + static_cast<int64_t>(part) * 3 * stage.channels + own;
  to[0] = moments.count;
  to[stage.channels] = moments.mean;
  to[2 * stage.channels] = moments.squares;
}

// moments [rows, 3, channels] -> state, running statistics, and the forward's coefficients. Clears the counters of the
// forward, which would take a launch of its own.
template <class T>
__global__ void __launch_bounds__(kThreads) hcl_bn_statistics_kernel(const __grid_constant__ Statistics<T> launch) {
  __shared__ double of_team[3][kStatisticsTeams][kStatisticsChannels];
  for (uint32_t k = blockIdx.x * kThreads + threadIdx.x; k < launch.zeros; k += gridDim.x * kThreads) {
    launch.counters[k] = 0;
  }
  const StatisticsStage<T>& stage = launch.stage[stage_of(launch, blockIdx.x)];
  const uint32_t lane = threadIdx.x % kStatisticsChannels, team = threadIdx.x / kStatisticsChannels;
  const uint32_t channel = (blockIdx.x - stage.first_block) * kStatisticsChannels + lane;
  const bool active = channel < stage.channels;
  ChannelMoments moments;
  if (active) {
#pragma unroll 2
    for (uint32_t row = team; row < stage.rows; row += kStatisticsTeams) {
      moments.add(ChannelMoments::row(stage.moments, row, channel, stage.channels));
    }
  }
  of_team[0][team][lane] = moments.count;
  of_team[1][team][lane] = moments.mean;
  of_team[2][team][lane] = moments.squares;
  __syncthreads();
  if (!active || team != 0) return;
  for (uint32_t other = 1; other < kStatisticsTeams; ++other) {
    ChannelMoments more;
    more.count = of_team[0][other][lane];
    more.mean = of_team[1][other][lane];
    more.squares = of_team[2][other][lane];
    moments.add(more);
  }
  const BatchNorm& bn = stage.bn;
  const ChannelStatistics statistics = statistics_of(bn, channel, moments);
  stage.state[channel] = statistics.mean;
  stage.state[stage.channels + channel] = statistics.invstd;
  const double scale = bn.weight.get(channel, 1) * statistics.invstd;
  const T shift = static_cast<T>(statistics.mean);
  stage.coefficients[kScale * stage.channels + channel] = static_cast<T>(scale);
  stage.coefficients[kShift * stage.channels + channel] = shift;
  // What the shift is off the mean.
  stage.coefficients[kOffset * stage.channels + channel] =
      static_cast<T>(bn.bias.get(channel, 0) - scale * (statistics.mean - shift));
}

// Gradients of weight and bias, and the coefficients of u's gradient. One thread has a channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    hcl_bn_coefficients_kernel(const __grid_constant__ CoefficientLaunch<T> launch) {
  const CoefficientStage<T>& stage = launch.stage[stage_of(launch, blockIdx.x)];
  const uint32_t channels = stage.channels, channel = (blockIdx.x - stage.first_block) * kThreads + threadIdx.x;
  if (channel >= channels) return;
  const double grad = *launch.upstream;
  double sum = 0, product = 0;  // of g, of g xhat
#pragma unroll 4
  for (uint32_t b = 0; b < stage.batch; ++b) {
    const double* from = stage.sums + 2 * static_cast<int64_t>(b) * channels + channel;
    sum += from[0];
    product += from[channels];
  }
  stage.bias_gradient.set(channel, grad * sum);
  stage.weight_gradient.set(channel, grad * product);
  if (stage.coefficients == nullptr) return;

  double mean_grad = 0, mean_product = 0;
  if (stage.of_batch) {
    mean_grad = stage.means != nullptr ? stage.means[channel] : grad * sum / stage.values;
    mean_product = stage.means != nullptr ? stage.means[channels + channel] : grad * product / stage.values;
  }
  const double mean = stage.state[channel], invstd = stage.state[channels + channel];
  const double scale = stage.weight.get(channel, 1) * invstd, bias = stage.bias.get(channel, 0);
  const double alpha = grad * static_cast<double>(stage.alpha),
               u_weight = scale * (alpha * scale - mean_product * invstd);
  const T shift = static_cast<T>(mean);
  T* const to = stage.coefficients + channel;
  to[kUWeight * channels] = static_cast<T>(u_weight);
  to[kBackwardShift * channels] = shift;
  to[kTeacherWeight * channels] = static_cast<T>(-scale * alpha);
  to[kEntryWeight * channels] = static_cast<T>(scale * grad);
  to[kConstant * channels] = static_cast<T>(scale * (alpha * bias - mean_grad) - u_weight * (mean - shift));
}

}  // namespace hcl_bn
}  // namespace transkd
