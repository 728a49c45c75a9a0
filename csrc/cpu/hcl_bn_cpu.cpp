// hcl_bn on CPU: hcl of BN(u), which is never stored. One pass over u for the batch's moments, one over u and the
// teacher's map for the loss and all sums that the backward needs, one more for the gradient.
//
// With w = u - shift, shift near the mean, d = BN(u) - t and xhat the normalised u, the forward sums d and w per cell
// of the pyramid (hcl_cpu.cpp), d^2 and d w over all. From them come the table of the pooled terms' gradient and, with
// g = alpha d + table[cell] = dL/dBN(u), the sums of g and g xhat over every plane. The gradient
//   dL/du = weight invstd (g - mean of g - xhat mean of g xhat)
// is then linear in u and t with one constant per cell. Every stage works through its maps in the order opposite to the
// pass before, whose last reads may still be in the cache. Work is cut into pieces that do not depend on the number of
// threads, and every sum runs in a fixed order: results repeat bit for bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/hcl_bn_contract.h"
#include "cpu/common/tensor.h"
#include "cpu/hcl_bn_passes.h"
#include "cpu/hcl_stage.h"

namespace transkd {
namespace hcl_bn {
namespace {

std::vector<Tensor> hcl_bn_reduce(std::vector<Tensor> us, std::vector<int64_t> parts) {
  check_reduce(us, parts);
  std::vector<Tensor> moments;
  for (size_t m = 0; m < us.size(); ++m) {
    moments.push_back(torch::stable::empty({parts[m], 3, us[m].size(1)}, ScalarType::Double));
    double* const to = static_cast<double*>(moments.back().mutable_data_ptr());
    is_double(us[m]) ? reduce<double>(us[m], parts[m], to) : reduce<float>(us[m], parts[m], to);
  }
  return moments;
}

std::vector<Stage> stages_of(const std::vector<Tensor>& us, const std::vector<Tensor>& teachers,
                             const std::vector<double>& weights, const std::vector<double>& level_weights) {
  check_maps(us, teachers, weights, level_weights);
  std::vector<Stage> stages;
  stages.reserve(us.size());
  for (size_t m = 0; m < us.size(); ++m) stages.emplace_back(us[m], teachers[m], weights[m], level_weights.data());
  return stages;
}

// Fills the state and updates the running statistics.
void normalise(const BatchNorm& bn, const Tensor& moments, const State& state, int64_t channels) {
  const double* const from = static_cast<const double*>(moments.const_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    const ChannelStatistics statistics =
        statistics_of(bn, c, ChannelMoments::of_rows(from, moments.size(0), c, channels));
    state.mean[c] = statistics.mean;
    state.invstd[c] = statistics.invstd;
  }
  if (bn.norm == Norm::kTracked) ++*bn.batches;
}

// From the sums of d and w: the table of the pooled terms' gradient, [B, cells, C], and the sums of g and g xhat,
// [B, 2, C]. Returns the stage's loss.
template <class T>
double finish(const Stage& stage, const State& state, const Coefficients<T>& k, Sums& sums, T* table, double* of_g) {
  const Axis &rows = stage.pyramid.rows, &columns = stage.pyramid.columns;
  const int64_t channels = stage.channels, cells = stage.batch * stage.cells();
  for (int64_t i = 0; i < cells; ++i) {
    for (int64_t c = 0; c < channels; ++c) table[i * channels + c] = static_cast<T>(sums.cell(i)[c]);
  }
  const double loss = sums.squares * stage.alpha() / 2 + pool(stage, table);

  std::vector<double> drift(channels);  // w = u - mean + drift
  for (int64_t c = 0; c < channels; ++c) drift[c] = state.mean[c] - static_cast<double>(k.shift[c]);
  std::vector<double> d_sums(channels);
  for (int64_t b = 0; b < stage.batch; ++b) {
    double *const sum = of_g + b * 2 * channels, *const product = sum + channels;
    std::fill_n(sum, 2 * channels, 0.0);
    std::fill(d_sums.begin(), d_sums.end(), 0.0);
    for (int64_t cell = 0; cell < stage.cells(); ++cell) {
      const int64_t i = cell / columns.segments, j = cell % columns.segments;
      const double pixels =
          static_cast<double>((rows.edge[i + 1] - rows.edge[i]) * (columns.edge[j + 1] - columns.edge[j]));
      const double* const d = sums.cell(b * stage.cells() + cell);
      const double* const w = d + channels;
      const T* const level = table + (b * stage.cells() + cell) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        d_sums[c] += d[c];
        sum[c] += pixels * static_cast<double>(level[c]);
        product[c] += (w[c] - pixels * drift[c]) * static_cast<double>(level[c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += stage.alpha() * d_sums[c];
      product[c] += stage.alpha() * (sums.products[b * channels + c] - drift[c] * d_sums[c]);
      product[c] *= state.invstd[c];
    }
  }
  return loss;
}

template <class T>
double forward(const Stage& stage, const BatchNorm& bn, const State& state, T* table, double* of_g) {
  const Coefficients<T> coefficients(bn, state, stage.channels);
  Sums sums(stage);
  if (stage.layout == Layout::kContiguous) {
    add_contiguous(stage, coefficients, sums);
  } else {
    add_channels_last(stage, coefficients, sums);
  }
  return finish(stage, state, coefficients, sums, table, of_g);
}

// What a call leaves, and where its stages' parts begin.
struct Outputs {
  Kept kept;
  Tensor loss, tables, states, sums;

  Outputs(const std::vector<Stage>& stages, ScalarType type) {
    for (const Stage& stage : stages) kept.add(stage.batch, stage.channels, stage.cells());
    loss = torch::stable::empty({}, type);
    tables = torch::stable::empty({kept.tables.back()}, type);
    states = torch::stable::empty({kept.states.back()}, ScalarType::Double);
    sums = torch::stable::empty({kept.sums.back()}, ScalarType::Double);
  }
};

template <class T>
void forward_stages(const std::vector<Stage>& stages, const std::vector<BatchNorm>& bns,
                    const std::vector<Tensor>& moments, Outputs& to) {
  const auto state_of = [&](size_t m) {
    return State(static_cast<double*>(to.states.mutable_data_ptr()) + to.kept.states[m], stages[m].channels);
  };
  for (size_t m = 0; m < stages.size(); ++m) normalise(bns[m], moments[m], state_of(m), stages[m].channels);
  double total = 0;
  for (size_t m = stages.size(); m-- > 0;) {
    total += forward(stages[m], bns[m], state_of(m), static_cast<T*>(to.tables.mutable_data_ptr()) + to.kept.tables[m],
                     static_cast<double*>(to.sums.mutable_data_ptr()) + to.kept.sums[m]);
  }
  *static_cast<T*>(to.loss.mutable_data_ptr()) = static_cast<T>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hcl_bn_fwd(std::vector<Tensor> us, std::vector<Tensor> teachers,
                                                      std::vector<Tensor> moments, Affine affine,
                                                      std::vector<Tensor> running, std::vector<Tensor> batches,
                                                      std::vector<int64_t> norms, std::vector<double> momenta,
                                                      std::vector<double> eps, std::vector<double> weights,
                                                      std::vector<double> level_weights) {
  const std::vector<Stage> stages = stages_of(us, teachers, weights, level_weights);
  std::vector<BatchNorm> bns = batch_norms_of(us, affine, norms);
  add_statistics(bns, us, running, batches, momenta, eps);
  check_moments(moments, us, bns);

  const ScalarType type = hcl_compute_type(us);
  Outputs outputs(stages, type);
  if (type == ScalarType::Double) {
    forward_stages<double>(stages, bns, moments, outputs);
  } else {
    forward_stages<float>(stages, bns, moments, outputs);
  }
  return {outputs.loss, outputs.tables, outputs.states, outputs.sums};
}

// Gradients of one stage that are wanted, null otherwise.
struct Wanted {
  const Tensor *u = nullptr, *weight = nullptr, *bias = nullptr;
};

template <class T>
void backward(const Stage& stage, const BatchNorm& bn, const State& state, double upstream, const Tensor& table,
              const Tensor& sums, const Tensor* means, const Wanted& wanted) {
  const int64_t channels = stage.channels;
  std::vector<double> of_g(2 * channels);  // over the samples: g and g xhat
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  for (int64_t b = 0; b < stage.batch; ++b, from += 2 * channels) {
    for (int64_t i = 0; i < 2 * channels; ++i) of_g[i] += from[i];
  }
  for (double& sum : of_g) sum *= upstream;
  const auto values = [](const Tensor* tensor) {
    return tensor ? Values{tensor->mutable_data_ptr(), storage_type_of("hcl_bn", *tensor)} : Values{};
  };
  const Values bias = values(wanted.bias), weight = values(wanted.weight);
  for (int64_t c = 0; c < channels; ++c) {
    bias.set(c, of_g[c]);
    weight.set(c, of_g[channels + c]);
  }
  if (!wanted.u) return;
  const double* mean_g = nullptr;
  if (of_batch(bn.norm) && means) {
    mean_g = static_cast<const double*>(means->const_data_ptr());
  } else if (of_batch(bn.norm)) {
    const double count = static_cast<double>(stage.batch) * static_cast<double>(stage.plane());
    for (double& sum : of_g) sum /= count;
    mean_g = of_g.data();
  }
  const Slopes<T> slopes(stage, bn, state, upstream, static_cast<const T*>(table.const_data_ptr()), mean_g);
  if (stage.layout == Layout::kContiguous) {
    backward_contiguous(stage, slopes, *wanted.u);
  } else {
    backward_channels_last(stage, slopes, *wanted.u);
  }
}

std::vector<Tensor> hcl_bn_bwd(Tensor grad, std::vector<Tensor> us, std::vector<Tensor> teachers,
                               std::vector<Tensor> tables, std::vector<Tensor> states, std::vector<Tensor> sums,
                               std::vector<Tensor> means, Affine affine, std::vector<int64_t> norms,
                               std::vector<double> weights, std::vector<double> level_weights,
                               std::vector<bool> wanted) {
  const std::vector<Stage> stages = stages_of(us, teachers, weights, level_weights);
  const std::vector<BatchNorm> bns = batch_norms_of(us, affine, norms);
  check_backward(grad, us, tables, [&](size_t m) { return stages[m].cells(); }, states, sums, means, affine, wanted);

  std::vector<Tensor> gradients;
  gradients.reserve(wanted.size());
  std::vector<Wanted> of_stages(stages.size());
  for (size_t m = 0; m < stages.size(); ++m) {
    const auto add = [&](Gradient kind, const Tensor& like) -> const Tensor* {
      if (!wanted[kGradients * m + kind]) return nullptr;
      gradients.push_back(torch::stable::empty_like(like));
      return &gradients.back();
    };
    of_stages[m].u = add(kU, us[m]);
    if (of_stages[m].u) use_huge_pages(*of_stages[m].u);
    if (affine[2 * m]) of_stages[m].weight = add(kWeight, *affine[2 * m]);
    if (affine[2 * m + 1]) of_stages[m].bias = add(kBias, *affine[2 * m + 1]);
  }
  const bool doubles = is_double(us[0]);
  const double upstream = doubles ? *static_cast<const double*>(grad.const_data_ptr())
                                  : static_cast<double>(*static_cast<const float*>(grad.const_data_ptr()));
  for (size_t m = 0; m < stages.size(); ++m) {
    const Tensor* const mean = means.empty() ? nullptr : &means[m];
    const auto of_type = doubles ? &backward<double> : &backward<float>;
    // Which is not written here.
    const State state(const_cast<double*>(static_cast<const double*>(states[m].const_data_ptr())), stages[m].channels);
    of_type(stages[m], bns[m], state, upstream, tables[m], sums[m], mean, of_stages[m]);
  }
  return gradients;
}

}  // namespace
}  // namespace hcl_bn
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CPU, m) {
  m.impl("hcl_bn_reduce", TORCH_BOX(&transkd::hcl_bn::hcl_bn_reduce));
  m.impl("hcl_bn_fwd", TORCH_BOX(&transkd::hcl_bn::hcl_bn_fwd));
  m.impl("hcl_bn_bwd", TORCH_BOX(&transkd::hcl_bn::hcl_bn_bwd));
}
