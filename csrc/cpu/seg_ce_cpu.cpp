// seg_ce on CPU: bilinear upsampling and cross-entropy in one, so that scores at label size exist for a few label rows
// at a time only.
//
// A source row is interpolated along its columns once, and mixed with its neighbour for every label row between them.
// There the softmax is at hand, so the gradient of the summed loss is made with it: gathered for the two rows, and
// brought back to their columns when no label row reads them any more. Bands of source rows go to threads; what a band
// has for the first row of the next one is added at the end. Bands and tiles do not depend on the number of threads:
// results repeat bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/seg_ce_contract.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensor.h"
#include "cpu/common/values.h"
#include "cpu/seg_ce_loops.h"
#include "cpu/seg_ce_rows.h"

namespace transkd {
namespace seg_ce {
namespace {

constexpr int64_t kOperations = 4;  // for a class of a label pixel

int64_t work_of(const Sizes& sizes) { return kOperations * sizes.batch * sizes.classes * sizes.label_plane(); }

// Calls f(first row, second row, begin, end) with the label rows between each two source rows of a band.
template <class F>
void over_rows(const Bilinear& vertical, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = vertical.start(row), to = vertical.start(row + 1);
    if (from < to) f(row, vertical.source(from).second, from, to);
  }
}

// ---- Forward.

struct Sums {
  double loss = 0, total = 0;
  int64_t labelled = 0, right = 0, ignored = 0;

  void add(const Sums& other) {
    loss += other.loss;
    total += other.total;
    labelled += other.labelled;
    right += other.right;
    ignored += other.ignored;
  }
};

template <class T, class Storage>
struct Forward {
  const Geometry<T>& g;
  const Storage* labels;
  int64_t ignore_index;
  const T* table;  // weights of the classes, and 0

  struct Rooms {
    Scores<T> scores;
    std::optional<Gradients<T>> gradients;
    Room<Class<T>> targets;
    Room<T> weights, values;

    Rooms(const Geometry<T>& g, const Tensor& logits, T* kept, T* edge)
        : scores(g, logits),
          targets(kRows * g.tile),
          weights(kRows * g.tile),
          values((g.sizes.classes + 1) * kRows * kPad) {
      if (kept != nullptr) gradients.emplace(g, kept, edge);
    }
  };

  Sums add_band(int64_t sample, int64_t band, Rooms& rooms) const {
    const Sizes& sizes = g.sizes;
    const int64_t begin = band * g.band, end = std::min(begin + g.band, sizes.height);
    const bool mix = !sizes.same_size();
    Sums sums;
    if (rooms.gradients) rooms.gradients->start(sample, band);
    for (const TileColumns& columns : g.tiles) {
      rooms.scores.start(sample, columns);
      if (rooms.gradients) rooms.gradients->start_tile(columns);
      over_rows(g.vertical, begin, end, [&](int64_t first, int64_t second, int64_t from, int64_t to) {
        Pixels<T> pixels{};
        std::tie(pixels.upper, pixels.lower) = rooms.scores.get(first, second);
        if (rooms.gradients) {
          std::tie(pixels.upper_gradient, pixels.lower_gradient) = rooms.gradients->get(first, mix ? second : -1);
        }
        pixels.classes = sizes.classes;
        pixels.width = columns.width;
        pixels.mix = mix;
        pixels.values = rooms.values.get();
        pixels.loss = &sums.loss;
        pixels.total = &sums.total;
        pixels.right = &sums.right;
        for (int64_t row = from; row < to; row += pixels.rows) {
          pixels.rows = !mix ? 1 : to - row >= 4 ? 4 : to - row >= 2 ? 2 : 1;
          for (int r = 0; r < pixels.rows; ++r) {
            Class<T>* const targets = rooms.targets.get() + r * columns.width;
            T* const weights = rooms.weights.get() + r * columns.width;
            read_labels(
                Labels<T, Storage>{labels + (sample * sizes.label_height + row + r) * sizes.label_width + columns.begin,
                                   columns.end - columns.begin, columns.width, sizes.classes, ignore_index, table,
                                   targets, weights, &sums.labelled, &sums.ignored});
            pixels.targets[r] = targets;
            pixels.weights[r] = weights;
            pixels.fraction[r] = g.vertical.template fraction<T>(g.vertical.source(row + r));
          }
          add_pixels(pixels);
        }
      });
      if (rooms.gradients) rooms.gradients->finish();
    }
    return sums;
  }

  // kept [B, K, h, w] is filled, or null.
  Sums operator()(const Tensor& logits, T* kept) const {
    const Sizes& sizes = g.sizes;
    const int64_t tasks = sizes.batch * g.bands;
    const Room<T> edge(kept == nullptr ? 0 : tasks * sizes.classes * sizes.width);
    std::vector<Sums> parts(tasks);
    over_tasks(tasks, work_of(sizes), [&](const auto& next) {
      Rooms rooms(g, logits, kept, edge.get());
      for (int64_t task = next(); task < tasks; task = next()) {
        parts[task] = add_band(task / g.bands, task % g.bands, rooms);
      }
    });
    if (kept != nullptr) Gradients<T>(g, kept, edge.get()).add_edges();
    Sums sums;
    for (const Sums& part : parts) sums.add(part);
    return sums;
  }
};

template <class T>
Sums forward(const Sizes& sizes, const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weight,
             int64_t ignore_index, T* kept) {
  const Geometry<T> geometry(sizes);
  std::vector<T> table = weight ? values_of<T>(*weight) : std::vector<T>(sizes.classes, T(1));
  table.push_back(0);
  const auto run = [&](auto label) {
    using Storage = decltype(label);
    return Forward<T, Storage>{geometry, static_cast<const Storage*>(labels.const_data_ptr()), ignore_index,
                               table.data()}(logits, kept);
  };
  switch (label_type_of(labels)) {
    case LabelType::kByte:
      return run(uint8_t{});
    case LabelType::kShort:
      return run(int16_t{});
    case LabelType::kInt:
      return run(int32_t{});
    default:
      return run(int64_t{});
  }
}

template <class T>
void put_sums(const Sizes& sizes, const Sums& sums, const Tensor& loss, const Tensor& total, const Tensor& counts) {
  *static_cast<T*>(loss.mutable_data_ptr()) = sums.total <= 0 ? T(0) : static_cast<T>(sums.loss / sums.total);
  *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(sums.total);
  int64_t* const count = static_cast<int64_t*>(counts.mutable_data_ptr());
  count[kLabelled] = sums.labelled;
  count[kRight] = sums.right;
  count[kIgnored] = sums.ignored;
  count[kOutOfRange] = sizes.batch * sizes.label_plane() - sums.labelled - sums.ignored;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> seg_ce_fwd(Tensor logits, Tensor labels, std::optional<Tensor> weight,
                                                      int64_t ignore_index, bool keep) {
  const Sizes sizes = sizes_of(logits, labels, weight, ignore_index);
  const ScalarType type = compute_type(logits);
  Tensor loss = torch::stable::empty({}, type), total = torch::stable::empty({}, type);
  Tensor counts = torch::stable::empty({kCounts}, ScalarType::Long), kept = empty_kept(logits, keep);
  if (keep) use_huge_pages(kept);
  void* const data = keep ? kept.mutable_data_ptr() : nullptr;
  if (type == ScalarType::Double) {
    put_sums<double>(sizes, forward(sizes, logits, labels, weight, ignore_index, static_cast<double*>(data)), loss,
                     total, counts);
  } else {
    put_sums<float>(sizes, forward(sizes, logits, labels, weight, ignore_index, static_cast<float*>(data)), loss, total,
                    counts);
  }
  return {loss, counts, total, kept};
}

// ---- Backward: grad / total * kept.

template <class T>
void backward(const Tensor& grad, const Tensor& total, const Tensor& kept, const Tensor& gradient) {
  constexpr int64_t kBlock = 4096;
  const T sum = *static_cast<const T*>(total.const_data_ptr());
  const T factor = *static_cast<const T*>(grad.const_data_ptr()) / sum;
  const T* const from = static_cast<const T*>(kept.const_data_ptr());
  const Writer<T> out(gradient);
  const int64_t count = kept.numel();
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 8, [&](int64_t begin, int64_t end) {
    const Room<T> room(out.buffer(kBlock));
    for (int64_t offset = begin * kBlock; offset < std::min(end * kBlock, count); offset += kBlock) {
      const int64_t n = std::min(kBlock, count - offset);
      T* const to = out.place(offset, room.get());
      if (sum <= 0) {
        std::fill_n(to, n, T(0));
      } else {  // also where it is NaN
        scale(Scale<T>{from + offset, n, factor, to});
      }
      out.commit(offset, n, to);
    }
  });
}

Tensor seg_ce_bwd(Tensor grad, Tensor total, Tensor kept, int64_t dtype) {
  Tensor gradient = empty_gradient(grad, total, kept, dtype);
  use_huge_pages(gradient);
  if (is_double(kept)) {
    backward<double>(grad, total, kept, gradient);
  } else {
    backward<float>(grad, total, kept, gradient);
  }
  return gradient;
}

// ---- The classes.

template <class T>
void predict(const Sizes& sizes, const Tensor& logits, int64_t* to) {
  const Geometry<T> g(sizes);
  const int64_t tasks = sizes.batch * g.bands;
  over_tasks(tasks, work_of(sizes), [&](const auto& next) {
    Scores<T> scores(g, logits);
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t sample = task / g.bands, begin = task % g.bands * g.band;
      for (const TileColumns& columns : g.tiles) {
        scores.start(sample, columns);
        over_rows(g.vertical, begin, std::min(begin + g.band, sizes.height),
                  [&](int64_t first, int64_t second, int64_t from, int64_t end) {
                    const auto [upper, lower] = scores.get(first, second);
                    for (int64_t row = from; row < end; ++row) {
                      choose_classes(
                          Best<T>{upper, lower, sizes.classes, columns.width, !sizes.same_size(),
                                  g.vertical.template fraction<T>(g.vertical.source(row)), columns.end - columns.begin,
                                  to + (sample * sizes.label_height + row) * sizes.label_width + columns.begin});
                    }
                  });
      }
    }
  });
}

Tensor seg_ce_predict(Tensor logits, int64_t height, int64_t width) {
  const Sizes sizes = sizes_of(logits, height, width);
  Tensor classes = torch::stable::empty({sizes.batch, height, width}, ScalarType::Long);
  use_huge_pages(classes);
  int64_t* const to = static_cast<int64_t*>(classes.mutable_data_ptr());
  if (is_double(logits)) {
    predict<double>(sizes, logits, to);
  } else {
    predict<float>(sizes, logits, to);
  }
  return classes;
}

}  // namespace
}  // namespace seg_ce
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("seg_ce_fwd", TORCH_BOX(&transkd::seg_ce::seg_ce_fwd));
  m.impl("seg_ce_bwd", TORCH_BOX(&transkd::seg_ce::seg_ce_bwd));
  m.impl("seg_ce_predict", TORCH_BOX(&transkd::seg_ce::seg_ce_predict));
}
