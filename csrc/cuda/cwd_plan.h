// How the CUDA kernels of cwd cut a call into launches and blocks. Plain C++ without torch or CUDA, so that the tests
// on CPU run exactly what the launcher runs.
//
// A stage is a view [B, M, N] with one softmax per row, or (strided) one per column of a sample. A block takes some
// softmaxes of one part, `lanes` threads wide:
//   rows:    `lanes` threads share a row, each block takes 128 / lanes rows, and a part is a run of columns;
//   strided: `lanes` threads lie side by side in columns, 128 / lanes of them share a column, a part is a run of rows.
// Softmaxes that are too long for a block, or too few for the device, are cut into `parts`; what each part leaves is
// merged by a kernel of its own. All of it depends on the views only, never on the device: results are the same
// everywhere.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/storage_type.h"
#include "cuda/common/launch_size.h"

namespace transkd {
namespace cwd {

constexpr int kThreads = 128;
constexpr int kLaunchStages = 8;      // stages that one launch can take
constexpr int kNumbers = 5;           // that a part of a softmax leaves
constexpr int kMergedSoftmaxes = 32;  // of a block of the merging kernel
constexpr int kMergeThreads = 256, kMergeLanes = kMergeThreads / kMergedSoftmaxes;
constexpr double kLog2E = 1.4426950408889634;

// Accesses that a thread has under way at a time, per map.
constexpr int kVectorAccesses = 2, kScalarAccesses = 4;
constexpr int accesses_of(bool vector) { return vector ? kVectorAccesses : kScalarAccesses; }

// One stage of a call, as it comes in.
struct View {
  int64_t batch, rows, columns;
  bool strided;
  StorageType student_type, teacher_type;
  double weight;
  const void* student;
  const void* teacher;
  void* gradient;    // of the student; nullptr in the forward
  void* statistics;  // [B, 4, softmaxes of a sample]
};

// Which instantiation of a kernel a launch needs.
struct Variant {
  StorageType student, teacher;
  bool strided, vector;
  bool operator==(const Variant& other) const {
    return student == other.student && teacher == other.teacher && strided == other.strided && vector == other.vector;
  }
};

// Sizes that decide how a call is cut; tests choose others to reach every way of cutting with small views.
struct Tuning {
  int64_t blocks = 4 * 132;                               // wanted in a call: a few per multiprocessor of a large GPU
  int64_t least_elements = 16384, most_elements = 65536;  // of a block
  bool vectors = true;                                    // use 16-byte accesses where they are possible
};

// One stage as the kernels see it.
template <class T>
struct Softmaxes {
  const void* student;
  const void* teacher;
  void* gradient;
  T* statistics;
  int64_t records;   // where the stage's records [B, parts, 5, softmaxes] begin
  T weight;          // of a divergence in the loss
  T gradient_scale;  // dL/dstudent = gradient_scale (p_s - p_t), for an upstream gradient of 1
  uint32_t batch;
  uint32_t softmaxes;      // of a sample
  uint32_t all_softmaxes;  // of all samples
  uint32_t length;         // entries of a softmax
  uint32_t part_length;    // of each part but the last
  uint32_t parts;
  uint32_t groups;  // of softmaxes: blocks of one part (strided: and of one sample)
  uint32_t lanes;
  uint32_t first_block;
};

// The parameter of the kernels that read the views. T is the type of computing.
template <class T>
struct Launch {
  Softmaxes<T> stage[kLaunchStages];
  uint32_t stages;
  uint32_t first_block;  // blocks of the call in earlier launches
  T inverse, rate;       // 1 / temperature, log2(e) / temperature
  T* shares;             // of the call's blocks in the loss, then of the merging ones
  T* records;
  uint32_t* counter;  // of the merging blocks; the call's first block makes it 0
  const T* upstream;
};

// The parameter of the merging kernel.
template <class T>
struct Merge {
  Softmaxes<T> stage[kLaunchStages];
  uint32_t stages;
  uint32_t first_share, shares_of_call, blocks_of_call;
  T inverse, rate;
  T* shares;
  const T* records;
  uint32_t* counter;
  T* loss;
};
static_assert(sizeof(Launch<double>) <= 4096 && sizeof(Merge<double>) <= 4096,
              "a kernel's parameters must fit into 4 KB");

template <class T>
class Plan {
 public:
  struct Step {
    Variant variant;
    Launch<T> launch;
    uint32_t blocks = 0;
  };
  struct MergeStep {
    Merge<T> merge;
    uint32_t blocks = 0;
  };

  Plan(const std::vector<View>& views, double temperature, const Tuning& tuning = {}) {
    int64_t elements = 0;
    for (const View& v : views) elements += v.batch * v.rows * v.columns;
    elements = std::clamp(elements / tuning.blocks, tuning.least_elements, tuning.most_elements);
    for (const View& v : views) add(v, temperature, elements, tuning.vectors);
    if (merges_.empty()) {  // somebody must add the loss up
      merges_.push_back(MergeStep{Merge<T>{}});
      merges_.back().blocks = 1;
    }
    number();
    // Softmaxes are one-hot or flat long before; and no difference is multiplied by infinity or zero.
    const double inverse = std::clamp(1 / temperature, 1e-30, 1e30);
    const T rounded = static_cast<T>(inverse), rate = static_cast<T>(inverse * kLog2E);
    for (Step& step : steps_) step.launch.inverse = rounded, step.launch.rate = rate;
    for (MergeStep& step : merges_) step.merge.inverse = rounded, step.merge.rate = rate;
  }

  const std::vector<Step>& steps() const { return steps_; }
  // At least one; the last block of all of them adds the loss up.
  const std::vector<MergeStep>& merges() const { return merges_; }

  // Nothing in the workspace need be initialised.
  size_t workspace_bytes() const { return kCounterBytes + (blocks_ + merge_blocks_ + records_) * sizeof(T); }

  void bind_forward(void* workspace, void* loss) {
    char* base = static_cast<char*>(workspace);
    uint32_t* counter = reinterpret_cast<uint32_t*>(base);
    T* records = reinterpret_cast<T*>(base + kCounterBytes);
    T* shares = records + records_;
    for (Step& step : steps_) {
      step.launch.counter = counter;
      step.launch.records = records;
      step.launch.shares = shares;
    }
    for (MergeStep& step : merges_) {
      step.merge.counter = counter;
      step.merge.records = records;
      step.merge.shares = shares;
      step.merge.loss = static_cast<T*>(loss);
    }
  }

  void bind_backward(const void* upstream) {
    for (Step& step : steps_) step.launch.upstream = static_cast<const T*>(upstream);
  }

 private:
  static constexpr size_t kCounterBytes = 16;

  // Elements of a 16-byte access, or 1 where a row or a base address stands against it. Doubles are for gradcheck and
  // not worth kernels of their own.
  static int64_t vector_width(const View& v) {
    if (v.student_type == StorageType::kDouble) return 1;
    const int64_t width = 16 / std::max(size_of(v.student_type), size_of(v.teacher_type));
    const bool fits = v.columns % width == 0 && aligned(v.student, width * size_of(v.student_type)) &&
                      aligned(v.gradient, width * size_of(v.student_type)) &&
                      aligned(v.teacher, width * size_of(v.teacher_type)) && aligned(v.statistics, 16);
    return fits ? width : 1;
  }

  static int64_t power_of_two_from(int64_t value) {
    int64_t power = 1;
    while (power < value) power *= 2;
    return power;
  }

  // Cuts softmaxes of `length` entries so that a block has about `elements` of them, in steps of `step` entries.
  static void cut(Softmaxes<T>& stage, int64_t width_of_block, int64_t step, int64_t elements) {
    const int64_t wanted = std::max<int64_t>(1, elements / width_of_block / step) * step;
    const int64_t parts = std::max<int64_t>(1, (stage.length + wanted / 2) / wanted);
    const int64_t length = ceil_div(ceil_div(stage.length, parts), step) * step;
    stage.parts = static_cast<uint32_t>(ceil_div(stage.length, length));
    stage.part_length = static_cast<uint32_t>(std::min<int64_t>(length, stage.length));
  }

  void add(const View& v, double temperature, int64_t elements, bool vectors) {
    const int64_t width = vectors ? vector_width(v) : 1;
    const Variant variant{v.student_type, v.teacher_type, v.strided, width > 1};
    const int64_t accesses = accesses_of(width > 1);
    checked("cwd", v.rows, "rows in a view [B, M, N]");
    checked("cwd", v.columns, "columns in a view [B, M, N]");
    Softmaxes<T> stage{};
    stage.student = v.student;
    stage.teacher = v.teacher;
    stage.gradient = v.gradient;
    stage.statistics = static_cast<T*>(v.statistics);
    stage.weight = static_cast<T>(v.weight);
    stage.gradient_scale = static_cast<T>(v.weight / temperature);
    stage.batch = checked("cwd", v.batch, "samples");
    stage.softmaxes = static_cast<uint32_t>(v.strided ? v.columns : v.rows);
    stage.length = static_cast<uint32_t>(v.strided ? v.rows : v.columns);
    stage.all_softmaxes = checked("cwd", v.batch * stage.softmaxes, "softmaxes");

    int64_t groups;
    if (v.strided) {
      // As wide as the block's share allows, but not so that its threads have less than one step of rows; 128 bytes
      // side by side are enough.
      int64_t lanes = std::min<int64_t>(kThreads, power_of_two_from(ceil_div(v.columns, width)));
      while (lanes > 8 && lanes * width * v.rows > elements && 2 * (kThreads / lanes) * accesses <= v.rows) lanes /= 2;
      stage.lanes = static_cast<uint32_t>(lanes);
      cut(stage, lanes * width, kThreads / lanes * accesses, elements);
      stage.groups = static_cast<uint32_t>(ceil_div(v.columns, lanes * width));
      groups = v.batch * stage.groups;
    } else {
      // So many threads that a block has its share, or that none of them has less than one step.
      const int64_t of_share = power_of_two_from(ceil_div(kThreads * v.columns, elements));
      const int64_t of_step = power_of_two_from(ceil_div(v.columns, width * accesses));
      const int64_t least = std::min<int64_t>(of_step, width > 1 ? 8 : 32);
      const int64_t lanes = std::clamp<int64_t>(of_share, least, std::min<int64_t>(kThreads, std::max(least, of_step)));
      stage.lanes = static_cast<uint32_t>(lanes);
      cut(stage, kThreads / lanes, lanes * width * accesses, elements);
      groups = ceil_div(stage.all_softmaxes, kThreads / lanes);
      stage.groups = checked("cwd", groups, "groups of rows");
    }

    Step& step = step_for(variant);
    stage.first_block = step.blocks;
    step.blocks = checked("cwd", step.blocks + groups * stage.parts, "blocks");
    stage.records = records_;
    if (stage.parts > 1) {
      records_ += static_cast<int64_t>(stage.all_softmaxes) * stage.parts * kNumbers;
      add_merge(stage);
    }
    step.launch.stage[step.launch.stages++] = stage;
  }

  void add_merge(Softmaxes<T> stage) {
    if (merges_.empty() || merges_.back().merge.stages == kLaunchStages) merges_.push_back(MergeStep{Merge<T>{}});
    MergeStep& step = merges_.back();
    stage.first_block = step.blocks;
    step.blocks = checked("cwd", step.blocks + ceil_div(stage.all_softmaxes, kMergedSoftmaxes), "blocks");
    step.merge.stage[step.merge.stages++] = stage;
  }

  Step& step_for(const Variant& variant) {
    for (Step& step : steps_) {
      if (step.variant == variant && step.launch.stages < kLaunchStages) return step;
    }
    steps_.push_back(Step{variant, Launch<T>{}});
    return steps_.back();
  }

  void number() {
    for (Step& step : steps_) {
      step.launch.first_block = checked("cwd", blocks_, "blocks");
      blocks_ += step.blocks;
    }
    for (MergeStep& step : merges_) {
      step.merge.first_share = checked("cwd", blocks_ + merge_blocks_, "blocks");
      merge_blocks_ += step.blocks;
    }
    for (MergeStep& step : merges_) {
      step.merge.shares_of_call = checked("cwd", blocks_ + merge_blocks_, "blocks");
      step.merge.blocks_of_call = static_cast<uint32_t>(merge_blocks_);
    }
  }

  std::vector<Step> steps_;
  std::vector<MergeStep> merges_;
  int64_t blocks_ = 0, merge_blocks_ = 0, records_ = 0;
};

}  // namespace cwd
}  // namespace transkd
