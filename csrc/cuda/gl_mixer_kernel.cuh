// gl_mixer on CUDA: both convolutions over tokens as one product, with gate, weights and residual as its epilogue, and
// the gradients. gl_mixer_plan.h says how a call is cut into blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/gl_mixer_gradients.cuh"
#include "cuda/gl_mixer_tiles.cuh"

namespace transkd {
namespace gl_mixer {

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// sigmoid(x) and its derivative; exact where either is small, without overflow.
template <class T>
struct Sigmoid {
  T value, slope;

  __device__ __forceinline__ explicit Sigmoid(T x) {
    const T ratio = exponential(x < 0 ? x : -x), large = 1 / (1 + ratio), small = ratio * large;
    value = x < 0 ? small : large;
    slope = small * large;
  }
};

template <class E, bool kVector, bool kTf32>
struct Forward {
  using T = ComputeType<E>;
  static constexpr int kThreads = kForwardThreads, kDepth = depth_of(sizeof(E));
  static constexpr int kLength = kTapCount * kDepth, kStacked = 2 * kTileChannels;
  static constexpr int kLeading = leading_of<E>(kLength), kLeadingSum = leading_of<T>(kStacked);
  static constexpr int kBytesA = kTileRows * kLeading * sizeof(E);
  static constexpr int kFactors = kBytesA + kStacked * kLeading * sizeof(E);
  static constexpr int kSums = kTileRows * kLeadingSum * sizeof(T);
  static constexpr int kBytes = kFactors > kSums ? kFactors : kSums;
  static_assert(kBytesA % 32 == 0, "tiles are aligned to 32 bytes");

  __device__ static void run(const Pass& pass, unsigned char* shared) {
    const uint32_t first_channel = blockIdx.x % pass.channel_tiles * kTileChannels;
    const uint32_t first_row = blockIdx.x / pass.channel_tiles * kTileRows;
    E* const a = reinterpret_cast<E*>(shared);
    E* const b = reinterpret_cast<E*>(shared + kBytesA);
    TileProduct<E, Order::kRowMajor, Order::kColumnMajor, kTf32, kTileRows, kStacked, kThreads> product;
    RowTile<E, kVector, kTapCount, kTileRows, kDepth, kThreads> rows;
    WeightTile<E, kVector, kStacked, kDepth, kThreads> weights;
    const auto window = [&](uint32_t first) {
      return Window<E>{static_cast<const E*>(pass.call.e), pass.channels, first_row, first, pass.channels, 1};
    };
    // First channels of a, then the same ones of b.
    const auto stacked = [&](uint32_t row) {
      const uint32_t channel = first_channel + row % kTileChannels;
      return channel >= pass.channels ? 2 * pass.channels : row < kTileChannels ? channel : pass.channels + channel;
    };
    const auto load = [&](uint32_t first) {
      rows.load(pass, window(first));
      weights.load(pass, first, stacked);
    };
    load(0);
    for (uint32_t first = 0; first < pass.channels; first += kDepth) {
      rows.put(pass, window(first), a, kLeading);
      weights.put(pass, first, stacked, b, kDepth, kLeading);
      __syncthreads();
      if (first + kDepth < pass.channels) load(first + kDepth);
      product.add(a, kLeading, b, kLeading, kLength);
      __syncthreads();
    }
    T* const sums = reinterpret_cast<T*>(shared);
    product.store(sums, kLeadingSum);
    __syncthreads();
    mix(pass, sums, first_row, first_channel);
  }

 private:
  __device__ static void mix(const Pass& pass, const T* sums, uint32_t first_row, uint32_t first_channel) {
    constexpr int V = kVector ? kWidth<E> : 1, kPacks = kTileChannels / V;
    const Call& call = pass.call;
    const T attention_weight = read<T>(call.attention_weight, 0), conv_weight = read<T>(call.conv_weight, 0);
    for (uint32_t i = threadIdx.x; i < kTileRows * kPacks; i += kThreads) {
      const uint32_t row = first_row + i / kPacks, column = i % kPacks * V, channel = first_channel + column;
      if (row >= pass.rows || channel >= pass.channels) continue;
      const int64_t at = static_cast<int64_t>(row) * pass.channels + channel;
      T u[V];
      read_pack(u, call.u.data, call.u.type, at);
      Packed<E, V> e, out;
      e.clear();
      if (call.residual) e.load(static_cast<const E*>(call.e) + at);
      out.clear();
      Pack<T, V> branch[2];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T* sum = sums + i / kPacks * kLeadingSum + column + v;
        const T value = sum[0] + read<T>(call.bias[0], channel + v);
        const T gate = sum[kTileChannels] + read<T>(call.bias[1], channel + v);
        branch[0].element[v] = value;
        branch[1].element[v] = gate;
        const T mixed = attention_weight * u[v] + conv_weight * (value * Sigmoid<T>(gate).value);
        out.set(v, call.residual ? mixed + e.get(v) : mixed);
      }
      out.store(static_cast<E*>(call.out) + at);
      if (call.branches == nullptr) continue;
      T* const branches = static_cast<T*>(call.branches) + at + static_cast<int64_t>(row) * pass.channels;
      branch[0].store(branches);
      branch[1].store(branches + pass.channels);
    }
  }
};

// out, and with branches a and g.
template <class E, bool kVector, bool kTf32>
__global__ void __launch_bounds__(kForwardThreads, 2) gl_mixer_forward_kernel(const __grid_constant__ Pass pass) {
  __shared__ __align__(128) unsigned char shared[Forward<E, kVector, kTf32>::kBytes];
  Forward<E, kVector, kTf32>::run(pass, shared);
}

// D_a = w_conv G s, D_b = w_conv G a s', the gradient of u, and what the other gradients are sums of: D over the rows
// of a part, G u and G a s over the block.
template <class E, bool kVector>
__global__ void __launch_bounds__(kGateThreads, 2) gl_mixer_gate_kernel(const __grid_constant__ Pass pass) {
  using T = ComputeType<E>;
  constexpr int V = kVector ? kWidth<E> : 1;
  const Call& call = pass.call;
  const uint32_t group = blockIdx.x % pass.gate_groups, part = blockIdx.x / pass.gate_groups;
  const uint32_t lane = threadIdx.x % pass.lanes, team = threadIdx.x / pass.lanes, teams = kGateThreads / pass.lanes;
  const uint32_t channel = (group * pass.lanes + lane) * V;
  const uint32_t end_row = min((part + 1) * pass.gate_share, pass.rows);
  const bool sums = pass.sum_blocks > 0, reads_u = call.attention_weight_gradient != nullptr;
  const bool reads_branches = pass.e_blocks + pass.weight_blocks > 0 || call.conv_weight_gradient != nullptr ||
                              call.bias_gradient[0] != nullptr || call.bias_gradient[1] != nullptr;
  // Where the convolutions' gradients are wanted, and whose.
  const bool stores[2] = {pass.e_blocks > 0 || call.weight_gradient[0] != nullptr,
                          pass.e_blocks > 0 || call.weight_gradient[1] != nullptr};
  const T attention_weight = read<T>(call.attention_weight, 0), conv_weight = read<T>(call.conv_weight, 0);
  T bias[2][V] = {}, attention = 0, convolution = 0;
  if (channel < pass.channels) {
    for (uint32_t row = part * pass.gate_share + team; row < end_row; row += teams) {
      const int64_t at = static_cast<int64_t>(row) * pass.channels + channel;
      const int64_t of_a = at + static_cast<int64_t>(row) * pass.channels, of_b = of_a + pass.channels;
      Packed<E, V> grad;
      grad.load(static_cast<const E*>(call.grad) + at);
      if (call.u_gradient != nullptr) {
        T gradient[V];
#pragma unroll
        for (int v = 0; v < V; ++v) gradient[v] = attention_weight * grad.get(v);
        write_pack(gradient, call.u_gradient, call.u.type, at);
      }
      if (reads_u) {
        T u[V];
        read_pack(u, call.u.data, call.u.type, at);
#pragma unroll
        for (int v = 0; v < V; ++v) attention += grad.get(v) * u[v];
      }
      if (!reads_branches) continue;
      Pack<T, V> value, gate;
      value.load(static_cast<const T*>(call.branches) + of_a);
      gate.load(static_cast<const T*>(call.branches) + of_b);
      Packed<E, V> of_value, of_gate;
      of_value.clear();
      of_gate.clear();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Sigmoid<T> sigmoid(gate.element[v]);
        const T weighted = conv_weight * grad.get(v);
        const T value_gradient = weighted * sigmoid.value;
        const T gate_gradient = weighted * (value.element[v] * sigmoid.slope);
        convolution += grad.get(v) * (value.element[v] * sigmoid.value);
        bias[0][v] += value_gradient;
        bias[1][v] += gate_gradient;
        of_value.set(v, value_gradient);
        of_gate.set(v, gate_gradient);
      }
      E* const gradients = static_cast<E*>(pass.gate_gradient);
      if (stores[0]) of_value.store(gradients + of_a);
      if (stores[1]) of_gate.store(gradients + of_b);
    }
  }
  if (!sums) return;

  __shared__ T of_teams[2 * kGateThreads * V];  // [teams, 2, V, lanes]
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) of_teams[((team * 2 + k) * V + v) * pass.lanes + lane] = bias[k][v];
  }
  const double attention_sum = sum_block<kGateThreads>(static_cast<double>(attention));
  __syncthreads();
  const double convolution_sum = sum_block<kGateThreads>(static_cast<double>(convolution));
  const uint32_t own_sums = 2 * V * pass.lanes;
  for (uint32_t i = threadIdx.x; i < own_sums; i += kGateThreads) {
    const uint32_t k = i / (V * pass.lanes), v = i / pass.lanes % V;
    const uint32_t own = (group * pass.lanes + i % pass.lanes) * V + v;
    if (own >= pass.channels) continue;
    double sum = 0;
    for (uint32_t t = 0; t < teams; ++t) sum += of_teams[t * own_sums + i];
    pass.bias_sums[(int64_t{2} * part + k) * pass.channels + own] = sum;
  }
  if (threadIdx.x == 0) {
    pass.scalar_sums[int64_t{2} * blockIdx.x] = attention_sum;
    pass.scalar_sums[int64_t{2} * blockIdx.x + 1] = convolution_sum;
  }
}

// The gradients of e and of all parameters; those of the weights in parts, if there are several.
template <class E, bool kVector, bool kTf32>
__global__ void __launch_bounds__(gradient_threads(sizeof(E)))
    gl_mixer_gradients_kernel(const __grid_constant__ Pass pass) {
  using OfE = EmbeddingGradient<E, kVector, kTf32>;
  using OfWeights = WeightGradients<E, kVector, kTf32>;
  using OfSums = Sums<gradient_threads(sizeof(E))>;
  constexpr int kMost = OfE::kBytes > OfWeights::kBytes ? OfE::kBytes : OfWeights::kBytes;
  __shared__ __align__(128) unsigned char shared[kMost > OfSums::kBytes ? kMost : OfSums::kBytes];
  uint32_t block = blockIdx.x;
  if (block < pass.e_blocks) return OfE::run(pass, shared, block);
  block -= pass.e_blocks;
  if (block < pass.weight_blocks) return OfWeights::run(pass, shared, block);
  OfSums::run(pass, shared, block - pass.weight_blocks);
}

// The gradients of the weights from their parts.
template <class T, bool kVector>
__global__ void __launch_bounds__(kMergeThreads) gl_mixer_merge_kernel(const __grid_constant__ Merge merge) {
  constexpr int V = kVector ? 4 : 1;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) * V;
  if (at >= merge.elements) return;
  const T* part = static_cast<const T*>(merge.parts) + at;
  T sums[V] = {};
#pragma unroll 4
  for (uint32_t p = 0; p < merge.count; ++p, part += merge.elements) {
    Pack<T, V> pack;
    pack.load(part);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += pack.element[v];
  }
  const bool second = at >= merge.of_gradient;
  write_pack(sums, merge.gradient[second], merge.type[second], second ? at - merge.of_gradient : at);
}

// Calls visit(TypeTag<E>, bool_constant<vectors>).
template <class Visit>
void visit_elements(const Pass& pass, Visit visit) {
  if (pass.call.type == StorageType::kDouble) return visit(TypeTag<double>(), std::false_type());
  visit_storage<float>(pass.call.type, [&](auto type) {
    pass.vectors ? visit(type, std::true_type()) : visit(type, std::false_type());
  });
}

// Calls visit(TypeTag<E>, bool_constant<vectors>, bool_constant<TF32 tensor cores>).
template <class Visit>
void visit_products(const Pass& pass, bool tf32, Visit visit) {
  visit_elements(pass, [&](auto type, auto vectors) {
    if constexpr (std::is_same_v<typename decltype(type)::type, float>) {
      if (tf32) return visit(type, vectors, std::true_type());
    }
    visit(type, vectors, std::false_type());
  });
}

// Calls visit(TypeTag<T>, bool_constant<vectors>).
template <class Visit>
void visit_merge(const Merge& merge, Visit visit) {
  if (merge.doubles) return visit(TypeTag<double>(), std::false_type());
  merge.vectors ? visit(TypeTag<float>(), std::true_type()) : visit(TypeTag<float>(), std::false_type());
}

}  // namespace gl_mixer
}  // namespace transkd
