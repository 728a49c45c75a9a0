// What the blocks of gl_mixer_gradients_kernel do: the gradient of e, those of the convolutions' weights, and the sums
// for biases and scalars.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/gl_mixer_tiles.cuh"

namespace transkd {
namespace gl_mixer {

// de = D_a, D_b times the weights of all taps, tap t from the token after (t = 0), at, before (t = 2); + G with
// residual.
template <class E, bool kVector, bool kTf32>
struct EmbeddingGradient {
  using T = ComputeType<E>;
  static constexpr int kThreads = gradient_threads(sizeof(E)), kDepth = depth_of(sizeof(E));
  static constexpr int kLength = kTapCount * kDepth;  // of a product between two barriers
  static constexpr int kLeadingA = leading_of<E>(kLength), kLeadingB = leading_of<E>(kTileChannels);
  static constexpr int kLeadingSum = leading_of<T>(kTileChannels);
  static constexpr int kBytesA = kTileRows * kLeadingA * sizeof(E);
  static constexpr int kFactors = kBytesA + kLength * kLeadingB * sizeof(E);
  static constexpr int kSums = kTileRows * kLeadingSum * sizeof(T);
  static constexpr int kBytes = kFactors > kSums ? kFactors : kSums;
  static_assert(kBytesA % 32 == 0, "tiles are aligned to 32 bytes");

  __device__ static void run(const Pass& pass, unsigned char* shared, uint32_t block) {
    const uint32_t first_channel = block % pass.channel_tiles * kTileChannels;
    const uint32_t first_row = block / pass.channel_tiles * kTileRows, stacked_channels = 2 * pass.channels;
    E* const a = reinterpret_cast<E*>(shared);
    E* const b = reinterpret_cast<E*>(shared + kBytesA);
    const E* gate_gradient = static_cast<const E*>(pass.gate_gradient);
    TileProduct<E, Order::kRowMajor, Order::kRowMajor, kTf32, kTileRows, kTileChannels, kThreads> product;
    RowTile<E, kVector, kTapCount, kTileRows, kDepth, kThreads> rows;
    WeightTile<E, kVector, kDepth, kTileChannels, kThreads> weights;
    const auto window = [&](uint32_t first) {
      return Window<E>{gate_gradient, stacked_channels, first_row, first, stacked_channels, -1};
    };
    const auto stacked_from = [](uint32_t first) { return [first](uint32_t row) { return first + row; }; };
    const auto load = [&](uint32_t first) {
      rows.load(pass, window(first));
      weights.load(pass, first_channel, stacked_from(first));
    };
    load(0);
    for (uint32_t first = 0; first < stacked_channels; first += kDepth) {
      rows.put(pass, window(first), a, kLeadingA);
      weights.put(pass, first_channel, stacked_from(first), b, kDepth * kLeadingB, kLeadingB);
      __syncthreads();
      if (first + kDepth < stacked_channels) load(first + kDepth);
      product.add(a, kLeadingA, b, kLeadingB, kLength);
      __syncthreads();
    }
    T* const sums = reinterpret_cast<T*>(shared);
    product.store(sums, kLeadingSum);
    __syncthreads();
    store(pass, sums, first_row, first_channel);
  }

 private:
  __device__ static void store(const Pass& pass, const T* sums, uint32_t first_row, uint32_t first_channel) {
    constexpr int V = kVector ? kWidth<E> : 1, kPacks = kTileChannels / V;
    for (uint32_t i = threadIdx.x; i < kTileRows * kPacks; i += kThreads) {
      const uint32_t row = i / kPacks, channel = i % kPacks * V;
      if (first_row + row >= pass.rows || first_channel + channel >= pass.channels) continue;
      const int64_t at = static_cast<int64_t>(first_row + row) * pass.channels + first_channel + channel;
      Packed<E, V> grad;
      grad.clear();
      if (pass.call.residual) grad.load(static_cast<const E*>(pass.call.grad) + at);
      T values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = sums[row * kLeadingSum + channel + v] + grad.get(v);
      write_as(values, static_cast<E*>(pass.call.e_gradient) + at);
    }
  }
};

// dW[c, k, t] = sum over a part of the rows of D[row, c] e[row + t - 1, k].
template <class E, bool kVector, bool kTf32>
struct WeightGradients {
  using T = ComputeType<E>;
  static constexpr int kThreads = gradient_threads(sizeof(E)), kDepth = row_depth(sizeof(E));
  static constexpr int kStacked = stacked_tile(sizeof(E)), kColumns = kTapCount * kTileChannels;
  static constexpr int kLeadingA = leading_of<E>(kStacked), kLeadingB = leading_of<E>(kColumns);
  static constexpr int kLeadingSum = leading_of<T>(kColumns);
  static constexpr int kBytesA = kDepth * kLeadingA * sizeof(E);
  static constexpr int kFactors = kBytesA + kDepth * kLeadingB * sizeof(E);
  static constexpr int kSums = kStacked * kLeadingSum * sizeof(T);
  static constexpr int kBytes = kFactors > kSums ? kFactors : kSums;
  static_assert(kBytesA % 32 == 0, "tiles are aligned to 32 bytes");

  __device__ static void run(const Pass& pass, unsigned char* shared, uint32_t block) {
    const uint32_t first_channel = block % pass.channel_tiles * kTileChannels, rest = block / pass.channel_tiles;
    const uint32_t first_stacked = pass.first_stacked + rest % pass.stacked_tiles * kStacked;
    const uint32_t part = rest / pass.stacked_tiles, first_row = part * pass.weight_share;
    const uint32_t end_row = min(first_row + pass.weight_share, pass.rows);
    E* const a = reinterpret_cast<E*>(shared);
    E* const b = reinterpret_cast<E*>(shared + kBytesA);
    TileProduct<E, Order::kColumnMajor, Order::kRowMajor, kTf32, kStacked, kColumns, kThreads> product;
    RowTile<E, kVector, 1, kDepth, kStacked, kThreads> gate_gradient;
    RowTile<E, kVector, kTapCount, kDepth, kTileChannels, kThreads> e;
    // Parts are whole numbers of depths, all but the last, which ends with the rows.
    const auto of_gate = [&](uint32_t row) {
      return Window<E>{
          static_cast<const E*>(pass.gate_gradient), 2 * pass.channels, row, first_stacked, pass.end_stacked, 0};
    };
    const auto of_e = [&](uint32_t row) {
      return Window<E>{static_cast<const E*>(pass.call.e), pass.channels, row, first_channel, pass.channels, 1};
    };
    const auto load = [&](uint32_t row) {
      gate_gradient.load(pass, of_gate(row));
      e.load(pass, of_e(row));
    };
    load(first_row);
    for (uint32_t row = first_row; row < end_row; row += kDepth) {
      gate_gradient.put(pass, of_gate(row), a, kLeadingA);
      e.put(pass, of_e(row), b, kLeadingB);
      __syncthreads();
      if (row + kDepth < end_row) load(row + kDepth);
      product.add(a, kLeadingA, b, kLeadingB, kDepth);
      __syncthreads();
    }
    T* const sums = reinterpret_cast<T*>(shared);
    product.store(sums, kLeadingSum);
    __syncthreads();
    store(pass, sums, part, first_stacked, first_channel);
  }

 private:
  __device__ static void store(const Pass& pass, const T* sums, uint32_t part, uint32_t first_stacked,
                               uint32_t first_channel) {
    constexpr int V = kVector ? 4 : 1;
    constexpr uint32_t kPacks = kColumns / V;
    const uint32_t wanted = pass.end_stacked - pass.first_stacked;
    const int64_t length = int64_t{kTapCount} * pass.channels;
    for (uint32_t i = threadIdx.x; i < kStacked * kPacks; i += kThreads) {
      const uint32_t row = i / kPacks, column = i % kPacks * V, stacked = first_stacked + row;
      if (stacked >= pass.end_stacked || kTapCount * first_channel + column >= length) continue;
      T values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = sums[row * kLeadingSum + (column + v) % kTapCount * kTileChannels + (column + v) / kTapCount];
      }
      const int64_t to = kTapCount * first_channel + column;
      if (pass.weight_parts_count > 1) {
        T* const parts = static_cast<T*>(pass.weight_parts);
        const int64_t line = static_cast<int64_t>(part) * wanted + stacked - pass.first_stacked;
        write_as(values, parts + line * length + to);
      } else {
        const bool second = stacked >= pass.channels;
        const int64_t line = second ? stacked - pass.channels : stacked;
        write_pack(values, pass.call.weight_gradient[second], pass.call.weight[second].type, line * length + to);
      }
    }
  }
};

// Block 0: the scalars. Each other one: the biases' gradients of 32 stacked channels.
template <int kThreads>
struct Sums {
  static constexpr int kStrips = kThreads / kWarp;
  static constexpr int kBytes = kThreads * sizeof(double);

  __device__ static void run(const Pass& pass, unsigned char* shared, uint32_t block) {
    block == 0 ? scalars(pass) : biases(pass, reinterpret_cast<double*>(shared), block - 1);
  }

 private:
  __device__ static void scalars(const Pass& pass) {
    const Call& call = pass.call;
    double sums[2] = {};
    for (uint32_t i = threadIdx.x; i < pass.gate_parts * pass.gate_groups; i += kThreads) {
      sums[0] += pass.scalar_sums[2 * static_cast<int64_t>(i)];
      sums[1] += pass.scalar_sums[2 * static_cast<int64_t>(i) + 1];
    }
    const double attention = sum_block<kThreads>(sums[0]);
    __syncthreads();
    const double convolution = sum_block<kThreads>(sums[1]);
    if (threadIdx.x > 0) return;
    if (call.attention_weight_gradient != nullptr) {
      write(attention, call.attention_weight_gradient, call.attention_weight.type, 0);
    }
    if (call.conv_weight_gradient != nullptr) {
      write(convolution, call.conv_weight_gradient, call.conv_weight.type, 0);
    }
  }

  __device__ static void biases(const Pass& pass, double* shared, uint32_t block) {
    const uint32_t stacked = block * kWarp + threadIdx.x % kWarp, stacked_channels = 2 * pass.channels;
    double sum = 0;
    if (stacked < stacked_channels) {
      for (uint32_t part = threadIdx.x / kWarp; part < pass.gate_parts; part += kStrips) {
        sum += pass.bias_sums[static_cast<int64_t>(part) * stacked_channels + stacked];
      }
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kWarp || stacked >= stacked_channels) return;
    for (int strip = 1; strip < kStrips; ++strip) sum += shared[strip * kWarp + threadIdx.x];
    const bool second = stacked >= pass.channels;
    void* const to = pass.call.bias_gradient[second];
    if (to != nullptr) write(sum, to, pass.call.bias[second].type, second ? stacked - pass.channels : stacked);
  }
};

}  // namespace gl_mixer
}  // namespace transkd
