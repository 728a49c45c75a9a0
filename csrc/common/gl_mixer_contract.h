// What the launchers of gl_mixer ask of their arguments, on CPU and CUDA alike. The errors come before any work;
// transkd_fast/ops/gl_mixer.py has checked the same before, in the user's terms.
#pragma once

#include <cstdint>
#include <vector>

#include "common/contract.h"

namespace transkd {
namespace gl_mixer {

// The places in `wanted`, and the order of the gradients.
enum Wanted {
  kE,
  kU,
  kConvAWeight,
  kConvABias,
  kConvBWeight,
  kConvBBias,
  kAttentionWeight,
  kConvWeight,
  kWanted,
};
constexpr int64_t kTaps = 3;

// The arguments that forward and backward share.
struct Arguments {
  const Tensor &e, &u, &conv_a_weight, &conv_a_bias, &conv_b_weight, &conv_b_bias, &attention_weight, &conv_weight;

  int64_t batch() const { return e.size(0); }
  int64_t tokens() const { return e.size(1); }
  int64_t channels() const { return e.size(2); }
  int64_t rows() const { return batch() * tokens(); }
  ScalarType compute_type() const { return is_double(e) ? ScalarType::Double : ScalarType::Float; }
  // By its place in `wanted`.
  const Tensor& operator[](int place) const {
    const Tensor* const all[kWanted] = {
        &e, &u, &conv_a_weight, &conv_a_bias, &conv_b_weight, &conv_b_bias, &attention_weight, &conv_weight};
    return *all[place];
  }
};

namespace detail {

inline void check_tokens(const char* name, const Tensor& t, const Tensor& e) {
  STD_TORCH_CHECK(t.dim() == 3 && shape_of(t) == shape_of(e), "gl_mixer: expected ", name, " of e's shape ",
                  shape_of(e), ", got ", shape_of(t));
  storage_type_of("gl_mixer", t);
  STD_TORCH_CHECK(t.device() == e.device(), "gl_mixer: expected ", name, " on e's device");
  STD_TORCH_CHECK(is_double(t) == is_double(e), "gl_mixer: float64 does not mix with other dtypes, got e and ", name,
                  " of both; convert them to one of them");
  STD_TORCH_CHECK(t.is_contiguous(), "gl_mixer: expected ", name, " contiguous; call .contiguous() first");
}

inline void check_parameter(const char* name, const Tensor& t, const Tensor& e) {
  storage_type_of("gl_mixer", t);
  STD_TORCH_CHECK(t.device() == e.device(), "gl_mixer: expected ", name, " on e's device");
  STD_TORCH_CHECK(t.is_contiguous(), "gl_mixer: expected ", name, " contiguous; call .contiguous() first");
}

inline void check_convolution(const char* name, const Tensor& weight, const Tensor& bias, const Tensor& e) {
  const int64_t channels = e.size(2);
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == channels && weight.size(1) == channels &&
                      weight.size(2) == kTaps && bias.dim() == 1 && bias.size(0) == channels,
                  "gl_mixer: expected ", name, "_weight to have shape [", channels, ", ", channels, ", ", kTaps,
                  "] and its bias [", channels, "], got ", shape_of(weight), " and ", shape_of(bias));
  check_parameter(name, weight, e);
  check_parameter(name, bias, e);
}

inline void check_scalar(const char* name, const Tensor& t, const Tensor& e) {
  STD_TORCH_CHECK(t.numel() == 1, "gl_mixer: expected ", name, " with one element, got ", shape_of(t));
  check_parameter(name, t, e);
}

}  // namespace detail

inline void check(const Arguments& given) {
  STD_TORCH_CHECK(given.e.dim() == 3 && given.e.numel() > 0,
                  "gl_mixer: expected e as tokens [B, N, C] with at least one element, got shape ", shape_of(given.e));
  detail::check_tokens("e", given.e, given.e);
  detail::check_tokens("u", given.u, given.e);
  detail::check_convolution("conv_a", given.conv_a_weight, given.conv_a_bias, given.e);
  detail::check_convolution("conv_b", given.conv_b_weight, given.conv_b_bias, given.e);
  detail::check_scalar("attention_weight", given.attention_weight, given.e);
  detail::check_scalar("conv_weight", given.conv_weight, given.e);
}

// After check().
inline void check_backward(const Arguments& given, const Tensor& grad, const Tensor& branches,
                           const std::vector<bool>& wanted) {
  const Tensor& e = given.e;
  detail::check_tokens("grad", grad, e);
  STD_TORCH_CHECK(grad.scalar_type() == e.scalar_type(), "gl_mixer_bwd: expected grad of e's dtype");
  STD_TORCH_CHECK(branches.dim() == 4 && branches.size(0) == e.size(0) && branches.size(1) == e.size(1) &&
                      branches.size(2) == 2 && branches.size(3) == e.size(2) && branches.is_contiguous() &&
                      branches.scalar_type() == given.compute_type() && branches.device() == e.device(),
                  "gl_mixer_bwd: expected the branches that gl_mixer_fwd kept, contiguous, of shape [", e.size(0), ", ",
                  e.size(1), ", 2, ", e.size(2), "], got ", shape_of(branches));
  STD_TORCH_CHECK(wanted.size() == kWanted, "gl_mixer_bwd: expected ", static_cast<int>(kWanted),
                  " flags of wanted gradients, got ", wanted.size());
}

}  // namespace gl_mixer
}  // namespace transkd
