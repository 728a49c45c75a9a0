// pea on CPU: one pass over the embeddings forward, which makes all gradients but for a factor, and one over the
// gradients backward.
//
// A stage's rows are cut into pieces, pieces into blocks, blocks into groups. Of a group the projections are made into
// a buffer that stays in the cache, become residuals there, and give the rows of dx; the weight's gradient takes a
// whole block at a time. Each piece has its own sums, merged in the order of pieces. All cuts depend on sizes only:
// results repeat bit for bit, with any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/pea_contract.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensor.h"
#include "cpu/common/tokens.h"
#include "cpu/common/values.h"
#include "cpu/pea_loops.h"

namespace transkd {
namespace pea {
namespace {

bool channel_major(const Tensor& tensor) { return token_layout_of(tensor) == TokenLayout::kChannelMajor; }

int64_t rounded_down(int64_t value, int64_t multiple, int64_t least) {
  return std::max(least, value / multiple * multiple);
}

// How a stage's rows are cut.
struct Cut {
  int64_t slabs, slab_rows;  // channel-major rows of two samples have nothing in common
  int64_t group, block;      // rows
  int64_t blocks_of_slab, blocks, blocks_of_piece, pieces;

  template <class T>
  static Cut of(const Stage& stage) {
    constexpr int64_t kGroupBytes = 64 << 10, kBlockBytes = 384 << 10, kGroupRows = 128, kBlockRows = 256;
    // Of all pieces' weight gradients, unless that leaves too few pieces for the threads.
    constexpr int64_t kPartialBytes = 2 << 20, kMostPieces = 32;
    // Enough of them for a few threads, unless the weight is so large that its partial sums would fill the memory.
    constexpr int64_t kFewestPieces = 8, kMostPartialBytes = 64 << 20;
    constexpr int64_t kBytes = sizeof(T);
    Cut cut{};
    const bool by_sample =
        channel_major(*stage.x) || channel_major(*stage.target) || (stage.assistant && channel_major(*stage.assistant));
    cut.slabs = by_sample ? stage.batch : 1;
    cut.slab_rows = stage.rows() / cut.slabs;
    cut.group = std::min(kGroupRows, rounded_down(kGroupBytes / (stage.out * kBytes), 16, 16));
    cut.block = std::min(kBlockRows, kBlockBytes / ((stage.in + stage.out) * kBytes));
    cut.block = rounded_down(cut.block, cut.group, cut.group);
    cut.blocks_of_slab = (cut.slab_rows + cut.block - 1) / cut.block;
    cut.blocks = cut.slabs * cut.blocks_of_slab;
    const int64_t partial = stage.in * stage.out * kBytes;
    const int64_t fewest = std::clamp<int64_t>(kMostPartialBytes / partial, 1, kFewestPieces);
    const int64_t most = std::clamp(kPartialBytes / partial, fewest, kMostPieces);
    cut.blocks_of_piece = (cut.blocks + most - 1) / most;
    cut.pieces = (cut.blocks + cut.blocks_of_piece - 1) / cut.blocks_of_piece;
    return cut;
  }

  Rows rows_of(int64_t block) const {
    const int64_t first = block % blocks_of_slab * this->block;
    return {block / blocks_of_slab, first, std::min(this->block, slab_rows - first)};
  }
};

// One stage at work: what all its pieces read, and what each of them leaves.
template <class T>
class Work {
 public:
  Work(const Stage& stage, const Kept& kept)
      : stage_(stage),
        cut_(Cut::of<T>(stage)),
        x_(*stage.x, channel_major(*stage.x), cut_.slab_rows),
        target_(*stage.target, channel_major(*stage.target), cut_.slab_rows),
        bias_(values_of<T>(*stage.bias)),
        weight_(values_of<T>(*stage.weight)),
        to_output_(gemm::panels_size<T>(stage.in, stage.out)),
        sums_(cut_.pieces) {
    if (stage.assistant) {
      assistant_.emplace(*stage.assistant, channel_major(*stage.assistant), cut_.slab_rows);
      f_p_ = values_of<T>(*stage.projection_scale)[0];
      f_a_ = values_of<T>(*stage.assistant_scale)[0];
    }
    std::vector<T> transposed(weight_.size());
    gemm::transpose(weight_.data(), stage.in, stage.out, stage.in, transposed.data(), stage.out);
    gemm::pack_panels(transposed.data(), stage.out, stage.in, stage.out, to_output_.get(), panel(stage.in));
    if (kept.x) {
      kept_x_.emplace(*kept.x, channel_major(*kept.x), cut_.slab_rows);
      scale(weight_.data(), f_p_, static_cast<int64_t>(weight_.size()), transposed.data(), false);
      to_input_ = Room<T>(gemm::panels_size<T>(stage.out, stage.in));
      gemm::pack_panels(transposed.data(), stage.in, stage.out, stage.in, to_input_.get(), panel(stage.out));
    }
    if (kept.residual) kept_residual_.emplace(*kept.residual, channel_major(*kept.residual), cut_.slab_rows);
    if (kept.weight) weights_ = Room<T>(cut_.pieces * stage.in * stage.out);
    if (kept.bias) biases_ = Room<double>(cut_.pieces * stage.out);
  }

  int64_t pieces() const { return cut_.pieces; }
  // Multiplications and additions of one piece.
  int64_t cost() const { return cut_.blocks_of_piece * std::min(cut_.block, cut_.slab_rows) * stage_.in * stage_.out; }

  void run(int64_t piece) {
    const int64_t in = stage_.in, out = stage_.out;
    const Room<T> x_room(x_.room(cut_.group)), target_room(target_.room(cut_.group)), residuals(cut_.group * out);
    const Room<T> assistant_room(assistant_ ? assistant_->room(cut_.group) : 0);
    const Room<T> kept_x_room(kept_x_ ? kept_x_->room(cut_.group) : 0);
    const Room<T> kept_residual_room(kept_residual_ ? kept_residual_->room(cut_.group) : 0);
    T* const weight = weights_.get() ? weights_.get() + piece * in * out : nullptr;
    double* const bias = biases_.get() ? biases_.get() + piece * out : nullptr;
    const Room<T> strips(weight ? gemm::strips_size(cut_.block, out) : 0);
    const Room<T> panels(weight ? gemm::panels_size<T>(cut_.block, in) : 0);
    std::vector<T> columns(bias ? out : 0);
    if (bias) std::fill(bias, bias + out, 0.0);
    Sums sums;
    const int64_t begin = piece * cut_.blocks_of_piece, end = std::min(begin + cut_.blocks_of_piece, cut_.blocks);
    for (int64_t b = begin; b < end; ++b) {
      const Rows block = cut_.rows_of(b);
      for (int64_t r = 0; r < block.count; r += cut_.group) {
        const Rows group{block.slab, block.first + r, std::min(cut_.group, block.count - r)};
        const T* const x = x_.read(group, x_room.get());
        gemm::multiply(x, in, group.count, in, to_output_.get(), out, residuals.get(), out, false,
                       target_.ahead(group));
        sums.add(make_residual(residuals.get(), {bias_.data(), f_p_, f_a_}, target_.read(group, target_room.get()),
                               assistant_ ? assistant_->read(group, assistant_room.get()) : nullptr, group.count, out,
                               bias ? columns.data() : nullptr));
        if (kept_x_) {
          T* const to = kept_x_->place(group, kept_x_room.get());
          gemm::multiply(residuals.get(), out, group.count, out, to_input_.get(), in, to, in, false);
          kept_x_->write(group, to, kept_x_room.get());
        }
        if (weight) {
          gemm::pack_strips(residuals.get(), out, group.count, out, strips.get() + r * gemm::kTileRows,
                            strip(block.count));
          gemm::pack_panels(x, in, group.count, in, panels.get() + r * gemm::panel_width<T>(), panel(block.count));
        }
        if (kept_residual_) kept_residual_->write(group, residuals.get(), kept_residual_room.get());
      }
      if (weight) {
        gemm::multiply_transposed(strips.get(), strip(block.count), out, block.count, panels.get(), panel(block.count),
                                  in, weight, in, b > begin);
      }
      for (int64_t c = 0; bias && c < out; ++c) {
        bias[c] += static_cast<double>(columns[c]);
        columns[c] = 0;
      }
    }
    sums_[piece] = sums;
  }

  // After all pieces; returns the stage's sum of R^2.
  double finish(const Kept& kept) {
    const int64_t in = stage_.in, out = stage_.out;
    if (kept.weight) {
      T* const to = static_cast<T*>(kept.weight->mutable_data_ptr());
      const int64_t count = in * out;
      torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
        merge(weights_.get() + begin, cut_.pieces, count, f_p_, end - begin, to + begin);
      });
    }
    if (kept.bias) {
      T* const to = static_cast<T*>(kept.bias->mutable_data_ptr());
      for (int64_t c = 0; c < out; ++c) {
        double sum = 0;
        for (int64_t piece = 0; piece < cut_.pieces; ++piece) sum += biases_.get()[piece * out + c];
        to[c] = static_cast<T>(static_cast<double>(f_p_) * sum);
      }
    }
    Sums sums;
    for (const Sums& part : sums_) sums.add(part);
    if (kept.scales) {
      T* const to = static_cast<T*>(kept.scales->mutable_data_ptr());
      to[0] = static_cast<T>(sums.projected);
      to[1] = static_cast<T>(sums.assisted);
    }
    return sums.squares;
  }

  // 2 w_m / (B N C_out), minus that, and f_a times that.
  void put_factors(T* factors) const {
    factors[kProjectionFactor] = static_cast<T>(stage_.factor());
    factors[kTargetFactor] = -factors[kProjectionFactor];
    factors[kAssistantFactor] = stage_.assistant ? static_cast<T>(stage_.factor() * f_a_) : 0;
  }

 private:
  static int64_t panel(int64_t k) { return k * gemm::panel_width<T>(); }
  static int64_t strip(int64_t k) { return k * gemm::kTileRows; }

  const Stage& stage_;
  Cut cut_;
  TokenReader<T> x_, target_;
  std::optional<TokenReader<T>> assistant_;
  std::optional<TokenWriter<T>> kept_x_, kept_residual_;
  T f_p_ = 1, f_a_ = 0;
  std::vector<T> bias_, weight_;
  Room<T> to_output_, to_input_;  // the weight in panels, for x W^T and for f_p R W
  Room<T> weights_;               // of each piece R^T x,
  Room<double> biases_;           // sum R,
  std::vector<Sums> sums_;        // and the other sums
};

template <class T>
void forward(const std::vector<Stage>& stages, const std::vector<Kept>& kept, T* loss, T* factors) {
  struct Task {
    Work<T>* work;
    int64_t piece;
  };
  std::vector<std::unique_ptr<Work<T>>> works;
  std::vector<Task> tasks;
  int64_t cost = 0;
  for (size_t m = 0; m < stages.size(); ++m) {
    works.push_back(std::make_unique<Work<T>>(stages[m], kept[m]));
    for (int64_t piece = 0; piece < works[m]->pieces(); ++piece) {
      tasks.push_back({works[m].get(), piece});
      cost += works[m]->cost();
    }
  }
  // The longest first, so that no thread is left alone with one at the end.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.work->cost() > b.work->cost(); });
  const int64_t count = static_cast<int64_t>(tasks.size());
  over_tasks(count, cost, [&](auto next) {
    for (int64_t i = next(); i < count; i = next()) tasks[i].work->run(tasks[i].piece);
  });
  double total = 0;
  for (size_t m = 0; m < stages.size(); ++m) {
    total += works[m]->finish(kept[m]) * stages[m].factor() / 2;
    works[m]->put_factors(factors + m * kFactors);
  }
  *loss = static_cast<T>(total);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> pea_fwd(
    std::vector<Tensor> xs, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> targets,
    std::vector<Tensor> assistants, std::vector<Tensor> projection_scales, std::vector<Tensor> assistant_scales,
    std::vector<double> stage_weights, std::vector<bool> wanted, bool /*tf32*/) {
  const std::vector<Stage> stages =
      stages_of(xs, weights, biases, targets, assistants, projection_scales, assistant_scales, stage_weights, wanted);
  std::vector<Kept> kept;
  std::vector<Tensor> list;
  for (const Stage& stage : stages) {
    kept.emplace_back(stage);
    if (kept.back().x) use_huge_pages(*kept.back().x);
    if (kept.back().residual) use_huge_pages(*kept.back().residual);
    kept.back().append_to(list);
  }
  const ScalarType type = compute_type(xs[0]);
  Tensor loss = torch::stable::empty({}, type);
  Tensor factors = torch::stable::empty({static_cast<int64_t>(stages.size()), static_cast<int64_t>(kFactors)}, type);
  if (type == ScalarType::Double) {
    forward(stages, kept, static_cast<double*>(loss.mutable_data_ptr()),
            static_cast<double*>(factors.mutable_data_ptr()));
  } else {
    forward(stages, kept, static_cast<float*>(loss.mutable_data_ptr()),
            static_cast<float*>(factors.mutable_data_ptr()));
  }
  return {loss, factors, list};
}

template <class T>
void apply(const Scaling& scaling, T factor) {
  constexpr int64_t kRun = 4096, kGrain = 1 << 15, kStreamBytes = 8 << 20;
  const Tensor &kept = *scaling.kept, &gradient = scaling.gradient;
  const int64_t count = kept.numel();
  const Reader<T> from(kept);
  const bool is_compute = gradient.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  const bool narrows = sizeof(T) == 4 && is_narrow(gradient.scalar_type());
  // A gradient of this size would only push out what comes next, and a usual store reads it from memory first.
  const bool stream = is_compute && count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
                      reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16 == 0;
  const int64_t runs = (count + kRun - 1) / kRun;
  torch::stable::parallel_for(0, runs, kGrain / kRun, [&](int64_t begin, int64_t end) {
    const Room<T> from_room(from.buffer(kRun)), to_room(kRun);
    for (int64_t run = begin; run < end; ++run) {
      const int64_t offset = run * kRun, n = std::min(kRun, count - offset);
      const T* const source = from.read(offset, n, from_room.get());
      if (is_compute || narrows) {
        const Writer<T> writer(gradient);
        T* const to = writer.place(offset, to_room.get());
        scale(source, factor, n, to, stream);
        writer.commit(offset, n, to);
      } else {
        scale(source, factor, n, to_room.get(), false);
        put_values(to_room.get(), offset, n, gradient);
      }
    }
    if (stream) streamed();
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& factors, const std::vector<Scaling>& scalings) {
  const T upstream = *static_cast<const T*>(grad.const_data_ptr());
  const T* const factor = static_cast<const T*>(factors.const_data_ptr());
  for (const Scaling& scaling : scalings) apply(scaling, upstream * factor[scaling.place()]);
}

std::vector<Tensor> pea_bwd(Tensor grad, Tensor factors, std::vector<Tensor> kept, std::vector<int64_t> dtypes) {
  const std::vector<Scaling> scalings = scalings_of(grad, factors, kept, dtypes);
  std::vector<Tensor> gradients;
  for (const Scaling& scaling : scalings) {
    use_huge_pages(scaling.gradient);
    gradients.push_back(scaling.gradient);
  }
  if (is_double(factors)) {
    backward<double>(grad, factors, scalings);
  } else {
    backward<float>(grad, factors, scalings);
  }
  return gradients;
}

}  // namespace
}  // namespace pea
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("pea_fwd", TORCH_BOX(&transkd::pea::pea_fwd));
  m.impl("pea_bwd", TORCH_BOX(&transkd::pea::pea_bwd));
}
