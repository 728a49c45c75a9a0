// csf on CPU: two passes over the maps forward, two backward; between them attention() works on [samples, channels].
//
// Upsampling is nearest, so every fine pixel lies in the window of one coarse pixel, and windows are whole rows times
// whole columns: all passes walk the fine maps in the order of memory, coarse row by coarse row. Work is cut into
// pieces that do not depend on the number of threads, and every sum runs in a fixed order: results repeat bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/csf_contract.h"
#include "cpu/csf_passes.h"

namespace transkd {
namespace csf {
namespace {

// The team of attention(): the calling thread alone.
struct Alone {
  template <class F>
  TRANSKD_INLINE void each(int64_t count, const F& f) const {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
};

// Some sums side by side: one alone waits for each of its additions.
template <class Term, class Then>
TRANSKD_INLINE void each_sum(const Alone&, int64_t rows, int64_t columns, int64_t length, Term term, Then then) {
  constexpr int kSums = 8;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t first = 0;
    for (; first + kSums <= columns; first += kSums) {
      double sums[kSums] = {};
      for (int64_t k = 0; k < length; ++k) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) sums[i] += term(row, first + i, k);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) then(row, first + i, sums[i]);
    }
    for (; first < columns; ++first) {
      double sum = 0;
      for (int64_t k = 0; k < length; ++k) sum += term(row, first, k);
      then(row, first, sum);
    }
  }
}

// Parameters as doubles, all of them given, so that attention() asks for the type of none of their elements.
class Wide {
 public:
  explicit Wide(const Sizes& sizes) : sizes_(sizes), buffer_(new double[size(sizes)]), free_(buffer_.get()) {}

  TRANSKD_INLINE Values take(const Values& values, int64_t count, double otherwise) {
    double* const to = free_;
    free_ += count;
    if (values.type == StorageType::kFloat && values.given()) {
      std::copy_n(static_cast<const float*>(values.data), count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = values.get(i, otherwise);
    }
    return {to, StorageType::kDouble};
  }

  TRANSKD_INLINE BatchNorm take(const BatchNorm& bn, int64_t channels) {
    BatchNorm wide = bn;
    wide.weight = take(bn.weight, channels, 1);
    wide.bias = take(bn.bias, channels, 0);
    return wide;
  }

  TRANSKD_INLINE Layers take(const Layers& layers) {
    const int64_t weights = sizes_.channels * sizes_.squeezed;
    return {take(layers.fc, weights, 0),
            {take(layers.head_weight[0], weights, 0), take(layers.head_weight[1], weights, 0)},
            {take(layers.head_bias[0], sizes_.channels, 0), take(layers.head_bias[1], sizes_.channels, 0)}};
  }

 private:
  static int64_t size(const Sizes& sizes) {
    return 3 * sizes.channels * sizes.squeezed + 4 * sizes.channels + 2 * sizes.squeezed;
  }

  const Sizes& sizes_;
  std::unique_ptr<double[]> buffer_;
  double* free_;
};

// Gradients of parameters as doubles, all of them given likewise; put() writes those that are wanted.
class WideGradients {
 public:
  WideGradients(const Sizes& sizes, const Values* wanted) : wanted_(wanted) {
    const int64_t channels = sizes.channels, squeezed = sizes.squeezed, weights = channels * squeezed;
    const int64_t counts[kParameters] = {channels, channels, weights, squeezed, squeezed,
                                         weights,  channels, weights, channels};
    begin_[0] = 0;
    for (int k = 0; k < kParameters; ++k) begin_[k + 1] = begin_[k] + counts[k];
    buffer_.reset(new double[begin_[kParameters]]);
  }

  TRANSKD_INLINE Values operator[](Parameter k) const { return {buffer_.get() + begin_[k], StorageType::kDouble}; }

  TRANSKD_INLINE void put() const {
    for (int k = 0; k < kParameters; ++k) {
      const Values& to = wanted_[k];
      const double* const from = buffer_.get() + begin_[k];
      const int64_t count = begin_[k + 1] - begin_[k];
      if (to.given() && to.type == StorageType::kFloat) {
        std::copy_n(from, count, static_cast<float*>(to.data));
      } else {
        for (int64_t i = 0; i < count; ++i) to.set(i, from[i]);
      }
    }
  }

 private:
  const Values* wanted_;
  int64_t begin_[kParameters + 1];
  std::unique_ptr<double[]> buffer_;
};

// Flattened, so that the compiler sees that all parameters are doubles.
#define TRANSKD_CSF_ATTENTION(T)                                                                                       \
  TRANSKD_CLONES __attribute__((flatten)) void attend(const Sizes& sizes, const BatchNorm& bn, const BatchNorm& fc_bn, \
                                                      const Layers& layers, const State& state,                        \
                                                      const Coefficients<T>& coefficients) {                           \
    Wide wide(sizes);                                                                                                  \
    attention(Alone(), sizes, wide.take(bn, sizes.channels), wide.take(fc_bn, sizes.squeezed), wide.take(layers),      \
              state, coefficients);                                                                                    \
  }                                                                                                                    \
  TRANSKD_CLONES __attribute__((flatten)) void attend_backward(                                                        \
      const Sizes& sizes, const BatchNorm& bn, const BatchNorm& fc_bn, const Layers& layers, const State& state,       \
      const Scratch& scratch, const Values* gradients, const Coefficients<T>& coefficients) {                          \
    Wide wide(sizes);                                                                                                  \
    const WideGradients to(sizes, gradients);                                                                          \
    attention_backward(Alone(), sizes, wide.take(bn, sizes.channels), wide.take(fc_bn, sizes.squeezed),                \
                       wide.take(layers), state, scratch, {to[kWeight], to[kBias]}, {to[kFcWeight], to[kFcBias]},      \
                       {to[kFc], {to[kHead0], to[kHead1]}, {to[kHead0Bias], to[kHead1Bias]}}, coefficients);           \
    to.put();                                                                                                          \
  }
TRANSKD_CSF_ATTENTION(float)
TRANSKD_CSF_ATTENTION(double)
#undef TRANSKD_CSF_ATTENTION

Tensor csf_reduce(Tensor z, Tensor y, int64_t parts) {
  check_maps(z, y);
  check_parts(parts);
  Tensor sums = torch::stable::empty({z.size(0), parts, 3, z.size(1)}, ScalarType::Double);
  double* to = static_cast<double*>(sums.mutable_data_ptr());
  is_double(z) ? reduce<double>(z, y, parts, to) : reduce<float>(z, y, parts, to);
  return sums;
}

template <class T>
Tensor fuse_with_attention(const Tensor& z, const Tensor& y, const Sizes& sizes, const BatchNorm& bn,
                           const BatchNorm& fc_bn, const Layers& layers, const State& state) {
  std::vector<T> table(Coefficients<T>::kRows * sizes.batch * sizes.channels);
  const Coefficients<T> coefficients(table.data(), sizes);
  attend(sizes, bn, fc_bn, layers, state, coefficients);
  Tensor v = torch::stable::empty_like(z);
  use_huge_pages(v);
  fuse(z, y, coefficients, v);
  return v;
}

std::tuple<Tensor, Tensor> csf_fuse(Tensor z, Tensor y, Tensor sums, int64_t first, Parameters parameters,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, OptionalTensor fc_running_mean,
                                    OptionalTensor fc_running_var, OptionalTensor fc_num_batches_tracked, int64_t norm,
                                    std::optional<double> momentum, double eps, int64_t fc_norm,
                                    std::optional<double> fc_momentum, double fc_eps) {
  check_maps(z, y);
  check_sums(sums, z, first);
  const Sizes sizes = sizes_of(z, sums.size(0), first, parameters);
  const Layers layers = layers_of(parameters, sizes, z);
  BatchNorm bn = batch_norm_of("the map's batch norm", norm_of(norm, false), parameters[kWeight], parameters[kBias],
                               sizes.channels, z);
  BatchNorm fc_bn = batch_norm_of("the squeeze layer's batch norm", norm_of(fc_norm, true), parameters[kFcWeight],
                                  parameters[kFcBias], sizes.squeezed, z);
  add_statistics("the map's batch norm", bn, running_mean, running_var, num_batches_tracked, momentum, eps,
                 sizes.channels, z);
  add_statistics("the squeeze layer's batch norm", fc_bn, fc_running_mean, fc_running_var, fc_num_batches_tracked,
                 fc_momentum, fc_eps, sizes.squeezed, z);

  Tensor saved = torch::stable::empty({State::size(sizes)}, ScalarType::Double);
  const State state(static_cast<double*>(saved.mutable_data_ptr()), sizes);
  const int64_t parts = sums.size(1);
  const Parts cut(sizes.pixels, parts);
  const double* const from = static_cast<const double*>(sums.const_data_ptr());
  for (int64_t plane = 0; plane < sizes.planes(); ++plane) {
    const int64_t sample = plane / sizes.channels, channel = plane % sizes.channels;
    const double about = *Moments::entry(from, sample, 0, parts, channel, sizes.channels);
    Moments all;
    for (int64_t part = 0; part < parts; ++part) {
      all.add(Moments::entry(from, sample, part, parts, channel, sizes.channels), sizes.channels,
              static_cast<double>(cut.size(part)), about);
    }
    put_moments(state, sizes, plane, all, about);
  }
  Tensor v = is_double(z) ? fuse_with_attention<double>(z, y, sizes, bn, fc_bn, layers, state)
                          : fuse_with_attention<float>(z, y, sizes, bn, fc_bn, layers, state);
  return {v, saved};
}

Tensor csf_bwd_reduce(Tensor grad, Tensor z, Tensor y, Tensor state, int64_t parts) {
  check_maps(z, y);
  check_grad(grad, z);
  check_parts(parts);
  STD_TORCH_CHECK(state.dim() == 1 && state.numel() >= z.size(1) && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Double && state.device() == z.device(),
                  "csf: expected the state that csf_fuse made, float64, got ", shape_of(state));
  const double* const mean = static_cast<const double*>(state.const_data_ptr());
  Tensor sums = torch::stable::empty({z.size(0), parts, 3, z.size(1)}, ScalarType::Double);
  double* const to = static_cast<double*>(sums.mutable_data_ptr());
  is_double(z) ? backward_reduce<double>(grad, z, y, mean, parts, to)
               : backward_reduce<float>(grad, z, y, mean, parts, to);
  return sums;
}

// The sums over the parts of every plane.
Scratch scratch_of(const Tensor& sums, const Sizes& sizes, std::vector<double>& buffer) {
  buffer.assign(Scratch::size(sizes), 0);
  const Scratch scratch(buffer.data(), sizes);
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  for (int64_t b = 0; b < sizes.samples; ++b) {
    for (int64_t part = 0; part < sums.size(1); ++part) {
      for (double* const row : {scratch.grad, scratch.grad_z, scratch.grad_y}) {
        for (int64_t c = 0; c < sizes.channels; ++c) row[b * sizes.channels + c] += from[c];
        from += sizes.channels;
      }
    }
  }
  return scratch;
}

struct Gradients {
  std::vector<Tensor> list;  // those wanted, in order
  const Tensor *z = nullptr, *y = nullptr;
  Values parameters[kParameters];

  Gradients(const Tensor& z_map, const Tensor& y_map, const Parameters& given, const std::vector<bool>& wanted) {
    list.reserve(wanted.size());
    const auto add = [&](size_t k, const Tensor& like) {
      if (!wanted[k]) return false;
      list.push_back(torch::stable::empty_like(like));
      use_huge_pages(list.back());
      return true;
    };
    if (add(0, z_map)) z = &list.back();
    if (add(1, y_map)) y = &list.back();
    for (int k = 0; k < kParameters; ++k) {
      if (given[k] && add(kWantedParameters + k, *given[k])) {
        parameters[k] = {list.back().mutable_data_ptr(), storage_type_of("csf", list.back())};
      }
    }
  }
};

template <class T>
void backward(const Tensor& grad, const Tensor& z, const Tensor& y, const Sizes& sizes, const BatchNorm& bn,
              const BatchNorm& fc_bn, const Layers& layers, const State& state, const Scratch& scratch,
              const Gradients& gradients) {
  std::vector<T> table(Coefficients<T>::kRows * sizes.batch * sizes.channels);
  const Coefficients<T> coefficients(table.data(), sizes);
  attend_backward(sizes, bn, fc_bn, layers, state, scratch, gradients.parameters, coefficients);
  if (!gradients.z && !gradients.y) return;
  const Maps maps(z, y);
  const Tensor* const needed = of_batch(bn.norm) ? &z : nullptr;
  if (maps.largest_window <= kChain) {
    backward_apply<T, T>(maps, grad, needed, coefficients, gradients.z, gradients.y);
  } else {
    backward_apply<T, double>(maps, grad, needed, coefficients, gradients.z, gradients.y);
  }
}

std::vector<Tensor> csf_bwd_apply(Tensor grad, Tensor z, Tensor y, Tensor sums, Tensor state, int64_t first,
                                  Parameters parameters, int64_t norm, int64_t fc_norm, std::vector<bool> wanted) {
  check_maps(z, y);
  check_grad(grad, z);
  check_sums(sums, z, first);
  const Sizes sizes = sizes_of(z, sums.size(0), first, parameters);
  check_state(state, sizes, z);
  check_wanted(wanted, parameters);
  const Layers layers = layers_of(parameters, sizes, z);
  const BatchNorm bn = batch_norm_of("the map's batch norm", norm_of(norm, false), parameters[kWeight],
                                     parameters[kBias], sizes.channels, z);
  const BatchNorm fc_bn = batch_norm_of("the squeeze layer's batch norm", norm_of(fc_norm, true), parameters[kFcWeight],
                                        parameters[kFcBias], sizes.squeezed, z);
  const State saved(const_cast<double*>(static_cast<const double*>(state.const_data_ptr())), sizes);
  std::vector<double> buffer;
  const Scratch scratch = scratch_of(sums, sizes, buffer);
  Gradients gradients(z, y, parameters, wanted);
  if (is_double(z)) {
    backward<double>(grad, z, y, sizes, bn, fc_bn, layers, saved, scratch, gradients);
  } else {
    backward<float>(grad, z, y, sizes, bn, fc_bn, layers, saved, scratch, gradients);
  }
  return gradients.list;
}

}  // namespace
}  // namespace csf
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("csf_reduce", TORCH_BOX(&transkd::csf::csf_reduce));
  m.impl("csf_fuse", TORCH_BOX(&transkd::csf::csf_fuse));
  m.impl("csf_bwd_reduce", TORCH_BOX(&transkd::csf::csf_bwd_reduce));
  m.impl("csf_bwd_apply", TORCH_BOX(&transkd::csf::csf_bwd_apply));
}
