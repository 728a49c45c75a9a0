// The passes of hcl_bn over the maps on CPU: moments, sums of the forward, gradient of u.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/batch_norm.h"
#include "cpu/common/moments.h"
#include "cpu/common/tensor.h"
#include "cpu/hcl_bn_loops.h"
#include "cpu/hcl_stage.h"

namespace transkd {
namespace hcl_bn {
namespace {

// ---- Moments of u.

template <class T>
void reduce(const Tensor& u, int64_t parts, double* to) {
  const Reader<T> reader(u);
  const int64_t channels = u.size(1);
  // A slab is what one run of pixels stands in memory: a plane, or the whole of a channels-last map.
  const bool planes = layout_of(u) == Layout::kContiguous;
  const int64_t lanes = planes ? 1 : channels, slabs = planes ? u.size(0) * channels : 1;
  const int64_t pixels = u.numel() / (slabs * lanes), length = std::max<int64_t>(1, kGrain / lanes);
  const int64_t of_slab = (pixels + length - 1) / length, rows = of_slab * slabs * lanes / channels;
  // Rows of [mean, squares] x [channels]; a channel has a row per piece of its slabs.
  std::vector<double> results(rows * 2 * channels);
  const int64_t pieces = slabs * of_slab;
  torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, kGrain * pieces / u.numel()),
                              [&](int64_t begin, int64_t end) {
                                std::vector<T> buffer, scratch;
                                for (int64_t piece = begin; piece < end; ++piece) {
                                  const int64_t slab = piece / of_slab, first = piece % of_slab * length;
                                  const int64_t row = slab / channels * of_slab + piece % of_slab;
                                  double* const result = results.data() + row * 2 * channels + slab % channels;
                                  moments(reader, (slab * pixels + first) * lanes, std::min(length, pixels - first),
                                          lanes, buffer, scratch, result, result + channels);
                                }
                              });

  std::fill_n(to, parts * 3 * channels, 0.0);
  const std::vector<double> none(channels);
  for (int64_t part = 0; part < parts; ++part, to += 3 * channels) {
    double count = 0;
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      double* const mean = results.data() + row * 2 * channels;
      const int64_t first = row % of_slab * length, values = std::min(length, pixels - first);
      join(count, static_cast<double>(values), channels, none.data(), mean + channels, mean, to + channels,
           to + 2 * channels);
      count += static_cast<double>(values);
    }
    std::fill_n(to, channels, count);
  }
}

// A stage's state [2, C].
struct State {
  double *mean, *invstd;

  State(double* data, int64_t channels) : mean(data), invstd(data + channels) {}
};

// The number of a plane's row segment that row r lies in.
int band_of(const Axis& rows, int64_t r) {
  return static_cast<int>(std::upper_bound(rows.edge, rows.edge + rows.segments + 1, r) - rows.edge) - 1;
}

// ---- Forward.

// Sums of one stage: of d and w per cell, [B, cells, 2, C], and of d w, [B, C]; of d^2 over all.
struct Sums {
  int64_t step;  // no power of two: the cells of one channel would compete for one place in the cache
  std::vector<double> of_cells, products;
  double squares = 0;

  explicit Sums(const Stage& stage)
      : step(2 * stage.channels + 8), of_cells(stage.batch * stage.cells() * step), products(stage.planes()) {}
  // Of d, of a cell's first channel; w follows after [channels].
  double* cell(int64_t i) { return of_cells.data() + i * step; }
};

// BN(u) = scale (u - shift) + offset.
template <class T>
struct Coefficients {
  std::vector<T> scale, shift, offset;

  Coefficients(const BatchNorm& bn, const State& state, int64_t channels)
      : scale(channels), shift(channels), offset(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = bn.weight.get(c, 1) * state.invstd[c];
      shift[c] = static_cast<T>(state.mean[c]);
      scale[c] = static_cast<T>(factor);
      offset[c] = static_cast<T>(bn.bias.get(c, 0) - factor * (state.mean[c] - static_cast<double>(shift[c])));
    }
  }
};

template <class T>
void add_contiguous(const Stage& stage, const Coefficients<T>& k, Sums& sums) {
  const Reader<T> u(stage.student), t(stage.teacher);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  std::vector<double> squares_of(stage.planes());
  torch::stable::parallel_for(
      0, stage.planes(), std::max<int64_t>(1, kGrain / stage.plane()), [&](int64_t begin, int64_t end) {
        const int64_t elements = rows_at_once * columns.size;
        std::vector<T> u_buffer(u.buffer(elements)), t_buffer(t.buffer(elements));
        for (int64_t plane = end; plane-- > begin;) {
          const int64_t b = plane / stage.channels, c = plane % stage.channels;
          for (int band = 0; band < rows.segments; ++band) {
            BandSums of_band;
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * stage.plane() + r * columns.size, n = count * columns.size;
              add_rows(u.read(offset, n, u_buffer.data()), t.read(offset, n, t_buffer.data()), count, columns,
                       OfPlane<T>{k.scale[c], k.shift[c], k.offset[c]}, &of_band);
            }
            for (int j = 0; j < columns.segments; ++j) {
              double* const cell = sums.cell(b * stage.cells() + band * columns.segments + j) + c;
              cell[0] = of_band.d[j];
              cell[stage.channels] = of_band.w[j];
            }
            squares_of[plane] += of_band.squares;
            sums.products[plane] += of_band.products;
          }
        }
      });
  for (const double part : squares_of) sums.squares += part;
}

template <class T>
void add_channels_last(const Stage& stage, const Coefficients<T>& k, Sums& sums) {
  const Reader<T> u(stage.student), t(stage.teacher);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const int64_t channels = stage.channels, row_step = stage.width * channels;
  const int64_t pixels_at_once = std::max(kSumGroup, kBuffer / channels);
  const Normaliser<T> normaliser{k.scale.data(), k.shift.data(), k.offset.data()};

  struct Piece {
    int64_t sample, cell, top, bottom, left, right;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < stage.batch; ++b) {
    for (int i = 0; i < rows.segments; ++i) {
      for (int j = 0; j < columns.segments; ++j) {
        const int64_t left = columns.edge[j], right = columns.edge[j + 1];
        const int64_t strip = std::max<int64_t>(1, kGrain / (channels * (right - left)));
        for (int64_t top = rows.edge[i]; top < rows.edge[i + 1]; top += strip) {
          const int64_t bottom = std::min(top + strip, rows.edge[i + 1]);
          pieces.push_back({b, b * stage.cells() + i * columns.segments + j, top, bottom, left, right});
        }
      }
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t grain = std::max<int64_t>(1, kGrain * count / (stage.planes() * stage.plane()));
  std::vector<double> results(count * 3 * channels), squares_of(count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const int64_t elements = pixels_at_once * channels;
    std::vector<T> u_buffer(u.buffer(elements)), t_buffer(t.buffer(elements));
    for (int64_t p = end; p-- > begin;) {
      const Piece& piece = pieces[p];
      const int64_t rows_at_once = std::max<int64_t>(1, kSumGroup / (piece.right - piece.left));
      Total<T> squares;
      for (int64_t r = piece.top; r < piece.bottom; r += rows_at_once) {
        for (int64_t x = piece.left; x < piece.right; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, piece.right - x);
          const int64_t rows = std::min(rows_at_once, piece.bottom - r);
          const int64_t offset = ((piece.sample * stage.height + r) * stage.width + x) * channels;
          const auto read = [&](const Reader<T>& from, std::vector<T>& buffer) {
            if (buffer.empty()) return PixelRows<T>{from.read(offset, 1, nullptr), row_step};
            const int64_t n = pixels * channels;
            for (int64_t k = 0; k < rows; ++k) from.read(offset + k * row_step, n, buffer.data() + k * n);
            return PixelRows<T>{buffer.data(), n};
          };
          add_pixels(read(u, u_buffer), read(t, t_buffer), rows, pixels, channels, normaliser,
                     results.data() + p * 3 * channels, squares);
        }
      }
      squares_of[p] = squares.sum();
    }
  });

  for (int64_t p = 0; p < count; ++p) {
    const double* const from = results.data() + p * 3 * channels;
    double* const cell = sums.cell(pieces[p].cell);
    double* const products = sums.products.data() + pieces[p].sample * channels;
    for (int64_t i = 0; i < 2 * channels; ++i) cell[i] += from[i];
    for (int64_t c = 0; c < channels; ++c) products[c] += from[2 * channels + c];
    sums.squares += squares_of[p];
  }
}

// ---- Backward.

// dL/du = u_weight (u - shift) + t_weight t + level, [B, cells, C].
template <class T>
struct Slopes {
  std::vector<T> u_weight, shift, t_weight, level;

  // mean_g: the means over all values of g and of g xhat, [2, C], times the upstream gradient; null where running
  // statistics normalise.
  Slopes(const Stage& stage, const BatchNorm& bn, const State& state, double upstream, const T* table,
         const double* mean_g)
      : u_weight(stage.channels),
        shift(stage.channels),
        t_weight(stage.channels),
        level(stage.batch * stage.cells() * stage.channels) {
    const int64_t channels = stage.channels;
    const double alpha = upstream * stage.alpha();
    std::vector<double> scale(channels), constant(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double weight = bn.weight.get(c, 1), mean = mean_g ? mean_g[c] : 0;
      const double product = mean_g ? mean_g[channels + c] : 0;
      shift[c] = static_cast<T>(state.mean[c]);
      scale[c] = weight * state.invstd[c];
      const double slope = scale[c] * state.invstd[c] * (alpha * weight - product);
      u_weight[c] = static_cast<T>(slope);
      t_weight[c] = static_cast<T>(-scale[c] * alpha);
      constant[c] =
          scale[c] * (alpha * bn.bias.get(c, 0) - mean) + slope * (static_cast<double>(shift[c]) - state.mean[c]);
      scale[c] *= upstream;
    }
    for (int64_t i = 0; i < stage.batch * stage.cells(); ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t entry = i * channels + c;
        level[entry] = static_cast<T>(scale[c] * static_cast<double>(table[entry]) + constant[c]);
      }
    }
  }
};

template <class T>
void backward_contiguous(const Stage& stage, const Slopes<T>& slopes, const Tensor& gradient) {
  const Reader<T> u(stage.student), t(stage.teacher);
  const Writer<T> out(gradient);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const bool stream = streams(stage, gradient, out, divisor(columns));
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  torch::stable::parallel_for(
      0, stage.planes(), std::max<int64_t>(1, kGrain / stage.plane()), [&](int64_t begin, int64_t end) {
        const int64_t elements = rows_at_once * columns.size;
        std::vector<T> u_buffer(u.buffer(elements)), t_buffer(t.buffer(elements)), out_buffer(out.buffer(elements));
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t b = plane / stage.channels, c = plane % stage.channels;
          for (int band = 0; band < rows.segments; ++band) {
            T level[kMaxSegments];
            for (int j = 0; j < columns.segments; ++j) {
              level[j] = slopes.level[(b * stage.cells() + band * columns.segments + j) * stage.channels + c];
            }
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * stage.plane() + r * columns.size, n = count * columns.size;
              T* const to = out.place(offset, out_buffer.data());
              rows_backward(u.read(offset, n, u_buffer.data()), t.read(offset, n, t_buffer.data()), count, columns,
                            slopes.u_weight[c], slopes.shift[c], slopes.t_weight[c], level, to, stream);
              out.commit(offset, n, to);
            }
          }
        }
        if (stream) streamed();
      });
}

template <class T>
void backward_channels_last(const Stage& stage, const Slopes<T>& slopes, const Tensor& gradient) {
  const Reader<T> u(stage.student), t(stage.teacher);
  const Writer<T> out(gradient);
  const Axis& columns = stage.pyramid.columns;
  const Slope<T> slope{slopes.u_weight.data(), slopes.shift.data(), slopes.t_weight.data()};
  const int64_t channels = stage.channels, pixels_at_once = std::max(kGroup, kBuffer / channels);
  const bool stream = streams(stage, gradient, out, channels);
  const int64_t lines = stage.batch * stage.height, grain = std::max<int64_t>(1, kGrain / (stage.width * channels));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    const int64_t elements = pixels_at_once * channels;
    std::vector<T> u_buffer(u.buffer(elements)), t_buffer(t.buffer(elements)), out_buffer(out.buffer(elements));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / stage.height, band = band_of(stage.pyramid.rows, line % stage.height);
      for (int j = 0; j < columns.segments; ++j) {
        const T* const level = slopes.level.data() + (b * stage.cells() + band * columns.segments + j) * channels;
        for (int64_t x = columns.edge[j]; x < columns.edge[j + 1]; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, columns.edge[j + 1] - x), n = pixels * channels;
          const int64_t offset = (line * stage.width + x) * channels;
          T* const to = out.place(offset, out_buffer.data());
          pixels_backward(u.read(offset, n, u_buffer.data()), t.read(offset, n, t_buffer.data()), pixels, channels,
                          slope, level, to, stream);
          out.commit(offset, n, to);
        }
      }
    }
    if (stream) streamed();
  });
}

}  // namespace
}  // namespace hcl_bn
}  // namespace transkd
