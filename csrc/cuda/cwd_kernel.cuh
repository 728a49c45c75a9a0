// cwd on CUDA: KL divergences of softmaxes along one axis, in one pass over student and teacher, and their gradient.
// cwd_plan.h says how a call is cut into blocks, cwd_numbers.cuh what is kept of a softmax.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/cwd_numbers.cuh"
#include "cuda/cwd_plan.h"

namespace transkd {
namespace cwd {

// Softmaxes along the strided axis: a thread has V of them side by side, else entries of one.
template <int V, bool kStrided>
constexpr int kSums = kStrided ? V : 1;
template <int V>
constexpr int kAccesses = accesses_of(V > 1);
// Blocks on a multiprocessor: as many registers as its softmaxes need.
template <class T, bool kStrided>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 1
                              : kStrided     ? 3
                                             : 8;

template <class Kernel>
__device__ __forceinline__ const auto& stage_of(const Kernel& launch, uint32_t block) {
  uint32_t m = 0;
  while (m + 1 < launch.stages && block >= launch.stage[m + 1].first_block) ++m;
  return launch.stage[m];
}

// What a block works on, and which entries one of its threads takes: every stride-th of [first, end), counted in rows
// (strided) or in vectors of a row.
template <class T, int V, bool kStrided>
struct Place {
  const Softmaxes<T>& stage;
  uint32_t part, sample;     // sample: strided only
  uint32_t first_softmax;    // of the block; counted in the sample (strided) or in all samples
  uint32_t softmaxes;        // of the block, beyond the last one too
  uint32_t own_softmax;      // of the thread, from the block's first
  uint32_t member, members;  // threads that share a softmax
  uint32_t first, end;
  int64_t origin, step;  // of the thread's entries in the view

  __device__ Place(const Launch<T>& launch, uint32_t block) : stage(stage_of(launch, block)) {
    const Softmaxes<T>& s = stage;
    uint32_t rest = block - s.first_block;
    const uint32_t side = threadIdx.x % s.lanes, across = threadIdx.x / s.lanes;
    if constexpr (kStrided) {
      softmaxes = s.lanes * V;
      members = kThreads / s.lanes;
      first_softmax = rest % s.groups * softmaxes;
      rest /= s.groups;
      part = rest % s.parts;
      sample = rest / s.parts;
      own_softmax = side * V;
      member = across;
    } else {
      softmaxes = kThreads / s.lanes;
      members = s.lanes;
      part = rest % s.parts;
      first_softmax = rest / s.parts * softmaxes;
      sample = 0;
      own_softmax = across;
      member = side;
    }
    const uint32_t softmax = first_softmax + own_softmax, most = kStrided ? s.softmaxes : s.all_softmaxes;
    const uint32_t begin = part * s.part_length, length = min(s.part_length, s.length - begin);
    first = (kStrided ? begin : begin / V) + member;
    end = softmax < most ? (kStrided ? begin + length : (begin + length) / V) : 0;
    if constexpr (kStrided) {
      step = s.softmaxes;
      origin = static_cast<int64_t>(sample) * s.length * s.softmaxes + softmax;
    } else {
      step = V;
      origin = static_cast<int64_t>(softmax) * s.length;
    }
  }

  // Where the statistics [B, 4, softmaxes] of one of the block's softmaxes begin.
  __device__ int64_t place_in(uint32_t softmax, int64_t rows_of_sample) const {
    const uint32_t of_all = first_softmax + softmax;
    const int64_t its_sample = kStrided ? sample : of_all / stage.softmaxes;
    const uint32_t in_sample = kStrided ? of_all : of_all % stage.softmaxes;
    return its_sample * rows_of_sample * stage.softmaxes + in_sample;
  }
};

// Adds a thread's tile, in which what is beyond the part is -inf: its own maximum first, so that the numbers are
// rescaled once.
template <class A, class B, int V, bool kStrided, class T>
__device__ __forceinline__ void add_tile(const Packed<A, V>* s, const Packed<B, V>* t, T rate, Numbers<T>* numbers) {
  constexpr int kEntries = kStrided ? 1 : V;  // of an access that belong to one softmax
#pragma unroll
  for (int x = 0; x < kSums<V, kStrided>; ++x) {
    Numbers<T>& own = numbers[x];
    T to_s = own.max_s, to_t = own.max_t;
#pragma unroll
    for (int u = 0; u < kAccesses<V>; ++u) {
#pragma unroll
      for (int v = 0; v < kEntries; ++v) {
        to_s = max(to_s, s[u].get(x + v));
        to_t = max(to_t, t[u].get(x + v));
      }
    }
    own.raise(to_s, to_t, rate);
    const T base_s = base_of(to_s), base_t = base_of(to_t);
#pragma unroll
    for (int u = 0; u < kAccesses<V>; ++u) {
#pragma unroll
      for (int v = 0; v < kEntries; ++v) own.add(s[u].get(x + v), t[u].get(x + v), base_s, base_t, rate);
    }
  }
}

template <class S, int V>
__device__ __forceinline__ void fill_with_minus_infinity(Packed<S, V>& pack) {
#pragma unroll
  for (int v = 0; v < V; ++v) pack.set(v, kMinusInfinity<ComputeType<S>>);
}

// Merges the threads of each softmax, pair by pair, in shared memory: numbers [5, members, softmaxes]; those of the
// first member become all members'.
template <int kStride, class T>
__device__ __forceinline__ void merge_members(T* shared, uint32_t members, uint32_t softmaxes, T rate) {
  for (uint32_t half = members / 2; half > 0; half /= 2) {
    for (uint32_t i = threadIdx.x; i < half * softmaxes; i += kThreads) {
      Numbers<T> own, other;
      own.load(shared + i, kStride);
      other.load(shared + i + half * softmaxes, kStride);
      own.merge(other, rate);
      own.store(shared + i, kStride);
    }
    __syncthreads();
  }
}

template <class A, class B, int V, bool kStrided>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<ComputeType<A, B>, kStrided>)
    cwd_forward_kernel(const __grid_constant__ Launch<ComputeType<A, B>> launch) {
  using T = ComputeType<A, B>;
  constexpr int kWays = kSums<V, kStrided>, kTile = kAccesses<V>, kStride = kThreads * kWays;
  __shared__ T shared[kNumbers * kStride];
  const Place<T, V, kStrided> place(launch, blockIdx.x);
  const Softmaxes<T>& stage = place.stage;
  const A* student = static_cast<const A*>(stage.student) + place.origin;
  const B* teacher = static_cast<const B*>(stage.teacher) + place.origin;
  if (launch.first_block + blockIdx.x == 0 && threadIdx.x == 0) *launch.counter = 0;

  Numbers<T> numbers[kWays];
  for (uint32_t i = place.first; i < place.end; i += kTile * place.members) {
    Packed<A, V> s[kTile];
    Packed<B, V> t[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const uint32_t entry = i + u * place.members;
      if (entry < place.end) {
        s[u].load(student + entry * place.step);
        t[u].load(teacher + entry * place.step);
      } else {
        fill_with_minus_infinity(s[u]);
        fill_with_minus_infinity(t[u]);
      }
    }
    add_tile<A, B, V, kStrided>(s, t, launch.rate, numbers);
  }
#pragma unroll
  for (int x = 0; x < kWays; ++x) {
    numbers[x].store(shared + place.member * place.softmaxes + place.own_softmax + x, kStride);
  }
  __syncthreads();
  merge_members<kStride>(shared, place.members, place.softmaxes, launch.rate);

  T divergence = 0;
  const uint32_t most = (kStrided ? stage.softmaxes : stage.all_softmaxes) - place.first_softmax;
  for (uint32_t x = threadIdx.x; x < min(place.softmaxes, most); x += kThreads) {
    Numbers<T> merged;
    merged.load(shared + x, kStride);
    if (stage.parts == 1) {
      divergence += keep(merged, stage.statistics + place.place_in(x, 4), stage.softmaxes, launch.inverse);
    } else {
      const int64_t record = place.place_in(x, static_cast<int64_t>(stage.parts) * kNumbers);
      merged.store(
          launch.records + stage.records + record + static_cast<int64_t>(place.part) * kNumbers * stage.softmaxes,
          stage.softmaxes);
    }
  }
  divergence = sum_block<kThreads>(divergence);
  if (threadIdx.x == 0) launch.shares[launch.first_block + blockIdx.x] = divergence * stage.weight;
}

// Merges the records [B, parts, 5, softmaxes] of the stages that have several parts, in the parts' order, and adds the
// loss up. Each warp takes every kMergeLanes-th part of 32 softmaxes.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) cwd_merge_kernel(const __grid_constant__ Merge<T> launch) {
  constexpr int kStride = kMergeLanes * kMergedSoftmaxes;
  __shared__ T shared[kNumbers * kStride];
  const uint32_t own = threadIdx.x % kMergedSoftmaxes, lane = threadIdx.x / kMergedSoftmaxes;
  T share = 0;
  if (launch.stages > 0) {
    const Softmaxes<T>& stage = stage_of(launch, blockIdx.x);
    const uint32_t softmax = (blockIdx.x - stage.first_block) * kMergedSoftmaxes + own;
    const bool inside = softmax < stage.all_softmaxes;
    const int64_t sample = softmax / stage.softmaxes, softmaxes = stage.softmaxes;
    const uint32_t in_sample = softmax % stage.softmaxes;
    const T* records = launch.records + stage.records + sample * stage.parts * kNumbers * softmaxes + in_sample;
    Numbers<T> merged;
    for (uint32_t part = inside ? lane : stage.parts; part < stage.parts; part += kMergeLanes) {
      Numbers<T> record;
      record.load(records + part * kNumbers * softmaxes, softmaxes);
      merged.merge(record, launch.rate);
    }
    merged.store(shared + threadIdx.x, kStride);
    __syncthreads();
    if (lane == 0) {
      for (uint32_t other = 1; other < kMergeLanes; ++other) {
        Numbers<T> more;
        more.load(shared + other * kMergedSoftmaxes + own, kStride);
        merged.merge(more, launch.rate);
      }
      T* statistics = stage.statistics + sample * 4 * softmaxes + in_sample;
      const T divergence = inside ? keep(merged, statistics, softmaxes, launch.inverse) : T(0);
      share = sum_lanes(divergence) * stage.weight;
    }
  }
  if (threadIdx.x == 0) launch.shares[launch.first_share + blockIdx.x] = share;

  if (comes_last(launch.counter, launch.blocks_of_call)) {
    double loss = 0;
    for (uint32_t k = threadIdx.x; k < launch.shares_of_call; k += kMergeThreads) loss += __ldcg(launch.shares + k);
    loss = sum_block<kMergeThreads>(loss);
    if (threadIdx.x == 0) *launch.loss = static_cast<T>(loss);
  }
}

template <class A, class B, int V, bool kStrided>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<ComputeType<A, B>, kStrided>)
    cwd_backward_kernel(const __grid_constant__ Launch<ComputeType<A, B>> launch) {
  using T = ComputeType<A, B>;
  constexpr int kWays = kSums<V, kStrided>, kTile = kAccesses<V>;
  // The last views that the forward read are the likeliest to be in the cache still.
  const Place<T, V, kStrided> place(launch, gridDim.x - 1 - blockIdx.x);
  const Softmaxes<T>& stage = place.stage;
  if (place.first >= place.end) return;
  const A* student = static_cast<const A*>(stage.student) + place.origin;
  const B* teacher = static_cast<const B*>(stage.teacher) + place.origin;
  A* gradient = static_cast<A*>(stage.gradient) + place.origin;
  const T scale = *launch.upstream * stage.gradient_scale;
  Pack<T, kWays> max_s, log_s, max_t, log_t;
  const T* statistics = stage.statistics + place.place_in(place.own_softmax, 4);
  max_s.load(statistics);
  log_s.load(statistics + stage.softmaxes);
  max_t.load(statistics + 2 * static_cast<int64_t>(stage.softmaxes));
  log_t.load(statistics + 3 * static_cast<int64_t>(stage.softmaxes));
#pragma unroll
  for (int x = 0; x < kWays; ++x) {
    log_s.element[x] *= static_cast<T>(kLog2E);
    log_t.element[x] *= static_cast<T>(kLog2E);
  }
  for (uint32_t i = place.first; i < place.end; i += kTile * place.members) {
    Packed<A, V> s[kTile];
    Packed<B, V> t[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const uint32_t entry = i + u * place.members;
      if (entry >= place.end) continue;
      s[u].load(student + entry * place.step);
      t[u].load(teacher + entry * place.step);
    }
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const uint32_t entry = i + u * place.members;
      if (entry >= place.end) continue;
      Packed<A, V> out;
      out.clear();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int x = kStrided ? v : 0;
        const T p_s = exp2_of((s[u].get(v) - max_s.element[x]) * launch.rate - log_s.element[x]);
        const T p_t = exp2_of((t[u].get(v) - max_t.element[x]) * launch.rate - log_t.element[x]);
        out.set(v, scale * (p_s - p_t));
      }
      out.store(gradient + entry * place.step);
    }
  }
}

// Calls visit(integral_constant<V>, bool_constant<strided>) with what a launch on views stored as A and B needs.
template <class A, class B, class Visit>
void visit_variant(const Variant& variant, Visit visit) {
  const auto choose = [&](auto strided) {
    if constexpr (!std::is_same_v<A, double>) {
      if (variant.vector) return visit(std::integral_constant<int, kVectorWidth<A, B>>(), strided);
    }
    visit(std::integral_constant<int, 1>(), strided);
  };
  variant.strided ? choose(std::true_type()) : choose(std::false_type());
}

// Calls visit(TypeTag<A>, TypeTag<B>, integral_constant<V>, bool_constant<strided>).
template <class T, class Visit>
void visit_instance(const Variant& variant, Visit visit) {
  visit_storage<T>(variant.student, [&](auto student) {
    visit_storage<T>(variant.teacher, [&](auto teacher) {
      visit_variant<typename decltype(student)::type, typename decltype(teacher)::type>(
          variant, [&](auto width, auto strided) { visit(student, teacher, width, strided); });
    });
  });
}

}  // namespace cwd
}  // namespace transkd
