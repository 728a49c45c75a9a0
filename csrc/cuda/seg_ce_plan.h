// How the CUDA kernels of seg_ce cut a call into blocks. Plain C++ without torch or CUDA, so that the tests on CPU run
// exactly what the launcher runs.
//
// Between the centres of four neighbouring source pixels, its corners, lies a cell: cell (y, x) holds the label pixels
// whose position floors to y and x; y or x is -1 before the first centre. A thread works on one cell, or on a share of
// a large one, by squares of side x side label pixels. A block takes a tile of cells. With gradients tiles overlap by a
// row and a column: a block makes the whole gradient of the source pixels between its cells, which costs less than a
// second kernel that adds up borders. Without gradients, and where labels and logits are of one size, they do not.
// All of it depends on the call only, never on the device: results are the same everywhere.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/bilinear.h"
#include "common/label_type.h"
#include "common/storage_type.h"
#include "cuda/common/launch_size.h"

namespace transkd {
namespace seg_ce {

constexpr int kThreads = 320;  // 9 x 33 cells, around 8 x 32 source pixels
constexpr int kPoints = 384;   // source pixels that a block reads, at most
constexpr int kFinishThreads = 256;
constexpr int kScaleThreads = 256;
constexpr int kScaleVectors = 4;  // of a thread of the backward
// Classes that a block reads at a time; what it shares of them fits into 48 KB.
template <class T>
constexpr int kClasses = 32 / sizeof(T);

// One call, as it comes in. Absent is nullptr.
struct Maps {
  int64_t batch, classes, height, width, label_height, label_width;
  bool channels_last;
  StorageType type, weight_type;
  LabelType label_type;
  int64_t ignore_index;
  const void* logits;
  const void* labels;
  const void* weight;
  void* kept;       // of the type of computing
  void* predicted;  // int64
};

// Sizes that decide how a call is cut; tests choose others to get many blocks of small maps.
struct Tuning {
  int64_t threads = kThreads;  // of a block, for its cells
  int64_t blocks = 2 * 132;    // that a large GPU takes at a time
};

// What a block adds up.
struct Sums {
  double loss, total;
  uint32_t right, ignored, out_of_range;
};

// The parameter of the forward and of the prediction. T is the type of computing.
template <class T>
struct Launch {
  const void* logits;
  const void* labels;
  const T* weight;
  T* kept;
  int64_t* predicted;
  Sums* sums;  // [blocks]
  int64_t ignore_index;
  int64_t class_stride, pixel_stride, sample_stride;
  uint32_t classes, height, width, label_height, label_width;
  uint32_t tile_rows, tile_columns;         // cells of a block
  uint32_t row_step, column_step;           // from one tile to the next
  uint32_t row_tiles, column_tiles;         // of a sample
  uint32_t shares, rounds, column_squares;  // threads of a cell; squares that each takes; squares side by side
  StorageType type;
  LabelType label_type;
  bool channels_last;
};

// The parameter of the kernel that brings weights of another type into the type of computing, before the forward.
template <class T>
struct Weights {
  const void* from;
  T* to;
  uint32_t count;
  StorageType type;
};

// The parameter of the forward's last kernel.
template <class T>
struct Finish {
  const Sums* sums;
  uint32_t blocks;
  int64_t pixels;
  T *loss, *total;
  int64_t* counts;
};

// The parameter of the backward.
template <class T>
struct Scale {
  const T* upstream;
  const T* total;
  const T* kept;
  void* gradient;
  int64_t count;
  bool vectors;
};

template <class T>
class Plan {
 public:
  explicit Plan(const Maps& m, const Tuning& tuning = {}) {
    launch.classes = checked("seg_ce", m.classes, "classes");
    const int64_t plane = checked("seg_ce", m.height * m.width, "pixels in a plane");
    const int64_t label_plane = checked("seg_ce", m.label_height * m.label_width, "label pixels of a sample");
    launch.logits = m.logits;
    launch.labels = m.labels;
    launch.weight = static_cast<const T*>(m.weight);
    launch.kept = static_cast<T*>(m.kept);
    launch.predicted = static_cast<int64_t*>(m.predicted);
    launch.ignore_index = m.ignore_index;
    launch.class_stride = m.channels_last ? 1 : plane;
    launch.pixel_stride = m.channels_last ? m.classes : 1;
    launch.sample_stride = m.classes * plane;
    launch.height = static_cast<uint32_t>(m.height);
    launch.width = static_cast<uint32_t>(m.width);
    launch.label_height = static_cast<uint32_t>(m.label_height);
    launch.label_width = static_cast<uint32_t>(m.label_width);
    launch.type = m.type;
    launch.label_type = m.label_type;
    launch.channels_last = m.channels_last;

    // A cell holds at most so many rows and columns of label pixels.
    const int64_t rows = ceil_div(m.label_height, m.height), columns = ceil_div(m.label_width, m.width);
    side = m.height == m.label_height && m.width == m.label_width        ? 1
           : sizeof(T) == sizeof(double) || std::max(rows, columns) <= 2 ? 2
                                                                         : 4;
    launch.column_squares = static_cast<uint32_t>(ceil_div(columns, side));
    cut(m, ceil_div(rows, side) * launch.column_squares, tuning);
    if (m.weight != nullptr && m.weight_type != kType) {
      weights = {m.weight, nullptr, launch.classes, m.weight_type};
      weight_blocks = static_cast<uint32_t>(ceil_div(m.classes, kFinishThreads));
    }
    finish.blocks = blocks;
    finish.pixels = m.batch * label_plane;
  }

  size_t workspace_bytes() const { return blocks * sizeof(Sums) + weights.count * sizeof(T); }

  void bind(void* workspace, void* loss, void* total, void* counts) {
    launch.sums = static_cast<Sums*>(workspace);
    if (weight_blocks > 0) launch.weight = weights.to = reinterpret_cast<T*>(launch.sums + blocks);
    finish.sums = launch.sums;
    finish.loss = static_cast<T*>(loss);
    finish.total = static_cast<T*>(total);
    finish.counts = static_cast<int64_t*>(counts);
  }

  Weights<T> weights{};
  Launch<T> launch{};
  Finish<T> finish{};
  int side;  // of a square of label pixels, which is also the kernels' template parameter
  uint32_t blocks = 0;
  uint32_t weight_blocks = 0;  // none: the weights are as the kernels want them

 private:
  static constexpr StorageType kType = sizeof(T) == sizeof(double) ? StorageType::kDouble : StorageType::kFloat;

  // Chooses the tile for which the blocks have least to do one after the other.
  void cut(const Maps& m, int64_t squares, const Tuning& tuning) {
    const int64_t overlap = m.kept != nullptr && side > 1;
    int64_t least = 0;
    for (int64_t shares = 1; shares == 1 || shares < 2 * squares; shares *= 2) {
      const int64_t cells = tuning.threads / shares;
      const int64_t rounds = ceil_div(squares, shares);
      for (int64_t columns = std::min({m.width + 1, cells, int64_t{kPoints / 2 - 1}}); columns > overlap; --columns) {
        const int64_t rows = std::min({m.height + 1, cells / columns, kPoints / (columns + 1) - 1});
        // A tile that has the first row of source pixels has the second one, and so with columns: see spread().
        if (rows - overlap < std::min(m.height, 1 + overlap)) continue;
        if (columns - overlap < std::min(m.width, 1 + overlap)) break;
        const int64_t row_tiles = ceil_div(m.height + 1 - overlap, rows - overlap);
        const int64_t column_tiles = ceil_div(m.width + 1 - overlap, columns - overlap);
        const int64_t count = m.batch * row_tiles * column_tiles;
        // Of two equally long ways, the one with fewer blocks reads less twice.
        const int64_t cost = std::max(count, tuning.blocks) * rounds;
        if (blocks_ != 0 && (cost > least || (cost == least && count >= blocks_))) continue;
        least = cost;
        blocks_ = count;
        launch.tile_rows = static_cast<uint32_t>(rows);
        launch.tile_columns = static_cast<uint32_t>(columns);
        launch.row_step = static_cast<uint32_t>(rows - overlap);
        launch.column_step = static_cast<uint32_t>(columns - overlap);
        launch.row_tiles = static_cast<uint32_t>(row_tiles);
        launch.column_tiles = static_cast<uint32_t>(column_tiles);
        launch.shares = static_cast<uint32_t>(shares);
        launch.rounds = static_cast<uint32_t>(rounds);
      }
    }
    blocks = checked("seg_ce", blocks_, "blocks");
  }

  int64_t blocks_ = 0;
};

// Elements of a 16-byte store of the backward, and those that one block takes.
constexpr int64_t scale_width(StorageType type) { return 16 / size_of(type); }
constexpr int64_t scale_elements(StorageType type) { return scale_width(type) * kScaleVectors * kScaleThreads; }

template <class T>
Scale<T> plan_scale(const void* upstream, const void* total, const void* kept, void* gradient, int64_t count) {
  return {static_cast<const T*>(upstream),   static_cast<const T*>(total), static_cast<const T*>(kept), gradient, count,
          aligned(kept) && aligned(gradient)};
}

inline uint32_t scale_blocks(int64_t count, StorageType type) {
  return checked("seg_ce_bwd", ceil_div(count, scale_elements(type)), "blocks");
}

}  // namespace seg_ce
}  // namespace transkd
