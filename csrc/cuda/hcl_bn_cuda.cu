// The launchers of hcl_bn on CUDA: repeat the contract, allocate, launch what hcl_bn_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/hcl_bn_contract.h"
#include "cuda/common/stream.h"
#include "cuda/hcl_bn_kernel.cuh"

namespace transkd {
namespace hcl_bn {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor empty(std::vector<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

// The stages, with their maps, batch norms and moments or tables still to come.
std::vector<Maps> describe(const std::vector<Tensor>& us, const std::vector<Tensor>& teachers,
                           const std::vector<BatchNorm>& bns, const std::vector<double>& weights) {
  std::vector<Maps> stages;
  for (size_t m = 0; m < us.size(); ++m) {
    Maps maps{};
    maps.batch = us[m].size(0);
    maps.channels = us[m].size(1);
    maps.height = us[m].size(2);
    maps.width = us[m].size(3);
    maps.channels_last = layout_of(us[m]) == Layout::kChannelsLast;
    maps.student_type = storage_type_of("hcl_bn", us[m]);
    maps.teacher_type = storage_type_of("hcl_bn", teachers[m]);
    maps.weight = weights[m];
    maps.student = us[m].const_data_ptr();
    maps.teacher = teachers[m].const_data_ptr();
    maps.bn = bns[m];
    stages.push_back(maps);
  }
  return stages;
}

int64_t cells_of(const Tensor& u) { return Pyramid(u.size(2), u.size(3)).cells(); }

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
const double* const_doubles(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }

template <class T>
void launch_reduce(const std::vector<ReduceMap>& maps, cudaStream_t stream) {
  for (const ReduceStep& step : plan_reduce(maps)) {
    visit_reduce_instance<T>(step.variant, [&](auto type, auto vector, auto channels_last) {
      using S = typename decltype(type)::type;
      hcl_bn_reduce_kernel<S, decltype(vector)::value, decltype(channels_last)::value>
          <<<step.blocks, kThreads, 0, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class T>
void launch_forward(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tensor& loss,
                    cudaStream_t stream) {
  ForwardPlan<T> plan(maps, level_weights);
  const Tensor workspace = empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte, loss);
  plan.bind(workspace.mutable_data_ptr(), loss.mutable_data_ptr());
  for (const Statistics<T>& launch : plan.statistics()) {
    hcl_bn_statistics_kernel<T><<<launch.blocks, kThreads, 0, stream>>>(launch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (const auto& step : plan.steps()) {
    visit_maps_instance<T>(step.variant, [&](auto u, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(u)::type;
      using B = typename decltype(teacher)::type;
      hcl_bn_forward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>
          <<<step.blocks, kThreads, step.shared_bytes, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class T>
void launch_backward(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tensor& grad,
                     cudaStream_t stream) {
  BackwardPlan<T> plan(maps, level_weights);
  const Tensor workspace = empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte, grad);
  plan.bind(workspace.mutable_data_ptr(), grad.const_data_ptr());
  for (const CoefficientLaunch<T>& launch : plan.coefficients()) {
    hcl_bn_coefficients_kernel<T><<<launch.blocks, kThreads, 0, stream>>>(launch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (const auto& step : plan.steps()) {
    visit_maps_instance<T>(step.variant, [&](auto u, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(u)::type;
      using B = typename decltype(teacher)::type;
      hcl_bn_backward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>
          <<<step.blocks, kThreads, 0, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::vector<Tensor> hcl_bn_reduce(std::vector<Tensor> us, std::vector<int64_t> parts) {
  check_reduce(us, parts);
  STD_TORCH_CHECK(us[0].is_cuda(), "hcl_bn: expected maps on a CUDA device");
  const DeviceGuard guard(us[0].get_device_index());
  std::vector<Tensor> moments;
  std::vector<ReduceMap> maps;
  for (size_t m = 0; m < us.size(); ++m) {
    const Tensor& u = us[m];
    moments.push_back(empty({parts[m], 3, u.size(1)}, ScalarType::Double, u));
    maps.push_back({u.size(0), u.size(1), u.size(2) * u.size(3), layout_of(u) == Layout::kChannelsLast,
                    storage_type_of("hcl_bn", u), u.const_data_ptr(), parts[m], doubles(moments[m])});
  }
  const cudaStream_t stream = current_stream(us[0]);
  is_double(us[0]) ? launch_reduce<double>(maps, stream) : launch_reduce<float>(maps, stream);
  return moments;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hcl_bn_fwd(std::vector<Tensor> us, std::vector<Tensor> teachers,
                                                      std::vector<Tensor> moments, Affine affine,
                                                      std::vector<Tensor> running, std::vector<Tensor> batches,
                                                      std::vector<int64_t> norms, std::vector<double> momenta,
                                                      std::vector<double> eps, std::vector<double> weights,
                                                      std::vector<double> level_weights) {
  check_maps(us, teachers, weights, level_weights);
  STD_TORCH_CHECK(us[0].is_cuda(), "hcl_bn: expected maps on a CUDA device");
  std::vector<BatchNorm> bns = batch_norms_of(us, affine, norms);
  add_statistics(bns, us, running, batches, momenta, eps);
  check_moments(moments, us, bns);
  const DeviceGuard guard(us[0].get_device_index());
  const ScalarType type = hcl_compute_type(us);
  const Tensor loss = empty({}, type, us[0]);
  std::vector<Maps> maps = describe(us, teachers, bns, weights);
  Kept kept;
  for (size_t m = 0; m < us.size(); ++m) kept.add(maps[m].batch, maps[m].channels, cells_of(us[m]));
  const Tensor tables = empty({kept.tables.back()}, type, loss);
  const Tensor states = empty({kept.states.back()}, ScalarType::Double, loss);
  const Tensor sums = empty({kept.sums.back()}, ScalarType::Double, loss);
  const int64_t entry = type == ScalarType::Double ? sizeof(double) : sizeof(float);
  for (size_t m = 0; m < us.size(); ++m) {
    maps[m].table = static_cast<char*>(tables.mutable_data_ptr()) + kept.tables[m] * entry;
    maps[m].state = doubles(states) + kept.states[m];
    maps[m].sums = doubles(sums) + kept.sums[m];
    maps[m].moments = const_doubles(moments[m]);
    maps[m].rows = moments[m].size(0);
  }
  const cudaStream_t stream = current_stream(loss);
  if (type == ScalarType::Double) {
    launch_forward<double>(maps, level_weights, loss, stream);
  } else {
    launch_forward<float>(maps, level_weights, loss, stream);
  }
  return {loss, tables, states, sums};
}

std::vector<Tensor> hcl_bn_bwd(Tensor grad, std::vector<Tensor> us, std::vector<Tensor> teachers,
                               std::vector<Tensor> tables, std::vector<Tensor> states, std::vector<Tensor> sums,
                               std::vector<Tensor> means, Affine affine, std::vector<int64_t> norms,
                               std::vector<double> weights, std::vector<double> level_weights,
                               std::vector<bool> wanted) {
  check_maps(us, teachers, weights, level_weights);
  STD_TORCH_CHECK(us[0].is_cuda(), "hcl_bn: expected maps on a CUDA device");
  const std::vector<BatchNorm> bns = batch_norms_of(us, affine, norms);
  check_backward(grad, us, tables, [&](size_t m) { return cells_of(us[m]); }, states, sums, means, affine, wanted);
  const DeviceGuard guard(us[0].get_device_index());
  std::vector<Maps> maps = describe(us, teachers, bns, weights);
  std::vector<Tensor> gradients;
  const auto gradient_of = [&](const Tensor& tensor) -> void* {
    gradients.push_back(torch::stable::empty_like(tensor));
    return gradients.back().mutable_data_ptr();
  };
  for (size_t m = 0; m < us.size(); ++m) {
    Maps& of = maps[m];
    // The backward only reads them.
    of.table = const_cast<void*>(tables[m].const_data_ptr());
    of.state = const_cast<double*>(const_doubles(states[m]));
    of.sums = const_cast<double*>(const_doubles(sums[m]));
    if (!means.empty()) of.means = const_doubles(means[m]);
    const size_t first = kGradients * m;
    if (wanted[first + kU]) of.gradient = gradient_of(us[m]);
    if (wanted[first + kWeight]) of.weight_gradient = {gradient_of(*affine[2 * m]), of.bn.weight.type};
    if (wanted[first + kBias]) of.bias_gradient = {gradient_of(*affine[2 * m + 1]), of.bn.bias.type};
  }
  const cudaStream_t stream = current_stream(grad);
  if (is_double(us[0])) {
    launch_backward<double>(maps, level_weights, grad, stream);
  } else {
    launch_backward<float>(maps, level_weights, grad, stream);
  }
  return gradients;
}

}  // namespace
}  // namespace hcl_bn
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("hcl_bn_reduce", TORCH_BOX(&transkd::hcl_bn::hcl_bn_reduce));
  m.impl("hcl_bn_fwd", TORCH_BOX(&transkd::hcl_bn::hcl_bn_fwd));
  m.impl("hcl_bn_bwd", TORCH_BOX(&transkd::hcl_bn::hcl_bn_bwd));
}
