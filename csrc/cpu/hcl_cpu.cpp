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
#include <torch/headeronly/util/Exception.h>

#include <tuple>
#include <vector>

#include "cpu/common/clones.h"
#include "cpu/common/tensor.h"
#include "cpu/common/vector.h"
#include "cpu/hcl_pyramid.h"

namespace transkd {
namespace {

constexpr int64_t kBuffer = 4096;    // elements taken at a time
constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay

// ---- Loops over one run of memory; s, t, out are the compute type.

// d = s - t of one vector, added to a sum, its square to another.
template <class T, class V>
TRANSKD_INLINE void add_difference(const T* s, const T* t, V& sum, V& squares) {
  V d, other;
  d.load(s);
  other.load(t);
  d.lanes -= other.lanes;
  sum.lanes += d.lanes;
  squares.lanes += d.lanes * d.lanes;
}

// Rows of one plane: sums [segments] of d per column segment; returns the sum of d^2.
template <class T>
TRANSKD_INLINE T rows_loop(const T* s, const T* t, int64_t rows, const Axis& columns, T* sums) {
  using Whole = Vector<T>;
  using Half = Vector<T, 32>;
  Whole squares;
  Half half_squares;
  T single_squares = 0;
  for (int j = 0; j < columns.segments; ++j) {
    const int64_t begin = columns.edge[j], end = columns.edge[j + 1];
    Whole sum;
    Half half_sum;
    T single_sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const T *s_row = s + r * columns.size, *t_row = t + r * columns.size;
      int64_t i = begin;
      for (; i + Whole::kSize <= end; i += Whole::kSize) add_difference(s_row + i, t_row + i, sum, squares);
      if (i + Half::kSize <= end) {
        add_difference(s_row + i, t_row + i, half_sum, half_squares);
        i += Half::kSize;
      }
      for (; i < end; ++i) {
        const T d = s_row[i] - t_row[i];
        single_sum += d;
        single_squares += d * d;
      }
    }
    sums[j] = sum.sum() + half_sum.sum() + single_sum;
  }
  return squares.sum() + half_squares.sum() + single_squares;
}

// Pixels of a channels-last map: adds d to sums [channels]; returns the sum of d^2.
template <class T>
TRANSKD_INLINE T pixels_loop(const T* s, const T* t, int64_t pixels, int64_t channels, T* sums) {
  using Whole = Vector<T>;
  Whole squares;
  T single_squares = 0;
  for (int64_t p = 0; p < pixels; ++p, s += channels, t += channels) {
    int64_t c = 0;
    for (; c + Whole::kSize <= channels; c += Whole::kSize) {
      Whole sum;
      sum.load(sums + c);
      add_difference(s + c, t + c, sum, squares);
      sum.store(sums + c);
    }
    for (; c < channels; ++c) {
      const T d = s[c] - t[c];
      sums[c] += d;
      single_squares += d * d;
    }
  }
  return squares.sum() + single_squares;
}

// out = alpha (s - t) + level[segment] over rows of one plane.
template <class T>
TRANSKD_INLINE void rows_backward_loop(const T* __restrict s, const T* __restrict t, int64_t rows, const Axis& columns,
                                       T alpha, const T* __restrict level, T* __restrict out) {
  for (int64_t r = 0; r < rows; ++r, s += columns.size, t += columns.size, out += columns.size) {
    for (int j = 0; j < columns.segments; ++j) {
      const T add = level[j];
      for (int64_t i = columns.edge[j]; i < columns.edge[j + 1]; ++i) out[i] = alpha * (s[i] - t[i]) + add;
    }
  }
}

// out = alpha (s - t) + level[channel] over pixels of one cell.
template <class T>
TRANSKD_INLINE void pixels_backward_loop(const T* __restrict s, const T* __restrict t, int64_t pixels, int64_t channels,
                                         T alpha, const T* __restrict level, T* __restrict out) {
  for (int64_t p = 0; p < pixels; ++p, s += channels, t += channels, out += channels) {
    for (int64_t c = 0; c < channels; ++c) out[c] = alpha * (s[c] - t[c]) + level[c];
  }
}

// The instruction-set clones of the loops, one set per compute type.
#define TRANSKD_HCL_LOOPS(T)                                                                             \
  TRANSKD_CLONES T add_rows(const T* s, const T* t, int64_t rows, const Axis& columns, T* sums) {        \
    return rows_loop<T>(s, t, rows, columns, sums);                                                      \
  }                                                                                                      \
  TRANSKD_CLONES T add_pixels(const T* s, const T* t, int64_t pixels, int64_t channels, T* sums) {       \
    return pixels_loop<T>(s, t, pixels, channels, sums);                                                 \
  }                                                                                                      \
  TRANSKD_CLONES void rows_backward(const T* s, const T* t, int64_t rows, const Axis& columns, T alpha,  \
                                    const T* level, T* out) {                                            \
    rows_backward_loop<T>(s, t, rows, columns, alpha, level, out);                                       \
  }                                                                                                      \
  TRANSKD_CLONES void pixels_backward(const T* s, const T* t, int64_t pixels, int64_t channels, T alpha, \
                                      const T* level, T* out) {                                          \
    pixels_backward_loop<T>(s, t, pixels, channels, alpha, level, out);                                  \
  }
TRANSKD_HCL_LOOPS(float)
TRANSKD_HCL_LOOPS(double)
#undef TRANSKD_HCL_LOOPS

// ---- From the cells' sums of one plane to its pyramid terms and the gradient's table.

struct Shape {
  int64_t batch, channels, height, width;
  explicit Shape(const Tensor& map)
      : batch(map.size(0)), channels(map.size(1)), height(map.size(2)), width(map.size(3)) {}
  int64_t planes() const { return batch * channels; }
  int64_t plane() const { return height * width; }
  double alpha(const Pyramid& pyramid) const {
    return 2 * pyramid.pixel_weight / (static_cast<double>(planes()) * static_cast<double>(plane()));
  }
};

// cell_sums [cells] -> the plane's share of the loss's pooled terms; gradient [cells].
double pool_cells(const Pyramid& pyramid, int64_t planes, const double* cell_sums, double* gradient) {
  const Axis &rows = pyramid.rows, &columns = pyramid.columns;
  std::fill(gradient, gradient + pyramid.cells(), 0.0);
  double loss = 0;
  for (int k = 0; k < kLevels; ++k) {
    const int64_t l = kLevelSize[k];
    if (!pyramid.used[k]) continue;
    const double weight = pyramid.weight[k] / static_cast<double>(planes * l * l);
    for (int64_t i = 0; i < l; ++i) {
      const Window& vertical = rows.window[k][i];
      for (int64_t j = 0; j < l; ++j) {
        const Window& horizontal = columns.window[k][j];
        double sum = 0;
        for (int r = vertical.first; r < vertical.last; ++r) {
          for (int c = horizontal.first; c < horizontal.last; ++c) sum += cell_sums[r * columns.segments + c];
        }
        const double share = 1 / (vertical.length * horizontal.length);
        const double pooled = sum * share;
        loss += weight * pooled * pooled;
        const double slope = 2 * weight * pooled * share;
        for (int r = vertical.first; r < vertical.last; ++r) {
          for (int c = horizontal.first; c < horizontal.last; ++c) gradient[r * columns.segments + c] += slope;
        }
      }
    }
  }
  return loss;
}

// ---- Forward. table is [B, cells, C] in both layouts. Returns the loss.

template <class T>
double forward_contiguous(const Tensor& student, const Tensor& teacher, const Pyramid& pyramid, T* table) {
  const Shape shape(student);
  const Reader<T> s(student), t(teacher);
  const Axis &rows = pyramid.rows, &columns = pyramid.columns;
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  std::vector<double> losses(shape.planes());
  torch::stable::parallel_for(
      0, shape.planes(), std::max<int64_t>(1, kGrain / shape.plane()), [&](int64_t begin, int64_t end) {
        std::vector<T> s_buffer(rows_at_once * columns.size), t_buffer(s_buffer.size());
        double cells[kMaxCells], gradient[kMaxCells];
        for (int64_t plane = begin; plane < end; ++plane) {
          std::fill(cells, cells + kMaxCells, 0.0);
          double squares = 0;
          for (int band = 0; band < rows.segments; ++band) {
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * shape.plane() + r * columns.size, n = count * columns.size;
              T sums[kMaxSegments];
              squares += add_rows(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), count,
                                  columns, sums);
              for (int j = 0; j < columns.segments; ++j) cells[band * columns.segments + j] += sums[j];
            }
          }
          losses[plane] = squares * shape.alpha(pyramid) / 2 + pool_cells(pyramid, shape.planes(), cells, gradient);
          const int64_t b = plane / shape.channels, c = plane % shape.channels;
          for (int k = 0; k < pyramid.cells(); ++k) {
            table[(b * pyramid.cells() + k) * shape.channels + c] = static_cast<T>(gradient[k]);
          }
        }
      });
  double loss = 0;
  for (const double part : losses) loss += part;
  return loss;
}

template <class T>
double forward_channels_last(const Tensor& student, const Tensor& teacher, const Pyramid& pyramid, T* table) {
  const Shape shape(student);
  const Reader<T> s(student), t(teacher);
  const Axis &rows = pyramid.rows, &columns = pyramid.columns;
  const int64_t channels = shape.channels, cells = pyramid.cells();
  // Each channel's sum over a piece, and the squares over a run of pixels, are chains of float additions: kept short.
  constexpr int64_t kPiece = 1024, kRun = 512;
  const int64_t pixels_at_once = std::clamp<int64_t>(kBuffer / channels, 1, kRun);

  struct Piece {
    int64_t sample, cell, top, bottom, left, right;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < shape.batch; ++b) {
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
  const int64_t grain = std::max<int64_t>(1, kGrain * count / (shape.planes() * shape.plane()));
  std::vector<T> sums(count * channels);
  std::vector<double> squares_of(count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> s_buffer(pixels_at_once * channels), t_buffer(s_buffer.size());
    for (int64_t p = begin; p < end; ++p) {
      const Piece& piece = pieces[p];
      for (int64_t r = piece.top; r < piece.bottom; ++r) {
        for (int64_t x = piece.left; x < piece.right; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, piece.right - x);
          const int64_t offset = ((piece.sample * shape.height + r) * shape.width + x) * channels,
                        n = pixels * channels;
          squares_of[p] += add_pixels(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), pixels,
                                      channels, sums.data() + p * channels);
        }
      }
    }
  });

  std::vector<double> cell_sums(shape.batch * cells * channels);
  double loss = 0;
  for (int64_t p = 0; p < count; ++p) {
    double* into = cell_sums.data() + pieces[p].cell * channels;
    for (int64_t c = 0; c < channels; ++c) into[c] += sums[p * channels + c];
    loss += squares_of[p] * shape.alpha(pyramid) / 2;
  }
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      double plane[kMaxCells], gradient[kMaxCells];
      for (int64_t k = 0; k < cells; ++k) plane[k] = cell_sums[(b * cells + k) * channels + c];
      loss += pool_cells(pyramid, shape.planes(), plane, gradient);
      for (int64_t k = 0; k < cells; ++k) table[(b * cells + k) * channels + c] = static_cast<T>(gradient[k]);
    }
  }
  return loss;
}

// ---- Backward.

template <class T>
void backward_contiguous(T upstream, const Tensor& student, const Tensor& teacher, const Pyramid& pyramid,
                         const T* table, const Tensor& gradient) {
  const Shape shape(student);
  const Reader<T> s(student), t(teacher);
  const Writer<T> out(gradient);
  const Axis &rows = pyramid.rows, &columns = pyramid.columns;
  const T alpha = static_cast<T>(upstream * shape.alpha(pyramid));
  const int64_t rows_at_once = std::max<int64_t>(1, kBuffer / columns.size);
  torch::stable::parallel_for(
      0, shape.planes(), std::max<int64_t>(1, kGrain / shape.plane()), [&](int64_t begin, int64_t end) {
        std::vector<T> s_buffer(rows_at_once * columns.size), t_buffer(s_buffer.size()), out_buffer(s_buffer.size());
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t b = plane / shape.channels, c = plane % shape.channels;
          for (int band = 0; band < rows.segments; ++band) {
            T level[kMaxSegments];
            for (int j = 0; j < columns.segments; ++j) {
              const int64_t cell = b * pyramid.cells() + band * columns.segments + j;
              level[j] = upstream * table[cell * shape.channels + c];
            }
            for (int64_t r = rows.edge[band]; r < rows.edge[band + 1]; r += rows_at_once) {
              const int64_t count = std::min(rows_at_once, rows.edge[band + 1] - r);
              const int64_t offset = plane * shape.plane() + r * columns.size, n = count * columns.size;
              T* to = out.place(offset, out_buffer.data());
              rows_backward(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), count, columns,
                            alpha, level, to);
              out.commit(offset, n, to);
            }
          }
        }
      });
}

template <class T>
void backward_channels_last(T upstream, const Tensor& student, const Tensor& teacher, const Pyramid& pyramid,
                            const T* table, const Tensor& gradient) {
  const Shape shape(student);
  const Reader<T> s(student), t(teacher);
  const Writer<T> out(gradient);
  const Axis &rows = pyramid.rows, &columns = pyramid.columns;
  const T alpha = static_cast<T>(upstream * shape.alpha(pyramid));
  const int64_t channels = shape.channels, pixels_at_once = std::max<int64_t>(1, kBuffer / channels);
  std::vector<T> levels(shape.batch * pyramid.cells() * channels);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = upstream * table[i];
  const int64_t lines = shape.batch * shape.height, grain = std::max<int64_t>(1, kGrain / (shape.width * channels));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> s_buffer(pixels_at_once * channels), t_buffer(s_buffer.size()), out_buffer(s_buffer.size());
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / shape.height, r = line % shape.height;
      const int band = static_cast<int>(std::upper_bound(rows.edge, rows.edge + rows.segments + 1, r) - rows.edge) - 1;
      for (int j = 0; j < columns.segments; ++j) {
        const T* level = levels.data() + (b * pyramid.cells() + band * columns.segments + j) * channels;
        for (int64_t x = columns.edge[j]; x < columns.edge[j + 1]; x += pixels_at_once) {
          const int64_t pixels = std::min(pixels_at_once, columns.edge[j + 1] - x);
          const int64_t offset = (line * shape.width + x) * channels, n = pixels * channels;
          T* to = out.place(offset, out_buffer.data());
          pixels_backward(s.read(offset, n, s_buffer.data()), t.read(offset, n, t_buffer.data()), pixels, channels,
                          alpha, level, to);
          out.commit(offset, n, to);
        }
      }
    }
  });
}

// ---- The registered ops.

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

Layout check(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, "hcl: expected maps [B, C, H, W]");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim) && student.size(dim) > 0,
                    "hcl: expected non-empty maps of one shape; they differ in dimension ", dim);
  }
  for (const Tensor* map : {&student, &teacher}) {
    const ScalarType type = map->scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half || is_double(*map),
        "hcl: expected float32, float64, bfloat16 or float16 maps");
  }
  STD_TORCH_CHECK(is_double(student) == is_double(teacher), "hcl: float64 does not mix with other dtypes");
  const Layout layout = layout_of(student);
  STD_TORCH_CHECK(layout != Layout::kOther && layout == layout_of(teacher),
                  "hcl: expected both maps contiguous or both channels-last");
  return layout;
}

std::tuple<Tensor, Tensor> hcl_fwd(const Tensor& student, const Tensor& teacher) {
  const Layout layout = check(student, teacher);
  const Pyramid pyramid(student.size(2), student.size(3));
  const ScalarType type = is_double(student) ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::empty({}, type);
  Tensor table = torch::stable::empty({student.size(0), pyramid.cells(), student.size(1)}, type);
  const auto run = [&](auto* rows) {
    using T = std::remove_pointer_t<decltype(rows)>;
    const double value = layout == Layout::kContiguous ? forward_contiguous<T>(student, teacher, pyramid, rows)
                                                       : forward_channels_last<T>(student, teacher, pyramid, rows);
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(value);
  };
  if (type == ScalarType::Double) {
    run(static_cast<double*>(table.mutable_data_ptr()));
  } else {
    run(static_cast<float*>(table.mutable_data_ptr()));
  }
  return {loss, table};
}

Tensor hcl_bwd(const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& table) {
  const Layout layout = check(student, teacher);
  const Pyramid pyramid(student.size(2), student.size(3));
  const ScalarType type = is_double(student) ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type,
                  "hcl_bwd: expected a scalar grad of the loss's dtype");
  STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == student.size(0) && table.size(1) == pyramid.cells() &&
                      table.size(2) == student.size(1) && table.scalar_type() == type && table.is_contiguous(),
                  "hcl_bwd: expected the table that hcl_fwd made");
  Tensor gradient = torch::stable::empty_like(student);
  const auto run = [&](auto upstream) {
    using T = decltype(upstream);
    const T* levels = static_cast<const T*>(table.const_data_ptr());
    if (layout == Layout::kContiguous) {
      backward_contiguous<T>(upstream, student, teacher, pyramid, levels, gradient);
    } else {
      backward_channels_last<T>(upstream, student, teacher, pyramid, levels, gradient);
    }
  };
  if (type == ScalarType::Double) {
    run(*static_cast<const double*>(grad.const_data_ptr()));
  } else {
    run(*static_cast<const float*>(grad.const_data_ptr()));
  }
  return gradient;
}

}  // namespace
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("hcl_fwd", TORCH_BOX(&transkd::hcl_fwd));
  m.impl("hcl_bwd", TORCH_BOX(&transkd::hcl_bwd));
}
