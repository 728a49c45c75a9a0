// The launchers of pea on CUDA: repeat the contract, allocate, launch what pea_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/pea_contract.h"
#include "cuda/common/stream.h"
#include "cuda/pea_kernel.cuh"

namespace transkd {
namespace pea {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr size_t kUsualSharedBytes = 48 << 10;  // what a block may ask for without saying so before

// A map or a parameter; absent without a tensor. Which of them are written is the plan's affair.
Map map_of(const Tensor* tensor) {
  if (tensor == nullptr) return {};
  const bool channel_major = tensor->dim() == 3 && token_layout_of(*tensor) == TokenLayout::kChannelMajor;
  return {const_cast<void*>(tensor->const_data_ptr()), storage_type_of("pea", *tensor), channel_major, false};
}

Map map_of(const std::optional<Tensor>& tensor) { return map_of(tensor ? &*tensor : nullptr); }

void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

Problem problem_of(const Stage& stage, const Kept& kept) {
  Problem p{};
  p.batch = stage.batch;
  p.tokens = stage.tokens;
  p.in = stage.in;
  p.out = stage.out;
  p.loss_weight = stage.loss_weight;
  p.x = map_of(stage.x);
  p.target = map_of(stage.target);
  p.assistant = map_of(stage.assistant);
  p.weight = map_of(stage.weight);
  p.bias = map_of(stage.bias);
  p.projection_scale = map_of(stage.projection_scale);
  p.assistant_scale = map_of(stage.assistant_scale);
  p.dx = map_of(kept.x);
  p.residual = map_of(kept.residual);
  p.dweight = data_of(kept.weight);
  p.dbias = data_of(kept.bias);
  p.scales = data_of(kept.scales);
  return p;
}

template <class Kernel, class Parameter>
void launch(Kernel kernel, uint32_t blocks, size_t shared_bytes, cudaStream_t stream, const Parameter& parameter) {
  if (shared_bytes > kUsualSharedBytes) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<blocks, kThreads, shared_bytes, stream>>>(parameter);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_forward(const std::vector<Problem>& problems, bool tf32, const Tensor& loss, const Tensor& factors) {
  Plan<T> plan(problems, tf32);
  const Tensor workspace = torch::stable::empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte,
                                                std::nullopt, loss.device());
  plan.bind(workspace.mutable_data_ptr(), loss.mutable_data_ptr(), factors.mutable_data_ptr());
  const cudaStream_t stream = current_stream(loss);
  for (const auto& step : plan.steps()) {
    visit_instance<T>(step.variant, [&](auto x, auto tf32) {
      using X = typename decltype(x)::type;
      constexpr bool kTf32 = decltype(tf32)::value;
      launch(pea_project_kernel<X, kTf32>, step.blocks, step.shared_bytes, stream, step.launch);
      if (step.gradient_blocks == 0) return;
      launch(pea_gradient_kernel<X, kTf32>, step.gradient_blocks, step.gradient_shared_bytes, stream, step.launch);
    });
  }
  for (const auto& last : plan.lasts()) launch(pea_finish_kernel<T>, last.blocks, 0, stream, last.finish);
}

template <class T>
void launch_backward(const std::vector<ScaleJob>& jobs, const Tensor& grad, const Tensor& factors) {
  const cudaStream_t stream = current_stream(grad);
  for (const auto& step : plan_backward<T>(jobs, grad.const_data_ptr(), factors.const_data_ptr())) {
    launch(pea_scale_kernel<T>, step.blocks, 0, stream, step);
  }
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> pea_fwd(
    std::vector<Tensor> xs, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> targets,
    std::vector<Tensor> assistants, std::vector<Tensor> projection_scales, std::vector<Tensor> assistant_scales,
    std::vector<double> stage_weights, std::vector<bool> wanted, bool tf32) {
  const std::vector<Stage> stages =
      stages_of(xs, weights, biases, targets, assistants, projection_scales, assistant_scales, stage_weights, wanted);
  STD_TORCH_CHECK(xs[0].is_cuda(), "pea: expected embeddings on a CUDA device");
  const DeviceGuard guard(xs[0].get_device_index());
  const ScalarType type = compute_type(xs[0]);
  const auto device = xs[0].device();
  Tensor loss = torch::stable::empty({}, type, std::nullopt, device);
  Tensor factors = torch::stable::empty({static_cast<int64_t>(stages.size()), kFactors}, type, std::nullopt, device);
  std::vector<Tensor> list;
  std::vector<Problem> problems;
  for (const Stage& stage : stages) {
    const Kept kept(stage);
    kept.append_to(list);
    problems.push_back(problem_of(stage, kept));
  }
  type == ScalarType::Double ? launch_forward<double>(problems, tf32, loss, factors)
                             : launch_forward<float>(problems, tf32, loss, factors);
  return {loss, factors, list};
}

std::vector<Tensor> pea_bwd(Tensor grad, Tensor factors, std::vector<Tensor> kept, std::vector<int64_t> dtypes) {
  STD_TORCH_CHECK(factors.is_cuda(), "pea_bwd: expected tensors on a CUDA device");
  const DeviceGuard guard(factors.get_device_index());
  const std::vector<Scaling> scalings = scalings_of(grad, factors, kept, dtypes);
  std::vector<Tensor> gradients;
  std::vector<ScaleJob> jobs;
  for (const Scaling& s : scalings) {
    gradients.push_back(s.gradient);
    ScaleJob job{};
    job.from = s.kept->const_data_ptr();
    job.to = s.gradient.mutable_data_ptr();
    job.count = s.kept->numel();
    job.from_type = storage_type_of("pea_bwd", *s.kept);
    job.to_type = storage_type_of("pea_bwd", s.gradient);
    job.place = static_cast<uint32_t>(s.place());
    jobs.push_back(job);
  }
  is_double(factors) ? launch_backward<double>(jobs, grad, factors) : launch_backward<float>(jobs, grad, factors);
  return gradients;
}

}  // namespace
}  // namespace pea
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("pea_fwd", TORCH_BOX(&transkd::pea::pea_fwd));
  m.impl("pea_bwd", TORCH_BOX(&transkd::pea::pea_bwd));
}
