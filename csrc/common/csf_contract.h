// What the launchers of csf ask of their arguments, on CPU and CUDA alike, and how they hand them on. The errors come
// before any work; transkd_fast/ops/csf.py has checked the same before, in the user's terms.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/batch_norm_contract.h"
#include "common/csf_attention.h"

namespace transkd {
namespace csf {

using Parameters = std::vector<OptionalTensor>;

// The places in `parameters`.
enum Parameter { kWeight, kBias, kFc, kFcWeight, kFcBias, kHead0, kHead0Bias, kHead1, kHead1Bias, kParameters };
// The places in `wanted`, and in the order of the gradients: z, y, then the parameters.
constexpr int kWantedParameters = 2;

namespace detail {

inline bool is_in(Layout layout, const Tensor& map) {
  return layout == Layout::kContiguous ? map.is_contiguous() : is_channels_last(map);
}

inline void check_same_form(const char* name, const Tensor& map, const Tensor& z, Layout layout) {
  STD_TORCH_CHECK(map.device() == z.device(), "csf: expected ", name, " on z's device");
  STD_TORCH_CHECK(is_double(map) == is_double(z),
                  "csf: float64 does not mix with other dtypes, got maps of both; convert them to one of them");
  STD_TORCH_CHECK(is_in(layout, map), "csf: expected ", name, " in z's layout, ", name_of(layout), ", got one that is ",
                  name_of(layout_of(map)));
}

}  // namespace detail

inline ScalarType compute_type(const Tensor& z) { return is_double(z) ? ScalarType::Double : ScalarType::Float; }

// z and y, as every raw op takes them.
inline void check_maps(const Tensor& z, const Tensor& y) {
  STD_TORCH_CHECK(z.dim() == 4 && y.dim() == 4 && z.size(0) == y.size(0) && z.size(1) == y.size(1),
                  "csf: expected z [B, M, H, W] and y [B, M, h, w], got ", shape_of(z), " and ", shape_of(y));
  STD_TORCH_CHECK(z.numel() > 0 && y.numel() > 0, "csf: expected maps with at least one element, got ", shape_of(z),
                  " and ", shape_of(y));
  storage_type_of("csf", z);
  storage_type_of("csf", y);
  const Layout layout = layout_of(z);
  STD_TORCH_CHECK(layout != Layout::kOther, "csf: expected z contiguous or channels-last, got one that is neither; ",
                  "call .contiguous() first");
  detail::check_same_form("y", y, z, layout);
}

inline void check_parts(int64_t parts) { STD_TORCH_CHECK(parts > 0, "csf: expected parts > 0, got ", parts); }

inline void check_grad(const Tensor& grad, const Tensor& z) {
  STD_TORCH_CHECK(grad.dim() == 4 && shape_of(grad) == shape_of(z) && grad.scalar_type() == z.scalar_type(),
                  "csf: expected grad of z's shape ", shape_of(z), " and dtype, got ", shape_of(grad));
  detail::check_same_form("grad", grad, z, layout_of(z));
}

inline void check_sums(const Tensor& sums, const Tensor& z, int64_t first) {
  STD_TORCH_CHECK(sums.dim() == 4 && sums.size(1) > 0 && sums.size(2) == 3 && sums.size(3) == z.size(1) &&
                      sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.device() == z.device(),
                  "csf: expected contiguous float64 sums [samples, parts, 3, ", z.size(1), "], got ", shape_of(sums));
  STD_TORCH_CHECK(first >= 0 && first + z.size(0) <= sums.size(0), "csf: expected sums of the samples from ", first,
                  " on, for a batch of ", z.size(0), ", got sums of ", sums.size(0));
}

inline Values values_of(const char* name, const OptionalTensor& tensor, int64_t count, const Tensor& z,
                        bool required = false) {
  return small_values_of("csf", name, tensor, count, z, required);
}

inline Sizes sizes_of(const Tensor& z, int64_t samples, int64_t first, const Parameters& parameters) {
  STD_TORCH_CHECK(parameters.size() == kParameters, "csf: expected ", static_cast<int>(kParameters),
                  " parameters, got ", parameters.size());
  STD_TORCH_CHECK(parameters[kFc] && parameters[kFc]->dim() == 2 && parameters[kFc]->size(0) > 0,
                  "csf: expected the squeeze layer's weight [L, M]");
  return {samples, first, z.size(0), z.size(1), parameters[kFc]->size(0), z.size(2) * z.size(3)};
}

inline Layers layers_of(const Parameters& parameters, const Sizes& sizes, const Tensor& z) {
  const int64_t weights = sizes.channels * sizes.squeezed;
  return {values_of("the squeeze layer's weight", parameters[kFc], weights, z, true),
          {values_of("head 0's weight", parameters[kHead0], weights, z, true),
           values_of("head 1's weight", parameters[kHead1], weights, z, true)},
          {values_of("head 0's bias", parameters[kHead0Bias], sizes.channels, z, true),
           values_of("head 1's bias", parameters[kHead1Bias], sizes.channels, z, true)}};
}

inline Norm norm_of(int64_t norm, bool may_be_none) { return checked_norm("csf", norm, may_be_none); }

// A batch norm's affine parameters and its kind, which is all that the backward needs.
inline BatchNorm batch_norm_of(const char* name, Norm norm, const OptionalTensor& weight, const OptionalTensor& bias,
                               int64_t channels, const Tensor& z) {
  BatchNorm bn{};
  bn.norm = norm;
  bn.weight = values_of(name, weight, channels, z);
  bn.bias = values_of(name, bias, channels, z);
  return bn;
}

inline void add_statistics(const char* name, BatchNorm& bn, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const OptionalTensor& batches,
                           std::optional<double> momentum, double eps, int64_t channels, const Tensor& z) {
  const bool needed = bn.norm == Norm::kRunning || bn.norm == Norm::kTracked;
  bn.running_mean = values_of(name, running_mean, channels, z, needed);
  bn.running_var = values_of(name, running_var, channels, z, needed);
  if (batches) bn.batches = counter_of("csf", name, *batches, z);
  bn.cumulative = !momentum;
  bn.momentum = momentum.value_or(0);
  bn.eps = eps;
  STD_TORCH_CHECK(momentum || bn.batches || bn.norm != Norm::kTracked, "csf: expected ", name,
                  "'s counter with momentum None (cumulative average), got None");
}

inline void check_state(const Tensor& state, const Sizes& sizes, const Tensor& z) {
  STD_TORCH_CHECK(state.dim() == 1 && state.numel() == State::size(sizes) && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Double && state.device() == z.device(),
                  "csf: expected the state that csf_fuse made, float64 of ", State::size(sizes), " entries, got ",
                  shape_of(state));
}

inline void check_wanted(const std::vector<bool>& wanted, const Parameters& parameters) {
  STD_TORCH_CHECK(wanted.size() == kWantedParameters + kParameters, "csf: expected ",
                  static_cast<int>(kWantedParameters + kParameters), " flags of wanted gradients, got ", wanted.size());
  for (int k = 0; k < kParameters; ++k) {
    STD_TORCH_CHECK(!wanted[kWantedParameters + k] || parameters[k], "csf: parameter ", k,
                    " is None and has no gradient, but one is wanted");
  }
}

}  // namespace csf
}  // namespace transkd
