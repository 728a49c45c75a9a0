// How csf on CPU walks its maps and cuts its work into pieces, which depend on sizes only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/csf_attention.h"
#include "common/layout.h"
#include "common/nearest.h"

namespace transkd {
namespace csf {

constexpr int64_t kBuffer = 4096;    // elements taken at a time
constexpr int64_t kPiece = 1 << 15;  // elements of a piece; below that a second thread does not pay

// A run of memory of a fine map: some of its rows, or a piece of one, and what they read of the coarse map.
struct Run {
  int64_t row, rows, column, columns;
  const int64_t *row_source, *column_source;  // per row and column of the run
  int64_t coarse_row;                         // the first one at hand

  // Where the coarse row that row r reads stands, in elements from coarse_row on.
  TRANSKD_INLINE int64_t coarse(int64_t r, int64_t row_elements) const {
    return (row_source[r] - coarse_row) * row_elements;
  }
};

// Pixels [begin, end) of every slab.
struct Range {
  int64_t part, begin, end;
};

// z, grad and v are fine maps, y is the coarse one. A slab is what one map of pixels stands in memory: a plane, whose
// pixels hold one channel each, or a sample of a channels-last map.
struct Maps {
  int64_t batch, channels, slabs, lanes;  // lanes: channels in a pixel of a slab
  Nearest rows, columns;
  std::vector<int64_t> row_start, column_start;  // windows, as Nearest::start
  std::vector<int64_t> row_source, column_source;
  int64_t largest_window = 0;
  bool pairs;    // of columns
  bool uniform;  // all windows are of one size, so that y may be taken as a single row

  Maps(const Tensor& z, const Tensor& y)
      : batch(z.size(0)),
        channels(z.size(1)),
        slabs(batch * channels),
        lanes(1),
        rows(y.size(2), z.size(2)),
        columns(y.size(3), z.size(3)),
        row_start(starts_of(rows)),
        column_start(starts_of(columns)),
        pairs(columns.halves()) {
    if (layout_of(z) == Layout::kChannelsLast) {
      slabs = batch;
      lanes = channels;
    }
    for (int64_t r = 0; r < rows.out; ++r) row_source.push_back(rows.source(r));
    for (int64_t x = 0; x < columns.out; ++x) column_source.push_back(columns.source(x));
    largest_window = largest(row_start) * largest(column_start);
    uniform = rows.out % rows.in == 0 && columns.out % columns.in == 0 &&
              largest_window == (rows.out / rows.in) * (columns.out / columns.in);
  }

  bool planes() const { return lanes == 1; }
  int64_t pixels() const { return rows.out * columns.out; }
  int64_t coarse_pixels() const { return rows.in * columns.in; }
  // Elements of a coarse row as it is, and with every plane's columns repeated.
  int64_t coarse_row() const { return columns.in * lanes; }
  int64_t spread_row() const { return planes() ? columns.out : coarse_row(); }
  // Of a plane or sample's first channel in a table of [batch, channels]; of a channel in one of [channels].
  int64_t entry(int64_t slab) const { return slab * lanes; }
  int64_t channel(int64_t slab) const { return planes() ? slab % channels : 0; }

  int64_t run_pixels() const { return std::max(kFewestPixels, kBuffer / lanes); }
  int64_t run_elements() const { return run_pixels() * lanes; }

  // The last of the coarse rows from `first` on that are at hand together, past the end: with their windows they fill a
  // buffer, or it is a single one.
  int64_t together(int64_t first, int64_t last) const {
    const auto fits = [&](int64_t end) {
      return (row_start[end] - row_start[first]) * columns.out <= run_pixels() &&
             (end - first) * std::max(coarse_row(), spread_row()) <= kBuffer;
    };
    int64_t end = first + 1;
    while (end < last && fits(end + 1)) ++end;
    return end;
  }
  int64_t coarse_elements() const { return std::max(kBuffer, coarse_row()); }
  int64_t spread_elements() const { return std::max(kBuffer, spread_row()); }

  // Calls f for every run of the fine pixels [begin, end), in their order, with coarse_row the first one at hand.
  template <class F>
  void runs(int64_t begin, int64_t end, int64_t coarse_row, const F& f) const {
    const int64_t width = columns.out, at_once = run_pixels(), rows_at_once = std::max<int64_t>(1, at_once / width);
    int64_t row = begin / width, column = begin % width;
    for (int64_t p = begin; p < end;) {
      const int64_t pixels = std::min({width - column, end - p, at_once});
      const int64_t height = pixels == width ? std::min((end - p) / width, rows_at_once) : 1;
      const Run run{row, height, column, pixels, row_source.data() + row, column_source.data() + column, coarse_row};
      f(run);
      p += run.rows * run.columns;
      column += run.columns;
      if (column == width) {
        column = 0;
        row += run.rows;
      }
    }
  }

 private:
  static constexpr int64_t kFewestPixels = 8;

  static std::vector<int64_t> starts_of(const Nearest& axis) {
    std::vector<int64_t> starts;
    for (int64_t i = 0; i <= axis.in; ++i) starts.push_back(axis.start(i));
    return starts;
  }

  static int64_t largest(const std::vector<int64_t>& starts) {
    int64_t size = 0;
    for (size_t i = 1; i < starts.size(); ++i) size = std::max(size, starts[i] - starts[i - 1]);
    return size;
  }
};

// Every part of a slab's pixels in pieces of `length`.
inline std::vector<Range> ranges_of(const Parts& parts, int64_t count, int64_t length) {
  std::vector<Range> ranges;
  for (int64_t part = 0; part < count; ++part) {
    const int64_t end = parts.begin(part + 1);
    for (int64_t p = parts.begin(part); p < end; p += length) ranges.push_back({part, p, std::min(p + length, end)});
  }
  return ranges;
}

// Calls f(begin, end) for shares of `pieces` equal pieces of `elements` in all.
template <class F>
void in_parallel(int64_t pieces, int64_t elements, const F& f) {
  torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, kPiece * pieces / elements), f);
}

// Cuts the maps into bands of coarse rows with their windows and calls f(share) on each thread, which calls
// share([&](slab, first coarse row, last) {...}) for its bands, from the end of memory: what the pass over the sums
// read last may still be in the cache.
template <class F>
void over_bands(const Maps& maps, const F& f) {
  const int64_t of_slab = (maps.pixels() + maps.coarse_pixels()) * maps.lanes;
  const int64_t height = std::max<int64_t>(1, kPiece * maps.rows.in / of_slab);
  const int64_t bands = (maps.rows.in + height - 1) / height;
  in_parallel(maps.slabs * bands, maps.slabs * of_slab, [&](int64_t begin, int64_t end) {
    f([&](const auto& on_band) {
      for (int64_t piece = end; piece-- > begin;) {
        const int64_t first = piece % bands * height;
        on_band(piece / bands, first, std::min(first + height, maps.rows.in));
      }
    });
  });
}

}  // namespace csf
}  // namespace transkd
