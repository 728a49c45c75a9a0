// The passes of csf over the maps on CPU: sums and fused map forward, sums and gradients backward.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/common/tensor.h"
#include "cpu/csf_loops.h"
#include "cpu/csf_maps.h"

namespace transkd {
namespace csf {
namespace {

// ---- Sums of the forward.

// Mean and centred squares of the pixels of a range.
template <class T>
void moments(const Reader<T>& z, int64_t offset, int64_t pixels, int64_t lanes, std::vector<T>& buffer,
             std::vector<T>& scratch, double* mean, double* squares) {
  const int64_t chain = lanes == 1 ? 2 * kChain * Vector<T>::kSize : kChain;
  const int64_t at_once = std::clamp<int64_t>(kBuffer / lanes, std::min(chain, kGroup), chain);
  buffer.resize(z.buffer(at_once * lanes));
  scratch.assign(3 * lanes, 0);
  T *const shift = scratch.data(), *const sum = shift + lanes, *const products = sum + lanes;
  std::fill(mean, mean + lanes, 0.0);
  std::fill(squares, squares + lanes, 0.0);
  for (int64_t p = 0; p < pixels; p += at_once) {
    const int64_t count = std::min(at_once, pixels - p);
    const T* from = z.read(offset + p * lanes, count * lanes, buffer.data());
    if (p == 0) {
      const int64_t some = std::min(count, std::max<int64_t>(1, at_once / 8));
      add_moments(from, some, lanes, shift, sum, products);
      for (int64_t c = 0; c < lanes; ++c) shift[c] = sum[c] / static_cast<T>(some);
    }
    add_moments(from, count, lanes, shift, sum, products);
    join(static_cast<double>(p), static_cast<double>(count), lanes, sum, products, shift, mean, squares);
  }
}

// The sum over a range of coarse pixels of y times the size of the window.
template <class T>
void weighted(const Maps& maps, const Reader<T>& y, int64_t slab, const Range& range, const std::vector<T>& widths,
              std::vector<T>& buffer, double* sums) {
  const int64_t width = maps.uniform ? maps.coarse_pixels() : maps.columns.in;
  const int64_t at_once = std::max<int64_t>(1, kBuffer / maps.lanes);
  buffer.resize(y.buffer(at_once * maps.lanes));
  for (int64_t p = range.begin; p < range.end;) {
    const int64_t row = p / width, column = p % width;
    const int64_t count = std::min({width - column, range.end - p, at_once});
    const int64_t rows = maps.row_start[row + 1] - maps.row_start[row];
    // Nobody reads the others: their NaN must not count.
    if (rows > 0) {
      add_weighted(y.read((slab * maps.coarse_pixels() + p) * maps.lanes, count * maps.lanes, buffer.data()),
                   widths.data() + (maps.uniform ? 0 : column), count, maps.lanes, static_cast<double>(rows), sums);
    }
    p += count;
  }
}

template <class T>
void reduce(const Tensor& z, const Tensor& y, int64_t parts, double* sums) {
  const Maps maps(z, y);
  const Reader<T> z_reader(z), y_reader(y);
  const int64_t lanes = maps.lanes;
  const auto length = [&](int64_t pixels) { return (pixels + 63) / 64 * 64; };
  const Parts fine(maps.pixels(), parts), coarse(maps.coarse_pixels(), parts);
  const std::vector<Range> z_ranges = ranges_of(fine, parts, length(std::max<int64_t>(1, kPiece / lanes)));
  const int64_t z_count = static_cast<int64_t>(z_ranges.size());
  const std::vector<Range> y_ranges = ranges_of(coarse, parts, length(maps.coarse_pixels() / z_count + 1));
  const int64_t y_count = static_cast<int64_t>(y_ranges.size()), pieces = std::max(z_count, y_count);
  std::vector<T> widths;
  if (maps.uniform) widths.resize(kBuffer, static_cast<T>(maps.column_start[1]));
  for (int64_t j = 0; !maps.uniform && j < maps.columns.in; ++j) {
    widths.push_back(static_cast<T>(maps.column_start[j + 1] - maps.column_start[j]));
  }

  std::vector<double> results(maps.slabs * pieces * 3 * lanes);  // mean, squares, y
  const auto result = [&](int64_t slab, int64_t k) { return results.data() + (slab * pieces + k) * 3 * lanes; };
  in_parallel(maps.slabs * pieces, z.numel() + y.numel(), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer, scratch;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t slab = piece / pieces, k = piece % pieces;
      double* const to = result(slab, k);
      if (k < z_count) {
        const Range& range = z_ranges[k];
        moments(z_reader, (slab * maps.pixels() + range.begin) * lanes, range.end - range.begin, lanes, buffer, scratch,
                to, to + lanes);
      }
      if (k < y_count) weighted(maps, y_reader, slab, y_ranges[k], widths, buffer, to + 2 * lanes);
    }
  });

  // Per part, in the order of the ranges.
  std::fill(sums, sums + maps.batch * parts * 3 * maps.channels, 0.0);
  const std::vector<double> none(lanes);
  std::vector<double> about(lanes);
  for (int64_t slab = 0; slab < maps.slabs; ++slab) {
    const int64_t sample = maps.entry(slab) / maps.channels;
    const auto place = [&](int64_t part, int64_t row) {
      return sums + ((sample * parts + part) * 3 + row) * maps.channels + maps.channel(slab);
    };
    for (int64_t k = 0; k < z_count; ++k) {
      const Range& range = z_ranges[k];
      std::copy(result(slab, k), result(slab, k) + lanes, about.data());
      join(static_cast<double>(range.begin - fine.begin(range.part)), static_cast<double>(range.end - range.begin),
           lanes, none.data(), result(slab, k) + lanes, about.data(), place(range.part, 0), place(range.part, 1));
    }
    for (int64_t k = 0; k < y_count; ++k) {
      double* const to = place(y_ranges[k].part, 2);
      for (int64_t c = 0; c < lanes; ++c) to[c] += result(slab, k)[2 * lanes + c];
    }
  }
}

// ---- The fused map.

// Whether a large result goes past the cache: it would only push out what comes next, and a usual store reads it from
// memory first.
template <class T>
bool streams(const Maps& maps, const Tensor& tensor, const Writer<T>& out) {
  constexpr int64_t kStreamBytes = 8 << 20;
  const int64_t row = (maps.planes() ? maps.columns.out : maps.lanes) * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && row % 16 == 0;
  return tensor.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && aligned && !out.buffered();
}

template <class T>
void fuse(const Tensor& z, const Tensor& y, const Coefficients<T>& coefficients, const Tensor& v) {
  const Maps maps(z, y);
  const Reader<T> z_reader(z), y_reader(y);
  const Writer<T> out(v);
  const bool stream = streams(maps, v, out);
  const int64_t lanes = maps.lanes, width = maps.columns.out;
  over_bands(maps, [&](const auto& share) {
    std::vector<T> z_buffer(z_reader.buffer(maps.run_elements())), v_buffer(out.buffer(maps.run_elements()));
    std::vector<T> y_buffer(y_reader.buffer(maps.coarse_elements())),
        spread(maps.planes() ? maps.spread_elements() : 0);
    share([&](int64_t slab, int64_t first, int64_t last) {
      const int64_t entry = maps.entry(slab);
      for (int64_t i = first, next; i < last; i = next) {
        next = maps.together(i, last);
        const T* const coarse = y_reader.read((slab * maps.rows.in + i) * maps.coarse_row(),
                                              (next - i) * maps.coarse_row(), y_buffer.data());
        if (maps.planes()) {
          expand(coarse, next - i, maps.columns.in, maps.column_source.data(), maps.columns.out, maps.pairs,
                 coefficients.up_weight[entry], coefficients.offset[entry], spread.data());
        }
        maps.runs(maps.row_start[i] * width, maps.row_start[next] * width, i, [&](const Run& run) {
          const int64_t offset = (slab * maps.pixels() + run.row * width + run.column) * lanes;
          const int64_t count = run.rows * run.columns * lanes;
          const T* const from = z_reader.read(offset, count, z_buffer.data());
          T* const to = out.place(offset, v_buffer.data());
          if (maps.planes()) {
            fuse_plane(from, spread.data(), run, width, coefficients.scale[entry], coefficients.shift[entry], to,
                       stream);
          } else {
            fuse_pixels(from, coarse, run, maps.coarse_row(), lanes, coefficients, entry, to, stream);
          }
          out.commit(offset, count, to);
        });
      }
    });
    if (stream) streamed();
  });
}

// ---- Sums of the backward.

template <class T>
void backward_reduce(const Tensor& grad, const Tensor& z, const Tensor& y, const double* mean, int64_t parts,
                     double* sums) {
  const Maps maps(z, y);
  const Reader<T> grad_reader(grad), z_reader(z), y_reader(y);
  const int64_t lanes = maps.lanes, width = maps.columns.out;
  const int64_t rows = std::max<int64_t>(1, kPiece / (width * lanes));
  const std::vector<Range> ranges = ranges_of(Parts(maps.pixels(), parts), parts, rows * width);
  const int64_t pieces = static_cast<int64_t>(ranges.size());
  std::vector<T> shift(maps.channels);
  for (int64_t c = 0; c < maps.channels; ++c) shift[c] = static_cast<T>(mean[c]);

  std::vector<double> results(maps.slabs * pieces * 3 * lanes);
  in_parallel(maps.slabs * pieces, z.numel(), [&](int64_t begin, int64_t end) {
    std::vector<T> grad_buffer(grad_reader.buffer(maps.run_elements())), z_buffer(z_reader.buffer(maps.run_elements()));
    std::vector<T> y_buffer(y_reader.buffer(maps.coarse_elements())),
        spread(maps.planes() ? maps.spread_elements() : 0);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t slab = piece / pieces;
      const Range& range = ranges[piece % pieces];
      double* const to = results.data() + piece * 3 * lanes;
      const T* const about = shift.data() + maps.channel(slab);
      const int64_t last = maps.row_source[(range.end - 1) / width] + 1;
      for (int64_t i = maps.row_source[range.begin / width], next; i < last; i = next) {
        next = maps.together(i, last);
        const T* const coarse = y_reader.read((slab * maps.rows.in + i) * maps.coarse_row(),
                                              (next - i) * maps.coarse_row(), y_buffer.data());
        if (maps.planes()) {
          expand(coarse, next - i, maps.columns.in, maps.column_source.data(), width, maps.pairs, T(1), T(0),
                 spread.data());
        }
        const int64_t from_pixel = std::max(range.begin, maps.row_start[i] * width);
        maps.runs(from_pixel, std::min(range.end, maps.row_start[next] * width), i, [&](const Run& run) {
          const int64_t offset = (slab * maps.pixels() + run.row * width + run.column) * lanes;
          const int64_t count = run.rows * run.columns * lanes;
          const T* const g = grad_reader.read(offset, count, grad_buffer.data());
          const T* const from = z_reader.read(offset, count, z_buffer.data());
          if (maps.planes()) {
            add_products_plane(g, from, spread.data(), run, width, *about, to);
          } else {
            add_products_pixels(g, from, coarse, run, maps.coarse_row(), lanes, about, to);
          }
        });
      }
    }
  });

  std::fill(sums, sums + maps.batch * parts * 3 * maps.channels, 0.0);
  for (int64_t piece = 0; piece < maps.slabs * pieces; ++piece) {
    const int64_t slab = piece / pieces, sample = maps.entry(slab) / maps.channels;
    double* const to = sums + (sample * parts + ranges[piece % pieces].part) * 3 * maps.channels + maps.channel(slab);
    for (int64_t c = 0; c < lanes; ++c) {
      const double* const from = results.data() + piece * 3 * lanes + c;
      const int64_t channel = maps.channel(slab) + c;
      to[c] += from[0];
      to[maps.channels + c] += from[lanes] + (static_cast<double>(shift[channel]) - mean[channel]) * from[0];
      to[2 * maps.channels + c] += from[2 * lanes];
    }
  }
}

// ---- Gradients.

// dz and dy are none where they are not wanted; z counts unless BN(z) took running statistics.
template <class T, class Sum>
void backward_apply(const Maps& maps, const Tensor& grad, const Tensor* z, const Coefficients<T>& coefficients,
                    const Tensor* dz, const Tensor* dy) {
  const Reader<T> grad_reader(grad), z_reader(z ? *z : grad);
  const std::optional<Writer<T>> dz_writer = dz ? std::optional<Writer<T>>(*dz) : std::nullopt;
  const std::optional<Writer<T>> dy_writer = dy ? std::optional<Writer<T>>(*dy) : std::nullopt;
  const bool stream = dz && streams(maps, *dz, *dz_writer);
  const int64_t lanes = maps.lanes, width = maps.columns.out;
  over_bands(maps, [&](const auto& share) {
    std::vector<T> grad_buffer(grad_reader.buffer(maps.run_elements())), z_buffer(z_reader.buffer(maps.run_elements()));
    std::vector<T> dz_buffer(dz ? dz_writer->buffer(maps.run_elements()) : 0);
    std::vector<T> dy_buffer(dy ? dy_writer->buffer(maps.coarse_elements()) : 0);
    std::vector<Sum> sums(maps.spread_elements());
    share([&](int64_t slab, int64_t first, int64_t last) {
      const int64_t entry = maps.entry(slab);
      for (int64_t i = first, next; i < last; i = next) {
        next = maps.together(i, last);
        std::fill_n(sums.begin(), (next - i) * maps.spread_row(), Sum(0));
        maps.runs(maps.row_start[i] * width, maps.row_start[next] * width, i, [&](const Run& run) {
          const int64_t offset = (slab * maps.pixels() + run.row * width + run.column) * lanes;
          const int64_t count = run.rows * run.columns * lanes;
          const T* const g = grad_reader.read(offset, count, grad_buffer.data());
          const T* const from = dz && z ? z_reader.read(offset, count, z_buffer.data()) : nullptr;
          T* const to = dz ? dz_writer->place(offset, dz_buffer.data()) : nullptr;
          if (maps.planes()) {
            apply_plane(g, from, run, width, coefficients, entry, sums.data(), to, stream);
          } else {
            apply_pixels(g, from, run, maps.coarse_row(), lanes, coefficients, entry, sums.data(), to, stream);
          }
          if (dz) dz_writer->commit(offset, count, to);
        });
        if (!dy) continue;
        const int64_t offset = (slab * maps.rows.in + i) * maps.coarse_row(), count = (next - i) * maps.coarse_row();
        T* const to = dy_writer->place(offset, dy_buffer.data());
        if (maps.planes()) {
          windows_of_plane(sums.data(), maps.row_start.data() + i, next - i, maps.column_start.data(), maps.columns.in,
                           maps.pairs, coefficients.up_weight[entry], coefficients.pixel_share[entry], to);
        } else {
          windows_of_pixels(sums.data(), maps.row_start.data() + i, next - i, maps.column_start.data(), maps.columns.in,
                            lanes, coefficients.up_weight + entry, coefficients.pixel_share + entry, to);
        }
        dy_writer->commit(offset, count, to);
      }
    });
    if (stream) streamed();
  });
}

}  // namespace
}  // namespace csf
}  // namespace transkd
