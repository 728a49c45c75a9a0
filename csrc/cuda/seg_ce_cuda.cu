// The launchers of seg_ce on CUDA: repeat the contract, allocate, launch what seg_ce_plan.h laid out.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/seg_ce_contract.h"
#include "cuda/common/stream.h"
#include "cuda/seg_ce_kernel.cuh"

namespace transkd {
namespace seg_ce {
namespace {

using torch::stable::accelerator::DeviceGuard;

Maps maps_of(const Tensor& logits, const Sizes& sizes) {
  STD_TORCH_CHECK(logits.is_cuda(), "seg_ce: expected logits on a CUDA device");
  Maps maps{};
  maps.batch = sizes.batch;
  maps.classes = sizes.classes;
  maps.height = sizes.height;
  maps.width = sizes.width;
  maps.label_height = sizes.label_height;
  maps.label_width = sizes.label_width;
  maps.channels_last = sizes.channels_last;
  maps.type = storage_type_of("seg_ce", logits);
  maps.logits = logits.const_data_ptr();
  return maps;
}

template <class T>
void launch_forward(const Maps& maps, const Tensor& loss, const Tensor& total, const Tensor& counts) {
  Plan<T> plan(maps);
  const Tensor workspace = torch::stable::empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte,
                                                std::nullopt, loss.device());
  plan.bind(workspace.mutable_data_ptr(), loss.mutable_data_ptr(), total.mutable_data_ptr(), counts.mutable_data_ptr());
  const cudaStream_t stream = current_stream(loss);
  if (plan.weight_blocks > 0) {
    seg_ce_weights_kernel<T><<<plan.weight_blocks, kFinishThreads, 0, stream>>>(plan.weights);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  visit_side<T>(plan.side, [&](auto side) {
    seg_ce_forward_kernel<decltype(side)::value, T><<<plan.blocks, kThreads, 0, stream>>>(plan.launch);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  seg_ce_finish_kernel<T><<<1, kFinishThreads, 0, stream>>>(plan.finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_predict(const Maps& maps, const Tensor& logits) {
  const Plan<T> plan(maps);
  visit_side<T>(plan.side, [&](auto side) {
    seg_ce_predict_kernel<decltype(side)::value, T><<<plan.blocks, kThreads, 0, current_stream(logits)>>>(plan.launch);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_scale(const Tensor& grad, const Tensor& total, const Tensor& kept, const Tensor& gradient) {
  const StorageType type = storage_type_of("seg_ce_bwd", gradient);
  const Scale<T> scale = plan_scale<T>(grad.const_data_ptr(), total.const_data_ptr(), kept.const_data_ptr(),
                                       gradient.mutable_data_ptr(), kept.numel());
  const uint32_t blocks = scale_blocks(scale.count, type);
  visit_storage<T>(type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    seg_ce_scale_kernel<T, S><<<blocks, kScaleThreads, 0, current_stream(kept)>>>(scale);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> seg_ce_fwd(Tensor logits, Tensor labels, std::optional<Tensor> weight,
                                                      int64_t ignore_index, bool keep) {
  Maps maps = maps_of(logits, sizes_of(logits, labels, weight, ignore_index));
  const DeviceGuard guard(logits.get_device_index());
  maps.labels = labels.const_data_ptr();
  maps.label_type = label_type_of(labels);
  maps.ignore_index = ignore_index;
  if (weight) {
    maps.weight = weight->const_data_ptr();
    maps.weight_type = storage_type_of("seg_ce", *weight);
  }
  const ScalarType type = compute_type(logits);
  const auto device = logits.device();
  const Tensor loss = torch::stable::empty({}, type, std::nullopt, device);
  const Tensor total = torch::stable::empty({}, type, std::nullopt, device);
  const Tensor counts = torch::stable::empty({kCounts}, ScalarType::Long, std::nullopt, device);
  const Tensor kept = empty_kept(logits, keep);
  if (keep) maps.kept = kept.mutable_data_ptr();
  type == ScalarType::Double ? launch_forward<double>(maps, loss, total, counts)
                             : launch_forward<float>(maps, loss, total, counts);
  return {loss, counts, total, kept};
}

Tensor seg_ce_bwd(Tensor grad, Tensor total, Tensor kept, int64_t dtype) {
  STD_TORCH_CHECK(kept.is_cuda(), "seg_ce_bwd: expected tensors on a CUDA device");
  const DeviceGuard guard(kept.get_device_index());
  const Tensor gradient = empty_gradient(grad, total, kept, dtype);
  is_double(kept) ? launch_scale<double>(grad, total, kept, gradient)
                  : launch_scale<float>(grad, total, kept, gradient);
  return gradient;
}

Tensor seg_ce_predict(Tensor logits, int64_t height, int64_t width) {
  Maps maps = maps_of(logits, sizes_of(logits, height, width));
  const DeviceGuard guard(logits.get_device_index());
  const Tensor classes =
      torch::stable::empty({maps.batch, height, width}, ScalarType::Long, std::nullopt, logits.device());
  maps.predicted = classes.mutable_data_ptr();
  is_double(logits) ? launch_predict<double>(maps, logits) : launch_predict<float>(maps, logits);
  return classes;
}

}  // namespace
}  // namespace seg_ce
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) {
  m.impl("seg_ce_fwd", TORCH_BOX(&transkd::seg_ce::seg_ce_fwd));
  m.impl("seg_ce_bwd", TORCH_BOX(&transkd::seg_ce::seg_ce_bwd));
  m.impl("seg_ce_predict", TORCH_BOX(&transkd::seg_ce::seg_ce_predict));
}
