// How the kernels of gl_mixer bring tiles to shared memory: from global memory to registers, while the tiles before are
// multiplied, and from there on. 16 bytes at a time where the tensors allow it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common/storage.cuh"
#include "cuda/gl_mixer_plan.h"

namespace transkd {
namespace gl_mixer {

template <class E>
constexpr int kWidth = 16 / sizeof(E);

// A value of any floating dtype.
template <class T>
__device__ __forceinline__ T read(const Values& from, int64_t at) {
  if constexpr (std::is_same_v<T, float>) {
    if (from.type == StorageType::kDouble) return static_cast<float>(__ldg(static_cast<const double*>(from.data) + at));
    return load_as<float>(from.data, from.type, at);
  } else {
    if (from.type == StorageType::kDouble) return __ldg(static_cast<const double*>(from.data) + at);
    return read<float>(from, at);
  }
}

template <class T>
__device__ __forceinline__ void write(T value, void* to, StorageType type, int64_t at) {
  if (type == StorageType::kDouble) {
    static_cast<double*>(to)[at] = value;
  } else {
    store_as<float>(static_cast<float>(value), to, type, at);
  }
}

// N neighbours of a type that is known at run time only; several of them are aligned to 16 bytes, or all of them to
// their size.
template <int N, class T>
__device__ __forceinline__ void read_pack(T (&to)[N], const void* from, StorageType type, int64_t at) {
  if constexpr (N == 1) {
    to[0] = load_as<T>(from, type, at);
  } else {
    const auto read_as = [&](auto tag) {
      using S = typename decltype(tag)::type;
      Pack<S, N> pack;
      pack.load(static_cast<const S*>(from) + at);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = widen(pack.element[i]);
    };
    if (type == StorageType::kFloat) return read_as(TypeTag<float>());
    type == StorageType::kHalf ? read_as(TypeTag<__half>()) : read_as(TypeTag<__nv_bfloat16>());
  }
}

// nvcc takes usual stores apart, to join what several branches have in common.
template <class S, int N, class T>
__device__ __forceinline__ void write_as(const T (&from)[N], S* to) {
  Pack<S, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(from[i], pack.element[i]);
  if constexpr (N == 1) {
    pack.store(to);
  } else {
    using Word = std::conditional_t<sizeof(pack) == 8, uint2, uint4>;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(Word)); ++i) {
      Word word;
      std::memcpy(&word, reinterpret_cast<const char*>(&pack) + i * sizeof(Word), sizeof(Word));
      __stwb(reinterpret_cast<Word*>(to) + i, word);
    }
  }
}

template <int N, class T>
__device__ __forceinline__ void write_pack(const T (&from)[N], void* to, StorageType type, int64_t at) {
  if constexpr (N == 1) {
    write(from[0], to, type, at);
  } else {
    if (type == StorageType::kFloat) return write_as(from, static_cast<float*>(to) + at);
    if (type == StorageType::kHalf) return write_as(from, static_cast<__half*>(to) + at);
    write_as(from, static_cast<__nv_bfloat16*>(to) + at);
  }
}

// Which rows of a matrix [rows, leading] a tile takes, and which of its columns. With three taps, tap t of a row is the
// row `step` (t - 1) further on.
template <class E>
struct Window {
  const E* from;
  uint32_t leading, first_row, first_column, end_column;
  int step;
};

// The rows of a window, all taps side by side in shared memory, [kRows, kTapsHere, kColumns]; zeros beyond the matrix,
// and where a row's sample has no row for a tap.
template <class E, bool kVector, int kTapsHere, int kRows, int kColumns, int kThreads>
class RowTile {
  static constexpr int V = kWidth<E>, kPacks = kColumns / V, kEach = kRows * kPacks / kThreads;
  static_assert(kRows * kPacks % kThreads == 0, "all threads take the same number of packs");

 public:
  // Loads to registers, for put() later on. Single elements are left to put().
  __device__ __forceinline__ void load(const Pass& pass, const Window<E>& window) {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int tap = 0; tap < kTapsHere; ++tap) {
          pack_[i][tap].clear();
          const E* place = find(pass, window, own_row(i), own_column(i), tap);
          if (place != nullptr) pack_[i][tap].load(place);
        }
      }
    }
  }

  // To shared memory; the window is the one of load().
  __device__ __forceinline__ void put(const Pass& pass, const Window<E>& window, E* to, int leading) const {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int tap = 0; tap < kTapsHere; ++tap) {
          pack_[i][tap].store(to + own_row(i) * leading + tap * kColumns + own_column(i));
        }
      }
    } else {
#pragma unroll 2
      for (int i = threadIdx.x; i < kRows * kTapsHere * kColumns; i += kThreads) {
        const int row = i / (kTapsHere * kColumns), in_row = i % (kTapsHere * kColumns);
        const E* place = find(pass, window, row, in_row % kColumns, in_row / kColumns);
        narrow(place != nullptr ? widen(__ldg(place)) : ComputeType<E>(0), to[row * leading + in_row]);
      }
    }
  }

 private:
  __device__ static int own_row(int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) / kPacks; }
  __device__ static int own_column(int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) % kPacks * V; }

  // Where an element stands, row and column counted from the window's; nullptr for one that is not there.
  __device__ __forceinline__ static const E* find(const Pass& pass, const Window<E>& window, int row, int column,
                                                  int tap) {
    const uint32_t row_there = window.first_row + row;
    const int shift = kTapsHere > 1 ? window.step * (tap - 1) : 0;
    if (row_there >= pass.rows || window.first_column + column >= window.end_column) return nullptr;
    // One token before the first wraps to a large number.
    if (kTapsHere > 1 && row_there % pass.tokens + shift >= pass.tokens) return nullptr;
    const E* const first = window.from + static_cast<int64_t>(window.first_row) * window.leading + window.first_column;
    return first + ((row + shift) * static_cast<int>(window.leading) + column);  // a tile's rows fit into 32 bits
  }

  Packed<E, V> pack_[kVector ? kEach : 1][kTapsHere];
};

// Some stacked channels of the convolutions' weights, each with some input channels. In global memory the taps of an
// input channel stand together, in shared memory the input channels of a tap do. Weights are rounded to E only on their
// way there, so that nothing waits for the loads before.
template <class E, bool kVector, int kRows, int kColumns, int kThreads>
class WeightTile {
  static constexpr int V = kWidth<E>, kPacks = kColumns / V, kEach = kRows * kPacks / kThreads;
  static constexpr int kElements = kTapCount * V;
  static_assert(kRows * kPacks % kThreads == 0, "all threads take the same number of packs");
  using T = ComputeType<E>;

 public:
  // stacked(row): the stacked channel that stands in a row, 2 C or more for none. Single elements are left to put().
  template <class Stacked>
  __device__ __forceinline__ void load(const Pass& pass, uint32_t first_column, Stacked stacked) {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t row = stacked(own_row(i)), column = first_column + own_column(i);
        std::memset(words_[i], 0, sizeof(words_[i]));
        const Values& weight = pass.call.weight[row >= pass.channels];
        type_[i] = weight.type;
        if (row >= 2 * pass.channels || column >= pass.channels) continue;
        const int64_t at = place_of(pass, row, column);
        if (weight.type == StorageType::kFloat) {
          load_words<kElements>(i, weight.data, at);
        } else {
          load_words<kElements / 2>(i, weight.data, at / 2);
        }
      }
    }
  }

  // Tap t of input channel k of a row goes to t * tap_leading + row * leading + k.
  template <class Stacked>
  __device__ __forceinline__ void put(const Pass& pass, uint32_t first_column, Stacked stacked, E* to, int tap_leading,
                                      int leading) const {
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        E* place = to + own_row(i) * leading + own_column(i);
        if (type_[i] == StorageType::kFloat) {
          put_as<float>(i, place, tap_leading);
        } else if (type_[i] == StorageType::kHalf) {
          put_as<__half>(i, place, tap_leading);
        } else {
          put_as<__nv_bfloat16>(i, place, tap_leading);
        }
      }
    } else {
#pragma unroll 2
      for (int i = threadIdx.x; i < kRows * kTapCount * kColumns; i += kThreads) {
        const int in_row = i % (kTapCount * kColumns), own_row = i / (kTapCount * kColumns);
        const int own_column = in_row / kTapCount, tap = in_row % kTapCount;
        const uint32_t row = stacked(own_row), column = first_column + own_column;
        T value = 0;
        if (row < 2 * pass.channels && column < pass.channels) {
          value = read<T>(pass.call.weight[row >= pass.channels], place_of(pass, row, column) + tap);
        }
        narrow(value, to[tap * tap_leading + own_row * leading + own_column]);
      }
    }
  }

 private:
  __device__ static int own_row(int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) / kPacks; }
  __device__ static int own_column(int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) % kPacks * V; }

  __device__ __forceinline__ static int64_t place_of(const Pass& pass, uint32_t row, uint32_t column) {
    const uint32_t channel = row >= pass.channels ? row - pass.channels : row;
    return (static_cast<int64_t>(channel) * pass.channels + column) * kTapCount;
  }

  template <int kWords>
  __device__ __forceinline__ void load_words(int i, const void* from, int64_t at) {
    constexpr int kEachLoad = kWords % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int k = 0; k < kWords; k += kEachLoad) {
      Pack<uint32_t, kEachLoad> words;
      words.load(static_cast<const uint32_t*>(from) + at + k);
#pragma unroll
      for (int j = 0; j < kEachLoad; ++j) words_[i][k + j] = words.element[j];
    }
  }

  template <class S>
  __device__ __forceinline__ void put_as(int i, E* place, int tap_leading) const {
#pragma unroll
    for (int tap = 0; tap < kTapCount; ++tap) {
      Pack<E, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        S value;
        const char* from = reinterpret_cast<const char*>(words_[i]) + (kTapCount * v + tap) * sizeof(S);
        std::memcpy(static_cast<void*>(&value), from, sizeof(S));
        if constexpr (std::is_same_v<S, E>) {
          pack.element[v] = value;
        } else {
          narrow(widen(value), pack.element[v]);
        }
      }
      pack.store(place + tap * tap_leading);
    }
  }

  // As they come: a float, or two halves.
  uint32_t words_[kVector ? kEach : 1][kElements];
  StorageType type_[kVector ? kEach : 1];
};

}  // namespace gl_mixer
}  // namespace transkd
