// hcl on CPU: the pyramid mean-squared error of two maps, forward in one pass over both, backward in one pass more.
//
// Pooling is linear, so every level comes from sums of d = student - teacher. The borders of all pooling windows cut a
// plane into at most 7 x 7 cells (4 x 4 where the sizes divide by 4); the forward keeps the sum of d per cell. The
// gradient is
//   dL/dstudent = alpha d + table[cell],
// because all pixels of a cell lie in the same windows; the table, a few numbers per plane, is all that is saved
// besides the maps. Work is cut into pieces that do not depend on the number of threads, and every sum runs in a fixed
// order: results repeat bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/hcl_contract.h"
#include "cpu/common/tensor.h"
#include "cpu/hcl_loops.h"
#include "cpu/hcl_stage.h"

namespace transkd {
namespace {

std::vector<Stage> stages_of(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                             const std::vector<double>& weights, const std::vector<double>& level_weights) {
  check_hcl(students, teachers, weights, level_weights);
  std::vector<Stage> stages;
  stages.reserve(students.size());
  for (size_t m = 0; m < students.size(); ++m) {
    stages.emplace_back(students[m], teachers[m], weights[m], level_weights.data());
  }
  return stages;
}

// ---- Forward: the sums of d per cell into table [B, cells, C]; returns the sum of d^2.

template <class T>
double add_contiguous(const Stage& stage, T* table) {
  const Reader<T> s(stage.student), t(stage.teacher);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  std::vector<double> squares_of(stage.planes());
  torch::stable::parallel_for(
      0, stage.planes(), std::max<int64_t>(1, kGrain / stage.plane()), [&](int64_t begin, int64_t end) {
        std::vector<T> s_buffer(rows_at_once * columns.size), t_buffer(s_buffer.size());
        for (int64_t plane = begin; plane < end; ++plane) {
          T* const cells = table + plane / stage.channels * stage.cells() * stage.channels + plane % stage.channels;
          double squares = 0;
          for (int band = 0; band < rows.segments; ++band) {
            double band_sums[kMaxSegments] = {};
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * stage.plane() + r * columns.size, n = count * columns.size;
              T sums[kMaxSegments];
              squares += add_rows(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), count,
                                  columns, sums);
              for (int j = 0; j < columns.segments; ++j) band_sums[j] += sums[j];
            }
            for (int j = 0; j < columns.segments; ++j) {
              cells[(band * columns.segments + j) * stage.channels] = static_cast<T>(band_sums[j]);
            }
          }
          squares_of[plane] = squares;
        }
      });
  double squares = 0;
  for (const double part : squares_of) squares += part;
  return squares;
}

template <class T>
double add_channels_last(const Stage& stage, T* table) {
  const Reader<T> s(stage.student), t(stage.teacher);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const int64_t channels = stage.channels, cells = stage.cells();
  // Each channel's sum over a piece, and the squares over a run of pixels, are chains of float additions: kept short.
  constexpr int64_t kPiece = 1024, kRun = 512;
  const int64_t pixels_at_once = std::clamp<int64_t>(kBuffer / channels, 1, kRun);

  struct Piece {
    int64_t sample, cell, top, bottom, left, right;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < stage.batch; ++b) {
    for (int i = 0; i < rows.segments; ++i) {
      for (int j = 0; j < columns.segments; ++j) {
        const int64_t left = columns.edge[j], right = columns.edge[j + 1];
        const int64_t strip = std::max<int64_t>(1, kPiece / (right - left));
        for (int64_t top = rows.edge[i]; top < rows.edge[i + 1]; top += strip) {
          const int64_t bottom = std::min(top + strip, rows.edge[i + 1]);
          pieces.push_back({b, b * cells + i * columns.segments + j, top, bottom, left, right});
        }
      }
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  const int64_t grain = std::max<int64_t>(1, kGrain * count / (stage.planes() * stage.plane()));
  std::vector<T> sums(count * channels);
  std::vector<double> squares_of(count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> s_buffer(pixels_at_once * channels), t_buffer(s_buffer.size());
    for (int64_t p = begin; p < end; ++p) {
      const Piece& piece = pieces[p];
      for (int64_t r = piece.top; r < piece.bottom; ++r) {
        for (int64_t x = piece.left; x < piece.right; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, piece.right - x);
          const int64_t offset = ((piece.sample * stage.height + r) * stage.width + x) * channels,
                        n = pixels * channels;
          squares_of[p] += add_pixels(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), pixels,
                                      channels, sums.data() + p * channels);
        }
      }
    }
  });

  std::vector<double> cell(channels);
  double squares = 0;
  for (int64_t p = 0; p < count;) {
    const int64_t place = pieces[p].cell;
    std::fill(cell.begin(), cell.end(), 0.0);
    for (; p < count && pieces[p].cell == place; ++p) {
      for (int64_t c = 0; c < channels; ++c) cell[c] += sums[p * channels + c];
      squares += squares_of[p];
    }
    for (int64_t c = 0; c < channels; ++c) table[place * channels + c] = static_cast<T>(cell[c]);
  }
  return squares;
}

// ---- Backward.

// Memory is walked from its end: what the forward read last may still be in the cache.

template <class T>
void backward_contiguous(T upstream, const Stage& stage, const T* table, const Tensor& gradient) {
  const Reader<T> s(stage.student), t(stage.teacher);
  const Writer<T> out(gradient);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const T alpha = static_cast<T>(upstream * stage.alpha());
  const bool stream = streams(stage, gradient, out, divisor(columns));
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  torch::stable::parallel_for(
      0, stage.planes(), std::max<int64_t>(1, kGrain / stage.plane()), [&](int64_t begin, int64_t end) {
        std::vector<T> s_buffer(rows_at_once * columns.size), t_buffer(s_buffer.size()), out_buffer(s_buffer.size());
        for (int64_t plane = end; plane-- > begin;) {
          const T* cells = table + plane / stage.channels * stage.cells() * stage.channels + plane % stage.channels;
          for (int band = 0; band < rows.segments; ++band) {
            T level[kMaxSegments];
            for (int j = 0; j < columns.segments; ++j) {
              level[j] = upstream * cells[(band * columns.segments + j) * stage.channels];
            }
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * stage.plane() + r * columns.size, n = count * columns.size;
              T* to = out.place(offset, out_buffer.data());
              rows_backward(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), count, columns,
                            alpha, level, to, stream);
              out.commit(offset, n, to);
            }
          }
        }
        if (stream) streamed();
      });
}

template <class T>
void backward_channels_last(T upstream, const Stage& stage, const T* table, const Tensor& gradient) {
  const Reader<T> s(stage.student), t(stage.teacher);
  const Writer<T> out(gradient);
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const T alpha = static_cast<T>(upstream * stage.alpha());
  const int64_t channels = stage.channels, pixels_at_once = std::max<int64_t>(1, kBuffer / channels);
  const bool stream = streams(stage, gradient, out, channels);
  std::vector<T> levels(stage.batch * stage.cells() * channels);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = upstream * table[i];
  const int64_t lines = stage.batch * stage.height, grain = std::max<int64_t>(1, kGrain / (stage.width * channels));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> s_buffer(pixels_at_once * channels), t_buffer(s_buffer.size()), out_buffer(s_buffer.size());
    for (int64_t line = end; line-- > begin;) {
      const int64_t b = line / stage.height, r = line % stage.height;
      const int band = static_cast<int>(std::upper_bound(rows.edge, rows.edge + rows.segments + 1, r) - rows.edge) - 1;
      for (int j = 0; j < columns.segments; ++j) {
        const T* level = levels.data() + (b * stage.cells() + band * columns.segments + j) * channels;
        for (int64_t x = columns.edge[j]; x < columns.edge[j + 1]; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, columns.edge[j + 1] - x);
          const int64_t offset = (line * stage.width + x) * channels, n = pixels * channels;
          T* to = out.place(offset, out_buffer.data());
          pixels_backward(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), pixels, channels,
                          alpha, level, to, stream);
          out.commit(offset, n, to);
        }
      }
    }
    if (stream) streamed();
  });
}

// ---- The registered ops.

template <class T>
Tensor forward(const std::vector<Stage>& stages, ScalarType type, std::vector<Tensor>& tables) {
  double total = 0;
  for (const Stage& stage : stages) {
    tables.push_back(torch::stable::empty({stage.batch, stage.cells(), stage.channels}, type));
    T* table = static_cast<T*>(tables.back().mutable_data_ptr());
    const double squares =
        stage.layout == Layout::kContiguous ? add_contiguous(stage, table) : add_channels_last(stage, table);
    total += squares * stage.alpha() / 2 + pool(stage, table);
  }
  Tensor loss = torch::stable::empty({}, type);
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(total);
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> hcl_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                std::vector<double> weights, std::vector<double> level_weights) {
  const std::vector<Stage> stages = stages_of(students, teachers, weights, level_weights);
  std::vector<Tensor> tables;
  Tensor loss = is_double(students[0]) ? forward<double>(stages, ScalarType::Double, tables)
                                       : forward<float>(stages, ScalarType::Float, tables);
  return {loss, tables};
}

template <class T>
void backward(const Tensor& grad, const std::vector<Stage>& stages, const std::vector<Tensor>& tables,
              const std::vector<Tensor>& gradients) {
  const T upstream = *static_cast<const T*>(grad.const_data_ptr());
  for (size_t m = stages.size(); m-- > 0;) {
    const T* table = static_cast<const T*>(tables[m].const_data_ptr());
    if (stages[m].layout == Layout::kContiguous) {
      backward_contiguous(upstream, stages[m], table, gradients[m]);
    } else {
      backward_channels_last(upstream, stages[m], table, gradients[m]);
    }
  }
}

std::vector<Tensor> hcl_bwd(Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                            std::vector<Tensor> tables, std::vector<double> weights,
                            std::vector<double> level_weights) {
  const std::vector<Stage> stages = stages_of(students, teachers, weights, level_weights);
  check_hcl_backward(grad, students, tables, [&](size_t m) { return stages[m].cells(); });
  std::vector<Tensor> gradients;
  for (const Tensor& student : students) gradients.push_back(torch::stable::empty_like(student));
  if (is_double(students[0])) {
    backward<double>(grad, stages, tables, gradients);
  } else {
    backward<float>(grad, stages, tables, gradients);
  }
  return gradients;
}

}  // namespace
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("hcl_fwd", TORCH_BOX(&transkd::hcl_fwd));
  m.impl("hcl_bwd", TORCH_BOX(&transkd::hcl_bwd));
}
