// What hcl and hcl_bn on CPU share: a stage of a call, its pooled terms, and when a gradient goes past the cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/hcl_pyramid.h"
#include "cpu/common/clones.h"
#include "cpu/common/tensor.h"
#include "cpu/common/vector.h"

namespace transkd {
namespace {

constexpr int64_t kBuffer = 4096;    // elements taken at a time
constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay

// One stage of a call whose maps are checked.
struct Stage {
  const Tensor& student;
  const Tensor& teacher;
  double weight;
  int64_t batch, channels, height, width;
  Layout layout;
  Pyramid pyramid;

  Stage(const Tensor& s, const Tensor& t, double w, const double* level_weights)
      : student(s),
        teacher(t),
        weight(w),
        batch(s.size(0)),
        channels(s.size(1)),
        height(s.size(2)),
        width(s.size(3)),
        layout(layout_of(s)),
        pyramid(height, width, level_weights) {}

  int64_t planes() const { return batch * channels; }
  int64_t plane() const { return height * width; }
  int64_t cells() const { return pyramid.cells(); }
  // dL/dstudent = alpha d + ...
  double alpha() const {
    return 2 * weight * pyramid.pixel_weight / (static_cast<double>(planes()) * static_cast<double>(plane()));
  }
};

// One plane's cells for a vector of channels: table [cells, stride], sums of d in, gradient of the pooled terms out;
// lanes says how many of the vector's channels there are. Returns those channels' share of the loss's pooled terms.
template <class T>
TRANSKD_INLINE T pool_loop(const Pyramid& pyramid, const T* level_weight, T* table, int64_t stride, int lanes) {
  using Channels = Vector<T>;
  const int cells = pyramid.cells();
  T padded[Channels::kSize] = {};
  Channels sums[kMaxCells], gradient[kMaxCells], loss;
  for (int k = 0; k < cells; ++k) {
    for (int lane = 0; lane < lanes; ++lane) padded[lane] = table[k * stride + lane];
    sums[k].load(padded);
  }
  for (int level = 0; level < kLevels; ++level) {
    if (!pyramid.used[level]) continue;
    for (int64_t i = 0; i < kLevelSize[level]; ++i) {
      const Window& vertical = pyramid.rows.window[level][i];
      for (int64_t j = 0; j < kLevelSize[level]; ++j) {
        const Window& horizontal = pyramid.columns.window[level][j];
        const T share = static_cast<T>(1 / (vertical.length * horizontal.length));
        Channels pooled;
        for (int r = vertical.first; r < vertical.last; ++r) {
          for (int c = horizontal.first; c < horizontal.last; ++c) {
            pooled.lanes += sums[r * pyramid.columns.segments + c].lanes;
          }
        }
        pooled.lanes *= share;
        const typename Channels::Lanes weighted = pooled.lanes * level_weight[level];
        loss.lanes += weighted * pooled.lanes;
        const typename Channels::Lanes slope = weighted * (2 * share);
        for (int r = vertical.first; r < vertical.last; ++r) {
          for (int c = horizontal.first; c < horizontal.last; ++c) {
            gradient[r * pyramid.columns.segments + c].lanes += slope;
          }
        }
      }
    }
  }
  for (int k = 0; k < cells; ++k) {
    gradient[k].store(padded);
    for (int lane = 0; lane < lanes; ++lane) table[k * stride + lane] = padded[lane];
  }
  return loss.sum();
}

#define TRANSKD_HCL_POOL(T)                                                                                            \
  TRANSKD_CLONES T pool_channels(const Pyramid& pyramid, const T* level_weight, T* table, int64_t stride, int lanes) { \
    return pool_loop<T>(pyramid, level_weight, table, stride, lanes);                                                  \
  }
TRANSKD_HCL_POOL(float)
TRANSKD_HCL_POOL(double)
#undef TRANSKD_HCL_POOL

// table [B, cells, C]: sums of d in, gradient of the pooled terms out. Returns the loss's pooled terms.
template <class T>
double pool(const Stage& stage, T* table) {
  T level_weight[kLevels];
  for (int k = 0; k < kLevels; ++k) {
    const double windows = static_cast<double>(stage.planes()) * static_cast<double>(kLevelSize[k] * kLevelSize[k]);
    level_weight[k] = static_cast<T>(stage.weight * stage.pyramid.weight[k] / windows);
  }
  constexpr int kLanes = Vector<T>::kSize;
  const int64_t vectors = (stage.channels + kLanes - 1) / kLanes;
  std::vector<double> losses(stage.batch * vectors);
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * kLanes * stage.cells()));  // a cell is in several windows
  torch::stable::parallel_for(0, stage.batch * vectors, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % vectors * kLanes;
      losses[i] =
          pool_channels(stage.pyramid, level_weight, table + i / vectors * stage.cells() * stage.channels + first,
                        stage.channels, static_cast<int>(std::min<int64_t>(kLanes, stage.channels - first)));
    }
  });
  double loss = 0;
  for (const double part : losses) loss += part;
  return loss;
}

// What every border of rows and segments of a plane is a multiple of.
inline int64_t divisor(const Axis& columns) {
  int64_t common = columns.size;
  for (int j = 1; j < columns.segments; ++j) common = std::gcd(common, columns.edge[j]);
  return common;
}

// Whether a gradient goes past the cache: one of this size would only push out what comes next, and a usual store reads
// it from memory first.
template <class T>
bool streams(const Stage& stage, const Tensor& gradient, const Writer<T>& out, int64_t run) {
  constexpr int64_t kStreamBytes = 8 << 20;
  const int64_t bytes = stage.planes() * stage.plane() * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16 == 0 && run * sizeof(T) % 16 == 0;
  return bytes >= kStreamBytes && aligned && !out.buffered();
}

}  // namespace
}  // namespace transkd
