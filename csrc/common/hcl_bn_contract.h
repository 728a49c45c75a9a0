// What the launchers of hcl_bn ask of their arguments, on CPU and CUDA alike, and how they hand them on. The errors
// come before any work; transkd_fast/ops/hcl_bn.py has checked the same before, in the user's terms.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/batch_norm_contract.h"
#include "common/hcl_contract.h"

namespace transkd {
namespace hcl_bn {

using Affine = std::vector<OptionalTensor>;  // weight, bias of every stage

// The places in a stage's part of `wanted`, and the order of its gradients.
enum Gradient { kU, kWeight, kBias, kGradients };

namespace detail {

inline void check_doubles(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, const Tensor& u) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.scalar_type() == ScalarType::Double &&
              tensor.is_contiguous() && tensor.device() == u.device();
  std::string expected;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    fits = fits && tensor.size(static_cast<int64_t>(dim)) == shape[dim];
    expected += (dim ? ", " : "") + std::to_string(shape[dim]);
  }
  STD_TORCH_CHECK(fits, "hcl_bn: expected ", name, " contiguous, float64 and of shape [", expected, "], got ",
                  shape_of(tensor));
}

inline void check_count(const char* name, size_t count, size_t expected) {
  STD_TORCH_CHECK(count == expected, "hcl_bn: expected ", expected, " ", name, ", got ", count);
}

}  // namespace detail

inline void check_reduce(const std::vector<Tensor>& us, const std::vector<int64_t>& parts) {
  STD_TORCH_CHECK(!us.empty() && us.size() == parts.size(),
                  "hcl_bn: expected a number of parts per map, and at least one map, got ", us.size(), " maps and ",
                  parts.size(), " numbers of parts");
  for (size_t m = 0; m < us.size(); ++m) {
    const Tensor& u = us[m];
    STD_TORCH_CHECK(parts[m] > 0, "hcl_bn: expected parts > 0, got ", parts[m]);
    STD_TORCH_CHECK(u.dim() == 4 && u.numel() > 0, "hcl_bn: expected u [B, C, H, W] with at least one element, got ",
                    shape_of(u));
    storage_type_of("hcl_bn", u);
    STD_TORCH_CHECK(u.device() == us[0].device() && is_double(u) == is_double(us[0]),
                    "hcl_bn: expected all maps on one device, and all or none of them float64");
    STD_TORCH_CHECK(
        layout_of(u) != Layout::kOther,
        "hcl_bn: expected u contiguous or channels-last, got one that is neither; call .contiguous() first");
  }
}

// The maps, as forward and backward take them.
inline void check_maps(const std::vector<Tensor>& us, const std::vector<Tensor>& teachers,
                       const std::vector<double>& weights, const std::vector<double>& level_weights) {
  STD_TORCH_CHECK(!us.empty() && us.size() == teachers.size() && us.size() == weights.size(),
                  "hcl_bn: expected as many teachers and weights as us, and at least one, got ", us.size(), " us, ",
                  teachers.size(), " teachers and ", weights.size(), " weights");
  check_level_weights("hcl_bn", level_weights);
  for (size_t m = 0; m < us.size(); ++m) {
    STD_TORCH_CHECK(us[m].device() == us[0].device(), "hcl_bn: expected all maps on one device");
    check_hcl_maps("hcl_bn", "u", us[m], teachers[m], is_double(us[0]));
  }
}

// After check_maps: every stage's kind of normalisation and affine parameters, which is all that the backward needs.
inline std::vector<BatchNorm> batch_norms_of(const std::vector<Tensor>& us, const Affine& affine,
                                             const std::vector<int64_t>& norms) {
  detail::check_count("kinds of normalisation, one per stage", norms.size(), us.size());
  detail::check_count("affine parameters, two per stage", affine.size(), 2 * us.size());
  std::vector<BatchNorm> bns(us.size(), BatchNorm{});
  for (size_t m = 0; m < us.size(); ++m) {
    const int64_t channels = us[m].size(1);
    bns[m].norm = checked_norm("hcl_bn", norms[m], false);
    bns[m].weight = small_values_of("hcl_bn", "weight", affine[2 * m], channels, us[m]);
    bns[m].bias = small_values_of("hcl_bn", "bias", affine[2 * m + 1], channels, us[m]);
  }
  return bns;
}

inline void add_statistics(std::vector<BatchNorm>& bns, const std::vector<Tensor>& us,
                           const std::vector<Tensor>& running, const std::vector<Tensor>& batches,
                           const std::vector<double>& momenta, const std::vector<double>& eps) {
  detail::check_count("momenta, one per stage", momenta.size(), us.size());
  detail::check_count("eps, one per stage", eps.size(), us.size());
  size_t with_running = 0, tracked = 0;
  for (const BatchNorm& bn : bns) {
    with_running += bn.norm != Norm::kBatch;
    tracked += bn.norm == Norm::kTracked;
  }
  detail::check_count("running statistics, mean and variance of every stage that has them", running.size(),
                      2 * with_running);
  detail::check_count("counters, one per stage that updates its statistics", batches.size(), tracked);
  const Tensor *next_running = running.data(), *next_counter = batches.data();
  for (size_t m = 0; m < us.size(); ++m) {
    BatchNorm& bn = bns[m];
    bn.eps = eps[m];
    bn.momentum = momenta[m];
    bn.cumulative = momenta[m] < 0;
    if (bn.norm == Norm::kBatch) continue;
    const int64_t channels = us[m].size(1);
    bn.running_mean = small_values_of("hcl_bn", "running mean", *next_running++, channels, us[m]);
    bn.running_var = small_values_of("hcl_bn", "running variance", *next_running++, channels, us[m]);
    if (bn.norm == Norm::kTracked) bn.batches = counter_of("hcl_bn", "batch norm", *next_counter++, us[m]);
  }
}

inline void check_moments(const std::vector<Tensor>& moments, const std::vector<Tensor>& us,
                          const std::vector<BatchNorm>& bns) {
  detail::check_count("moments, one tensor per stage", moments.size(), us.size());
  for (size_t m = 0; m < us.size(); ++m) {
    const int64_t rows = moments[m].dim() == 3 ? moments[m].size(0) : 0;
    detail::check_doubles("moments", moments[m], {rows, 3, us[m].size(1)}, us[m]);
    STD_TORCH_CHECK(rows > 0 || !of_batch(bns[m].norm),
                    "hcl_bn: expected moments with at least one row where a batch's statistics normalise, got none");
  }
}

// What the forward keeps lies stage by stage in flat tensors: torch.compile takes no op that changes its arguments and
// returns lists. Where each stage's part begins, and behind the last one the whole length.
struct Kept {
  std::vector<int64_t> tables{0}, states{0}, sums{0};

  void add(int64_t batch, int64_t channels, int64_t cells) {
    tables.push_back(tables.back() + batch * cells * channels);
    states.push_back(states.back() + 2 * channels);
    sums.push_back(sums.back() + batch * 2 * channels);
  }
};

// After check_maps and batch_norms_of; cells is called with a stage's number and gives the number of cells of its
// plane.
template <class Cells>
void check_backward(const Tensor& grad, const std::vector<Tensor>& us, const std::vector<Tensor>& tables, Cells cells,
                    const std::vector<Tensor>& states, const std::vector<Tensor>& sums,
                    const std::vector<Tensor>& means, const Affine& affine, const std::vector<bool>& wanted) {
  const ScalarType type = hcl_compute_type(us);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type && grad.device() == us[0].device(),
                  "hcl_bn_bwd: expected a scalar grad of the loss's dtype on the maps' device, got shape ",
                  shape_of(grad));
  detail::check_count("tables, one per stage", tables.size(), us.size());
  detail::check_count("states, one per stage", states.size(), us.size());
  detail::check_count("sums, one tensor per stage", sums.size(), us.size());
  if (!means.empty()) detail::check_count("means, one tensor per stage, or none", means.size(), us.size());
  detail::check_count("flags of wanted gradients, three per stage", wanted.size(), kGradients * us.size());
  for (size_t m = 0; m < us.size(); ++m) {
    const int64_t batch = us[m].size(0), channels = us[m].size(1);
    check_hcl_table("hcl_bn", tables[m], us[m], cells(m), type);
    detail::check_doubles("states", states[m], {2, channels}, us[m]);
    detail::check_doubles("sums", sums[m], {batch, 2, channels}, us[m]);
    if (!means.empty()) detail::check_doubles("means", means[m], {2, channels}, us[m]);
    STD_TORCH_CHECK(
        (!wanted[kGradients * m + kWeight] || affine[2 * m]) && (!wanted[kGradients * m + kBias] || affine[2 * m + 1]),
        "hcl_bn_bwd: a gradient of weight or bias of stage ", m + 1, " is wanted, but it is None");
  }
}

}  // namespace hcl_bn
}  // namespace transkd
