// The launcher of hcl on CUDA: repeats the contract, allocates, launches what hcl_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/common/stream.h"
#include "cuda/common/tensor.h"
#include "cuda/hcl_kernel.cuh"

namespace transkd {
namespace hcl {
namespace {

bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

Maps describe(const Tensor& student, const Tensor& teacher, double weight) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, "hcl: expected maps [B, C, H, W]");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim) && student.size(dim) > 0,
                    "hcl: expected non-empty maps of one shape; they differ in dimension ", dim);
  }
  const Layout layout = layout_of(student);
  STD_TORCH_CHECK(layout != Layout::kOther && layout == layout_of(teacher),
                  "hcl: expected both maps contiguous or both channels-last");
  Maps maps{};
  maps.batch = student.size(0);
  maps.channels = student.size(1);
  maps.height = student.size(2);
  maps.width = student.size(3);
  maps.channels_last = layout == Layout::kChannelsLast;
  maps.student_type = storage_type_of("hcl", student);
  maps.teacher_type = storage_type_of("hcl", teacher);
  maps.weight = weight;
  maps.student = student.const_data_ptr();
  maps.teacher = teacher.const_data_ptr();
  return maps;
}

std::vector<Maps> describe(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                           const std::vector<double>& weights) {
  STD_TORCH_CHECK(!students.empty() && students.size() == teachers.size() && students.size() == weights.size(),
                  "hcl: expected as many teachers and weights as students, and at least one");
  std::vector<Maps> maps;
  for (size_t m = 0; m < students.size(); ++m) {
    for (const Tensor* map : {&students[m], &teachers[m]}) {
      STD_TORCH_CHECK(map->is_cuda() && map->get_device_index() == students[0].get_device_index(),
                      "hcl: expected all maps on one CUDA device");
      STD_TORCH_CHECK(is_double(*map) == is_double(students[0]), "hcl: float64 does not mix with other dtypes");
    }
    maps.push_back(describe(students[m], teachers[m], weights[m]));
  }
  return maps;
}

template <class T>
void launch_forward(std::vector<Maps>& maps, const Tensor& loss, cudaStream_t stream) {
  Plan<T> plan(maps);
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
void launch_backward(const std::vector<Maps>& maps, const Tensor& grad, cudaStream_t stream) {
  Plan<T> plan(maps);
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
                                                std::vector<double> weights) {
  std::vector<Maps> maps = describe(students, teachers, weights);
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  const ScalarType type = is_double(students[0]) ? ScalarType::Double : ScalarType::Float;
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
    launch_forward<double>(maps, loss, stream);
  } else {
    launch_forward<float>(maps, loss, stream);
  }
  return {loss, tables};
}

std::vector<Tensor> hcl_bwd(Tensor grad, std::vector<Tensor> students, std::vector<Tensor> teachers,
                            std::vector<Tensor> tables, std::vector<double> weights) {
  std::vector<Maps> maps = describe(students, teachers, weights);
  const ScalarType type = is_double(students[0]) ? ScalarType::Double : ScalarType::Float;
  const auto on_device = [&](const Tensor& tensor) {
    return tensor.is_cuda() && tensor.get_device_index() == students[0].get_device_index();
  };
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == type && on_device(grad),
                  "hcl_bwd: expected a scalar grad of the loss's dtype on the maps' device");
  STD_TORCH_CHECK(tables.size() == maps.size(), "hcl_bwd: expected one table per stage");
  const torch::stable::accelerator::DeviceGuard guard(students[0].get_device_index());
  std::vector<Tensor> gradients;
  for (size_t m = 0; m < maps.size(); ++m) {
    const Tensor& table = tables[m];
    STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == maps[m].batch &&
                        table.size(1) == Pyramid(maps[m].height, maps[m].width).cells() &&
                        table.size(2) == maps[m].channels && table.scalar_type() == type && table.is_contiguous() &&
                        on_device(table),
                    "hcl_bwd: expected the tables that hcl_fwd made");
    gradients.push_back(torch::stable::empty_like(students[m]));
    // The backward only reads it.
    maps[m].table = const_cast<void*>(table.const_data_ptr());
    maps[m].gradient = gradients.back().mutable_data_ptr();
  }
  const cudaStream_t stream = current_stream(grad);
  if (type == ScalarType::Double) {
    launch_backward<double>(maps, grad, stream);
  } else {
    launch_backward<float>(maps, grad, stream);
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
