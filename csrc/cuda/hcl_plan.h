// How the CUDA kernels of hcl cut a call into launches and blocks. Plain C++ without torch or CUDA, so that the tests
// on CPU run exactly what the launcher runs.
//
// A group is some planes (one sample, one channel each) of a stage that are worked on together: consecutive planes in
// NCHW, a run of channels of one sample in channels-last. A group's cells (hcl_pyramid.h) are dealt to blocks:
//   small groups: one block takes all cells;
//   larger ones:  `cell_parts` blocks take some whole cells each;
//   still larger: every cell is a part of its own, and `strips` blocks share it.
// Inside a block, a cell (or its strip) is cut into `cuts` pieces where the cells are too few for the block's warps.
// All of it depends on the maps only, never on the device: results are the same everywhere.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/hcl_pyramid.h"
#include "common/storage_type.h"
#include "cuda/common/launch_size.h"

namespace transkd {
namespace hcl {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kLaunchStages = 8;  // stages that one launch can take
constexpr int kWindows = 1 + 2 * 2 + 4 * 4;
constexpr int kAxisWindows = 1 + 2 + 4;
// Of a group, at most.
template <class T>
constexpr int64_t kGroupPlanes = 256 / sizeof(T);
// Of a block; the rest of 48 KB is for the sums of warps.
constexpr int64_t kSharedBytes = (48 << 10) - 256;

// One stage of a call, as it comes in.
struct Maps {
  int64_t batch, channels, height, width;
  bool channels_last;
  StorageType student_type, teacher_type;
  double weight;
  const void* student;
  const void* teacher;
  void* gradient;  // of the student; nullptr in the forward
  void* table;     // [B, cells, C]
};

// Which instantiation of a kernel a launch needs.
struct Variant {
  StorageType student, teacher;
  bool channels_last, vector;
  bool operator==(const Variant& other) const {
    return student == other.student && teacher == other.teacher && channels_last == other.channels_last &&
           vector == other.vector;
  }
};

// Sizes that decide how a call is cut; tests choose others to reach every way of cutting with small maps.
struct Tuning {
  int64_t blocks = 8 * 132;                              // wanted in a call: a few per multiprocessor of a large GPU
  int64_t least_elements = 4096, most_elements = 65536;  // of a block
  bool vectors = true;                                   // use 16-byte accesses where they are possible
};

// One stage as the kernels see it. Levels and windows are in the order 1 x 1, 2 x 2, 4 x 4.
template <class T>
struct Stage {
  const void* student;
  const void* teacher;
  void* gradient;
  T* table;
  int64_t pixels;             // of a plane
  int64_t partials;           // where the stage's partial sums begin
  T alpha;                    // dL/dstudent = alpha d + table entry, for an upstream gradient of 1
  T level_weight[kLevels];    // of a squared pooled value in the loss
  uint32_t planes, channels;  // planes = batch * channels
  uint32_t width;
  uint32_t number;  // of the stage in the call
  uint32_t first_block, first_group, first_counter;
  uint32_t group_planes;  // the last group (of a sample, in channels-last) may have fewer
  uint32_t inner_groups;  // groups whose blocks alternate, because they read neighbouring memory
  uint32_t strips, cuts;
  uint32_t edge_row[kMaxSegments + 1], edge_column[kMaxSegments + 1];
  uint8_t cells, cell_parts, row_segments, column_segments, levels;
  uint8_t lanes;  // NCHW: threads that take one piece together. Channels-last: lanes of a warp side by side in channels
  uint8_t first_row[kAxisWindows], end_row[kAxisWindows], first_column[kAxisWindows], end_column[kAxisWindows];
  uint8_t order[kMaxCells];  // the cells, part by part, in each part from the largest to the smallest

  uint32_t parts() const { return cell_parts * strips; }
};

// The parameter of a kernel. T is the type of computing.
template <class T>
struct Launch {
  Stage<T> stage[kLaunchStages];
  uint32_t stages;
  uint32_t first_block, call_blocks;  // blocks of the call: those in earlier launches, and all
  uint32_t call_shares;
  T* shares;           // [call_shares] parts of the loss: the squares of each block, the pooled terms of each group
  T* partials;         // sums of strips, of the groups that several blocks share
  uint32_t* counters;  // [0] blocks of the call; then one for each such group
  T* loss;
  const T* upstream;
};
static_assert(sizeof(Launch<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

template <class T>
class Plan {
 public:
  struct Step {
    Variant variant;
    Launch<T> launch;
    uint32_t blocks = 0;
    size_t shared_bytes = 0;  // of the forward
  };

  // `sums` are taken over every cell: hcl_bn needs more of them.
  Plan(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tuning& tuning = {}, int sums = 1)
      : sums_(sums) {
    int64_t elements = 0;
    for (const Maps& m : maps) elements += m.batch * m.channels * m.height * m.width;
    elements = std::clamp(elements / tuning.blocks, tuning.least_elements, tuning.most_elements);
    for (const Maps& m : maps) add(m, Pyramid(m.height, m.width, level_weights.data()), elements, tuning.vectors);
    int64_t before = 0;
    for (Step& step : steps_) {
      step.launch.first_block = static_cast<uint32_t>(before);
      before += step.blocks;
    }
    blocks_ = checked("hcl", before, "blocks");
    for (Step& step : steps_) {
      step.launch.call_blocks = blocks_;
      step.launch.call_shares = checked("hcl", before + groups_, "blocks and groups");
    }
  }

  const std::vector<Step>& steps() const { return steps_; }

  // The first counter_bytes() of the workspace must be zero before the first step of the forward.
  size_t counter_bytes() const { return (1 + counters_) * sizeof(uint32_t); }
  size_t workspace_bytes() const { return shares_at() + (blocks_ + groups_ + partials_) * sizeof(T); }

  void bind_forward(void* workspace, void* loss) {
    char* base = static_cast<char*>(workspace);
    for (Step& step : steps_) {
      step.launch.counters = reinterpret_cast<uint32_t*>(base);
      step.launch.shares = reinterpret_cast<T*>(base + shares_at());
      step.launch.partials = step.launch.shares + blocks_ + groups_;
      step.launch.loss = static_cast<T*>(loss);
    }
  }

  // dL/dstudent of a pixel is this times its d, and its cell's table entry, for an upstream gradient of 1.
  static T alpha(const Maps& m, const Pyramid& pyramid) {
    const double elements = static_cast<double>(m.batch * m.channels) * static_cast<double>(m.height * m.width);
    return static_cast<T>(2 * m.weight * pyramid.pixel_weight / elements);
  }

  void bind_backward(const void* upstream) {
    for (Step& step : steps_) step.launch.upstream = static_cast<const T*>(upstream);
  }

 private:
  // Elements of a 16-byte access, or 1 where a row, a cell or a base address stands against it. Doubles are for
  // gradcheck and not worth kernels of their own.
  static int64_t vector_width(const Maps& m, const Pyramid& pyramid, bool channels_last) {
    if (m.student_type == StorageType::kDouble) return 1;
    const int64_t width = 16 / std::max(size_of(m.student_type), size_of(m.teacher_type));
    bool fits = aligned(m.student, width * size_of(m.student_type)) &&
                aligned(m.gradient, width * size_of(m.student_type)) &&
                aligned(m.teacher, width * size_of(m.teacher_type)) && aligned(m.table, 16);
    if (channels_last) return fits && m.channels % width == 0 ? width : 1;
    for (int j = 0; j <= pyramid.columns.segments; ++j) fits = fits && pyramid.columns.edge[j] % width == 0;
    return fits ? width : 1;
  }

  static Stage<T> describe(const Maps& m, const Pyramid& pyramid) {
    Stage<T> stage{};
    stage.student = m.student;
    stage.teacher = m.teacher;
    stage.gradient = m.gradient;
    stage.table = static_cast<T*>(m.table);
    stage.planes = checked("hcl", m.batch * m.channels, "planes (samples times channels)");
    stage.channels = static_cast<uint32_t>(m.channels);
    stage.pixels = checked("hcl", m.height * m.width, "pixels in a plane");
    stage.width = static_cast<uint32_t>(m.width);
    const double planes = static_cast<double>(stage.planes);
    stage.alpha = alpha(m, pyramid);
    const Axis &rows = pyramid.rows, &columns = pyramid.columns;
    stage.cells = static_cast<uint8_t>(pyramid.cells());
    stage.row_segments = static_cast<uint8_t>(rows.segments);
    stage.column_segments = static_cast<uint8_t>(columns.segments);
    std::copy(rows.edge, rows.edge + rows.segments + 1, stage.edge_row);
    std::copy(columns.edge, columns.edge + columns.segments + 1, stage.edge_column);
    for (int k = kLevels - 1, at = 0; k >= 0 && pyramid.used[k]; --k) {
      const int64_t l = kLevelSize[k];
      stage.level_weight[stage.levels++] =
          static_cast<T>(m.weight * pyramid.weight[k] / (planes * static_cast<double>(l * l)));
      for (int64_t i = 0; i < l; ++i, ++at) {
        stage.first_row[at] = static_cast<uint8_t>(rows.window[k][i].first);
        stage.end_row[at] = static_cast<uint8_t>(rows.window[k][i].last);
        stage.first_column[at] = static_cast<uint8_t>(columns.window[k][i].first);
        stage.end_column[at] = static_cast<uint8_t>(columns.window[k][i].last);
      }
    }
    return stage;
  }

  static int64_t pixels_of(const Pyramid& pyramid, int cell) {
    const Axis &rows = pyramid.rows, &columns = pyramid.columns;
    const int i = cell / columns.segments, j = cell % columns.segments;
    return (rows.edge[i + 1] - rows.edge[i]) * (columns.edge[j + 1] - columns.edge[j]);
  }

  // Fills order; returns the pixels of the largest cell. Cells of equal size stay in the order of memory; others are
  // dealt out, so that every part has its share of the large ones.
  static void deal_cells(const Pyramid& pyramid, Stage<T>& stage) {
    std::array<int, kMaxCells> sorted;
    const auto end = sorted.begin() + stage.cells;
    std::iota(sorted.begin(), end, 0);
    if (std::all_of(sorted.begin(), end, [&](int c) { return pixels_of(pyramid, c) == pixels_of(pyramid, 0); })) {
      for (int i = 0; i < kMaxCells; ++i) stage.order[i] = static_cast<uint8_t>(i);
      return;
    }
    std::stable_sort(sorted.begin(), end, [&](int a, int b) { return pixels_of(pyramid, a) > pixels_of(pyramid, b); });
    std::array<int, kMaxCells + 1> filled{};  // per part
    for (int i = 0, part = 0; i < stage.cells; part = (part + 1) % stage.cell_parts) {
      const int first = stage.cells * part / stage.cell_parts, last = stage.cells * (part + 1) / stage.cell_parts;
      if (first + filled[part] < last) stage.order[first + filled[part]++] = static_cast<uint8_t>(sorted[i++]);
    }
  }

  // Shared memory of a plane: the sums of its pieces, where its windows and, if there are several sums, its table
  // entries stand later; and those of its cells.
  size_t plane_bytes(int64_t slots, int64_t cells) const {
    return (std::max(sums_ * slots, kWindows + (sums_ > 1 ? cells : 0)) + sums_ * cells) * sizeof(T);
  }

  int64_t most_group_planes(int64_t cells) const {
    constexpr int64_t kSmallSlots = 14;  // few cells are cut into pieces for the block's warps: never more than these
    int64_t planes = kGroupPlanes<T>;
    while (static_cast<int64_t>(plane_bytes(std::max(cells, kSmallSlots), cells)) * planes > kSharedBytes) planes /= 2;
    return planes;
  }

  static int64_t power_of_two_up_to(int64_t value) {
    int64_t power = 1;
    while (2 * power <= value) power *= 2;
    return power;
  }

  // Lanes side by side in channels: enough for whole 128-byte lines, few of them beyond the last channel.
  static int64_t channel_lanes(int64_t vectors, int64_t most) {
    const auto padded = [&](int64_t lanes) { return (vectors + lanes - 1) / lanes * lanes; };
    int64_t lanes = most;
    while (lanes > 1 && lanes / 2 >= vectors) lanes /= 2;
    while (lanes > 8 && padded(lanes / 2) < padded(lanes)) lanes /= 2;
    return lanes;
  }

  void add(const Maps& m, const Pyramid& pyramid, int64_t block_elements, bool vectors) {
    Stage<T> stage = describe(m, pyramid);
    stage.number = stages_++;
    const int64_t pixels = stage.pixels;
    // A 1 x 1 map lies in memory as a channels-last one does, and is faster read as one.
    const bool channels_last = m.channels_last || pixels == 1;
    const int64_t width = vectors ? vector_width(m, pyramid, channels_last) : 1;
    const Variant variant{m.student_type, m.teacher_type, channels_last, width > 1};

    int64_t largest = 0;
    for (int c = 0; c < stage.cells; ++c) largest = std::max(largest, pixels_of(pyramid, c));

    const int64_t most_planes = most_group_planes(stage.cells);
    int64_t group_planes, outer_groups;
    if (channels_last) {
      const int64_t lanes = channel_lanes(m.channels / width, std::min<int64_t>(kWarp, most_planes / width));
      stage.lanes = static_cast<uint8_t>(lanes);
      group_planes = std::min(lanes * width, m.channels);
      stage.inner_groups = static_cast<uint32_t>((m.channels + group_planes - 1) / group_planes);
      outer_groups = m.batch;
    } else {
      group_planes = std::clamp<int64_t>(block_elements / pixels, 1, std::min<int64_t>(most_planes, stage.planes));
      stage.inner_groups = 1;
      outer_groups = (stage.planes + group_planes - 1) / group_planes;
    }
    const int64_t groups = checked("hcl", outer_groups * stage.inner_groups, "groups of planes");
    stage.group_planes = static_cast<uint32_t>(group_planes);

    const auto nearest = [](int64_t a, int64_t b) { return std::max<int64_t>(1, (a + b / 2) / b); };
    stage.cell_parts =
        static_cast<uint8_t>(std::min<int64_t>(nearest(pixels * group_planes, block_elements), stage.cells));
    stage.strips = 1;
    if (nearest(largest * group_planes, block_elements) > 1) {
      stage.cell_parts = stage.cells;
      stage.strips = static_cast<uint32_t>(std::min(nearest(largest * group_planes, block_elements), largest));
    }
    deal_cells(pyramid, stage);

    constexpr int64_t kWarps = kThreads / kWarp;
    const int64_t part_cells = (stage.cells + stage.cell_parts - 1) / stage.cell_parts;
    const int64_t pieces = part_cells * (channels_last ? 1 : group_planes);
    stage.cuts = static_cast<uint32_t>((kWarps + pieces - 1) / pieces);
    if (!channels_last) {
      // Threads of one piece: about eight accesses for each, and no thread of the block without a piece.
      const int64_t accesses = (largest / width + stage.strips * stage.cuts - 1) / (stage.strips * stage.cuts);
      int64_t lanes = power_of_two_up_to(std::clamp<int64_t>(accesses / 8, 1, kWarp));
      while (lanes < kWarp && lanes * pieces * stage.cuts < kThreads) lanes *= 2;
      stage.lanes = static_cast<uint8_t>(lanes);
    }

    Step& step = step_for(variant);
    step.shared_bytes = std::max(step.shared_bytes, plane_bytes(part_cells * stage.cuts, stage.cells) * group_planes);
    stage.first_block = step.blocks;
    step.blocks = checked("hcl", step.blocks + groups * stage.parts(), "blocks");
    stage.first_group = checked("hcl", groups_, "groups");
    groups_ += groups;
    stage.first_counter = checked("hcl", 1 + counters_, "groups");
    stage.partials = partials_;
    if (stage.parts() > 1) {
      counters_ += groups;
      partials_ += groups * stage.strips * sums_ * stage.cells * group_planes;
    }
    step.launch.stage[step.launch.stages++] = stage;
  }

  Step& step_for(const Variant& variant) {
    for (Step& step : steps_) {
      if (step.variant == variant && step.launch.stages < kLaunchStages) return step;
    }
    steps_.push_back(Step{variant, Launch<T>{}});
    return steps_.back();
  }

  size_t shares_at() const { return (counter_bytes() + 15) / 16 * 16; }

  int64_t sums_;
  uint32_t stages_ = 0;
  std::vector<Step> steps_;
  int64_t blocks_ = 0, groups_ = 0, counters_ = 0, partials_ = 0;
};

}  // namespace hcl
}  // namespace transkd
