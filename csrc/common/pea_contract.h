// What the launchers of pea ask of their arguments, on CPU and CUDA alike, how they describe a call's stages, and which
// tensors a call makes. The errors come before any work; transkd_fast/ops/pea.py has checked the same before, in the
// user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/contract.h"

namespace transkd {
namespace pea {

// The places of a stage in `wanted`.
enum Wanted { kX, kWeight, kBias, kTarget, kAssistant, kProjectionScale, kAssistantScale, kWanted };
// The places of a stage in the `dtypes` of pea_bwd: as in `wanted`, with one for both scales.
constexpr int kScales = kProjectionScale, kGradients = kScales + 1;
// The columns of `factors`.
enum Factor { kProjectionFactor, kTargetFactor, kAssistantFactor, kFactors };

// How [B, N, C] lies in memory; one that is both (N = 1 or C = 1) counts as token-major.
enum class TokenLayout { kTokenMajor, kChannelMajor, kOther };

inline TokenLayout token_layout_of(const Tensor& t) {
  if (t.is_contiguous()) return TokenLayout::kTokenMajor;
  const bool samples = t.size(0) == 1 || t.stride(0) == t.size(1) * t.size(2);
  return samples && t.stride(1) == 1 && t.stride(2) == t.size(1) ? TokenLayout::kChannelMajor : TokenLayout::kOther;
}

// One stage of a call that stages_of() has passed.
struct Stage {
  const Tensor *x, *weight, *bias, *target;
  const Tensor *assistant = nullptr, *projection_scale = nullptr, *assistant_scale = nullptr;
  double loss_weight;
  bool wanted[kWanted];
  int64_t batch, tokens, in, out;

  int64_t rows() const { return batch * tokens; }
  // dloss/dP = factor R.
  double factor() const { return 2 * loss_weight / (static_cast<double>(rows()) * static_cast<double>(out)); }
  bool wants_residual() const { return wanted[kTarget] || wanted[kAssistant]; }
  bool wants_scales() const { return wanted[kProjectionScale] || wanted[kAssistantScale]; }
  bool wants_any() const {
    for (const bool flag : wanted) {
      if (flag) return true;
    }
    return false;
  }
};

namespace detail {

inline std::string of_stage(size_t m) { return " of stage " + std::to_string(m + 1) + " "; }

inline void check_activation(const char* name, const Tensor& t, size_t m, const Tensor& first) {
  storage_type_of("pea", t);
  STD_TORCH_CHECK(t.device() == first.device(), "pea: expected ", name, of_stage(m), "on the device of stage 1's x");
  STD_TORCH_CHECK(is_double(t) == is_double(first),
                  "pea: float64 does not mix with other dtypes, got embeddings of both; convert them to one of them");
  STD_TORCH_CHECK(token_layout_of(t) != TokenLayout::kOther, "pea: expected ", name, of_stage(m),
                  "token-major or channel-major, got one that is neither; call .contiguous() first");
}

inline void check_like_target(const char* name, const Tensor& t, size_t m, const Stage& stage, const Tensor& first) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == stage.batch && t.size(1) == stage.tokens && t.size(2) == stage.out,
                  "pea: expected ", name, of_stage(m), "to have shape [", stage.batch, ", ", stage.tokens, ", ",
                  stage.out, "], got ", shape_of(t));
  check_activation(name, t, m, first);
}

inline void check_parameter(const char* name, const Tensor& t, size_t m, const Tensor& first) {
  storage_type_of("pea", t);
  STD_TORCH_CHECK(t.device() == first.device(), "pea: expected ", name, of_stage(m), "on the device of stage 1's x");
  STD_TORCH_CHECK(t.is_contiguous(), "pea: expected ", name, of_stage(m), "contiguous; call .contiguous() first");
}

inline void check_scale(const char* name, const Tensor& t, size_t m, const Tensor& first) {
  STD_TORCH_CHECK(t.numel() == 1, "pea: expected ", name, of_stage(m), "with one element, got ", shape_of(t));
  check_parameter(name, t, m, first);
}

inline Tensor empty_tokens(const int64_t (&shape)[3], ScalarType type, bool channel_major,
                           const torch::stable::Device& device) {
  const auto empty = [&](int64_t second, int64_t third) {
    return torch::stable::empty({shape[0], second, third}, type, std::nullopt, device);
  };
  return channel_major ? torch::stable::transpose(empty(shape[2], shape[1]), 1, 2) : empty(shape[1], shape[2]);
}

// float16 has too small a range for gradients that are not normalised.
inline ScalarType kept_type(ScalarType type) { return type == ScalarType::Half ? ScalarType::Float : type; }

}  // namespace detail

inline ScalarType compute_type(const Tensor& x) { return is_double(x) ? ScalarType::Double : ScalarType::Float; }

// Checks all arguments of pea_fwd and describes its stages, by pointers into the lists.
inline std::vector<Stage> stages_of(const std::vector<Tensor>& xs, const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& biases, const std::vector<Tensor>& targets,
                                    const std::vector<Tensor>& assistants, const std::vector<Tensor>& projection_scales,
                                    const std::vector<Tensor>& assistant_scales,
                                    const std::vector<double>& stage_weights, const std::vector<bool>& wanted) {
  const size_t count = xs.size();
  STD_TORCH_CHECK(count > 0 && weights.size() == count && biases.size() == count && targets.size() == count &&
                      stage_weights.size() == count,
                  "pea: expected as many weights, biases, targets and stage weights as xs, and at least one, got ",
                  count, " xs, ", weights.size(), " weights, ", biases.size(), " biases, ", targets.size(),
                  " targets and ", stage_weights.size(), " stage weights");
  const bool assisted = !assistants.empty();
  const size_t expected = assisted ? count : 0;
  STD_TORCH_CHECK(
      assistants.size() == expected && projection_scales.size() == expected && assistant_scales.size() == expected,
      "pea: expected assistants, projection_scales and assistant_scales all empty or one per stage, got ",
      assistants.size(), ", ", projection_scales.size(), " and ", assistant_scales.size(), " for ", count, " stages");
  STD_TORCH_CHECK(wanted.size() == kWanted * count, "pea: expected ", static_cast<int>(kWanted),
                  " flags of wanted gradients per stage, got ", wanted.size(), " for ", count, " stages");

  std::vector<Stage> stages;
  for (size_t m = 0; m < count; ++m) {
    Stage stage;
    stage.x = &xs[m];
    stage.weight = &weights[m];
    stage.bias = &biases[m];
    stage.target = &targets[m];
    stage.loss_weight = stage_weights[m];
    for (int k = 0; k < kWanted; ++k) stage.wanted[k] = wanted[m * kWanted + k];
    STD_TORCH_CHECK(xs[m].dim() == 3 && xs[m].numel() > 0, "pea: expected x", detail::of_stage(m),
                    "as tokens [B, N, C_in] with at least one element, got shape ", shape_of(xs[m]));
    detail::check_activation("x", xs[m], m, xs[0]);
    stage.batch = xs[m].size(0);
    stage.tokens = xs[m].size(1);
    stage.in = xs[m].size(2);
    STD_TORCH_CHECK(weights[m].dim() == 2 && weights[m].size(0) > 0 && weights[m].size(1) == stage.in,
                    "pea: expected weight", detail::of_stage(m), "to have shape [C_out, ", stage.in, "], got ",
                    shape_of(weights[m]));
    detail::check_parameter("weight", weights[m], m, xs[0]);
    stage.out = weights[m].size(0);
    STD_TORCH_CHECK(biases[m].dim() == 1 && biases[m].size(0) == stage.out, "pea: expected bias", detail::of_stage(m),
                    "to have shape [", stage.out, "], got ", shape_of(biases[m]));
    detail::check_parameter("bias", biases[m], m, xs[0]);
    detail::check_like_target("target", targets[m], m, stage, xs[0]);
    if (assisted) {
      detail::check_like_target("assistant", assistants[m], m, stage, xs[0]);
      detail::check_scale("projection_scale", projection_scales[m], m, xs[0]);
      detail::check_scale("assistant_scale", assistant_scales[m], m, xs[0]);
      stage.assistant = &assistants[m];
      stage.projection_scale = &projection_scales[m];
      stage.assistant_scale = &assistant_scales[m];
    }
    STD_TORCH_CHECK(assisted || !(stage.wanted[kAssistant] || stage.wants_scales()),
                    "pea: expected assistants where a gradient of theirs is wanted, got none for stage ", m + 1);
    stages.push_back(stage);
  }
  return stages;
}

// What the forward keeps of one stage, not yet filled; absent is what nobody wants.
struct Kept {
  std::optional<Tensor> x, weight, bias, residual, scales;

  explicit Kept(const Stage& stage) {
    const auto device = stage.x->device();
    const ScalarType compute = compute_type(*stage.x);
    const auto empty = [&](auto... sizes) { return torch::stable::empty({sizes...}, compute, std::nullopt, device); };
    if (stage.wanted[kX]) {
      x = detail::empty_tokens({stage.batch, stage.tokens, stage.in}, detail::kept_type(stage.x->scalar_type()),
                               token_layout_of(*stage.x) == TokenLayout::kChannelMajor, device);
    }
    if (stage.wanted[kWeight]) weight = empty(stage.out, stage.in);
    if (stage.wanted[kBias]) bias = empty(stage.out);
    if (stage.wants_residual()) {
      const Tensor& like = stage.wanted[kTarget] ? *stage.target : *stage.assistant;
      const bool one_type = !(stage.wanted[kTarget] && stage.wanted[kAssistant]) ||
                            stage.target->scalar_type() == stage.assistant->scalar_type();
      residual = detail::empty_tokens({stage.batch, stage.tokens, stage.out},
                                      one_type ? detail::kept_type(like.scalar_type()) : compute,
                                      token_layout_of(like) == TokenLayout::kChannelMajor, device);
    }
    if (stage.wants_scales()) scales = empty(static_cast<int64_t>(2));
  }

  // In the order in which pea_bwd expects them.
  void append_to(std::vector<Tensor>& list) const {
    for (const auto* tensor : {&x, &weight, &bias, &residual, &scales}) {
      if (*tensor) list.push_back(**tensor);
    }
  }
};

// One gradient of the backward: gradient = upstream * factors[stage, factor] * kept.
struct Scaling {
  const Tensor* kept;
  int64_t stage;
  Factor factor;
  Tensor gradient;  // not yet filled, of kept's shape and strides

  int64_t place() const { return stage * kFactors + factor; }  // in factors
};

// Checks all arguments of pea_bwd and makes the gradients, in their order.
inline std::vector<Scaling> scalings_of(const Tensor& grad, const Tensor& factors, const std::vector<Tensor>& kept,
                                        const std::vector<int64_t>& dtypes) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double};
  const ScalarType compute = factors.scalar_type();
  STD_TORCH_CHECK(factors.dim() == 2 && factors.size(0) > 0 && factors.size(1) == kFactors && factors.is_contiguous() &&
                      (compute == ScalarType::Float || compute == ScalarType::Double),
                  "pea_bwd: expected the factors that pea_fwd made, [stages, 3], got ", shape_of(factors));
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == compute && grad.device() == factors.device(),
                  "pea_bwd: expected a scalar grad of the loss's dtype on the factors' device, got shape ",
                  shape_of(grad));
  const int64_t stages = factors.size(0);
  STD_TORCH_CHECK(static_cast<int64_t>(dtypes.size()) == kGradients * stages, "pea_bwd: expected ", kGradients,
                  " dtype codes per stage, got ", dtypes.size(), " for ", stages, " stages");
  std::vector<Scaling> scalings;
  size_t next = 0;
  for (int64_t m = 0; m < stages; ++m) {
    for (int k = 0; k < kGradients; ++k) {
      const int64_t code = dtypes[m * kGradients + k];
      STD_TORCH_CHECK(code >= -1 && code < 4, "pea_bwd: expected dtype codes of -1 to 3, got ", code);
      if (code < 0) continue;
      const bool shared = k == kAssistant && dtypes[m * kGradients + kTarget] >= 0;  // the target's residual again
      STD_TORCH_CHECK(shared || next < kept.size(), "pea_bwd: expected a kept tensor per wanted gradient, got ",
                      kept.size());
      const Tensor& from = kept[shared ? next - 1 : next++];
      const int64_t dims = k == kWeight ? 2 : k == kBias || k == kScales ? 1 : 3;
      STD_TORCH_CHECK(from.dim() == dims, "pea_bwd: expected what pea_fwd kept, here of ", dims, " dimensions, got ",
                      shape_of(from));
      STD_TORCH_CHECK(is_double(from) == is_double(factors),
                      "pea_bwd: expected kept tensors and factors all float64 or none");
      storage_type_of("pea_bwd", from);
      STD_TORCH_CHECK(from.device() == factors.device(), "pea_bwd: expected kept tensors on the factors' device");
      const bool channel_major = dims == 3 && token_layout_of(from) == TokenLayout::kChannelMajor;
      STD_TORCH_CHECK(channel_major || from.is_contiguous(),
                      "pea_bwd: expected kept tensors contiguous or channel-major, as pea_fwd made them");
      const auto device = from.device();
      Tensor gradient =
          dims == 3
              ? detail::empty_tokens({from.size(0), from.size(1), from.size(2)}, kTypes[code], channel_major, device)
          : dims == 2 ? torch::stable::empty({from.size(0), from.size(1)}, kTypes[code], std::nullopt, device)
                      : torch::stable::empty({from.size(0)}, kTypes[code], std::nullopt, device);
      const Factor factor = k == kTarget ? kTargetFactor : k == kAssistant ? kAssistantFactor : kProjectionFactor;
      scalings.push_back({&from, m, factor, gradient});
    }
  }
  STD_TORCH_CHECK(next == kept.size(), "pea_bwd: expected ", next, " kept tensors for these dtypes, got ", kept.size());
  return scalings;
}

}  // namespace pea
}  // namespace transkd
