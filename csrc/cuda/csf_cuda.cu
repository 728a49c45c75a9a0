// The launchers of csf on CUDA: repeat the contract, allocate, launch what csf_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/csf_contract.h"
#include "cuda/common/stream.h"
#include "cuda/csf_kernel.cuh"

namespace transkd {
namespace csf {
namespace {

using torch::stable::accelerator::DeviceGuard;

Maps describe(const Tensor& z, const Tensor& y) {
  check_maps(z, y);
  STD_TORCH_CHECK(z.is_cuda(), "csf: expected maps on a CUDA device");
  Maps maps{};
  maps.batch = z.size(0);
  maps.channels = z.size(1);
  maps.height = z.size(2);
  maps.width = z.size(3);
  maps.coarse_height = y.size(2);
  maps.coarse_width = y.size(3);
  maps.channels_last = layout_of(z) == Layout::kChannelsLast;
  maps.z_type = storage_type_of("csf", z);
  maps.y_type = storage_type_of("csf", y);
  maps.z = z.const_data_ptr();
  maps.y = y.const_data_ptr();
  return maps;
}

template <class T>
constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

Tensor empty(std::vector<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
const double* const_doubles(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }

// Runs `kernel(Z, vector, channels-last)` of a step.
template <class T, class Launch>
void launch(const Step<T>& step, Launch kernel) {
  visit_instance<T>(step.variant, kernel);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
Tensor reduce(const Maps& maps, const Tensor& z, int64_t parts) {
  const Tensor sums = empty({maps.batch, parts, 3, maps.channels}, ScalarType::Double, z);
  const Step<T> step = Plan<T>(maps).reduce(parts, doubles(sums));
  const cudaStream_t stream = current_stream(z);
  launch(step, [&](auto type, auto vector, auto channels_last) {
    using Z = typename decltype(type)::type;
    csf_reduce_kernel<Z, decltype(vector)::value, decltype(channels_last)::value>
        <<<step.blocks, step.threads, 0, stream>>>(step.pass);
  });
  return sums;
}

template <class T>
void fuse(const Maps& maps, const Call& call, const Tensor& z) {
  const Tensor table = empty({Coefficients<T>::kRows, maps.batch, maps.channels}, kScalar<T>, z);
  const Coefficients<T> coefficients(static_cast<T*>(table.mutable_data_ptr()), call.sizes);
  const Step<T> step = Plan<T>(maps).fuse(coefficients);
  const cudaStream_t stream = current_stream(z);
  csf_attention_kernel<T><<<1, kAttentionThreads, kStageBytes, stream>>>(call, coefficients);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch(step, [&](auto type, auto vector, auto channels_last) {
    using Z = typename decltype(type)::type;
    csf_fuse_kernel<Z, decltype(vector)::value, decltype(channels_last)::value>
        <<<step.blocks, step.threads, 0, stream>>>(step.pass);
  });
}

template <class T>
Tensor backward_reduce(const Maps& maps, const Tensor& z, const double* mean, int64_t parts) {
  const Tensor sums = empty({maps.batch, parts, 3, maps.channels}, ScalarType::Double, z);
  const Step<T> step = Plan<T>(maps).reduce(parts, doubles(sums), mean);
  const cudaStream_t stream = current_stream(z);
  launch(step, [&](auto type, auto vector, auto channels_last) {
    using Z = typename decltype(type)::type;
    csf_backward_reduce_kernel<Z, decltype(vector)::value, decltype(channels_last)::value>
        <<<step.blocks, step.threads, 0, stream>>>(step.pass);
  });
  return sums;
}

template <class T>
void apply(const Maps& maps, BackwardCall call, const Tensor& z) {
  const Tensor table = empty({Coefficients<T>::kRows, maps.batch, maps.channels}, kScalar<T>, z);
  const Tensor scratch = empty({Scratch::size(call.sizes)}, ScalarType::Double, z);
  const Coefficients<T> coefficients(static_cast<T*>(table.mutable_data_ptr()), call.sizes);
  call.scratch = doubles(scratch);
  const Step<T> step = Plan<T>(maps).apply(coefficients);
  const cudaStream_t stream = current_stream(z);
  csf_attention_backward_kernel<T><<<1, kAttentionThreads, kStageBytes, stream>>>(call, coefficients);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (maps.out == nullptr && maps.y_gradient == nullptr) return;
  launch(step, [&](auto type, auto vector, auto channels_last) {
    using Z = typename decltype(type)::type;
    csf_apply_kernel<Z, decltype(vector)::value, decltype(channels_last)::value>
        <<<step.blocks, step.threads, 0, stream>>>(step.pass);
  });
}

Tensor csf_reduce(Tensor z, Tensor y, int64_t parts) {
  const Maps maps = describe(z, y);
  check_parts(parts);
  const DeviceGuard guard(z.get_device_index());
  return is_double(z) ? reduce<double>(maps, z, parts) : reduce<float>(maps, z, parts);
}

std::tuple<Tensor, Tensor> csf_fuse(Tensor z, Tensor y, Tensor sums, int64_t first, Parameters parameters,
                                    OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor num_batches_tracked, OptionalTensor fc_running_mean,
                                    OptionalTensor fc_running_var, OptionalTensor fc_num_batches_tracked, int64_t norm,
                                    std::optional<double> momentum, double eps, int64_t fc_norm,
                                    std::optional<double> fc_momentum, double fc_eps) {
  Maps maps = describe(z, y);
  check_sums(sums, z, first);
  Call call{};
  call.sizes = sizes_of(z, sums.size(0), first, parameters);
  call.layers = layers_of(parameters, call.sizes, z);
  call.bn = batch_norm_of("the map's batch norm", norm_of(norm, false), parameters[kWeight], parameters[kBias],
                          call.sizes.channels, z);
  call.fc_bn = batch_norm_of("the squeeze layer's batch norm", norm_of(fc_norm, true), parameters[kFcWeight],
                             parameters[kFcBias], call.sizes.squeezed, z);
  add_statistics("the map's batch norm", call.bn, running_mean, running_var, num_batches_tracked, momentum, eps,
                 call.sizes.channels, z);
  add_statistics("the squeeze layer's batch norm", call.fc_bn, fc_running_mean, fc_running_var, fc_num_batches_tracked,
                 fc_momentum, fc_eps, call.sizes.squeezed, z);
  const DeviceGuard guard(z.get_device_index());
  const Tensor v = torch::stable::empty_like(z);
  const Tensor state = empty({State::size(call.sizes)}, ScalarType::Double, z);
  maps.out = v.mutable_data_ptr();
  call.sums = const_doubles(sums);
  call.parts = sums.size(1);
  call.state = doubles(state);
  is_double(z) ? fuse<double>(maps, call, z) : fuse<float>(maps, call, z);
  return {v, state};
}

Tensor csf_bwd_reduce(Tensor grad, Tensor z, Tensor y, Tensor state, int64_t parts) {
  Maps maps = describe(z, y);
  check_grad(grad, z);
  check_parts(parts);
  // How many samples and squeeze channels there are is not known here; the means come first.
  STD_TORCH_CHECK(state.dim() == 1 && state.numel() >= z.size(1) && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Double && state.device() == z.device(),
                  "csf: expected the state that csf_fuse made, float64, got ", shape_of(state));
  const DeviceGuard guard(z.get_device_index());
  maps.grad = grad.const_data_ptr();
  const double* const mean = const_doubles(state);
  return is_double(z) ? backward_reduce<double>(maps, z, mean, parts) : backward_reduce<float>(maps, z, mean, parts);
}

std::vector<Tensor> csf_bwd_apply(Tensor grad, Tensor z, Tensor y, Tensor sums, Tensor state, int64_t first,
                                  Parameters parameters, int64_t norm, int64_t fc_norm, std::vector<bool> wanted) {
  Maps maps = describe(z, y);
  check_grad(grad, z);
  check_sums(sums, z, first);
  BackwardCall call{};
  call.sizes = sizes_of(z, sums.size(0), first, parameters);
  check_state(state, call.sizes, z);
  check_wanted(wanted, parameters);
  call.layers = layers_of(parameters, call.sizes, z);
  call.bn = batch_norm_of("the map's batch norm", norm_of(norm, false), parameters[kWeight], parameters[kBias],
                          call.sizes.channels, z);
  call.fc_bn = batch_norm_of("the squeeze layer's batch norm", norm_of(fc_norm, true), parameters[kFcWeight],
                             parameters[kFcBias], call.sizes.squeezed, z);
  const DeviceGuard guard(z.get_device_index());
  std::vector<Tensor> gradients;
  const auto gradient_of = [&](size_t k, const Tensor& tensor) -> void* {
    if (!wanted[k]) return nullptr;
    gradients.push_back(torch::stable::empty_like(tensor));
    return gradients.back().mutable_data_ptr();
  };
  maps.out = gradient_of(0, z);
  maps.y_gradient = gradient_of(1, y);
  Values of_parameters[kParameters];
  for (int k = 0; k < kParameters; ++k) {
    if (!parameters[k]) continue;
    of_parameters[k] = {gradient_of(kWantedParameters + k, *parameters[k]), storage_type_of("csf", *parameters[k])};
  }
  call.bn_gradients = {of_parameters[kWeight], of_parameters[kBias]};
  call.fc_bn_gradients = {of_parameters[kFcWeight], of_parameters[kFcBias]};
  call.gradients = {of_parameters[kFc],
                    {of_parameters[kHead0], of_parameters[kHead1]},
                    {of_parameters[kHead0Bias], of_parameters[kHead1Bias]}};
  maps.grad = grad.const_data_ptr();
  if (maps.out == nullptr || !of_batch(call.bn.norm)) maps.z = nullptr;
  call.sums = const_doubles(sums);
  call.parts = sums.size(1);
  call.state = const_cast<double*>(const_doubles(state));  // only read
  is_double(z) ? apply<double>(maps, call, z) : apply<float>(maps, call, z);
  return gradients;
}

}  // namespace
}  // namespace csf
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("csf_reduce", TORCH_BOX(&transkd::csf::csf_reduce));
  m.impl("csf_fuse", TORCH_BOX(&transkd::csf::csf_fuse));
  m.impl("csf_bwd_reduce", TORCH_BOX(&transkd::csf::csf_bwd_reduce));
  m.impl("csf_bwd_apply", TORCH_BOX(&transkd::csf::csf_bwd_apply));
}
