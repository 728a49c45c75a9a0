// How the CUDA kernels of csf cut a call into blocks. Plain C++ without torch or CUDA, so that the tests on CPU run
// exactly what the launcher runs.
//
// A block works on one plane (one sample, one channel) in NCHW, on some channels of one sample in channels-last, and
// `cuts` blocks share it. Threads form teams of `lanes`: side by side in channels (channels-last), or in the columns of
// one window of fine pixels (NCHW, gradients of a ratio that has no kernel of its own). Teams take pixels in turn.
// All of it depends on the maps only, never on the device: results are the same everywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/csf_attention.h"
#include "common/nearest.h"
#include "common/storage_type.h"
#include "cuda/common/launch_size.h"

namespace transkd {
namespace csf {

constexpr int kWarp = 32;
// Of a block, at most.
constexpr int kThreads = 256;
// Sums in channels-last have few parts, so that [samples, parts, 3, channels] stays small: two blocks must keep a
// multiprocessor busy. Three sums of each of eight channels need more registers than 64.
template <bool kChannelsLast>
constexpr int kReduceThreads = kChannelsLast ? 384 : kThreads;
constexpr int kAttentionThreads = 512;
// What a thread of csf_fuse_kernel takes: enough accesses under way to cover the latency of memory.
template <bool kChannelsLast>
constexpr int kFuseUnits = kChannelsLast ? 2 : 4;
// Channels that a block takes in channels-last: whole 128-byte lines, and little shared memory for their sums.
constexpr int kBlockChannels = 64;

// Dynamic shared memory of the attention kernels, for copies of parameters.
constexpr int kStageBytes = 32 << 10;

// The maps of a call; those that a launch does not touch are nullptr.
struct Maps {
  int64_t batch, channels, height, width, coarse_height, coarse_width;
  bool channels_last;
  StorageType z_type, y_type;
  const void* z;
  const void* y;
  const void* grad;
  void* out;  // v, or the gradient of z
  void* y_gradient;
};

// Which instantiation of a kernel a launch needs. The vector ones ask that y is stored as z is and, in NCHW, that
// every coarse row and column stands for two fine ones.
struct Variant {
  StorageType type;  // of z
  bool vector, channels_last;
};

// Tests choose others, to reach every way of cutting with small maps. Threads are whole warps, two at least.
struct Tuning {
  int64_t threads = kThreads, channels_last_reduce_threads = kReduceThreads<true>;
  int64_t attention_threads = kAttentionThreads;
  int64_t run = 128;    // values that a thread adds up before they go on as doubles; a multiple of 8
  bool vectors = true;  // use 16-byte accesses where they are possible
};

// The units of a plane, each a few neighbouring pixels of a row or one, and how far apart are those that a thread takes
// in turn.
struct Grid {
  uint32_t width, rows_on, columns_on;

  Grid() = default;
  Grid(int64_t row_units, uint32_t stride)
      : width(static_cast<uint32_t>(row_units)), rows_on(stride / width), columns_on(stride % width) {}
};

// The parameter of the kernels that go over the maps. T is the type of computing.
template <class T>
struct Pass {
  const void* z;
  const void* y;
  const void* grad;
  void* out;
  void* y_gradient;
  double* sums;        // [batch, parts, 3, channels]
  const double* mean;  // [channels]
  Coefficients<T> coefficients;
  NearestOf<int32_t> rows, columns;
  uint32_t channels, pixels, coarse_pixels;  // pixels of a plane
  uint32_t cuts;                             // the parts, where sums are made
  uint32_t share, coarse_share;              // what a cut takes: pixels where sums are made, else units; of y likewise
  uint32_t channel_groups, lanes, teams, run;
  Grid fine, coarse;
  StorageType y_type;
};
static_assert(sizeof(Pass<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

template <class T>
struct Step {
  Variant variant;
  uint32_t blocks, threads;
  Pass<T> pass;
};

template <class T>
class Plan {
 public:
  explicit Plan(const Maps& maps, const Tuning& tuning = {}) : maps_(maps), tuning_(tuning) {
    pixels_ = checked("csf", maps.height * maps.width, "pixels in a plane");
    coarse_pixels_ = checked("csf", maps.coarse_height * maps.coarse_width, "pixels in a plane");
    planes_ = checked("csf", maps.batch * maps.channels, "planes (samples times channels)");
  }

  // Sums of the parts, of either direction.
  Step<T> reduce(int64_t parts, double* sums, const double* mean = nullptr) const {
    const int64_t threads = maps_.channels_last ? tuning_.channels_last_reduce_threads : tuning_.threads;
    Step<T> step = start(threads);
    step.pass.sums = sums;
    step.pass.mean = mean;
    step.pass.share = checked("csf", Parts(pixels_, parts).length, "pixels in a part");
    step.pass.coarse_share = checked("csf", Parts(coarse_pixels_, parts).length, "pixels in a part");
    return cut(step, checked("csf", parts, "parts"));
  }

  // v.
  Step<T> fuse(const Coefficients<T>& coefficients) const {
    Step<T> step = start(tuning_.threads);
    step.pass.coefficients = coefficients;
    const int64_t unit = maps_.channels_last ? 1 : vector_width(step.variant);
    const int64_t each = maps_.channels_last ? kFuseUnits<true> : kFuseUnits<false>;
    return share(step, pixels_ / unit, each);
  }

  // Gradients of the maps.
  Step<T> apply(const Coefficients<T>& coefficients) const {
    Step<T> step = start(tuning_.threads);
    step.pass.coefficients = coefficients;
    if (maps_.channels_last || !step.variant.vector) {
      const int64_t window_columns = (maps_.width + maps_.coarse_width - 1) / maps_.coarse_width;
      if (!maps_.channels_last) step.pass.lanes = lanes_up_to(window_columns);
      return share(step, coarse_pixels_, 1);
    }
    const int64_t row_vectors = maps_.width / vector_width(step.variant);
    return share(step, maps_.coarse_height * row_vectors, 1);
  }

 private:
  static int64_t vector_width(const Variant& variant) { return variant.vector ? 16 / size_of(variant.type) : 1; }

  static uint32_t lanes_up_to(int64_t most) {
    uint32_t lanes = 1;
    while (2 * lanes <= std::min<int64_t>(most, kWarp)) lanes *= 2;
    return lanes;
  }

  // Doubles are for gradcheck and not worth kernels of their own.
  bool vectors_fit() const {
    const Maps& m = maps_;
    if (!tuning_.vectors || m.z_type == StorageType::kDouble || m.z_type != m.y_type) return false;
    const int64_t width = 16 / size_of(m.z_type);
    if (!aligned(m.z, 16) || !aligned(m.grad, 16) || !aligned(m.out, 16)) return false;
    if (m.channels_last) return m.channels % width == 0 && aligned(m.y, 16) && aligned(m.y_gradient, 16);
    return m.width % width == 0 && aligned(m.y, 8) && aligned(m.y_gradient, 8) &&
           Nearest(m.coarse_height, m.height).halves() && Nearest(m.coarse_width, m.width).halves();
  }

  Step<T> start(int64_t threads) const {
    const Maps& m = maps_;
    Step<T> step{{m.z_type, vectors_fit(), m.channels_last}, 0, static_cast<uint32_t>(threads), {}};
    Pass<T>& pass = step.pass;
    // Where z has no weight in a gradient, a map that is read anyway stands for it: that costs less than a branch.
    pass.z = m.z != nullptr ? m.z : m.grad;
    pass.y = m.y;
    pass.grad = m.grad;
    pass.out = m.out;
    pass.y_gradient = m.y_gradient;
    pass.rows = NearestOf<int32_t>(static_cast<int32_t>(m.coarse_height), static_cast<int32_t>(m.height));
    pass.columns = NearestOf<int32_t>(static_cast<int32_t>(m.coarse_width), static_cast<int32_t>(m.width));
    pass.channels = static_cast<uint32_t>(m.channels);
    pass.pixels = pixels_;
    pass.coarse_pixels = coarse_pixels_;
    pass.channel_groups = pass.lanes = 1;
    pass.run = static_cast<uint32_t>(tuning_.run);
    pass.y_type = m.y_type;
    if (m.channels_last) {
      const int64_t width = vector_width(step.variant), vectors = m.channels / width;
      while (pass.lanes < vectors && 2 * pass.lanes <= kWarp && 2 * pass.lanes * width <= kBlockChannels) {
        pass.lanes *= 2;
      }
      pass.channel_groups = static_cast<uint32_t>((vectors + pass.lanes - 1) / pass.lanes);
    }
    return step;
  }

  // Deals `units` of a plane or sample to blocks, `each` to a thread.
  Step<T> share(Step<T> step, int64_t units, int64_t each) const {
    const int64_t of_block = step.threads / step.pass.lanes * each;
    step.pass.share = static_cast<uint32_t>(of_block);
    return cut(step, (units + of_block - 1) / of_block);
  }

  Step<T> cut(Step<T> step, int64_t cuts) const {
    Pass<T>& pass = step.pass;
    pass.cuts = static_cast<uint32_t>(cuts);
    pass.teams = step.threads / pass.lanes;
    const int64_t unit = maps_.channels_last ? 1 : vector_width(step.variant), coarse_unit = unit > 1 ? unit / 2 : 1;
    pass.fine = Grid(maps_.width / unit, pass.teams);
    pass.coarse = Grid(maps_.coarse_width / coarse_unit, pass.teams);
    // Neither factor reaches 2^31.
    step.blocks = checked("csf", (maps_.channels_last ? maps_.batch * pass.channel_groups : planes_) * cuts, "blocks");
    return step;
  }

  Maps maps_;
  Tuning tuning_;
  uint32_t pixels_, coarse_pixels_, planes_;
};

// The parameters of the kernels for [samples, channels], which one block runs: those that no type of computing touches,
// and with the coefficients.
struct Call {
  Sizes sizes;
  BatchNorm bn, fc_bn;
  Layers layers;
  const double* sums;  // [samples, parts, 3, channels]
  int64_t parts;
  double* state;
};

struct BackwardCall : Call {
  double* scratch;
  AffineGradients bn_gradients, fc_bn_gradients;
  Layers gradients;
};

}  // namespace csf
}  // namespace transkd
