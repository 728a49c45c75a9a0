// The tile of cells that a block of seg_ce works on, the source pixels around it, and the label pixels of one thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/storage.cuh"
#include "cuda/seg_ce_plan.h"

namespace transkd {
namespace seg_ce {

constexpr uint32_t kNone = 0xffffffffu;

// The points of a tile are the corners of its cells, row by row. Cell (r, c) lies between the points (r, c),
// (r, c + 1), (r + 1, c) and (r + 1, c + 1).
template <class T>
struct Points {
  T value[kClasses<T>][kPoints];                             // logits of some classes; then their gradient
  uint32_t source[kPoints];                                  // the source pixel at a point, in its plane
  uint32_t target[kPoints];                                  // the same where the block writes its gradient, else kNone
  uint32_t row_edge[kPoints / 2], column_edge[kPoints / 2];  // where the cells' label pixels begin and end
};

template <class T>
struct Tile {
  int64_t first_logit, first_label;  // of the sample
  int first_row, first_column;       // of the cells
  uint32_t columns, count;           // of points
};

template <class T>
__device__ Tile<T> tile_of(const Launch<T>& launch, uint32_t block) {
  const uint32_t column = block % launch.column_tiles, row = block / launch.column_tiles % launch.row_tiles;
  const int64_t sample = block / launch.column_tiles / launch.row_tiles;
  return {sample * launch.sample_stride,
          sample * launch.label_height * launch.label_width,
          static_cast<int>(row * launch.row_step) - 1,
          static_cast<int>(column * launch.column_step) - 1,
          launch.tile_columns + 1,
          (launch.tile_rows + 1) * (launch.tile_columns + 1)};
}

// The first label pixel at or after a source pixel. Cells know no clamped positions, Bilinear's sources do.
__device__ __forceinline__ uint32_t edge_of(int source, uint32_t in, uint32_t out) {
  if (source != 0) return static_cast<uint32_t>(Bilinear{in, out}.start(source));
  const int64_t edge = (int64_t{out} + in - 1) / (2 * int64_t{in});
  return static_cast<uint32_t>(min(edge, int64_t{out}));
}

// Where a label pixel's position is clamped, torch adds 0 times the second source pixel, which may be infinite: it is
// the first corner of the cells in front of the first pixel.
__device__ __forceinline__ uint32_t corner_of(int source, uint32_t in) {
  return static_cast<uint32_t>(min(source < 0 ? 1 : source, static_cast<int>(in) - 1));
}

// Fills the tables; a barrier must follow. kSide: see Plan.
template <int kSide, class T>
__device__ void fill_tables(const Launch<T>& launch, const Tile<T>& tile, Points<T>& points) {
  for (uint32_t p = threadIdx.x; p < tile.count; p += kThreads) {
    const uint32_t r = p / tile.columns, c = p % tile.columns;
    const int row = tile.first_row + static_cast<int>(r), column = tile.first_column + static_cast<int>(c);
    const uint32_t pixel = corner_of(row, launch.height) * launch.width + corner_of(column, launch.width);
    // Labels of the logits' size need one corner only. Else the outer points need cells of other tiles.
    constexpr int kFirst = kSide > 1;
    const bool owned = static_cast<int>(r) >= kFirst && r < launch.tile_rows && static_cast<int>(c) >= kFirst &&
                       c < launch.tile_columns && row >= 0 && row < static_cast<int>(launch.height) && column >= 0 &&
                       column < static_cast<int>(launch.width);
    points.source[p] = pixel;
    points.target[p] = owned ? pixel : kNone;
  }
  for (uint32_t k = threadIdx.x; k <= launch.tile_rows + tile.columns; k += kThreads) {
    if (k <= launch.tile_rows) {
      points.row_edge[k] = edge_of(tile.first_row + static_cast<int>(k), launch.height, launch.label_height);
    } else {
      const uint32_t c = k - launch.tile_rows - 1;
      points.column_edge[c] = edge_of(tile.first_column + static_cast<int>(c), launch.width, launch.label_width);
    }
  }
}

// Calls visit(class, point) for some classes of the tile's points, side by side in memory for threads side by side.
template <class T, class Visit>
__device__ __forceinline__ void for_each_point(const Launch<T>& launch, const Tile<T>& tile, uint32_t classes,
                                               Visit visit) {
  if (launch.channels_last) {
    for (uint32_t e = threadIdx.x; e < tile.count * kClasses<T>; e += kThreads) {
      if (e % kClasses<T> < classes) visit(e % kClasses<T>, e / kClasses<T>);
    }
  } else {
    for (uint32_t p = threadIdx.x; p < tile.count; p += kThreads) {
#pragma unroll 4
      for (uint32_t k = 0; k < classes; ++k) visit(k, p);
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void read_as(const Launch<T>& launch, const Tile<T>& tile, uint32_t first, uint32_t classes,
                                        Points<T>& points) {
  const S* logits = static_cast<const S*>(launch.logits) + tile.first_logit + first * launch.class_stride;
  for_each_point(launch, tile, classes, [&](uint32_t k, uint32_t p) {
    points.value[k][p] = widen(__ldg(logits + k * launch.class_stride + points.source[p] * launch.pixel_stride));
  });
}

template <class T>
__device__ void read_classes(const Launch<T>& launch, const Tile<T>& tile, uint32_t first, uint32_t classes,
                             Points<T>& points) {
  if constexpr (std::is_same_v<T, double>) {
    read_as<double>(launch, tile, first, classes, points);
  } else {
    if (launch.type == StorageType::kFloat) read_as<float>(launch, tile, first, classes, points);
    if (launch.type == StorageType::kHalf) read_as<__half>(launch, tile, first, classes, points);
    if (launch.type == StorageType::kBFloat16) read_as<__nv_bfloat16>(launch, tile, first, classes, points);
  }
}

// Stores the points' values as gradient, or adds them to what this thread has stored there before.
template <class T>
__device__ void write_classes(const Launch<T>& launch, const Tile<T>& tile, uint32_t first, uint32_t classes, bool add,
                              const Points<T>& points) {
  T* kept = launch.kept + tile.first_logit + first * launch.class_stride;
  for_each_point(launch, tile, classes, [&](uint32_t k, uint32_t p) {
    const uint32_t target = points.target[p];
    if (target == kNone) return;
    T* to = kept + k * launch.class_stride + target * launch.pixel_stride;
    *to = add ? *to + points.value[k][p] : points.value[k][p];
  });
}

// The thread's number, computed anew wherever it is asked for: kept, all that hangs on it would take registers through
// the loops over classes.
__device__ __forceinline__ uint32_t thread_now() {
  uint32_t thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// This thread's cell, or its share of one. Threads without one have a share that there is not.
template <class T>
struct Cell {
  uint32_t share, row, column;    // in the tile
  int source_row, source_column;  // of the first corner

  __device__ Cell(const Launch<T>& launch, const Tile<T>& tile) {
    const uint32_t cells = launch.tile_rows * launch.tile_columns, thread = thread_now(), cell = thread % cells;
    share = thread / cells;
    row = cell / launch.tile_columns;
    column = cell % launch.tile_columns;
    source_row = tile.first_row + static_cast<int>(row);
    source_column = tile.first_column + static_cast<int>(column);
  }

  __device__ bool in_last_row(const Launch<T>& launch) const {
    return source_row + 1 == static_cast<int>(launch.height);
  }
  __device__ bool in_last_column(const Launch<T>& launch) const {
    return source_column + 1 == static_cast<int>(launch.width);
  }
  // No other tile counts its label pixels.
  __device__ bool counts(const Launch<T>& launch) const {
    return (row < launch.row_step || in_last_row(launch)) && (column < launch.column_step || in_last_column(launch));
  }
};

// Label pixels of a cell that a thread works on at a time: up to kSide x kSide of them, or none.
template <int kSide>
struct Square {
  uint32_t row, column, rows, columns;

  template <class T>
  __device__ Square(const Launch<T>& launch, const Points<T>& points, const Cell<T>& cell, uint32_t round) {
    const uint32_t number = round * launch.shares + cell.share;
    row = points.row_edge[cell.row] + number / launch.column_squares * kSide;
    column = points.column_edge[cell.column] + number % launch.column_squares * kSide;
    const uint32_t row_end = points.row_edge[cell.row + 1], column_end = points.column_edge[cell.column + 1];
    rows = cell.share < launch.shares && row < row_end ? min(row_end - row, static_cast<uint32_t>(kSide)) : 0;
    columns = column < column_end ? min(column_end - column, static_cast<uint32_t>(kSide)) : 0;
  }

  __device__ bool empty() const { return rows == 0 || columns == 0; }
  __device__ bool has(uint32_t i, uint32_t j) const { return i < rows && j < columns; }
  template <class T>
  __device__ int64_t first_label(const Launch<T>& launch, const Tile<T>& tile) const {
    return tile.first_label + static_cast<int64_t>(row) * launch.label_width + column;
  }
};

// The share of the second corners in a label pixel's row or column; what is left to 1 is the first corners'. Keeping
// both takes more registers than a thread has.
template <int kSide, class T>
__device__ __forceinline__ void weigh(int source, uint32_t in, uint32_t out, uint32_t pixel, uint32_t pixels,
                                      T (&second)[kSide]) {
#pragma unroll
  for (uint32_t i = 0; i < kSide; ++i) {
    // Beyond the square the last pixel comes again, so that nothing infinite is read that no pixel reads.
    const int64_t fine = pixel + min(i, pixels - 1);
    const int64_t rest = (2 * fine + 1) * in - out - 2 * int64_t{out} * source;
    const T fraction = static_cast<T>(static_cast<uint32_t>(rest)) / static_cast<T>(2 * int64_t{out});
    second[i] = source < 0 ? T(1) : fraction;
  }
}

// What it takes to interpolate at the pixels of a square.
template <int kSide, class T>
struct Bilinears {
  T bottom[kSide], right[kSide];
  uint32_t point;  // the first corner
  bool empty;

  __device__ Bilinears(const Launch<T>& launch, const Tile<T>& tile, const Points<T>& points, uint32_t round) {
    const Cell<T> cell(launch, tile);
    const Square<kSide> square(launch, points, cell, round);
    point = cell.row * tile.columns + cell.column;
    empty = square.empty();
    if (empty) return;
    weigh(cell.source_row, launch.height, launch.label_height, square.row, square.rows, bottom);
    weigh(cell.source_column, launch.width, launch.label_width, square.column, square.columns, right);
  }

  // Calls visit(i, j, value) for all pixels, column by column; values are those of one class at the tile's points.
  template <class Visit>
  __device__ __forceinline__ void interpolate(const Launch<T>& launch, const Tile<T>& tile, const T* values,
                                              Visit visit) const {
    const T* corner = values + point;
    if constexpr (kSide == 1) {
      visit(0, 0, *corner);
    } else {
      // On axes of one size torch reads no neighbour, which could be infinite.
      const uint32_t across = launch.width == launch.label_width ? 0 : 1;
      const uint32_t down = launch.height == launch.label_height ? 0 : launch.tile_columns + 1;
      const T a = corner[0], b = corner[across], c = corner[down], d = corner[down + across];
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const T above = (1 - right[j]) * a + right[j] * b, below = (1 - right[j]) * c + right[j] * d;
#pragma unroll
        for (int i = 0; i < kSide; ++i) visit(i, j, (1 - bottom[i]) * above + bottom[i] * below);
      }
    }
  }
};

}  // namespace seg_ce
}  // namespace transkd
