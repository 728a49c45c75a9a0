// The rows that seg_ce on CPU works with: how columns are cut into tiles and rows into bands, source rows interpolated
// along their columns, and gradients brought back to them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/bilinear.h"
#include "common/seg_ce_contract.h"
#include "cpu/common/gemm.h"
#include "cpu/common/tensor.h"
#include "cpu/common/values.h"
#include "cpu/seg_ce_columns.h"

namespace transkd {
namespace seg_ce {
namespace {

// Label columns [begin, end), and the columns that they read: from `column` on, `span` of them.
struct TileColumns {
  int64_t begin, end, width;  // width with what fills up a vector
  int64_t column, span;
  int64_t firsts;  // columns that are read first
  int64_t starts;  // where their label columns stand in Geometry::start
};

// What all rows of a call have in common; nothing of it depends on the number of threads.
template <class T>
struct Geometry {
  const Sizes sizes;
  const Bilinear vertical, horizontal;
  int64_t tile, span = 0;  // the widest of all tiles
  int64_t band, bands;     // source rows
  std::vector<TileColumns> tiles;
  std::vector<Class<T>> first;  // per label column, from the tile's first column on
  std::vector<T> fraction;
  std::vector<int64_t> start;  // per tile: the label columns at which its columns begin to be read first, and the end

  explicit Geometry(const Sizes& s) : sizes(s), vertical{s.height, s.label_height}, horizontal{s.width, s.label_width} {
    constexpr int64_t kTileBytes = 64 << 10;  // of scores and gradients; a quarter of a usual L2 cache or less
    constexpr int64_t kBand = 8;
    const int64_t all = (s.label_width + kPad - 1) / kPad * kPad;
    tile = kTileBytes / (4 * static_cast<int64_t>(sizeof(T)) * s.classes) / kPad * kPad;
    tile = std::clamp<int64_t>(tile, kPad, all);
    band = kBand;
    bands = (s.height + band - 1) / band;
    for (int64_t begin = 0; begin < s.label_width; begin += tile) {
      TileColumns columns;
      columns.begin = begin;
      columns.end = std::min(begin + tile, s.label_width);
      columns.width = std::min(tile, all - begin);
      columns.column = horizontal.source(begin).first;
      const auto last = horizontal.source(columns.end - 1);
      columns.span = last.second - columns.column + 1;
      columns.firsts = last.first - columns.column + 1;
      span = std::max(span, columns.span);
      columns.starts = static_cast<int64_t>(start.size());
      for (int64_t j = 0; j <= columns.firsts; ++j) {
        start.push_back(std::clamp(horizontal.start(columns.column + j), begin, columns.end) - begin);
      }
      for (int64_t x = begin; x < begin + columns.width; ++x) {
        const auto source = horizontal.source(std::min(x, columns.end - 1));
        first.push_back(static_cast<Class<T>>(source.first - columns.column));
        fraction.push_back(horizontal.template fraction<T>(source));
      }
      tiles.push_back(columns);
    }
  }

  int64_t room() const { return sizes.classes * tile; }
};

// The source rows of one sample, interpolated along their columns; two of them at a time.
template <class T>
class Scores {
 public:
  Scores(const Geometry<T>& geometry, const Tensor& logits)
      : g_(geometry),
        reader_(logits),
        stride_(geometry.span + kPad),
        columns_(geometry.sizes.classes * stride_),
        narrow_(std::max(reader_.buffer(geometry.span * (geometry.sizes.channels_last ? geometry.sizes.classes : 1)),
                         int64_t{1})) {
    for (int i = 0; i < 2; ++i) rows_[i] = Room<T>(geometry.room());
  }

  void start(int64_t sample, const TileColumns& columns) {
    sample_ = sample;
    tile_ = &columns;
    held_[0] = held_[1] = -1;
  }

  // The rows `first` and `second` [classes, tile width], which may be one; what was held before may go.
  std::pair<const T*, const T*> get(int64_t first, int64_t second) {
    if (held_[1] == first) {
      std::swap(rows_[0], rows_[1]);
      std::swap(held_[0], held_[1]);
    }
    hold(0, first);
    if (second == first) return {rows_[0].get(), rows_[0].get()};
    hold(1, second);
    return {rows_[0].get(), rows_[1].get()};
  }

 private:
  void hold(int slot, int64_t row) {
    if (held_[slot] == row) return;
    held_[slot] = row;
    fetch(row);
    const Sizes& sizes = g_.sizes;
    expand_row(Expand<T>{columns_.get(), stride_, sizes.classes, g_.first.data() + tile_->begin,
                         g_.fraction.data() + tile_->begin, int64_t{sizes.width != sizes.label_width}, tile_->width,
                         sizes.width <= sizes.label_width, sizes.same_size(), rows_[slot].get()});
  }

  // The columns of the tile of one row, [classes, stride].
  void fetch(int64_t row) {
    const Sizes& sizes = g_.sizes;
    const int64_t span = tile_->span;
    T* const to = columns_.get();
    if (sizes.channels_last) {
      const int64_t offset = ((sample_ * sizes.height + row) * sizes.width + tile_->column) * sizes.classes;
      gemm::transpose(reader_.read(offset, span * sizes.classes, narrow_.get()), sizes.classes, span, sizes.classes, to,
                      stride_);
    }
    for (int64_t k = 0; k < sizes.classes; ++k) {
      T* const line = to + k * stride_;
      if (!sizes.channels_last) {
        const int64_t offset = ((sample_ * sizes.classes + k) * sizes.height + row) * sizes.width + tile_->column;
        const T* const from = reader_.read(offset, span, line);
        if (from != line) std::copy_n(from, span, line);
      }
      std::fill(line + span, line + stride_, line[span - 1]);
    }
  }

  const Geometry<T>& g_;
  Reader<T> reader_;
  int64_t stride_;
  Room<T> columns_, narrow_, rows_[2];
  int64_t sample_ = 0, held_[2] = {-1, -1};
  const TileColumns* tile_ = nullptr;
};

// Gradients of two interpolated rows, gathered until no label row reads them any more, then brought back to their
// columns.
template <class T>
class Gradients {
 public:
  // `edge` [bands, classes, width] takes what a band has for the first row of the next one.
  Gradients(const Geometry<T>& geometry, T* kept, T* edge) : g_(geometry), kept_(kept), edge_(edge) {
    for (int i = 0; i < 2; ++i) rows_[i] = Room<T>(geometry.room());
  }

  // Zeroes the rows of a band.
  void start(int64_t sample, int64_t band) {
    const Sizes& sizes = g_.sizes;
    sample_ = sample;
    band_ = band;
    end_ = std::min((band + 1) * g_.band, sizes.height);
    const int64_t begin = band * g_.band, count = (end_ - begin) * sizes.width;
    if (sizes.channels_last) {
      std::fill_n(kept_ + (sample * sizes.height + begin) * sizes.width * sizes.classes, count * sizes.classes, T(0));
    } else {
      for (int64_t k = 0; k < sizes.classes; ++k) std::fill_n(kept_at(k, begin, 0), count, T(0));
    }
    std::fill_n(edge_of(sample, band), sizes.classes * sizes.width, T(0));
  }

  void start_tile(const TileColumns& columns) {
    tile_ = &columns;
    held_[0] = held_[1] = -1;
  }

  // Where to add the gradients of the rows `first` and `second`, which may be one.
  std::pair<T*, T*> get(int64_t first, int64_t second) {
    if (held_[0] != first || held_[1] != second) {
      flush(0);
      if (held_[1] == first) {
        std::swap(rows_[0], rows_[1]);
        std::swap(held_[0], held_[1]);
      } else {
        flush(1);
        clear(0, first);
      }
      clear(1, second);
    }
    return {rows_[0].get(), rows_[1].get()};
  }

  void finish() {
    flush(0);
    flush(1);
  }

  // After all bands: adds the edges, in order.
  void add_edges() {
    const Sizes& sizes = g_.sizes;
    for (int64_t b = 0; b < sizes.batch; ++b) {
      for (int64_t band = 0; band + 1 < g_.bands; ++band) {
        sample_ = b;
        const T* const from = edge_of(b, band);
        for (int64_t k = 0; k < sizes.classes; ++k) {
          T* const to = kept_at(k, (band + 1) * g_.band, 0);
          for (int64_t x = 0; x < sizes.width; ++x) to[x * column_stride()] += from[k * sizes.width + x];
        }
      }
    }
  }

 private:
  int64_t column_stride() const { return g_.sizes.channels_last ? g_.sizes.classes : 1; }
  int64_t class_stride() const { return g_.sizes.channels_last ? 1 : g_.sizes.plane(); }
  T* kept_at(int64_t k, int64_t row, int64_t column) const {
    const Sizes& sizes = g_.sizes;
    return kept_ + sample_ * sizes.classes * sizes.plane() + k * class_stride() +
           (row * sizes.width + column) * column_stride();
  }
  T* edge_of(int64_t sample, int64_t band) const {
    return edge_ + (sample * g_.bands + band) * g_.sizes.classes * g_.sizes.width;
  }

  void clear(int slot, int64_t row) {
    held_[slot] = row;
    std::fill_n(rows_[slot].get(), g_.sizes.classes * tile_->width, T(0));
  }

  void flush(int slot) {
    const int64_t row = std::exchange(held_[slot], -1);
    if (row < 0) return;
    const Sizes& sizes = g_.sizes;
    const bool inside = row < end_;
    collapse_row(Collapse<T>{rows_[slot].get(), sizes.classes, tile_->width, g_.start.data() + tile_->starts,
                             tile_->firsts, sizes.width - 1 - tile_->column, int64_t{sizes.width != sizes.label_width},
                             g_.fraction.data() + tile_->begin,
                             inside ? kept_at(0, row, tile_->column) : edge_of(sample_, band_) + tile_->column,
                             inside ? class_stride() : sizes.width, inside ? column_stride() : 1});
  }

  const Geometry<T>& g_;
  T *kept_, *edge_;
  Room<T> rows_[2];
  int64_t sample_ = 0, band_ = 0, end_ = 0, held_[2] = {-1, -1};
  const TileColumns* tile_ = nullptr;
};

}  // namespace
}  // namespace seg_ce
}  // namespace transkd
