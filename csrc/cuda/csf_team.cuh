// The block that works on [samples, channels]: the team of threads for csf_attention.h, and the merging of the parts
// that the reduce kernels left. It is all latency, so loads that do not depend on each other are under way together.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/csf_plan.h"

namespace transkd {
namespace csf {

struct Block {
  template <class Visit>
  __device__ __forceinline__ void each(int64_t count, Visit visit) const {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) visit(i);
    __syncthreads();
  }
};

// Several lanes share a sum.
template <class Term, class Then>
__device__ __forceinline__ void each_sum(const Block&, int64_t count, int64_t length, Term term, Then then) {
  uint32_t lanes = kWarp;
  while (lanes > 1 && lanes * count > blockDim.x) lanes /= 2;
  const uint32_t lane = threadIdx.x % lanes, teams = blockDim.x / lanes;
  for (int64_t base = 0; base < count; base += teams) {
    const int64_t i = base + threadIdx.x / lanes;
    double sum = 0;
    if (i < count) {
#pragma unroll 4
      for (int64_t k = lane; k < length; k += lanes) sum += term(i, k);
    }
    sum = sum_lanes(sum, 1, lanes);
    if (i < count && lane == 0) then(i, sum);
  }
  __syncthreads();
}

// Copies parameters to shared memory, while there is room: a thread reads one after the other, and would wait for
// global memory each time. A barrier must follow.
class Stage {
 public:
  __device__ void copy(Values& values, int64_t count) {
    if (values.type == StorageType::kDouble) {
      copy_as<unsigned long long>(values, count);
    } else if (values.type == StorageType::kFloat) {
      copy_as<unsigned>(values, count);
    } else {
      copy_as<unsigned short>(values, count);
    }
  }

 private:
  template <class Word>
  __device__ void copy_as(Values& values, int64_t count) {
    if (!values.given() || count > static_cast<int64_t>((kStageBytes - used_) / sizeof(Word))) return;
    extern __shared__ uint4 stage_memory[];
    Word* to = reinterpret_cast<Word*>(reinterpret_cast<char*>(stage_memory) + used_);
    const Word* from = static_cast<const Word*>(values.data);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = __ldg(from + i);
    values.data = to;
    used_ += (static_cast<uint32_t>(count * sizeof(Word)) + 15) / 16 * 16;
  }

  uint32_t used_ = 0;  // a multiple of 16
};

__device__ __forceinline__ void stage_parameters(const Sizes& sizes, BatchNorm& bn, BatchNorm& fc_bn, Layers& layers) {
  Stage stage;
  const int64_t weights = sizes.channels * sizes.squeezed;
  stage.copy(layers.fc, weights);
  stage.copy(layers.head_weight[0], weights);
  stage.copy(layers.head_weight[1], weights);
  stage.copy(layers.head_bias[0], sizes.channels);
  stage.copy(layers.head_bias[1], sizes.channels);
  stage.copy(bn.weight, sizes.channels);
  stage.copy(bn.bias, sizes.channels);
  stage.copy(fc_bn.weight, sizes.squeezed);
  stage.copy(fc_bn.bias, sizes.squeezed);
}

// Merges sums [samples, parts, 3, channels] over the parts: add(moments, entry, part, about) takes one part's entry in,
// done(plane, moments, about) gets what comes out. `about` is the first entry of the plane's first part.
template <class Add, class Done>
__device__ __forceinline__ void merge_parts(const double* sums, int64_t parts, const Sizes& sizes, Add add, Done done) {
  __shared__ double of_thread[3][kAttentionThreads];
  const int64_t planes = sizes.planes(), channels = sizes.channels;
  // Threads side by side take neighbouring planes, and groups of them parts in turn.
  const uint32_t width = static_cast<uint32_t>(min(planes, static_cast<int64_t>(blockDim.x)));
  const uint32_t group = threadIdx.x / width, groups = blockDim.x / width;
  for (int64_t base = 0; base < planes; base += width) {
    const int64_t plane = base + threadIdx.x % width;
    const bool active = group < groups && plane < planes;
    Moments moments;
    double about = 0;
    if (active) {
      const double* entry = Moments::entry(sums, plane / channels, 0, parts, plane % channels, channels);
      about = entry[0];
#pragma unroll 4
      for (int64_t part = group; part < parts; part += groups) add(moments, entry + part * 3 * channels, part, about);
    }
    of_thread[0][threadIdx.x] = moments.z;
    of_thread[1][threadIdx.x] = moments.squares;
    of_thread[2][threadIdx.x] = moments.y;
    __syncthreads();
    if (active && group == 0) {
      for (uint32_t other = threadIdx.x + width; other < groups * width; other += width) {
        moments.z += of_thread[0][other];
        moments.squares += of_thread[1][other];
        moments.y += of_thread[2][other];
      }
      done(plane, moments, about);
    }
    __syncthreads();
  }
}

}  // namespace csf
}  // namespace transkd
