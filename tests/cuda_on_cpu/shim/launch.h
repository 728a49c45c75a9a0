// The launch of a grid, and what CUDA threads know of their place in it.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// A place in the source, for messages. As a default argument it is the place of the call.
struct Site {
  const char* file;
  int line;
  const char* function;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                             const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

void launch_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread, Site site);

// Runs a kernel to its end: launch(grid, block, bytes, [&] { kernel<float>(x, y); }).
// Blocks run one after the other in a shuffled order, threads of a block in an order shuffled anew in every round.
template <class Thread>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const Thread& thread, Site site = Site::here()) {
  launch_grid(grid, block, dynamic_shared_bytes, thread, site);
}

// Decides the orders of later launches. The runtime sets it from the driver's third argument.
void set_seed(uint64_t seed);

// The array that `extern __shared__ T name[]` means; a driver defines it with CUDA_ON_CPU_DYNAMIC_SHARED.
struct DynamicShared {
  DynamicShared(void* (*address)(), size_t capacity);
};
constexpr size_t kMaxDynamicSharedBytes = 227 << 10;  // of a block on sm_90

}  // namespace cuda_on_cpu

// Stands at the end of the namespace in which the kernels declare `extern __shared__ type name[]`, after their header.
#define CUDA_ON_CPU_DYNAMIC_SHARED(type, name)                                                \
  alignas(1024) thread_local type name[::cuda_on_cpu::kMaxDynamicSharedBytes / sizeof(type)]; \
  static const ::cuda_on_cpu::DynamicShared name##_is_dynamic_shared([]() -> void* { return name; }, sizeof name)
