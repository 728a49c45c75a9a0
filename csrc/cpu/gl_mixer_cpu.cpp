// gl_mixer on CPU. Three tokens in a row are one run of 3 C elements, so both convolutions are one product of
// overlapping rows, [tokens, 3 C] x [3 C, 2 C], and so is their transpose, [tokens, 3 * 2 C] x [3 * 2 C, C].
//
// Work is cut into chunks of tokens of one sample and, for the weights' gradients, into groups of input channels; the
// cuts depend on sizes only, and every sum runs in a fixed order: results repeat bit for bit, with any number of
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/gl_mixer_contract.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tensor.h"
#include "cpu/common/values.h"
#include "cpu/gl_mixer_loops.h"

namespace transkd {
namespace gl_mixer {
namespace {

constexpr int64_t kChunk = 64;   // tokens
constexpr int64_t kBlock = 256;  // tokens that one product of the weights' gradients sums over

struct Chunk {
  int64_t sample, first, count;  // tokens

  int64_t row(int64_t tokens) const { return sample * tokens + first; }
};

struct Chunks {
  int64_t tokens, length, of_sample, count;

  Chunks(const Arguments& given, int64_t most)
      : tokens(given.tokens()),
        length(std::min(most, tokens)),
        of_sample((tokens + length - 1) / length),
        count(given.batch() * of_sample) {}

  Chunk operator[](int64_t i) const {
    const int64_t first = i % of_sample * length;
    return {i / of_sample, first, std::min(length, tokens - first)};
  }
};

// Calls f(token, place) for a chunk's tokens and their neighbours, place 0 being the neighbour before the first;
// token is -1 where a sample has none.
template <class F>
void with_neighbours(const Chunk& chunk, int64_t tokens, const F& f) {
  for (int64_t place = 0; place < chunk.count + 2; ++place) {
    const int64_t token = chunk.first + place - 1;
    f(token < tokens ? token : -1, place);
  }
}

// The weights of both convolutions, as products want them.
template <class T>
class Weights {
 public:
  explicit Weights(const Arguments& given) : channels_(given.channels()), by_input_(kTaps * channels_ * 2 * channels_) {
    const std::vector<T> a = values_of<T>(given.conv_a_weight), b = values_of<T>(given.conv_b_weight);
    gemm::transpose(a.data(), kTaps * channels_, channels_, kTaps * channels_, by_input_.get(), 2 * channels_);
    gemm::transpose(b.data(), kTaps * channels_, channels_, kTaps * channels_, by_input_.get() + channels_,
                    2 * channels_);
  }

  // [3 C, 2 C]: from three tokens to both branches.
  Room<T> forward() const {
    const int64_t rows = kTaps * channels_, stride = rows * gemm::panel_width<T>();
    Room<T> panels(gemm::panels_size<T>(rows, 2 * channels_));
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      gemm::pack_panels(of_tap(tap), kTaps * 2 * channels_, channels_, 2 * channels_,
                        panels.get() + tap * channels_ * gemm::panel_width<T>(), stride);
    }
    return panels;
  }

  // [3 * 2 C, C]: from both branches of three tokens to the one between them.
  Room<T> backward() const {
    const int64_t rows = kTaps * 2 * channels_, stride = rows * gemm::panel_width<T>();
    Room<T> panels(gemm::panels_size<T>(rows, channels_)), by_output(2 * channels_ * channels_);
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      gemm::transpose(of_tap(tap), kTaps * 2 * channels_, channels_, 2 * channels_, by_output.get(), channels_);
      const int64_t place = kTaps - 1 - tap;  // the token before saw this one in its last tap
      gemm::pack_panels(by_output.get(), channels_, 2 * channels_, channels_,
                        panels.get() + place * 2 * channels_ * gemm::panel_width<T>(), stride);
    }
    return panels;
  }

 private:
  const T* of_tap(int64_t tap) const { return by_input_.get() + tap * 2 * channels_; }

  int64_t channels_;
  Room<T> by_input_;  // [C, 3, 2 C]
};

template <class T>
Scales<T> scales_of(const Arguments& given) {
  return {values_of<T>(given.attention_weight)[0], values_of<T>(given.conv_weight)[0]};
}

template <class T>
int64_t cost_of_product(const Arguments& given) {
  return given.rows() * kTaps * 2 * given.channels() * given.channels();
}

template <class T>
void forward(const Arguments& given, bool residual, const Tensor& out, const Tensor* branches) {
  const int64_t channels = given.channels(), tokens = given.tokens();
  const Room<T> panels = Weights<T>(given).forward();
  std::vector<T> bias = values_of<T>(given.conv_a_bias);
  const std::vector<T> gate_bias = values_of<T>(given.conv_b_bias);
  bias.insert(bias.end(), gate_bias.begin(), gate_bias.end());
  const Scales<T> scales = scales_of<T>(given);
  const Reader<T> e(given.e), u(given.u);
  const Writer<T> to(out);
  T* const kept = branches ? static_cast<T*>(branches->mutable_data_ptr()) : nullptr;
  const Chunks chunks(given, kChunk);
  over_tasks(chunks.count, cost_of_product<T>(given), [&](auto next) {
    const int64_t size = chunks.length * channels;
    const Room<T> rows(size + 2 * channels), own(kept ? 0 : 2 * size), u_room(u.buffer(size)), to_room(to.buffer(size));
    for (int64_t i = next(); i < chunks.count; i = next()) {
      const Chunk chunk = chunks[i];
      with_neighbours(chunk, tokens, [&](int64_t token, int64_t place) {
        T* const row = rows.get() + place * channels;
        if (token < 0) {
          std::fill_n(row, channels, T(0));
        } else {
          const T* const from = e.read((chunk.sample * tokens + token) * channels, channels, row);
          if (from != row) std::copy_n(from, channels, row);
        }
      });
      const int64_t offset = chunk.row(tokens) * channels, count = chunk.count * channels;
      T* const both = kept ? kept + 2 * offset : own.get();
      gemm::multiply(rows.get(), channels, chunk.count, kTaps * channels, panels.get(), 2 * channels, both,
                     2 * channels, false);
      T* const place = to.place(offset, to_room.get());
      mix(both, bias.data(), u.read(offset, count, u_room.get()), residual ? rows.get() + channels : nullptr, scales,
          chunk.count, channels, place);
      to.commit(offset, count, place);
    }
  });
}

std::tuple<Tensor, Tensor> gl_mixer_fwd(Tensor e, Tensor u, Tensor conv_a_weight, Tensor conv_a_bias,
                                        Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight,
                                        Tensor conv_weight, bool residual, bool keep, bool /*tf32*/) {
  const Arguments given{e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight};
  check(given);
  Tensor out = torch::stable::empty_like(e);
  Tensor branches =
      keep ? torch::stable::empty({given.batch(), given.tokens(), static_cast<int64_t>(2), given.channels()},
                                  given.compute_type())
           : torch::stable::empty({static_cast<int64_t>(0)}, given.compute_type());
  use_huge_pages(out);
  use_huge_pages(branches);
  if (is_double(e)) {
    forward<double>(given, residual, out, keep ? &branches : nullptr);
  } else {
    forward<float>(given, residual, out, keep ? &branches : nullptr);
  }
  return {out, branches};
}

// ---- Backward.

struct Gradients {
  std::vector<Tensor> list;        // those wanted, in order
  const Tensor* of[kWanted] = {};  // by their places in `wanted`

  Gradients(const Arguments& given, const std::vector<bool>& wanted) {
    list.reserve(kWanted);
    for (int k = 0; k < kWanted; ++k) {
      if (!wanted[k]) continue;
      list.push_back(torch::stable::empty_like(given[k]));
      use_huge_pages(list.back());
      of[k] = &list.back();
    }
  }
};

template <class T>
class Backward {
 public:
  Backward(const Arguments& given, const Tensor& grad, const Tensor& branches, bool residual, const Gradients& to)
      : given_(given),
        grad_(grad),
        branches_(static_cast<const T*>(branches.const_data_ptr())),
        residual_(residual),
        to_(to),
        scales_(scales_of<T>(given)),
        chunks_(given, kChunk) {
    with_weights_ = to.of[kConvAWeight] || to.of[kConvBWeight];
    with_biases_ = to.of[kConvABias] || to.of[kConvBBias];
    with_branches_ = to.of[kE] || with_weights_ || with_biases_;
    if (to.of[kE]) panels_ = Weights<T>(given).backward();
    if (with_weights_) strips_ = Room<T>(2 * gemm::strips_size(given.rows(), given.channels()));
    columns_.resize(with_biases_ ? chunks_.count * 2 * given.channels() : 0);
    sums_.resize(2 * chunks_.count);
  }

  void run() {
    const bool any = with_branches_ || to_.of[kU] || to_.of[kAttentionWeight] || to_.of[kConvWeight];
    if (any) {
      const int64_t cost = to_.of[kE] ? cost_of_product<T>(given_) : 16 * given_.rows() * given_.channels();
      over_tasks(chunks_.count, cost, [&](auto next) { tokens(next); });
    }
    if (with_weights_) weights();
    put_sums();
  }

 private:
  // What belongs to a chunk of tokens: the gradients of e and u, and the sums.
  template <class Next>
  void tokens(const Next& next) {
    const int64_t channels = given_.channels(), tokens = given_.tokens(), size = chunks_.length * channels;
    const Reader<T> grad(grad_), u(given_.u);
    const Room<T> d(with_branches_ ? 2 * (size + 2 * channels) : 0), grad_room(grad.buffer(size + 2 * channels));
    const Room<T> u_room(u.buffer(size)), made(size);
    for (int64_t i = next(); i < chunks_.count; i = next()) {
      const Chunk chunk = chunks_[i];
      const int64_t offset = chunk.row(tokens) * channels, count = chunk.count * channels;
      if (with_branches_) {
        with_neighbours(chunk, tokens, [&](int64_t token, int64_t place) {
          T* const row = d.get() + 2 * place * channels;
          if (token < 0) {
            std::fill_n(row, 2 * channels, T(0));
          } else {
            const int64_t from = (chunk.sample * tokens + token) * channels;
            branch_gradients(grad.read(from, channels, grad_room.get()), branches_ + 2 * from, scales_.conv, 1,
                             channels, row);
          }
        });
      }
      const T* const own = d.get() + 2 * channels;
      const T* const g = grad.read(offset, count, grad_room.get());
      if (with_biases_) add_columns(own, chunk.count, 2 * channels, columns_.data() + 2 * i * channels);
      if (with_weights_) {
        for (const int64_t branch : {0, 1}) {
          gemm::pack_strips(own + branch * channels, 2 * channels, chunk.count, channels,
                            strips(branch) + chunk.row(tokens) * gemm::kTileRows, strip_stride());
        }
      }
      if (to_.of[kAttentionWeight]) sums_[2 * i] = sum_of_products(g, u.read(offset, count, u_room.get()), count);
      if (to_.of[kConvWeight]) {
        make_local(branches_ + 2 * offset, chunk.count, channels, made.get());
        sums_[2 * i + 1] = sum_of_products(g, made.get(), count);
      }
      if (to_.of[kU]) {
        const Writer<T> writer(*to_.of[kU]);
        T* const place = writer.place(offset, made.get());
        scale(g, scales_.attention, count, place);
        writer.commit(offset, count, place);
      }
      if (to_.of[kE]) {
        const Writer<T> writer(*to_.of[kE]);
        T* const place = writer.place(offset, made.get());
        gemm::multiply(d.get(), 2 * channels, chunk.count, kTaps * 2 * channels, panels_.get(), channels, place,
                       channels, false);
        if (residual_) add(g, count, place);
        writer.commit(offset, count, place);
      }
    }
  }

  // The convolutions' weights, by branch and by group of input channels.
  void weights() {
    const int64_t channels = given_.channels(), width = gemm::panel_width<T>();
    const int64_t groups = (channels + width - 1) / width;
    over_tasks(2 * groups, cost_of_product<T>(given_), [&](auto next) {
      const Chunks blocks(given_, kBlock);
      const Room<T> panel(blocks.length * width), sums(kTaps * channels * width), line(kTaps * width);
      for (int64_t i = next(); i < 2 * groups; i = next()) {
        const Tensor* const to = to_.of[i < groups ? kConvAWeight : kConvBWeight];
        if (to) weights_of(*to, i / groups, i % groups * width, blocks, panel.get(), sums.get(), line.get());
      }
    });
  }

  void weights_of(const Tensor& to, int64_t branch, int64_t first, const Chunks& blocks, T* panel, T* sums, T* line) {
    const int64_t channels = given_.channels(), tokens = given_.tokens(), width = gemm::panel_width<T>();
    const int64_t inputs = std::min(width, channels - first);
    const Reader<T> e(given_.e);
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      for (int64_t b = 0; b < blocks.count; ++b) {
        const Chunk block = blocks[b];
        for (int64_t r = 0; r < block.count; ++r) {
          const int64_t token = block.first + r + tap - 1;
          T* const row = panel + r * width;
          std::fill_n(row, width, T(0));
          if (token < 0 || token >= tokens) continue;
          const T* const from = e.read((block.sample * tokens + token) * channels + first, inputs, row);
          if (from != row) std::copy_n(from, inputs, row);
        }
        gemm::multiply_transposed(strips(branch) + block.row(tokens) * gemm::kTileRows, strip_stride(), channels,
                                  block.count, panel, 0, inputs, sums + tap * channels * width, width, b > 0);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < inputs; ++k) {
        for (int64_t tap = 0; tap < kTaps; ++tap) line[k * kTaps + tap] = sums[(tap * channels + c) * width + k];
      }
      put_values(line, (c * channels + first) * kTaps, inputs * kTaps, to);
    }
  }

  void put_sums() const {
    const int64_t channels = given_.channels();
    for (const int branch : {0, 1}) {
      const Tensor* const to = to_.of[branch == 0 ? kConvABias : kConvBBias];
      if (!to) continue;
      std::vector<double> sums(channels);
      for (int64_t i = 0; i < chunks_.count; ++i) {
        for (int64_t c = 0; c < channels; ++c) sums[c] += columns_[(2 * i + branch) * channels + c];
      }
      put_values(sums.data(), 0, channels, *to);
    }
    for (const int which : {0, 1}) {
      const Tensor* const to = to_.of[which == 0 ? kAttentionWeight : kConvWeight];
      if (!to) continue;
      double sum = 0;
      for (int64_t i = 0; i < chunks_.count; ++i) sum += sums_[2 * i + which];
      put_values(&sum, 0, 1, *to);
    }
  }

  int64_t strip_stride() const { return given_.rows() * gemm::kTileRows; }
  // Of one branch, strips of D over all rows.
  T* strips(int64_t branch) const {
    return strips_.get() + branch * gemm::strips_size(given_.rows(), given_.channels());
  }

  const Arguments& given_;
  const Tensor& grad_;
  const T* branches_;
  bool residual_;
  const Gradients& to_;
  Scales<T> scales_;
  Chunks chunks_;
  bool with_weights_, with_biases_, with_branches_;
  Room<T> panels_, strips_;
  std::vector<double> columns_;  // of each chunk, sums of D
  std::vector<double> sums_;     // of each chunk, sums of G u and of G a sigmoid(g)
};

std::vector<Tensor> gl_mixer_bwd(Tensor grad, Tensor e, Tensor u, Tensor branches, Tensor conv_a_weight,
                                 Tensor conv_a_bias, Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight,
                                 Tensor conv_weight, bool residual, std::vector<bool> wanted, bool /*tf32*/) {
  const Arguments given{e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight};
  check(given);
  check_backward(given, grad, branches, wanted);
  const Gradients gradients(given, wanted);
  if (is_double(e)) {
    Backward<double>(given, grad, branches, residual, gradients).run();
  } else {
    Backward<float>(given, grad, branches, residual, gradients).run();
  }
  return gradients.list;
}

}  // namespace
}  // namespace gl_mixer
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("gl_mixer_fwd", TORCH_BOX(&transkd::gl_mixer::gl_mixer_fwd));
  m.impl("gl_mixer_bwd", TORCH_BOX(&transkd::gl_mixer::gl_mixer_bwd));
}
