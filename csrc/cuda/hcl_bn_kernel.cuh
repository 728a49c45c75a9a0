// hcl_bn on CUDA: hcl of the normalised map, which is made of u wherever it is needed, and the sums that the gradients
// of the batch norm come of. hcl_bn_plan.h says how a call is cut into blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/storage.cuh"
#include "cuda/hcl_bn_plan.h"
#include "cuda/hcl_bn_statistics.cuh"
#include "cuda/hcl_kernel.cuh"

namespace transkd {
namespace hcl_bn {

// Maps of two types that are read one by one share a kernel; their types are known at run time only.
struct AnyType {};

// V neighbours in a map.
template <class S, int V>
struct Elements {
  Packed<S, V> pack;

  __device__ __forceinline__ void load(const void* map, StorageType, int64_t at) {
    pack.load(static_cast<const S*>(map) + at);
  }
  __device__ __forceinline__ void store(void* map, StorageType, int64_t at) const {
    pack.store(static_cast<S*>(map) + at);
  }
  __device__ __forceinline__ auto get(int v) const { return pack.get(v); }
  template <class T>
  __device__ __forceinline__ void set(int v, T value) {
    pack.set(v, value);
  }
};

template <>
struct Elements<AnyType, 1> {
  float value;

  __device__ __forceinline__ void load(const void* map, StorageType type, int64_t at) {
    value = load_as<float>(map, type, at);
  }
  __device__ __forceinline__ void store(void* map, StorageType type, int64_t at) const {
    store_as(value, map, type, at);
  }
  __device__ __forceinline__ float get(int) const { return value; }
  __device__ __forceinline__ void set(int, float to) { value = to; }
};

// Blocks on a multiprocessor, so that there are registers for the coefficients and sums of several channels, for many
// single loads, and for doubles.
template <class T, int V, bool kChannelsLast>
constexpr int kBlocksTogether = kChannelsLast == (V > 1) || std::is_same_v<T, double> ? 2 : 3;

// A piece's loads, some of them under way at a time. Calls visit(u, teacher, at) for every V elements that a thread
// takes, `at` being their place in the maps.
template <class A, class B, int V, bool kChannelsLast, class T, class Visit>
__device__ __forceinline__ void for_each_access(const hcl::Stage<T>& stage, hcl::Piece& piece, StorageType u_type,
                                                StorageType teacher_type, Visit visit) {
  // A choice of types at run time takes registers of its own.
  constexpr int kUnroll = std::is_same_v<A, AnyType> ? 4 : hcl::kUnroll<V, T>;
  uint32_t last = piece.walk.pixel();
  while (piece.walk.valid()) {
    Elements<A, V> u[kUnroll];
    Elements<B, V> teacher[kUnroll];
    uint32_t pixel[kUnroll];
    bool valid[kUnroll];
    // Where pixels have run out, one that was there is loaded again: so all loads are under way together.
#pragma unroll
    for (int k = 0; k < kUnroll; ++k, piece.walk.next()) {
      valid[k] = piece.walk.valid();
      if (valid[k]) last = piece.walk.pixel();
      pixel[k] = last;
      const int64_t at = piece.origin + hcl::offset_of<kChannelsLast>(stage, last);
      u[k].load(stage.student, u_type, at);
      teacher[k].load(stage.teacher, teacher_type, at);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (valid[k]) visit(u[k], teacher[k], piece.origin + hcl::offset_of<kChannelsLast>(stage, pixel[k]));
    }
  }
}

// Neighbouring channels of one row of coefficients; nothing is read where the thread has no piece.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> coefficients_of(const T* table, uint32_t row, uint32_t channels,
                                                        uint32_t channel, bool valid) {
  Packed<T, N> packed;
  packed.clear();
  if (valid) packed.load(table + row * channels + channel);
  return packed;
}

// The group's sums of g and g xhat, with g = alpha d + entry the gradient of the normalised map. cell_sums
// [kSums, cells, group_planes] and entries [cells, group_planes] are in shared memory.
template <bool kChannelsLast, class T>
__device__ void sum_planes(const hcl::Part<T, kChannelsLast>& part, const NormStage<T>& norm, const T* cell_sums,
                           const T* entries) {
  const hcl::Stage<T>& stage = part.stage;
  const uint32_t row = stage.cells * stage.group_planes;
  for (uint32_t plane = threadIdx.x; plane < part.planes; plane += kThreads) {
    const uint32_t sample = (part.first_plane + plane) / stage.channels;
    const uint32_t channel = (part.first_plane + plane) % stage.channels;
    const double mean = norm.state[channel], invstd = norm.state[stage.channels + channel];
    const double off = mean - static_cast<T>(mean);
    double grad = 0, grad_u = 0, difference = 0, product = 0;
    for (uint32_t cell = 0; cell < stage.cells; ++cell) {
      const uint32_t i = cell / stage.column_segments, j = cell % stage.column_segments;
      const double pixels = static_cast<double>(stage.edge_row[i + 1] - stage.edge_row[i]) *
                            static_cast<double>(stage.edge_column[j + 1] - stage.edge_column[j]);
      const T* sums = cell_sums + cell * stage.group_planes + plane;
      const double entry = entries[cell * stage.group_planes + plane];
      grad += pixels * entry;
      grad_u += entry * (sums[row] - pixels * off);
      difference += sums[0];
      product += sums[2 * row];
    }
    const double alpha = stage.alpha;
    double* to = norm.sums + 2 * static_cast<int64_t>(sample) * stage.channels + channel;
    to[0] = grad + alpha * difference;
    to[stage.channels] = (grad_u + alpha * (product - off * difference)) * invstd;
  }
}

// Dynamic shared memory: Step::shared_bytes.
template <class A, class B, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<ComputeType<A, B>, V, kChannelsLast>)
    hcl_bn_forward_kernel(const __grid_constant__ Forward<ComputeType<A, B>> call) {
  using T = ComputeType<A, B>;
  extern __shared__ uint4 shared_memory[];
  const hcl::Part<T, kChannelsLast> part(call.maps, blockIdx.x);
  const hcl::Stage<T>& stage = part.stage;
  const NormStage<T>& norm = call.norm[part.index];
  // The statistics, which read it, are done.
  if (blockIdx.x == stage.first_block && threadIdx.x == 0 && norm.batches != nullptr) ++*norm.batches;

  T* cell_sums = reinterpret_cast<T*>(shared_memory);                    // [kSums, cells, group_planes]
  T* piece_sums = cell_sums + kSums * stage.cells * stage.group_planes;  // [kSums, slots, group_planes]
  const uint32_t slot_sums = part.cells * stage.cuts * stage.group_planes;

  constexpr int kChannels = kChannelsLast ? V : 1, kChains = V == 1 ? 1 : 2;
  T squares[kChains] = {};
  hcl::for_each_piece<V>(part, [&](hcl::Piece piece) {
    const uint32_t channel = (part.first_plane + piece.plane) % stage.channels;
    const auto row = [&](uint32_t which) {
      return coefficients_of<kChannels>(norm.coefficients, which, stage.channels, channel, piece.walk.valid());
    };
    const Packed<T, kChannels> scale = row(kScale), shift = row(kShift), offset = row(kOffset);
    T difference[kChannels] = {}, centred[kChannels] = {}, product[kChannels] = {};
    for_each_access<A, B, V, kChannelsLast>(
        stage, piece, call.u_type, call.teacher_type, [&](const auto& u, const auto& teacher, int64_t) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int c = kChannelsLast ? v : 0;
            const T e = u.get(v) - shift.get(c), d = scale.get(c) * e + offset.get(c) - teacher.get(v);
            difference[c] += d;
            centred[c] += e;
            product[c] += d * e;
            squares[v % kChains] += d * d;
          }
        });
    const auto collect = [&](uint32_t which, const T(&own)[kChannels]) {
      T* to = piece_sums + which * slot_sums + piece.slot * stage.group_planes + piece.plane;
      // The threads that share the piece: those of other pixels.
      const uint32_t first = kChannelsLast ? stage.lanes : 1, end = kChannelsLast ? kWarpSize : stage.lanes;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const T sum = sum_lanes(own[c], first, end);
        if (piece.collects) to[c] = sum;
      }
    };
    collect(0, difference);
    collect(1, centred);
    collect(2, product);
  });
#pragma unroll
  for (int v = 1; v < kChains; ++v) squares[0] += squares[v];
  const T block_squares = sum_block<kThreads>(squares[0]);
  const hcl::Launch<T>& launch = call.maps;
  if (threadIdx.x == 0) launch.shares[launch.first_block + blockIdx.x] = block_squares * (stage.alpha / 2);

  const bool finishes = hcl::sum_cells<kSums>(launch, part, piece_sums, cell_sums);
  __syncthreads();
  if (finishes) {
    T* const slopes = piece_sums;                                        // [windows, group_planes]
    T* const entries = piece_sums + hcl::kWindows * stage.group_planes;  // [cells, group_planes]
    const T loss =
        sum_block<kThreads>(hcl::pool_group(part, cell_sums, slopes, [&](uint32_t cell, uint32_t plane, T entry) {
          entries[cell * stage.group_planes + plane] = entry;
        }));
    if (threadIdx.x == 0) launch.shares[launch.call_blocks + stage.first_group + part.group] = loss;
    sum_planes(part, norm, cell_sums, entries);
  }
  hcl::finish_loss(launch);
}

template <class A, class B, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<ComputeType<A, B>, V, kChannelsLast>)
    hcl_bn_backward_kernel(const __grid_constant__ Backward<ComputeType<A, B>> call) {
  using T = ComputeType<A, B>;
  constexpr int kChannels = kChannelsLast ? V : 1;
  // The last maps that the forward read are the likeliest to be in the cache still.
  const hcl::Part<T, kChannelsLast> part(call.maps, gridDim.x - 1 - blockIdx.x);
  const hcl::Stage<T>& stage = part.stage;
  const T* coefficients = call.coefficients[part.index];
  hcl::for_each_piece<V>(part, [&](hcl::Piece piece) {
    const uint32_t plane = part.first_plane + piece.plane;
    const uint32_t sample = plane / stage.channels, channel = plane % stage.channels;
    const bool valid = piece.walk.valid();
    const auto row = [&](uint32_t which) {
      return coefficients_of<kChannels>(coefficients, which, stage.channels, channel, valid);
    };
    Packed<T, kChannels> constant = row(kConstant);
    {
      const Packed<T, kChannels> entry_weight = row(kEntryWeight);
      Packed<T, kChannels> entry;
      entry.clear();
      const int64_t at = (static_cast<int64_t>(sample) * stage.cells + piece.cell) * stage.channels + channel;
      if (valid) entry.load(stage.table + at);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) constant.set(c, constant.get(c) + entry_weight.get(c) * entry.get(c));
    }
    const Packed<T, kChannels> u_weight = row(kUWeight), shift = row(kBackwardShift),
                               teacher_weight = row(kTeacherWeight);
    for_each_access<A, B, V, kChannelsLast>(
        stage, piece, call.u_type, call.teacher_type, [&](const auto& u, const auto& teacher, int64_t at) {
          Elements<A, V> out;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int c = kChannelsLast ? v : 0;
            const T e = u.get(v) - shift.get(c);
            out.set(v, u_weight.get(c) * e + (teacher_weight.get(c) * teacher.get(v) + constant.get(c)));
          }
          out.store(stage.gradient, call.u_type, at);
        });
  });
}

// Calls visit(TypeTag<A>, TypeTag<B>, integral_constant<V>, bool_constant<channels-last>) with what a launch over both
// maps needs; A and B are AnyType where maps of two types are read one by one.
template <class T, class Visit>
void visit_maps_instance(const Variant& variant, Visit visit) {
  if (!variant.vector && variant.student != variant.teacher) {
    if constexpr (std::is_same_v<T, float>) {
      const std::integral_constant<int, 1> one;
      const TypeTag<AnyType> any;
      return variant.channels_last ? visit(any, any, one, std::true_type()) : visit(any, any, one, std::false_type());
    }
  }
  visit_storage<T>(variant.student, [&](auto student) {
    using A = typename decltype(student)::type;
    const auto with = [&](auto teacher, auto width) {
      variant.channels_last ? visit(student, teacher, width, std::true_type())
                            : visit(student, teacher, width, std::false_type());
    };
    if constexpr (!std::is_same_v<A, double>) {
      if (variant.vector) {
        return visit_storage<T>(variant.teacher, [&](auto teacher) {
          using B = typename decltype(teacher)::type;
          with(teacher, std::integral_constant<int, kVectorWidth<A, B>>());
        });
      }
    }
    with(student, std::integral_constant<int, 1>());
  });
}

// Calls visit(TypeTag<S>, bool_constant<vector>, bool_constant<channels-last>) with what a launch for the moments
// needs.
template <class T, class Visit>
void visit_reduce_instance(const Variant& variant, Visit visit) {
  visit_storage<T>(variant.student, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto with = [&](auto vector) {
      variant.channels_last ? visit(type, vector, std::true_type()) : visit(type, vector, std::false_type());
    };
    if constexpr (!std::is_same_v<S, double>) {
      if (variant.vector) return with(std::true_type());
    }
    with(std::false_type());
  });
}

}  // namespace hcl_bn
}  // namespace transkd
