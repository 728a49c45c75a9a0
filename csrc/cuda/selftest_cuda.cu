#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/common/stream.h"
#include "cuda/selftest_kernel.cuh"

namespace transkd {
namespace {

using torch::stable::Tensor;

Tensor cuda_selftest(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(),
                  "cuda_selftest: expected a contiguous float32 tensor");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return y;
  constexpr int kThreads = 256;
  const unsigned blocks = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  selftest_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
                                                              n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace
}  // namespace transkd

STABLE_TORCH_LIBRARY_IMPL(transkd_fast, CUDA, m) { m.impl("cuda_selftest", TORCH_BOX(&transkd::cuda_selftest)); }
