// The launcher of hcl on CUDA: repeats the contract, allocates, launches what hcl_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/hcl_contract.h"
#include "cuda/common/stream.h"
#include "cuda/hcl_kernel.cuh"

namespace transkd {
namespace hcl {
namespace {

std::vector<Maps> describe(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                           const std::vector<double>& weights, const std::vector<double>& level_weights) {
  check_hcl(students, teachers, weights, level_weights);
  STD_TORCH_CHECK(students[0].is_cuda(), "hcl: expected maps on a CUDA device");
  std::vector<Maps> stages;
  for (size_t m = 0; m < students.size(); ++m) {
    Maps maps{};
    maps.batch = students[m].size(0);
    maps.channels = students[m].size(1);
    maps.height = students[m].size(2);
    maps.width = students[m].size(3);
    maps.channels_last = layout_of(students[m]) == Layout::kChannelsLast;
    maps.student_type = storage_type_of("hcl", students[m]);
    maps.teacher_type = storage_type_of("hcl", teachers[m]);
    maps.weight = weights[m];
    maps.student = students[m].const_data_ptr();
    maps.teacher = teachers[m].const_data_ptr();
    stages.push_back(maps);
  }
  return stages;
}

template <class T>
void launch_forward(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tensor& loss,
                    cudaStream_t stream) {
  Plan<T> plan(maps, level_weights);
  const Tensor workspace = torch::stable::empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte,
                                                std::nullopt, loss.device());
  plan.bind_forward(workspace.mutable_data_ptr(), loss.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, plan.counter_bytes(), stream));
  for (const auto& step : plan.steps()) {
    visit_instance<T>(step.variant, [&](auto student, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      hcl_forward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>
          <<<step.blocks, kThreads, step.shared_bytes, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class T>
void launch_backward(const std::vector<Maps>& maps, const std::vector<double>& level_weights, const Tensor& grad,
                     cudaStream_t stream) {
  Plan<T> plan(maps, level_weights);
  plan.bind_backward(grad.const_data_ptr());
  for (const auto& step : plan.steps()) {
    visit_instance<T>(step.variant, [&](auto student, auto teacher, auto width, auto channels_last) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      hcl_backward_kernel<A, B, decltype(width)::value, decltype(channels_last)::value>
          <<<step.blocks, kThreads, 0, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, std::vector<Tensor>> hcl_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                std::vector<double> weights, std::vector<double> level_weights) {
  std::vector<Maps> maps = describe(students, teachers, weights, level_weights);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  const ScalarType type = hcl_compute_type(students);
  const auto device = students[0].device();
  Tensor loss = torch::stable::empty({}, type, std::nullopt, device);
  std::vector<Tensor> tables;
  for (Maps& m : maps) {
    tables.push_back(
        torch::stable::empty({m.batch, Pyramid(m.height, m.width).cells(), m.channels}, type, std::nullopt, device));
    m.table = tables.back().mutable_data_ptr();
  }
  const cudaStream_t stream = current_stream(loss);
  if (type == ScalarType::Double) {
    launch_forward<double>(maps, level_weights, loss, stream);
  } else {
    launch_forward<float>(maps, level_weights, loss, stream);
  }
  return {loss, tables};
}

std::vector<Tensor> hcl_bwd(Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                            std::vector<Tensor> tables, std::vector<double> weights,
                            std::vector<double> level_weights) {
  std::vector<Maps> maps = describe(students, teachers, weights, level_weights);
  check_hcl_backward(grad, students, tables, [&](size_t m) { return Pyramid(maps[m].height, maps[m].width).cells(); });
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  std::vector<Tensor> gradients;
  for (size_t m = 0; m < maps.size(); ++m) {
    gradients.push_back(torch::stable::empty_like(students[m]));
    // The backward only reads it.
    maps[m].table = const_cast<void*>(tables[m].const_data_ptr());
    maps[m].gradient = gradients.back().mutable_data_ptr();
  }
  const cudaStream_t stream = current_stream(grad);
  if (is_double(students[0])) {
    launch_backward<double>(maps, level_weights, grad, stream);
  } else {
    launch_backward<float>(maps, level_weights, grad, stream);
  }
  return gradients;
}

}  // namespace
}  // namespace hcl
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("hcl_fwd", TORCH_BOX(&transkd::hcl::hcl_fwd));
  m.impl("hcl_bwd", TORCH_BOX(&transkd::hcl::hcl_bwd));
}
