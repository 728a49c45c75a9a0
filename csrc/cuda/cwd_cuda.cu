// The launcher of cwd on CUDA: repeats the contract, allocates, launches what cwd_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/cwd_contract.h"
#include "cuda/common/stream.h"
#include "cuda/cwd_kernel.cuh"

namespace transkd {
namespace cwd {
namespace {

std::vector<View> views_of(const std::vector<Stage>& stages) {
  std::vector<View> views;
  for (const Stage& stage : stages) {
    STD_TORCH_CHECK(stage.student->is_cuda(), "cwd: expected views on a CUDA device");
    View view{};
    view.batch = stage.batch;
    view.rows = stage.rows;
    view.columns = stage.columns;
    view.strided = stage.strided;
    view.student_type = storage_type_of("cwd", *stage.student);
    view.teacher_type = storage_type_of("cwd", *stage.teacher);
    view.weight = stage.weight;
    view.student = stage.student->const_data_ptr();
    view.teacher = stage.teacher->const_data_ptr();
    views.push_back(view);
  }
  return views;
}

template <class T>
void launch_forward(const std::vector<View>& views, double temperature, const Tensor& loss, cudaStream_t stream) {
  Plan<T> plan(views, temperature);
  const Tensor workspace = torch::stable::empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte,
                                                std::nullopt, loss.device());
  plan.bind_forward(workspace.mutable_data_ptr(), loss.mutable_data_ptr());
  for (const auto& step : plan.steps()) {
    visit_instance<T>(step.variant, [&](auto student, auto teacher, auto width, auto strided) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cwd_forward_kernel<A, B, decltype(width)::value, decltype(strided)::value>
          <<<step.blocks, kThreads, 0, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (const auto& step : plan.merges()) {
    cwd_merge_kernel<T><<<step.blocks, kMergeThreads, 0, stream>>>(step.merge);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class T>
void launch_backward(const std::vector<View>& views, double temperature, const Tensor& grad, cudaStream_t stream) {
  Plan<T> plan(views, temperature);
  plan.bind_backward(grad.const_data_ptr());
  for (const auto& step : plan.steps()) {
    visit_instance<T>(step.variant, [&](auto student, auto teacher, auto width, auto strided) {
      using A = typename decltype(student)::type;
      using B = typename decltype(teacher)::type;
      cwd_backward_kernel<A, B, decltype(width)::value, decltype(strided)::value>
          <<<step.blocks, kThreads, 0, stream>>>(step.launch);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, std::vector<Tensor>> cwd_fwd(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                std::vector<int64_t> dims, std::vector<double> weights,
                                                double temperature) {
  const std::vector<Stage> stages = stages_of(students, teachers, dims, weights, temperature);
  std::vector<View> views = views_of(stages);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  const ScalarType type = compute_type(students[0]);
  Tensor loss = torch::stable::empty({}, type, std::nullopt, students[0].device());
  std::vector<Tensor> statistics;
  for (size_t m = 0; m < stages.size(); ++m) {
    statistics.push_back(empty_statistics(stages[m]));
    views[m].statistics = statistics.back().mutable_data_ptr();
  }
  const cudaStream_t stream = current_stream(loss);
  if (type == ScalarType::Double) {
    launch_forward<double>(views, temperature, loss, stream);
  } else {
    launch_forward<float>(views, temperature, loss, stream);
  }
  return {loss, statistics};
}

std::vector<Tensor> cwd_bwd(Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                            std::vector<Tensor> statistics, std::vector<int64_t> dims, std::vector<double> weights,
                            double temperature) {
  const std::vector<Stage> stages = stages_of(students, teachers, dims, weights, temperature);
  check_backward(grad, stages, statistics);
  std::vector<View> views = views_of(stages);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  std::vector<Tensor> gradients;
  for (size_t m = 0; m < views.size(); ++m) {
    gradients.push_back(torch::stable::empty_like(students[m]));
    // The backward only reads them.
    views[m].statistics = const_cast<void*>(statistics[m].const_data_ptr());
    views[m].gradient = gradients.back().mutable_data_ptr();
  }
  const cudaStream_t stream = current_stream(grad);
  if (is_double(students[0])) {
    launch_backward<double>(views, temperature, grad, stream);
  } else {
    launch_backward<float>(views, temperature, grad, stream);
  }
  return gradients;
}

}  // namespace
}  // namespace cwd
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("cwd_fwd", TORCH_BOX(&transkd::cwd::cwd_fwd));
  m.impl("cwd_bwd", TORCH_BOX(&transkd::cwd::cwd_bwd));
}
