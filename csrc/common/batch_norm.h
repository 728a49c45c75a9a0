// Batch normalisation as the ops see it, on CPU and CUDA alike: small tensors of any dtype, the moments of a channel's
// values, what a channel is normalised with, and the running statistics. All of it is computed in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "common/host_device.h"
#include "common/storage_type.h"

namespace transkd {

enum class Norm : int64_t { kNone, kRunning, kBatch, kTracked };  // kTracked: kBatch that updates running statistics

TRANSKD_INLINE bool of_batch(Norm norm) { return norm == Norm::kBatch || norm == Norm::kTracked; }

// A small tensor of any floating dtype, or none.
struct Values {
  void* data = nullptr;
  StorageType type = StorageType::kFloat;

  TRANSKD_INLINE bool given() const { return data != nullptr; }

  TRANSKD_INLINE double operator[](int64_t i) const {
    if (type == StorageType::kFloat) return static_cast<const float*>(data)[i];
    if (type == StorageType::kDouble) return static_cast<const double*>(data)[i];
    if (type == StorageType::kBFloat16) return load(static_cast<const BFloat16*>(data)[i]);
    return load(static_cast<const Half*>(data)[i]);
  }

  TRANSKD_INLINE double get(int64_t i, double otherwise) const { return given() ? (*this)[i] : otherwise; }

  // Nothing where there is no tensor.
  TRANSKD_INLINE void set(int64_t i, double value) const {
    if (!given()) return;
    if (type == StorageType::kFloat) static_cast<float*>(data)[i] = static_cast<float>(value);
    if (type == StorageType::kDouble) static_cast<double*>(data)[i] = value;
    if (type == StorageType::kBFloat16) store(static_cast<BFloat16*>(data) + i, static_cast<float>(value));
    if (type == StorageType::kHalf) store(static_cast<Half*>(data) + i, static_cast<float>(value));
  }
};

struct BatchNorm {
  Norm norm;
  Values weight, bias, running_mean, running_var;
  int64_t* batches = nullptr;  // num_batches_tracked
  double eps;
  double momentum;
  bool cumulative;  // the average over all batches instead of momentum
};

// The weight of new statistics in the running ones.
TRANSKD_INLINE double share_of_new(const BatchNorm& bn) {
  return bn.cumulative ? 1 / static_cast<double>(*bn.batches + 1) : bn.momentum;
}

// Moves the running statistics of one channel; variance is the biased one over `count` values.
TRANSKD_INLINE void track(const BatchNorm& bn, int64_t channel, double mean, double variance, double count) {
  if (bn.norm != Norm::kTracked) return;
  const double share = share_of_new(bn);
  const auto move = [&](const Values& running, double value) {
    const double old = running[channel];
    running.set(channel, old + share * (value - old));
  };
  move(bn.running_mean, mean);
  move(bn.running_var, variance * (count / (count - 1)));
}

// Of some values of one channel: their number, their mean, and the sum of squared deviations from it.
struct ChannelMoments {
  double count = 0, mean = 0, squares = 0;

  // Joins those of other values (Chan, Golub, LeVeque); in a fixed order, the result repeats bit for bit.
  TRANSKD_INLINE void add(const ChannelMoments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count, share = other.count / total, distance = other.mean - mean;
    squares += other.squares + distance * distance * (count * share);
    mean += distance * share;
    count = total;
  }

  // Row `row` of moments [rows, 3, channels].
  TRANSKD_INLINE static ChannelMoments row(const double* moments, int64_t row, int64_t channel, int64_t channels) {
    const double* const from = moments + row * 3 * channels + channel;
    return {from[0], from[channels], from[2 * channels]};
  }

  TRANSKD_INLINE static ChannelMoments of_rows(const double* moments, int64_t rows, int64_t channel, int64_t channels) {
    ChannelMoments all;
    for (int64_t k = 0; k < rows; ++k) all.add(row(moments, k, channel, channels));
    return all;
  }
};

// What a channel is normalised with: (value - mean) invstd.
struct ChannelStatistics {
  double mean, invstd;
};

// From the moments of all values, which update the running statistics, or from the running statistics, as the kind of
// normalisation has it. Counting the batch is left to the caller: every channel reads the counter.
TRANSKD_INLINE ChannelStatistics statistics_of(const BatchNorm& bn, int64_t channel, const ChannelMoments& moments) {
  double mean, variance;
  if (of_batch(bn.norm)) {
    mean = moments.mean;
    variance = moments.squares / moments.count;
    track(bn, channel, mean, variance, moments.count);
  } else {
    mean = bn.running_mean[channel];
    variance = bn.running_var[channel];
  }
  return {mean, 1 / sqrt(variance + bn.eps)};
}

}  // namespace transkd
