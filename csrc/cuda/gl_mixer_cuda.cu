// The launchers of gl_mixer on CUDA: repeat the contract, allocate, launch what gl_mixer_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/gl_mixer_contract.h"
#include "cuda/common/stream.h"
#include "cuda/gl_mixer_kernel.cuh"

namespace transkd {
namespace gl_mixer {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Which of them are written, the kernels know.
Values values_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), storage_type_of("gl_mixer", tensor)};
}

Call describe(const Arguments& given, bool residual) {
  check(given);
  STD_TORCH_CHECK(given.e.is_cuda(), "gl_mixer: expected e on a CUDA device");
  Call call{};
  call.batch = given.batch();
  call.tokens = given.tokens();
  call.channels = given.channels();
  call.residual = residual;
  call.type = storage_type_of("gl_mixer", given.e);
  call.u = values_of(given.u);
  call.weight[0] = values_of(given.conv_a_weight);
  call.weight[1] = values_of(given.conv_b_weight);
  call.bias[0] = values_of(given.conv_a_bias);
  call.bias[1] = values_of(given.conv_b_bias);
  call.attention_weight = values_of(given.attention_weight);
  call.conv_weight = values_of(given.conv_weight);
  call.e = given.e.const_data_ptr();
  return call;
}

std::tuple<Tensor, Tensor> gl_mixer_fwd(Tensor e, Tensor u, Tensor conv_a_weight, Tensor conv_a_bias,
                                        Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight,
                                        Tensor conv_weight, bool residual, bool keep, bool tf32) {
  const Arguments given{e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight};
  Call call = describe(given, residual);
  const DeviceGuard guard(e.get_device_index());
  const Tensor out = torch::stable::empty_like(e);
  std::vector<int64_t> sizes{0};
  if (keep) sizes = {call.batch, call.tokens, 2, call.channels};
  const Tensor branches = torch::stable::empty(sizes, given.compute_type(), std::nullopt, e.device());
  call.out = out.mutable_data_ptr();
  if (keep) call.branches = branches.mutable_data_ptr();
  const Plan plan(call);
  const cudaStream_t stream = current_stream(e);
  visit_products(plan.pass(), tf32, [&](auto type, auto vectors, auto tensor_cores) {
    using E = typename decltype(type)::type;
    gl_mixer_forward_kernel<E, decltype(vectors)::value, decltype(tensor_cores)::value>
        <<<plan.forward_blocks(), kForwardThreads, 0, stream>>>(plan.pass());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, branches};
}

void launch_backward(const Plan& plan, bool tf32, cudaStream_t stream) {
  const Pass& pass = plan.pass();
  if (plan.gate_blocks() > 0) {
    visit_elements(pass, [&](auto type, auto vectors) {
      using E = typename decltype(type)::type;
      gl_mixer_gate_kernel<E, decltype(vectors)::value><<<plan.gate_blocks(), kGateThreads, 0, stream>>>(pass);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (plan.gradient_blocks() > 0) {
    visit_products(pass, tf32, [&](auto type, auto vectors, auto tensor_cores) {
      using E = typename decltype(type)::type;
      gl_mixer_gradients_kernel<E, decltype(vectors)::value, decltype(tensor_cores)::value>
          <<<plan.gradient_blocks(), gradient_threads(sizeof(E)), 0, stream>>>(pass);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (plan.merge_blocks() > 0) {
    visit_merge(plan.merge(), [&](auto type, auto vectors) {
      using T = typename decltype(type)::type;
      gl_mixer_merge_kernel<T, decltype(vectors)::value>
          <<<plan.merge_blocks(), kMergeThreads, 0, stream>>>(plan.merge());
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::vector<Tensor> gl_mixer_bwd(Tensor grad, Tensor e, Tensor u, Tensor branches, Tensor conv_a_weight,
                                 Tensor conv_a_bias, Tensor conv_b_weight, Tensor conv_b_bias, Tensor attention_weight,
                                 Tensor conv_weight, bool residual, std::vector<bool> wanted, bool tf32) {
  const Arguments given{e, u, conv_a_weight, conv_a_bias, conv_b_weight, conv_b_bias, attention_weight, conv_weight};
  Call call = describe(given, residual);
  check_backward(given, grad, branches, wanted);
  const DeviceGuard guard(e.get_device_index());
  std::vector<Tensor> gradients;
  const auto gradient_of = [&](int place) -> void* {
    if (!wanted[place]) return nullptr;
    gradients.push_back(torch::stable::empty_like(given[place]));
    return gradients.back().mutable_data_ptr();
  };
  call.e_gradient = gradient_of(kE);
  call.u_gradient = gradient_of(kU);
  call.weight_gradient[0] = gradient_of(kConvAWeight);
  call.bias_gradient[0] = gradient_of(kConvABias);
  call.weight_gradient[1] = gradient_of(kConvBWeight);
  call.bias_gradient[1] = gradient_of(kConvBBias);
  call.attention_weight_gradient = gradient_of(kAttentionWeight);
  call.conv_weight_gradient = gradient_of(kConvWeight);
  call.grad = grad.const_data_ptr();
  call.branches = const_cast<void*>(branches.const_data_ptr());  // only read
  Plan plan(call);
  const Tensor workspace = torch::stable::empty({plan.workspace_bytes()}, ScalarType::Byte, std::nullopt, e.device());
  plan.bind(workspace.mutable_data_ptr());
  launch_backward(plan, tf32, current_stream(e));
  return gradients;
}

}  // namespace
}  // namespace gl_mixer
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("gl_mixer_fwd", TORCH_BOX(&transkd::gl_mixer::gl_mixer_fwd));
  m.impl("gl_mixer_bwd", TORCH_BOX(&transkd::gl_mixer::gl_mixer_bwd));
}
