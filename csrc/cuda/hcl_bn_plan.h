// How the CUDA kernels of hcl_bn cut a call into launches and blocks. Plain C++ without torch or CUDA, so that the
// tests on CPU run exactly what the launcher runs.
//
// Forward and backward go over the maps as those of hcl do (hcl_plan.h), with three sums of every cell instead of one.
// Before them, the moments of u are taken: a part of a channel's values is a run of pixels of the whole batch, taken by
// one block in NCHW, and by one block per group of channels in channels-last.
// All of it depends on the maps only, never on the device: results are the same everywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/batch_norm.h"
#include "cuda/common/launch_size.h"
#include "cuda/hcl_plan.h"

namespace transkd {
namespace hcl_bn {

using hcl::kLaunchStages;
using hcl::kThreads;
using hcl::kWarp;
using hcl::Tuning;
using hcl::Variant;

// Of every cell: of d, of u less the shift, and of their product.
constexpr int kSums = 3;
// Channels that a block of the statistics takes; its warps share the rows of moments.
constexpr int kStatisticsChannels = kWarp;
constexpr int kStatisticsTeams = kThreads / kWarp;
// Channels that a block takes of channels-last moments, at most: few, since only the parts and they make blocks.
constexpr int kReduceChannels = 32;
// Values that a thread adds up before they go on as doubles.
constexpr int kRun = 128;
// Parts begin at multiples of it, which vectors divide.
constexpr int64_t kPartMultiple = 64;

// One stage of a forward or backward call; `student` is u.
struct Maps : hcl::Maps {
  BatchNorm bn;
  const double* moments;  // [rows, 3, C]
  int64_t rows;
  double* state;        // [2, C]
  double* sums;         // [B, 2, C]
  const double* means;  // [2, C], or nullptr: the sums' own
  Values weight_gradient, bias_gradient;
};

// What the forward makes of a channel's statistics, rows of a [.., C] table:
//   u normalised = scale (u - shift) + offset.
enum Coefficient { kScale, kShift, kOffset, kCoefficients };

// And the backward, with e the entry of the pixel's cell in hcl's table:
//   du = u_weight (u - shift) + teacher_weight T + entry_weight e + constant.
enum BackwardCoefficient { kUWeight, kBackwardShift, kTeacherWeight, kEntryWeight, kConstant, kBackwardCoefficients };

template <class Stage>
struct SmallLaunch {
  Stage stage[kLaunchStages];
  uint32_t stages;
};

// Statistics of a stage's channels.
template <class T>
struct StatisticsStage {
  BatchNorm bn;
  const double* moments;
  double* state;
  T* coefficients;
  uint32_t rows, channels, first_block;
};

template <class T>
struct Statistics : SmallLaunch<StatisticsStage<T>> {
  uint32_t* counters;  // of the forward, which must be zero before it
  uint32_t zeros;      // how many of them this launch clears
  uint32_t blocks;
};
static_assert(sizeof(Statistics<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

// Gradients of a stage's parameters, and the coefficients of u's.
template <class T>
struct CoefficientStage {
  Values weight, bias, weight_gradient, bias_gradient;
  const double* state;
  const double* sums;
  const double* means;
  T* coefficients;  // nullptr where u's gradient is not asked for
  double values;    // of a channel
  T alpha;
  uint32_t batch, channels, first_block;
  bool of_batch;  // whether the statistics depend on u
};

template <class T>
struct CoefficientLaunch : SmallLaunch<CoefficientStage<T>> {
  const T* upstream;
  uint32_t blocks;
};
static_assert(sizeof(CoefficientLaunch<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

// What the forward over the maps needs besides hcl's.
template <class T>
struct NormStage {
  const T* coefficients;
  const double* state;
  double* sums;
  int64_t* batches;  // counts this batch; nullptr where nothing is counted
};

template <class T>
struct Forward {
  hcl::Launch<T> maps;
  NormStage<T> norm[kLaunchStages];
  StorageType u_type, teacher_type;  // for the kernels that serve any pair of types
};
static_assert(sizeof(Forward<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

template <class T>
struct Backward {
  hcl::Launch<T> maps;
  const T* coefficients[kLaunchStages];
  StorageType u_type, teacher_type;
};

template <class Parameters>
struct Step {
  Variant variant;
  Parameters launch;
  uint32_t blocks;
  size_t shared_bytes;
};

namespace detail {

// The coefficients of all stages, behind each other; every row begins at 16 bytes if the number of channels allows
// 16-byte accesses at all.
inline std::vector<int64_t> coefficients_at(const std::vector<Maps>& maps, int64_t rows, int64_t* end) {
  std::vector<int64_t> at;
  int64_t next = 0;
  for (const Maps& m : maps) {
    at.push_back(next);
    next += (rows * m.channels + 3) / 4 * 4;
  }
  *end = next;
  return at;
}

// Appends a stage to the last of some launches that take kLaunchStages each, in blocks of `channels` channels.
template <class Launch, class Stage>
void append(std::vector<Launch>& launches, Stage stage, int64_t channels) {
  if (launches.empty() || launches.back().stages == kLaunchStages) launches.push_back(Launch{});
  Launch& launch = launches.back();
  stage.first_block = launch.blocks;
  launch.blocks = checked("hcl_bn", launch.blocks + ceil_div(stage.channels, channels), "blocks");
  launch.stage[launch.stages++] = stage;
}

inline std::vector<hcl::Maps> of_hcl(const std::vector<Maps>& maps) { return {maps.begin(), maps.end()}; }

}  // namespace detail

template <class T>
class ForwardPlan {
 public:
  ForwardPlan(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tuning& tuning = {})
      : maps_(maps), plan_(detail::of_hcl(maps), level_weights, tuning, kSums) {
    at_ = detail::coefficients_at(maps, kCoefficients, &coefficients_);
  }

  // Its base lies at a multiple of 16 bytes; nothing in it need be cleared before.
  size_t workspace_bytes() const { return coefficients_ * sizeof(T) + plan_.workspace_bytes(); }

  void bind(void* workspace, void* loss) {
    T* const coefficients = static_cast<T*>(workspace);
    plan_.bind_forward(coefficients + coefficients_, loss);
    for (size_t m = 0; m < maps_.size(); ++m) {
      const Maps& of = maps_[m];
      StatisticsStage<T> stage{};
      stage.bn = of.bn;
      stage.moments = of.moments;
      stage.state = of.state;
      stage.coefficients = coefficients + at_[m];
      stage.rows = checked("hcl_bn", of.rows, "rows of moments");
      stage.channels = checked("hcl_bn", of.channels, "channels");
      detail::append(statistics_, stage, kStatisticsChannels);
    }
    statistics_[0].counters = reinterpret_cast<uint32_t*>(coefficients + coefficients_);
    statistics_[0].zeros = static_cast<uint32_t>(plan_.counter_bytes() / sizeof(uint32_t));
    for (const auto& step : plan_.steps()) {
      Forward<T> forward{step.launch, {}, step.variant.student, step.variant.teacher};
      for (uint32_t k = 0; k < step.launch.stages; ++k) {
        const uint32_t m = step.launch.stage[k].number;
        const BatchNorm& bn = maps_[m].bn;
        forward.norm[k] = {coefficients + at_[m], maps_[m].state, maps_[m].sums,
                           bn.norm == Norm::kTracked ? bn.batches : nullptr};
      }
      steps_.push_back({step.variant, forward, step.blocks, step.shared_bytes});
    }
  }

  // In this order.
  const std::vector<Statistics<T>>& statistics() const { return statistics_; }
  const std::vector<Step<Forward<T>>>& steps() const { return steps_; }
  const hcl::Plan<T>& maps() const { return plan_; }

 private:
  std::vector<Maps> maps_;
  hcl::Plan<T> plan_;
  std::vector<int64_t> at_;
  int64_t coefficients_;
  std::vector<Statistics<T>> statistics_;
  std::vector<Step<Forward<T>>> steps_;
};

template <class T>
class BackwardPlan {
 public:
  BackwardPlan(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tuning& tuning = {})
      : maps_(maps), level_weights_(level_weights), tuning_(tuning) {
    at_ = detail::coefficients_at(maps, kBackwardCoefficients, &coefficients_);
  }

  // As the forward's.
  size_t workspace_bytes() const { return coefficients_ * sizeof(T); }

  void bind(void* workspace, const void* upstream) {
    T* const coefficients = static_cast<T*>(workspace);
    std::vector<hcl::Maps> wanted;
    std::vector<size_t> stage_of;
    for (size_t m = 0; m < maps_.size(); ++m) {
      const Maps& of = maps_[m];
      CoefficientStage<T> stage{};
      stage.weight = of.bn.weight;
      stage.bias = of.bn.bias;
      stage.weight_gradient = of.weight_gradient;
      stage.bias_gradient = of.bias_gradient;
      stage.state = of.state;
      stage.sums = of.sums;
      stage.means = of.means;
      stage.values = static_cast<double>(of.batch) * static_cast<double>(of.height * of.width);
      stage.alpha = hcl::Plan<T>::alpha(of, Pyramid(of.height, of.width, level_weights_.data()));
      stage.batch = checked("hcl_bn", of.batch, "samples");
      stage.channels = checked("hcl_bn", of.channels, "channels");
      stage.of_batch = of_batch(of.bn.norm);
      if (of.gradient != nullptr) {
        stage.coefficients = coefficients + at_[m];
        wanted.push_back(of);
        stage_of.push_back(m);
      }
      detail::append(coefficient_launches_, stage, kThreads);
    }
    for (auto& launch : coefficient_launches_) launch.upstream = static_cast<const T*>(upstream);
    if (wanted.empty()) return;
    const hcl::Plan<T> plan(wanted, level_weights_, tuning_);
    for (const auto& step : plan.steps()) {
      Backward<T> backward{step.launch, {}, step.variant.student, step.variant.teacher};
      for (uint32_t k = 0; k < step.launch.stages; ++k) {
        backward.coefficients[k] = coefficients + at_[stage_of[step.launch.stage[k].number]];
      }
      steps_.push_back({step.variant, backward, step.blocks, 0});
    }
  }

  // In this order.
  const std::vector<CoefficientLaunch<T>>& coefficients() const { return coefficient_launches_; }
  const std::vector<Step<Backward<T>>>& steps() const { return steps_; }

 private:
  std::vector<Maps> maps_;
  std::vector<double> level_weights_;
  Tuning tuning_;
  std::vector<int64_t> at_;
  int64_t coefficients_;
  std::vector<CoefficientLaunch<T>> coefficient_launches_;
  std::vector<Step<Backward<T>>> steps_;
};

// One stage of a call for the moments.
struct ReduceMap {
  int64_t batch, channels, pixels;  // pixels of a plane
  bool channels_last;
  StorageType type;
  const void* u;
  int64_t parts;
  double* moments;  // [parts, 3, C]
};

// Units are what a thread takes at a time: some neighbouring pixels of a plane, or one pixel of some channels. They lie
// in lines, unit_step elements apart and lines line_step apart: the planes of a channel, or all pixels of the batch.
struct ReduceStage {
  const void* u;
  double* moments;
  int64_t line_step;
  uint32_t channels, parts;
  uint32_t pixels;  // of a plane
  uint32_t units, share, line_units, unit_step;
  uint32_t lanes, channel_groups;
  uint32_t first_block;
};

struct ReduceStep {
  Variant variant;  // the teacher's type is u's
  SmallLaunch<ReduceStage> launch;
  uint32_t blocks;
};

inline std::vector<ReduceStep> plan_reduce(const std::vector<ReduceMap>& maps, bool vectors = true) {
  std::vector<ReduceStep> steps;
  for (const ReduceMap& m : maps) {
    // 1 x 1 maps lie in memory as channels-last ones do.
    const bool channels_last = m.channels_last || m.pixels == 1;
    const int64_t width = m.type == StorageType::kDouble ? 1 : 16 / size_of(m.type);
    const bool vector =
        vectors && width > 1 && aligned(m.u, 16) && (channels_last ? m.channels : m.pixels) % width == 0;
    const int64_t elements = vector ? width : 1, pixels_of_unit = channels_last ? 1 : elements;
    ReduceStage stage{};
    stage.u = m.u;
    stage.moments = m.moments;
    stage.channels = checked("hcl_bn", m.channels, "channels");
    stage.parts = checked("hcl_bn", m.parts, "parts");
    stage.pixels = checked("hcl_bn", m.pixels, "pixels in a plane");
    const int64_t values = checked("hcl_bn", m.batch * m.pixels, "values in a channel");
    stage.units = static_cast<uint32_t>(values / pixels_of_unit);
    stage.share =
        static_cast<uint32_t>(ceil_div(ceil_div(values, m.parts), kPartMultiple) * kPartMultiple / pixels_of_unit);
    stage.line_units = static_cast<uint32_t>(channels_last ? values : m.pixels / pixels_of_unit);
    stage.line_step = m.channels * (channels_last ? values : m.pixels);
    stage.unit_step = static_cast<uint32_t>(channels_last ? m.channels : elements);
    stage.lanes = stage.channel_groups = 1;
    int64_t blocks = m.channels;
    if (channels_last) {
      const int64_t packs = m.channels / elements;
      while (stage.lanes < packs && 2 * stage.lanes * elements <= kReduceChannels) stage.lanes *= 2;
      blocks = ceil_div(packs, stage.lanes);
      stage.channel_groups = static_cast<uint32_t>(blocks);
    }
    const Variant variant{m.type, m.type, channels_last, vector};
    auto step = std::find_if(steps.begin(), steps.end(), [&](const ReduceStep& other) {
      return other.variant == variant && other.launch.stages < kLaunchStages;
    });
    if (step == steps.end()) step = steps.insert(step, ReduceStep{variant, {}, 0});
    stage.first_block = step->blocks;
    step->blocks = checked("hcl_bn", step->blocks + blocks * m.parts, "blocks");
    step->launch.stage[step->launch.stages++] = stage;
  }
  return steps;
}

}  // namespace hcl_bn
}  // namespace transkd
